"""Faults injected into training, one by one: what was lost, what was told, and the exit code.

    python tests/faults.py          # all of them, in a minute or two, to results/reliability.md

A fault is a function of `at`, which has a folder of its own, the tiny curriculum of conftest.py,
its data and its unbroken run. It does the harm, runs the script as a user does, puts right what a
user would, resumes by the same command, and returns (what was lost, exit code, what was told).
FAULTS, at the end, says what has to come of each; test_faults.py asserts it.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from conftest import (
    ROOT,
    SERVER,
    be,
    free_port,
    log,
    make_config,
    make_data,
    make_run,
    rank_env,
    run,
    run_ranks,
    same,
)

sys.path.insert(0, str(ROOT))
from checkpoint import checkpoints, damaged, read_checkpoint
from model import Xmodel, XmodelConfig

SAME = 'nothing: log and weights end as those of the unbroken run'
TABLE = ROOT / 'results' / 'reliability.md'


# --------------------------------------------------------------------------------------------------
# Runs with something in them

# A config file that calls _before(step, rank) before each step; _steps has one entry for each begun
INJECT = """
import math, os, resource, shutil, signal, sys, time, torch, types
import torch.distributed as _dist
_main, _steps, _rank = sys.modules['__main__'], [], os.environ.get('RANK', '0')
_get_batch, _Xmodel = _main.get_batch, _main.Xmodel
def _before(step):
    pass
{}
def _counting(data, weights, rows, *rest):
    if isinstance(rows, range):                                  # the loop's, not the check before
        _before(len(_steps))
        _steps.append(rows)
    return _get_batch(data, weights, rows, *rest)
_main.get_batch = _counting
"""
# Xmodel with a gradient that is NaN where _bad(step)
NAN_GRADIENT = """
_models = []
def _hooked(config):
    model = _Xmodel(config)
    _models.append(model)
    model.embed.weight.register_hook(lambda g: g * math.nan if _bad(len(_steps) - 1) else g)
    return model
_main.Xmodel = _hooked
"""


def inject(at, code):
    """The argument of train.py that runs this code inside it."""
    (at.folder / 'inject.py').write_text(INJECT.format(code))
    return str(at.folder / 'inject.py')


def train(at, *args, **how):
    return run('train.py', *at.tiny, f'--out_dir={at.folder / "RUN"}', *args, **how)


def train_ranks(at, *args):
    return run_ranks(2, 'train.py', *at.tiny, f'--out_dir={at.folder / "RUN"}', *args)


def start(at, *args, world=1):
    """Processes of train.py, one for each rank, that are not waited for."""
    argv, port = [str(ROOT / 'train.py'), *at.tiny, f'--out_dir={at.folder / "RUN"}', *args], \
        free_port()
    processes = []
    for rank in range(world):
        processes.append(SERVER.Process(target=be, args=(argv, ROOT, [os.devnull] * 3,
                                                         rank_env(rank, world, port))))
        processes[-1].start()
    return processes


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, 'waited a minute in vain'
        time.sleep(0.0005)


def line_with(text, done):
    return next((line for line in done.stdout.splitlines() if text in line), '')


def code_of(done):
    """As a shell gives it: 128 + N of a process that signal N ended."""
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


# --------------------------------------------------------------------------------------------------
# What was lost

def compare(folder, unbroken):
    """SAME, if the log and the last weights of a run are bit for bit those of the unbroken one."""
    if left := [file.name for file in folder.glob('*.tmp')]:
        return f'{left} is left behind'
    if log(folder) != log(unbroken):
        return 'the logs differ'
    ours, theirs = read_checkpoint(folder), read_checkpoint(unbroken)
    odd = [key for key in ('model', 'optimizer_state', 'step', 'tokens', 'recent')
           if not same(ours[key], theirs[key])]
    return f'{odd} differ' if odd else SAME


def resumed(at, *args):
    """What is lost once the run has gone on, by the same command and --resume."""
    there = checkpoints(at.folder / 'RUN')
    if broken := [file.name for file in there if damaged(file)]:
        return f'{broken} are damaged'
    done = train(at, '--resume', *args)
    return compare(at.folder / 'RUN', at.unbroken) if done.returncode == 0 else done.stderr


def half_written(folder):
    return any(folder.glob('step_*.pt.tmp'))


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != 'lock'}


def without_the_last(at):
    """A copy of the unbroken run that has still two steps to do."""
    folder = shutil.copytree(at.unbroken, at.folder / 'RUN')
    (folder / 'step_20.pt').unlink()
    return folder


# --------------------------------------------------------------------------------------------------
# Disks

@functools.cache
def may_mount():
    """Whether this process may mount file systems, as root outside of containers may."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(['mount', '-t', 'tmpfs', 'none', folder], capture_output=True,
                                 check=False).returncode == 0 if shutil.which('mount') else False
        if mounted:
            subprocess.run(['umount', folder], check=True)
    return mounted


@contextlib.contextmanager
def small_disk(folder, size, limit):
    """A disk of `size` bytes at folder: yields a preexec_fn, and a function that adds room.

    Where nothing may be mounted, the preexec_fn limits the size of files to `limit` bytes instead.
    """
    folder.mkdir(exist_ok=True)
    if not may_mount():
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), lambda: None
        return
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', folder], check=True)
    try:
        yield None, lambda: subprocess.run(['mount', '-o', 'remount,size=16m', folder], check=True)
    finally:
        subprocess.run(['umount', folder], check=True)


@contextlib.contextmanager
def read_only(folder):
    """A folder that is read-only, by a mount or, if this process obeys them, by permissions."""
    if may_mount():
        subprocess.run(['mount', '--bind', folder, folder], check=True)
        try:
            subprocess.run(['mount', '-o', 'remount,bind,ro', folder], check=True)
            yield
        finally:
            subprocess.run(['umount', folder], check=True)
        return
    if os.geteuid() == 0:
        raise NotImplementedError('root may write where permissions forbid it, and may not mount')
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


def pages(n):
    return -(-n // 4096) * 4096


def full_in_a_checkpoint(at):
    # room for step 3's, log, lock and run.json; and for step 6's tensors, but not its whole file
    size = (at.unbroken / 'step_8.pt').stat().st_size
    state = read_checkpoint(at.unbroken / 'step_8.pt')
    tensors = sum(t.nbytes for part in (state['model'], *state['optimizer_state'].values())
                  for t in part.values())
    room = pages(size) + 3 * 4096 + pages(tensors) + 4096
    # steps wait for the checkpoint: otherwise the log, too, may meet the full disk
    waits = inject(at, """
import run
def _save(self, *args, save=run.RunFiles.save):
    save(self, *args)
    if self.writing:
        self.writing.exception()
run.RunFiles.save = _save
""")
    with small_disk(at.folder / 'RUN', room, limit=20_000) as (limit, add_room):
        done = train(at, waits, preexec_fn=limit)
        left = half_written(at.folder / 'RUN')
        add_room()
        return 'a part is left' if left else resumed(at), code_of(done), done.stderr


def too_little_space_for_a_checkpoint(at):
    done = train(at, inject(at, """
def _before(step):
    if step == 5:
        shutil.disk_usage = lambda path: types.SimpleNamespace(free=70_000)
"""))
    return resumed(at), code_of(done), done.stderr


def full_in_a_line_of_the_log(at):
    done = train(at, inject(at, """
def _before(step):
    if step == 5:                                                # a part of the line still fits
        size = os.path.getsize(os.path.join(_main.out_dir, 'log.jsonl')) + 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
"""))
    return resumed(at), code_of(done), done.stderr


def full_at_the_first_files(at):
    with small_disk(at.folder / 'RUN', 4096, limit=1000) as (limit, add_room):
        done = train(at, preexec_fn=limit)
        add_room()
        again = train(at)                                        # by the same command
        lost = compare(at.folder / 'RUN', at.unbroken) if again.returncode == 0 else again.stderr
        return lost, code_of(done), done.stderr


def full_while_data_are_made(at):
    with small_disk(at.folder / 'data', 700_000, limit=100_000) as (limit, _):
        shutil.copytree(at.data / 'arith', at.folder / 'data' / 'arith')
        before = files_of(at.folder / 'data' / 'arith')
        done = run('data_prep.py', 'arith', '--num_docs=2000', '--vocab_size=512', '--overwrite',
                   f'--out_dir={at.folder / "data" / "arith"}', preexec_fn=limit)
        left = [file.name for file in (at.folder / 'data').iterdir()]
        kept = left == ['arith'] and before == files_of(at.folder / 'data' / 'arith')
        return ('nothing: the data set before is there, and nothing else' if kept else f'{left}',
                code_of(done), done.stderr)


def full_under_stdout_and_stderr(at):
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, ROOT / 'train.py', *at.tiny, f'--out_dir={at.folder / "RUN"}'],
            stdout=full, stderr=full, check=False)
    return compare(at.folder / 'RUN', at.unbroken), code_of(done), ''


def read_only_out_dir(at):
    folder = without_the_last(at)
    with read_only(folder):
        done = train(at, '--resume')
    return resumed(at), code_of(done), done.stderr


def read_only_data_dir(at):
    shutil.copytree(at.data, at.folder / 'data')
    with read_only(at.folder / 'data'):
        done = train(at, f'--data_dir={at.folder / "data"}')
    return compare(at.folder / 'RUN', at.unbroken), code_of(done), done.stderr


def read_only_data_dir_without_data(at):
    (at.folder / 'data').mkdir()
    with read_only(at.folder / 'data'):
        done = run('train.py', *at.tiny, f'--out_dir={at.folder / "RUN"}',
                   f'--data_dir={at.folder / "data"}',
                   '--sources={"stdlib": "stdlib --max_mb=0.5", "arith": "arith"}')
    there = (at.folder / 'RUN').exists() or any((at.folder / 'data').iterdir())
    return 'something is left' if there else 'nothing: no file is written', code_of(done), \
        done.stderr


def out_dir_is_a_file(at):
    (at.folder / 'RUN').write_text('mine')
    done = train(at)
    kept = (at.folder / 'RUN').read_text() == 'mine'
    return 'nothing: the file is as it was' if kept else 'the file', code_of(done), done.stderr


# --------------------------------------------------------------------------------------------------
# Checkpoints and other files that are not as they were written

def refused_until_put_right(at, harm, put_right, *args):
    """A run is harmed, refused with nothing changed, put right and resumed."""
    folder = without_the_last(at)
    harm(folder)
    before = files_of(folder)
    done = train(at, '--resume', *args)
    changed = files_of(folder) != before
    put_right(done.stderr)
    return 'what the refusal changed' if changed else resumed(at, *args), code_of(done), done.stderr


def follow_advice(at, line, on):
    """Take away the checkpoints that a line names in advice to go on from step_N.pt."""
    advice = re.search(r'--resume without (.*) goes on from (.*)', line)
    assert advice and advice[2] == on, line
    for name in advice[1].split(', '):
        (at.folder / 'RUN' / name).unlink()


def bad_checkpoint(at, harm):
    """The newest checkpoint, step_18.pt, is bad; what the line advises is done."""
    return refused_until_put_right(at, lambda folder: harm(folder / 'step_18.pt'),
                                   lambda line: follow_advice(at, line, 'step_16.pt'))


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    content = bytearray(file.read_bytes())
    content[content.index(torch.load(file)['model']['embed.weight'][5].numpy().tobytes())] ^= 1
    file.write_bytes(content)


def with_nan(file):
    state = torch.load(file)
    state['model']['blocks.1.ffn.down.weight'][0, 0] = math.nan
    torch.save(state, file)


def of_another_shape(file):
    config = torch.load(file)['config'] | {'n_layer': 3}
    torch.save({'config': config, 'model': Xmodel(XmodelConfig(**config)).state_dict()}, file)


class Payload:                                                   # opens, so makes, a file if read
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, 'w')


def checkpoint_with_code(at):
    mark = at.folder / 'ran'
    row = bad_checkpoint(at, lambda file: torch.save({'model': Payload(str(mark))}, file))
    return ('the code in the file ran' if mark.exists() else row[0], *row[1:])


def weights_that_are_not_finite(at):
    shutil.copy(at.unbroken / 'step_8.pt', at.folder)
    with_nan(at.folder / 'step_8.pt')
    done = train(at, f'--init_from={at.folder / "step_8.pt"}')
    there = (at.folder / 'RUN').exists()
    return 'a run was begun' if there else 'nothing: no file is written', code_of(done), done.stderr


def bad_data(at, harm):
    """Data are not what they were; then they are put back."""
    folder = at.folder / 'data'

    def put_back(line):
        shutil.rmtree(folder)
        shutil.copytree(at.data, folder)

    shutil.copytree(at.data, folder)
    harm(folder / 'arith')
    return refused_until_put_right(at, lambda run: None, put_back, f'--data_dir={folder}')


def change_a_byte(folder):
    content = bytearray((folder / 'train.bin').read_bytes())
    content[len(content) // 2] ^= 1
    (folder / 'train.bin').write_bytes(content)


def change_meta(folder, **changes):
    meta = json.loads((folder / 'meta.json').read_text())
    for split, of_split in changes.pop('splits', {}).items():
        meta[split] |= of_split
    (folder / 'meta.json').write_text(json.dumps(meta | changes))


def put_an_id_past_the_vocabulary(folder):
    ids = np.fromfile(folder / 'train.bin', np.uint16)
    ids[len(ids) // 2] = 600
    ids.tofile(folder / 'train.bin')
    digest = hashlib.sha256((folder / 'train.bin').read_bytes()).hexdigest()
    change_meta(folder, splits={'train': {'sha256': digest}})    # as if it had been written so


def other_data(folder):
    shutil.rmtree(folder)
    done = run('data_prep.py', 'arith', '--num_docs=300', '--vocab_size=512', '--seed=1',
               f'--out_dir={folder}')
    assert done.returncode == 0, done.stderr


def broken_run_json_and_resume(at):
    (without_the_last(at) / 'run.json').write_text('{"knobs": ')
    done = train(at, '--resume')
    try:
        json.loads((at.folder / 'RUN' / 'run.json').read_text())
    except ValueError:
        return 'run.json', code_of(done), done.stderr
    return compare(at.folder / 'RUN', at.unbroken), code_of(done), done.stderr


def broken_run_json_and_replay(at):
    (without_the_last(at) / 'run.json').write_text('{"knobs": ')
    before = files_of(at.folder / 'RUN')
    later, done = train(at, '--replay=17'), train(at, '--replay=2')     # 17 needs it for nothing
    kept = files_of(at.folder / 'RUN') == before and later.returncode == 0
    return resumed(at) if kept else later.stderr, code_of(done), done.stderr


# --------------------------------------------------------------------------------------------------
# Signals, kills, locks, clocks

def signalled(at, code):
    done = train(at, inject(at, code))
    told, there = done.stderr or line_with('stopped by', done), checkpoints(at.folder / 'RUN')
    step = re.search(r'step (\d+), which is saved', told)
    if step and there[-1].name != f'step_{step[1]}.pt':
        return 'what it tells of as saved', code_of(done), told
    return resumed(at), code_of(done), told


TERM = """
def _before(step):
    if step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
"""
TERM_AT_ONCE = TERM.replace('5', '0')
TERM_DURING_IMPORTS = 'os.kill(os.getpid(), signal.SIGTERM)'
INT = TERM.replace('TERM', 'INT')
HUP = 'signal.signal(signal.SIGHUP, signal.SIG_DFL)' + TERM.replace('TERM', 'HUP')       # no nohup
INT_TWICE = """
def _before(step):
    if step == 5:
        os.kill(os.getpid(), signal.SIGINT)
        now = time.monotonic()                                  # two seconds later
        sys.modules['run'].time = types.SimpleNamespace(monotonic=lambda: now + 2)
        os.kill(os.getpid(), signal.SIGINT)
"""
KILL = TERM.replace('TERM', 'KILL')


def a_rank_is_killed(at):
    done = train_ranks(at, inject(at, "if _rank == '1':" + KILL.replace('\n', '\n    ')))
    assert code_of(done[1]) == 137, done[1].stderr
    again = train_ranks(at, '--resume')
    lost = compare(at.folder / 'RUN', at.of_two_ranks()) if again[0].returncode == 0 else \
        again[0].stderr
    last = done[0].stderr.splitlines()[-1].split('. ')[0]        # of several wordings
    return lost, code_of(done[0]), 'RuntimeError: [...] by peer' * ('by peer' in last)


def a_collective_while_ranks_end(at):
    """A thread of gloo's drops a tensor, which takes Python's lock, as the group is taken down."""
    processes = start(at, inject(at, """
_leave = _dist.destroy_process_group
def _leave_late():
    sys.setswitchinterval(1000)                                  # nobody is asked for the lock
    _dist.all_reduce(torch.zeros(1 << 24), async_op=True)
    _leave()
_dist.destroy_process_group = _leave_late
"""), world=2)
    for process in processes:
        process.join(60)
    hangs = [process.kill() or f'rank {rank} does not end' for rank, process in enumerate(processes)
             if process.is_alive()]
    lost = ', '.join(hangs) or compare(at.folder / 'RUN', at.of_two_ranks())
    return lost, processes[0].exitcode, ''


def killed_at_random(at, kills, world=1):
    """kill -9 of all ranks at random moments, each second time while a checkpoint is written."""
    args = [f'--steps_scale={kills / 2 + 1}', '--checkpoint_interval=1', '--eval_interval=1000']
    unbroken = at.folder / 'unbroken'
    done = run_ranks(world, 'train.py', *at.tiny, *args, f'--out_dir={unbroken}')
    assert done[0].returncode == 0, done[0].stderr
    rng, folder, writes = random.Random(0), at.folder / 'RUN', 0

    def steps():
        with contextlib.suppress(FileNotFoundError):
            return (folder / 'log.jsonl').read_bytes().count(b'\n')
        return 0

    for n in range(kills):
        before, end = steps(), time.monotonic() + rng.uniform(0.05, 0.8)
        processes = start(at, *args, '--resume', world=world)
        if n % 2:                                                # a file that is left is not meant
            wait_for(lambda: not half_written(folder))
            wait_for(lambda: half_written(folder))
        else:                                                    # so that steps remain for the rest
            wait_for(lambda end=end, most=before + 10: time.monotonic() > end or steps() >= most)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [-9] * world
        writes += half_written(folder)
    assert writes >= kills // 4, f'only {writes} of {kills} kills fell into a write'
    for process in (last := start(at, *args, '--resume', world=world)):
        process.join()
    lost = compare(folder, unbroken) if last[0].exitcode == 0 else 'the run does not go on'
    return lost, 137, ''


def two_runs_in_one_folder(at):
    first = start(at, inject(at, f"""
def _before(step):
    if step == 5:
        open({str(at.folder / 'here')!r}, 'w').close()
        while not os.path.exists({str(at.folder / 'go on')!r}):
            time.sleep(0.01)
"""))[0]
    wait_for((at.folder / 'here').exists)
    done = train(at, '--resume')
    (at.folder / 'go on').touch()
    first.join()
    return compare(at.folder / 'RUN', at.unbroken), code_of(done), done.stderr


def lock_of_a_dead_process(at):
    (without_the_last(at) / 'lock').write_text('process 1 on elsewhere\n')
    done = train(at, '--resume')
    return compare(at.folder / 'RUN', at.unbroken), code_of(done), done.stderr


def clock_set_back(at):
    done = train(at, inject(at, """
_time, _days = time.time, []
def _earlier():
    _days.append(1)
    return _time() - 86_400 * len(_days)
def _before(step):
    if step == 5:
        time.time = _earlier
"""))
    lines = (at.folder / 'RUN' / 'log.jsonl').read_text().splitlines()
    speeds = [json.loads(line)['tok_per_s'] for line in lines]
    if min(speeds) <= 0:
        return f'the speed, {min(speeds)}', code_of(done), done.stderr
    return compare(at.folder / 'RUN', at.unbroken), code_of(done), done.stderr


# --------------------------------------------------------------------------------------------------
# Numbers that are not finite

def nan_gradient_once(at):
    folder = at.folder / 'RUN'
    done = train(at, '--checkpoint_interval=1', '--keep=99',
                 inject(at, 'def _bad(step):\n    return step == 5' + NAN_GRADIENT))
    ours, theirs = log(folder), log(at.unbroken)
    odd = [line['step'] for line in ours if 'skipped' in line]
    before, after = (read_checkpoint(folder / f'step_{n}.pt') for n in (5, 6))
    kept = ours[:5] == theirs[:5] and all(math.isfinite(line['loss']) for line in ours) and \
        all(same(before[key], after[key]) for key in ('model', 'optimizer_state', 'recent'))
    return f'the update of step {odd}' if kept else 'more', code_of(done), \
        line_with('skipped', done)


def nan_gradients_from_now_on(at):
    folder = at.folder / 'RUN'
    done = train(at, '--keep=9', inject(at, 'def _bad(step):\n    return step >= 6' + NAN_GRADIENT))
    weights = [read_checkpoint(folder / f'step_{n}.pt')['model'] for n in (6, 11)]
    again = train(at, '--resume', '--keep=9')
    ours = log(folder)
    odd = [line['step'] for line in ours if 'skipped' in line]
    kept = same(*weights) and again.returncode == 0 and len(ours) == 20 and \
        ours[:6] == log(at.unbroken)[:6]
    return f'the updates of steps {odd}' if kept else 'more', code_of(done), done.stderr


def nan_gradient_on_one_rank(at):
    done = train_ranks(at, inject(at, """
def _bad(step):
    return step == 5 and _rank == '1'
_leave = _dist.destroy_process_group
def _save_and_leave():
    torch.save(_models[-1].state_dict(), os.path.join(_main.out_dir, 'weights_' + _rank))
    _leave()
_dist.destroy_process_group = _save_and_leave
""" + NAN_GRADIENT))
    ours, theirs = log(at.folder / 'RUN'), log(at.of_two_ranks())
    weights = [torch.load(at.folder / 'RUN' / f'weights_{rank}') for rank in (0, 1)]
    odd = [line['step'] for line in ours if 'skipped' in line]
    kept = same(*weights) and ours[:5] == theirs[:5] and len(ours) == 20
    return f'the update of step {odd}, on both' if kept else 'more', code_of(done[0]), \
        line_with('skipped', done[0])


def a_weight_overflows(at):
    """No gradient is odd, so that the update is done; the checkpoints after it are no use."""
    train(at, inject(at, """
def _before(step):
    if step == 7:
        _models[-1].blocks[1].ffn.down.weight.data[0, 0] = math.inf
def _bad(step):
    return False
""" + NAN_GRADIENT))
    done = train(at, '--resume')
    follow_advice(at, done.stderr.strip(), 'step_6.pt')
    return resumed(at), code_of(done), done.stderr


# by mounts or, where nothing may be mounted, by limits
FULL = '(No space left on device|File too large)'
READ_ONLY = '(Read-only file system|Permission denied)'
AS_BEFORE, SUMS = 'what was saved before is whole', 'its checksums are not right'
ON = '; --resume without step_18.pt goes on from step_16.pt'
DATA = 'python data_prep.py SOURCE --out_dir=data/arith --vocab_size=512 --overwrite'
FAULTS = {   # fault: (function, exit code, a pattern of what is told, what is lost)
    'disk full in a checkpoint': (
        full_in_a_checkpoint, 2, f'out/RUN/step_[36].pt: {FULL}; {AS_BEFORE}', SAME),
    'too little space for a checkpoint, before it is written': (
        too_little_space_for_a_checkpoint, 2,
        'out/RUN/step_6.pt: No space left on device .0.000457 GB are wanted, 7e-05 GB free', SAME),
    'disk full in a line of log.jsonl (a limit on file size)': (
        full_in_a_line_of_the_log, 2, f'out/RUN: File too large; {AS_BEFORE}', SAME),
    'disk full at the first files of a run': (
        full_at_the_first_files, 2, f'{FULL}; {AS_BEFORE}', SAME),
    'disk full while data_prep.py replaces a data set': (
        full_while_data_are_made, 2, f'data/arith: {FULL}; nothing was written',
        'nothing: the data set before is there, and nothing else'),
    'disk full under stdout and stderr (/dev/full)': (full_under_stdout_and_stderr, 0, '', SAME),
    'out_dir is read-only': (read_only_out_dir, 2, f'out/RUN/lock: {READ_ONLY}; {AS_BEFORE}', SAME),
    'data_dir is read-only': (read_only_data_dir, 0, '', SAME),
    'data_dir is read-only, and data are missing': (
        read_only_data_dir_without_data, 2, f'{READ_ONLY}; nothing was written',
        'nothing: no file is written'),
    'out_dir is a file': (out_dir_is_a_file, 2, f'out/RUN: File exists; {AS_BEFORE}',
                          'nothing: the file is as it was'),
    'the newest checkpoint is cut off': (
        lambda at: bad_checkpoint(at, cut), 2,
        f'step_18.pt is not a checkpoint of train.py, or is damaged: {SUMS}{ON}', SAME),
    'one bit of a tensor in it is flipped': (
        lambda at: bad_checkpoint(at, flip), 2, f'{SUMS}{ON}', SAME),
    'it is empty': (lambda at: bad_checkpoint(at, lambda file: file.write_bytes(b'')), 2,
                    f'{SUMS}{ON}', SAME),
    'it holds code': (checkpoint_with_code, 2, f'or is damaged .UnpicklingError.{ON}', SAME),
    'it is of another program': (
        lambda at: bad_checkpoint(at, lambda file: torch.save({'epoch': 3}, file)), 2,
        f'step_18.pt is not a checkpoint of train.py, or is damaged .KeyError.{ON}', SAME),
    'it is of a model of another shape': (
        lambda at: bad_checkpoint(at, of_another_shape), 2,
        f'step_18.pt holds another model than this config: n_layer: 3 -> 2{ON}', SAME),
    'a weight in it is NaN': (
        lambda at: bad_checkpoint(at, with_nan), 2,
        f'step_18.pt: blocks.1.ffn.down.weight has values that are not finite{ON}', SAME),
    '--init_from a checkpoint where a weight is NaN': (
        weights_that_are_not_finite, 2, 'has values that are not finite',
        'nothing: no file is written'),
    'run.json is broken, then --resume': (broken_run_json_and_resume, 0, '', SAME),
    'run.json is broken, then --replay': (
        broken_run_json_and_replay, 2, 'out/RUN/run.json is damaged', SAME),
    'train.bin is cut off': (
        lambda at: bad_data(at, lambda d: os.truncate(d / 'train.bin', 1000)), 2,
        f'data/arith/train.bin has 1000 bytes, not the 302832 that meta.json tells of: {DATA}',
        SAME),
    'a byte of train.bin is another': (
        lambda at: bad_data(at, change_a_byte), 2,
        f'data/arith/train.bin is not what was written, by the sha256 in meta.json: {DATA}', SAME),
    'train.bin has an id past the vocabulary': (
        lambda at: bad_data(at, put_an_id_past_the_vocabulary), 2,
        'data/arith/train.bin has the id 600, which is not below vocab_size=512', SAME),
    'meta.json has another sha256': (
        lambda at: bad_data(at, lambda d: change_meta(d, splits={'train': {'sha256': 'f' * 64}})),
        2, 'by the sha256 in meta.json', SAME),
    'meta.json has another vocab_size': (
        lambda at: bad_data(at, lambda d: change_meta(d, vocab_size=1024)), 2,
        'data/arith/meta.json has vocab_size=1024, the model 512', SAME),
    'meta.json is broken': (
        lambda at: bad_data(at, lambda d: (d / 'meta.json').write_text('{"vocab')), 2,
        f'data/arith/meta.json is damaged: {DATA}', SAME),
    'other data in the place of the run\'s own': (
        lambda at: bad_data(at, other_data), 2,
        '--resume goes on with the same run, but data.arith: ', SAME),
    'SIGTERM': (lambda at: signalled(at, TERM), 143,
                'stopped by SIGTERM at step 5, which is saved: --resume goes on', SAME),
    'SIGHUP': (lambda at: signalled(at, HUP), 129,
               'stopped by SIGHUP at step 5, which is saved: --resume goes on', SAME),
    'SIGINT (Ctrl-C)': (lambda at: signalled(at, INT), 130,
                        'stopped by SIGINT at step 5, which is saved: --resume goes on', SAME),
    'SIGINT twice, two seconds apart': (
        lambda at: signalled(at, INT_TWICE), 130,
        'train.py: stopped; --resume goes on from the newest checkpoint in out/RUN', SAME),
    'SIGTERM before the first step': (
        lambda at: signalled(at, TERM_AT_ONCE), 143,
        'stopped by SIGTERM at step 0, with nothing to save: --resume goes on', SAME),
    'SIGTERM while the config is read': (
        lambda at: signalled(at, TERM_DURING_IMPORTS), 143, '', SAME),
    'kill -9': (lambda at: signalled(at, KILL), 137, '', SAME),
    'kill -9 of one rank of two (what the other tells)': (a_rank_is_killed, 1, 'by peer', SAME),
    'two ranks end while a collective is under way': (a_collective_while_ranks_end, 0, '', SAME),
    'kill -9 at 20 random moments, 5 or more of them while a checkpoint is written': (
        lambda at: killed_at_random(at, 20), 137, '', SAME),
    'kill -9 of two ranks at 4 random moments': (
        lambda at: killed_at_random(at, 4, world=2), 137, '', SAME),
    'two runs in one folder': (
        two_runs_in_one_folder, 2, 'out/RUN is in use by process N on HOST', SAME),
    'the lock of a dead process': (lock_of_a_dead_process, 0, '', SAME),
    'the clock goes back by a day, whenever it is looked at': (clock_set_back, 0, '', SAME),
    'a gradient is NaN, once': (
        nan_gradient_once, 0, 'step 5 is skipped: it has loss', 'the update of step [5]'),
    'a gradient is NaN, from now on': (
        nan_gradients_from_now_on, 1, 'train.py: step 10 is the fifth in a row that is not finite',
        'the updates of steps [6, 7, 8, 9, 10]'),
    'a gradient is NaN on one rank of two': (
        nan_gradient_on_one_rank, 0, 'step 5 is skipped: it has loss',
        'the update of step [5], on both'),
    'a weight overflows, though no gradient was odd': (
        a_weight_overflows, 2, '.pt: blocks', SAME),
}


def row(name, at):
    """(what was lost, exit code, what was told, with short paths) of a fault."""
    lost, code, told = FAULTS[name][0](at)
    for long, short in ((f'{at.folder}/data', 'data'), (f'{at.folder}/', 'out/'),
                        (os.uname().nodename, 'HOST')):
        told = told.replace(long, short)
    for pattern, short in ((r'process \d+', 'process N'), (r'\.\d+\.tmp', '.N.tmp'),
                           (r"([0-9a-f]{8})[0-9a-f]{56}", r'\1...')):
        told = re.sub(pattern, short, told)
    return lost, code, told.strip()


def make_two_ranks(folder, tiny):
    """An unbroken run of the tiny curriculum on two ranks."""
    done = run_ranks(2, 'train.py', *tiny, f'--out_dir={folder}')
    assert done[0].returncode == 0, done[0].stderr
    return folder


def main():
    sys.warnoptions.append('ignore:resource_tracker')            # locks of those that were killed
    with tempfile.TemporaryDirectory() as name:
        common = Path(name)
        data = make_data(common / 'data')
        tiny = make_config(common / 'tiny.py', data)
        unbroken = make_run(common / 'unbroken', tiny)
        threads = json.loads((unbroken / 'run.json').read_text())['threads']
        two = functools.cache(lambda: make_two_ranks(common / 'two', tiny))
        lines = []
        for n, name in enumerate(FAULTS):
            at = SimpleNamespace(folder=common / f'{n}', data=data, tiny=tiny, unbroken=unbroken,
                                 of_two_ranks=two)
            at.folder.mkdir()
            try:
                lost, code, told = row(name, at)
            except NotImplementedError as e:
                lost, code, told = 'not tried', '', f'{e}'
            told = f'`{told}`' if told else ''
            lines.append(f'| {name} | {lost} | {told} | {code} |')
            print(lines[-1], flush=True)
    disks = 'full disks that are small tmpfs, and read-only mounts' if may_mount() else \
        'limits on the size of files in the place of full disks, and permissions'
    TABLE.write_text(f"""\
# What goes wrong, and what it costs

`python tests/faults.py` writes this table: it injects each fault into a run of 20 steps (AdamW,
Muon, longer text), puts right what a user would, goes on by the same command with `--resume`, and
compares log, weights and the optimizer's state with those of an unbroken run, bit for bit. Exit
codes are a shell's: 128 + N for signal N, 2 for what the user has to put right. Paths are short
ones here. tests/test_faults.py injects the same faults, and fails where one comes out otherwise.

This table was made on {os.cpu_count()} CPU cores ({sys.platform}), threads a process: {threads},
torch {torch.__version__.split('+')[0]}, with {disks}.

| fault | lost | what is told | exit code |
| --- | --- | --- | --- |
""" + '\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
