"""The files of a run: written whole or not at all, read without running what is in them.

A run's folder, out/RUN, holds its checkpoints, its log and run.json, which says how it was made.
A checkpoint step_N.pt is a dict of tensors and plain Python values, after N steps:

    model             weights, in fp32                      step, tokens, optimizer   see TrainState
    optimizer_state   moments, whole and by name            recent, watch             see TrainState
    config, knobs     what the model is, how it is trained  fp8       scales and their history
    made_by           code and packages

A checkpoint is written to a temporary file, read back, and renamed only if every checksum matches
(torch.save writes a zip file, which has one for each tensor). It is read with weights_only, so that
a foreign file cannot bring code along.

    python checkpoint.py out/RUN                   # what is in the newest checkpoint of a run
"""
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from configurator import fail
from model import Xmodel, XmodelConfig
from tokenizer import BOS_ID, EOS_ID


@dataclass
class TrainState:
    """Where a run stands: what a checkpoint holds beside tensors and how the run was made."""
    step: int = 0                       # steps done
    tokens: int = 0                     # tokens read, with padding
    optimizer: str | None = None        # 'adamw' or 'muon': the kind in force; None before step 0
    loss_history: list = field(default_factory=list)      # losses of the last 50 steps
    switch_alarm: tuple = (-50, 0.0)    # (step of the last change of optimizer, loss that is a
                                        # spike in the 50 steps after it)

    # two fields have other names in a file
    FILE_KEYS = {'loss_history': 'recent', 'switch_alarm': 'watch'}  # noqa: RUF012

    def to_checkpoint(self):
        """{key in the file: value}."""
        return {self.FILE_KEYS.get(name, name): value for name, value in vars(self).items()}

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """The state that read_checkpoint returned."""
        return cls(**{name: checkpoint[cls.FILE_KEYS.get(name, name)]
                      for name in cls.__dataclass_fields__})


# what a file of bare weights, {'config': ..., 'model': ...}, is taken to hold besides
BARE = TrainState().to_checkpoint() | {
    'knobs': {}, 'optimizer_state': {}, 'fp8': None, 'made_by': {},
    'bos_id': BOS_ID, 'eos_ids': [EOS_ID]}


# --------------------------------------------------------------------------------------------------
# Writing

def replace_file(path, write):
    """Let write(file) make the file `path` so that it is whole, or as before, whatever happens."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                       # torch.save wraps the disk's error
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def damaged(path):
    """Whether a zip file, as torch.save writes it, is cut off or differs from its checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is not None
    except Exception as e:                                     # zipfile raises many kinds
        # zipfile's own OSErrors are EINVAL (an offset before the file) or have no number
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise
        return True


def write_checkpoint(path, state):
    """Write the dict `state` as the file `path`, which appears once it has been read back.

    OSError where the disk is full, before anything is written if the disk says so.
    """
    def write_and_read_back(f):
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
        if hasattr(os, 'posix_fadvise'):                       # read from the disk, not from memory
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if damaged(f.name):
            raise OSError(errno.EIO, 'what was written does not read back')

    need = sum(t.nbytes for t in state['model'].values())
    need += sum(t.nbytes for moments in state['optimizer_state'].values() for t in moments.values())
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise OSError(errno.ENOSPC, f'No space left on device ({need / 1e9:.3g} GB are wanted, '
                                    f'{free / 1e9:.3g} GB free)', str(path))
    replace_file(path, write_and_read_back)


def prune(run, keep, ends):
    """Delete a run's checkpoints but for the last one, or `keep`, and those at the steps `ends`."""
    files = checkpoints(run)
    passing = [f for f in files if int(f.stem[5:]) not in ends]
    for file in passing[:max(0, len(passing) - keep)]:
        if file != files[-1]:
            file.unlink()


# --------------------------------------------------------------------------------------------------
# Reading

def checkpoints(run):
    """The step_N.pt files of a run's folder, in order of N."""
    files = [f for f in Path(run).glob('step_*.pt') if f.stem[5:].isdecimal() and not f.is_dir()]
    return sorted(files, key=lambda f: int(f.stem[5:]))


def checkpoint_file(path):
    """The file `path`, or the newest step_N.pt of the folder `path`; ValueError if none is."""
    if os.path.isdir(path):                 # unlike Path.is_dir, takes anything, as too long a name
        files = checkpoints(path)
        if files:
            return files[-1]
        if Path(path, 'config.json').exists():
            raise ValueError(f"{path} is a model in Hugging Face's format: python export.py "
                             f'--from_hf {path} out/NEW makes a checkpoint of it')
        raise ValueError(f'{path} holds no checkpoint (step_N.pt)')
    if not os.path.isfile(path):
        steps = [file.stem[5:] for file in checkpoints(os.path.dirname(path) or '.')]
        if steps:
            raise ValueError(f'{path} does not exist; N of step_N.pt there: {", ".join(steps)}')
        raise ValueError(f'{path} does not exist; a checkpoint is a file out/RUN/step_N.pt')
    return path


def wrong_field(checkpoint):
    """What is wrong with a checkpoint's fields, in words that name the first; '' if nothing is."""
    with torch.device('meta'):
        expected = Xmodel(checkpoint['config']).state_dict()
    shapes = {name: t.shape for name, t in expected.items()}
    if {name: t.shape for name, t in checkpoint['model'].items()} != shapes:
        return 'model: names or shapes are not those of its config'
    for name, t in checkpoint['model'].items():
        if t.dtype != torch.float32:
            return f'model: {name} is {t.dtype}, weights are torch.float32'
    for name, moments in checkpoint['optimizer_state'].items():
        for key, t in moments.items():
            if t.shape not in (shapes[name], ()) or t.dtype != torch.float32:
                return f'optimizer_state: {key} of {name} has another shape or dtype'
    for key in ('step', 'tokens'):
        if type(checkpoint[key]) is not int or checkpoint[key] < 0:
            return f'{key}={checkpoint[key]!r} is no number of {key}'
    if checkpoint['optimizer'] not in (None, 'adamw', 'muon'):
        return f'optimizer={checkpoint["optimizer"]!r} is neither adamw nor muon'
    losses, alarm = checkpoint['recent'], checkpoint['watch']
    if not is_finite_numbers(losses, list) or len(losses) > 50:
        return 'recent is no list of up to 50 finite losses'
    if not is_finite_numbers(alarm, (tuple, list)) or len(alarm) != 2:
        return f'watch={alarm!r} is no (step, loss)'
    if not isinstance(checkpoint['knobs'], dict):
        return 'knobs is no dict'
    return ''


def is_finite_numbers(values, kind):
    """Whether values is a list or tuple, as `kind` says, of finite numbers."""
    if not isinstance(values, kind):
        return False
    return all(type(x) in (int, float) and math.isfinite(x) for x in values)


def read_checkpoint(path, check=True):
    """The dict that train.py saved as the file `path`, or as the newest of the run folder `path`.

    Besides, 'path' is the file; 'config' is an XmodelConfig. check: read all of the file for its
    checksums. ValueError, in one line, for a missing, foreign or damaged file.
    """
    path = checkpoint_file(path)
    try:
        if check and damaged(path):
            raise ValueError(f'{path} is not a checkpoint of train.py, or is damaged: its '
                             'checksums are not right')
    except OSError as e:
        raise ValueError(f'{path}: {e.strerror}') from None
    try:
        # mapped, so that the optimizer's state takes memory only where it is wanted
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        config = XmodelConfig(**checkpoint['config'])
        checkpoint = BARE | checkpoint | {'config': config, 'path': str(path)}
        wrong = wrong_field(checkpoint)
    except Exception as e:  # noqa: BLE001                     (torch.load raises many kinds)
        raise ValueError(f'{path} is not a checkpoint of train.py, or is damaged '
                         f'({type(e).__name__})') from None
    if wrong:
        raise ValueError(f'{path} is not a checkpoint of train.py, or is damaged: {wrong}')
    return checkpoint


def load_model(path, device='cpu'):
    """(Xmodel in eval mode, the rest of the checkpoint), of what read_checkpoint reads, or read."""
    checkpoint = path if isinstance(path, dict) else read_checkpoint(path)
    model = Xmodel(checkpoint['config']).to(device)
    model.load_state_dict(checkpoint.pop('model'))
    return model.eval(), checkpoint


# --------------------------------------------------------------------------------------------------
# The other files of a run's folder: log.jsonl, run.json, lock

def to_json(value, **options):
    """JSON of a value, in which NaN and infinity, which JSON does not know, are null."""
    def known(value):
        if isinstance(value, np.generic):                        # a number of numpy's
            value = value.item()
        if isinstance(value, dict):
            return {key: known(x) for key, x in value.items()}
        if isinstance(value, (list, tuple)):
            return [known(x) for x in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value
    return json.dumps(known(value), **options)


def read_log(run):
    """The lines of run/log.jsonl, a dict each, without those where the loss is not finite."""
    log, entries, n = Path(run, 'log.jsonl'), [], 1
    try:
        for n, line in enumerate(log.read_text(encoding='utf-8').splitlines(), 1):
            entry = json.loads(line)
            loss, numbers = entry['loss'], entry['lr'] + entry['tokens']
            if loss is not None and math.isfinite(loss + numbers) and entry['phase']:
                entries.append(entry)
    except OSError as e:
        fail(f'{log}: {e.strerror}; give the folder of a run, as train.py writes it')
    except (ValueError, KeyError, TypeError):
        fail(f'{log}: line {n} is no line of a training log')
    return entries or fail(f'{log} holds no step yet')


def take_folder(run):
    """Make the run's folder, for this process alone; one line if another process trains there.

    Returns the file to keep open. The system gives the lock back when the process ends, in whatever
    way (on a network file system, when that hears of it).
    """
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / 'lock', 'a+')  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        fail(f'{run} is in use by {file.read().strip() or "another process"}')
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    for name in ('step_*.pt', 'log.jsonl', 'log.old', 'run.json'):  # of a process that was killed
        for temporary in run.glob(f'{name}.tmp'):
            temporary.unlink()
    return file


# whose code decides a run
CODE = ('train', 'model', 'kernels', 'muon', 'fp8', 'hardware', 'loader', 'distributed', 'start',
        'run', 'data_prep', 'documents', 'tokenizer')


@functools.cache
def code_and_packages():
    """What decides a run beside its knobs and data: code and packages."""
    here, code = Path(__file__).parent, hashlib.sha256()
    for name in CODE:
        code.update((here / f'{name}.py').read_bytes())
    commit = None
    if shutil.which('git'):
        git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True, text=True,
                             check=False)
        commit = git.stdout.strip()
    packages = {name: importlib.metadata.version(name) for name in ('torch', 'numpy', 'tiktoken')}
    return {'code': code.hexdigest()[:16], 'git_commit': commit,
            'python': sys.version.split()[0], **packages}


def step_of(line):
    """The step that a line of log.jsonl is of; -1 if it is no such line."""
    try:
        return int(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError, OverflowError):
        return -1


def begin_folder(run, step, about):
    """Begin, or with step > 0 go on, in a run's folder: cut its log to `step`, write run.json.

    run.json keeps the `about` of the run's first start; one that goes on is added to its list
    'resumed'. A log that is damaged, or has lines though there was no checkpoint to go on from, is
    also kept as log.old. Heartbeats are deleted, as there may be fewer ranks now.
    """
    log, run_json = run / 'log.jsonl', run / 'run.json'
    for beat in run.glob('heartbeat_*'):
        beat.unlink()
    old = log.read_bytes() if log.exists() else b''
    lines = old.decode(errors='replace').split('\n')[:-1]          # the last one: cut off by a kill
    steps = [step_of(line) for line in lines]
    if old and (not step or -1 in steps):
        replace_file(run / 'log.old', lambda f: f.write(old))
    kept = ''.join(line + '\n' for line, n in zip(lines, steps) if 0 <= n < step)
    if step:
        with suppress(OSError, ValueError, TypeError, AttributeError,
                      RecursionError):                              # damaged: made anew
            first = json.loads(run_json.read_text())
            if first.keys() >= about.keys():
                first['resumed'] = [*first.get('resumed', []), about]
                about = first
    # the log last: without one, a disk that is full by now leaves no run that would be in the way
    replace_file(run_json, lambda f: f.write(json.dumps(about, indent=1).encode()))
    replace_file(log, lambda f: f.write(kept.encode()))


def changes(old, new, path=''):
    """Lines 'path: old -> new' for what differs between two nested values of knobs."""
    if path == 'phases':
        old, new = ({phase['name']: phase for phase in phases} for phases in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in {**old, **new}:
            name = f'{path}.{key}' if path else key
            lines += changes(old.get(key), new.get(key), name)
        order_counts = path == 'phases' or path.endswith('.data')
        if lines or not order_counts:
            return lines
        old, new = list(old), list(new)
    if old == new:
        return []
    return [f'{path}: {old!r} -> {new!r}']


if __name__ == '__main__':
    try:
        for key, value in read_checkpoint(sys.argv[1] if sys.argv[1:] else 'out/proxy20m').items():
            print(f'{key}: {", ".join(value) if key == "model" else str(value)[:200]}')
    except ValueError as e:
        print(f'checkpoint.py: {e}', file=sys.stderr)
        sys.exit(2)
