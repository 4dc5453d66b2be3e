"""The files of a run: written whole or not at all, read without running what is in them.

A checkpoint out/RUN/step_N.pt is a dict of tensors and plain Python values, after N steps: model,
optimizer state, config, knobs, step, tokens, and what made it. It is read with weights_only, so
that a foreign file cannot bring code along, and only if its checksums are right: torch.save writes
a zip file, which has one for each tensor.

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
from pathlib import Path

import torch

from configurator import fail
from model import Xmodel, XmodelConfig
from tokenizer import BOS_ID, EOS_ID

# what a file of bare weights, {'config': ..., 'model': ...}, is taken to hold besides
BARE = {'knobs': {}, 'step': 0, 'tokens': 0, 'recent': [], 'watch': (-50, 0.0),
        'optimizer': None, 'optimizer_state': {}, 'fp8': None, 'made_by': {},
        'bos_id': BOS_ID, 'eos_ids': [EOS_ID]}


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
        # EINVAL: it says that something is before the file's beginning; None: from a decompressor
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise
        return True


def write_checkpoint(path, state):
    """Write the dict `state` as the file `path`, which is there only once it has been read back."""
    def write(f):
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
        if hasattr(os, 'posix_fadvise'):                       # read from the disk, not from memory
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if damaged(f.name):
            raise OSError(errno.EIO, 'what was written does not read back')

    tensors = [t for part in (state['model'], *state['optimizer_state'].values())
               for t in part.values()]
    need, free = sum(t.nbytes for t in tensors), shutil.disk_usage(path.parent).free
    if need > free:
        raise OSError(errno.ENOSPC, f'No space left on device ({need / 1e9:.3g} GB are wanted, '
                                    f'{free / 1e9:.3g} GB free)', str(path))
    replace_file(path, write)


def checkpoints(run):
    """The step_N.pt files of a run's folder, in order of N."""
    files = [f for f in Path(run).glob('step_*.pt') if f.stem[5:].isdecimal() and not f.is_dir()]
    return sorted(files, key=lambda f: int(f.stem[5:]))


def read_checkpoint(path, check=True):
    """The dict that train.py saved as the file `path`, or as the newest of the run folder `path`.

    ValueError, in one line, for a missing or foreign file; which cannot run code (weights_only).
    """
    if os.path.isdir(path):                 # unlike Path.is_dir, takes anything, as too long a name
        files = checkpoints(path)
        if not files and Path(path, 'config.json').exists():
            raise ValueError(f"{path} is a model in Hugging Face's format: python export.py "
                             f'--from_hf {path} out/NEW makes a checkpoint of it')
        if not files:
            raise ValueError(f'{path} holds no checkpoint (step_N.pt)')
        path = files[-1]
    if not os.path.isfile(path):
        there = ', '.join(file.stem[5:] for file in checkpoints(os.path.dirname(path) or '.'))
        raise ValueError(f'{path} does not exist; ' + (
            f'N of step_N.pt there: {there}' if there else
            'a checkpoint is a file out/RUN/step_N.pt'))
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
        with torch.device('meta'):
            right = Xmodel(config).state_dict()
        shapes, right = ({k: v.shape for k, v in d.items()} for d in (checkpoint['model'], right))
        if shapes != right or type(checkpoint['step']) is not int or checkpoint['step'] < 0 \
                or checkpoint['optimizer'] not in (None, 'adamw', 'muon') \
                or type(checkpoint['tokens']) is not int or type(checkpoint['knobs']) is not dict \
                or not all(t.is_floating_point() for t in checkpoint['model'].values()) \
                or any(t.shape not in (right[name], ()) for name, moments in
                       checkpoint['optimizer_state'].items() for t in moments.values()):
            raise ValueError
        return checkpoint
    except Exception as e:  # noqa: BLE001                         (torch.load raises many kinds)
        raise ValueError(f'{path} is not a checkpoint of train.py, or is damaged '
                         f'({type(e).__name__})') from None


def usable_device(name):
    """The torch.device of that name; ends the program in one line where it cannot be used."""
    try:
        zero = torch.zeros(1, device=name)
        zero.item()                                                # which 'meta' does not have
        return zero.device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        fail(f'device={name!r} cannot be used here: {str(e).splitlines()[0][:120]}')


def load_model(path, device='cpu'):
    """(Xmodel in eval mode, the rest of the checkpoint), of what read_checkpoint reads, or read."""
    checkpoint = path if isinstance(path, dict) else read_checkpoint(path)
    model = Xmodel(checkpoint['config']).to(device)
    model.load_state_dict(checkpoint.pop('model'))
    return model.eval(), checkpoint


def prune(run, keep, ends):
    """Delete a run's checkpoints but for the last one, or `keep`, and those at the steps `ends`."""
    files = checkpoints(run)
    passing = [f for f in files if int(f.stem[5:]) not in ends]
    for file in passing[:max(0, len(passing) - keep)]:
        if file != files[-1]:
            file.unlink()


def read_log(run):
    """The lines of run/log.jsonl, a dict each, without those where the loss is not finite."""
    log, entries, n = Path(run, 'log.jsonl'), [], 1
    try:
        for n, line in enumerate(log.read_text(encoding='utf-8').splitlines(), 1):
            entry = json.loads(line)
            if math.isfinite(entry['loss'] + entry['lr'] + entry['tokens']) and entry['phase']:
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


@functools.cache
def made_by():
    """What decides a run beside its knobs and data: code and packages."""
    here, code = Path(__file__).parent, hashlib.sha256()
    for name in ('train', 'model', 'muon', 'fp8', 'data_prep', 'tokenizer'):
        code.update((here / f'{name}.py').read_bytes())
    commit = shutil.which('git') and subprocess.run(
        ['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True, text=True,
        check=False).stdout.strip()
    return {'code': code.hexdigest()[:16], 'git_commit': commit,
            'python': sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in ('torch', 'numpy', 'tiktoken')}}


def step_of(line):
    """The step that a line of log.jsonl is of; -1 if it is no such line."""
    try:
        return int(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError, OverflowError):
        return -1


def begin_folder(run, step, about):
    """Keep of the run's log the lines before `step`, and no heartbeats; write run.json.

    A log that is damaged, or has lines though there was no checkpoint to go on from, is also kept
    as log.old.
    """
    log = run / 'log.jsonl'
    for beat in run.glob('heartbeat_*'):                           # there may be fewer ranks now
        beat.unlink()
    old = log.read_bytes() if log.exists() else b''
    lines = old.decode(errors='replace').split('\n')[:-1]          # the last one: cut off by a kill
    steps = [step_of(line) for line in lines]
    if old and (not step or -1 in steps):
        replace_file(run / 'log.old', lambda f: f.write(old))
    kept = ''.join(line + '\n' for line, at in zip(lines, steps) if 0 <= at < step)
    # the log last: without one, a disk that is full by now leaves no run that would be in the way
    replace_file(run / 'run.json', lambda f: f.write(json.dumps(about, indent=1).encode()))
    replace_file(log, lambda f: f.write(kept.encode()))


def changes(old, new, path=''):
    """Lines 'path: old -> new' for what differs between two nested values of knobs."""
    if path == 'phases':
        old, new = ({phase['name']: phase for phase in phases} for phases in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        lines = [line for key in {**old, **new}
                 for line in changes(old.get(key), new.get(key), f'{path}.{key}' if path else key)]
        if lines or list(old) == list(new) or not (path == 'phases' or path.endswith('.data')):
            return lines
        old, new = list(old), list(new)                # the order of phases and of data sets counts
    return [] if old == new else [f'{path}: {old!r} -> {new!r}']


if __name__ == '__main__':
    try:
        for key, value in read_checkpoint(sys.argv[1] if sys.argv[1:] else 'out/proxy20m').items():
            print(f'{key}: {", ".join(value) if key == "model" else str(value)[:1000]}')
    except ValueError as e:
        print(f'checkpoint.py: {e}', file=sys.stderr)
        sys.exit(2)
