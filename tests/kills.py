"""Kill what the project starts, and what starts it: who hangs, and what is left behind?

    python tests/kills.py            # 3 signals x (child, parent, all) x each place x 10 times
    python tests/kills.py 1          # once each

A place is a command that starts a process or a thread, or writes a temporary file. When it is at
work, a signal is sent to one of its children (to all trials of a sweep, which do not need one
another), to the command itself, or to it and all its children. Then it has 10 seconds to end, with
another exit code than 0 and without a traceback; then its children have as long. After that nothing
of it may be there: no process, no temporary file. (After SIGKILL of the command a temporary folder
may stay, until the next such command begins.) The table goes to results/kills.md. test_kills.py
asserts the same, once each.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 10
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
TARGETS = ('child', 'parent', 'all')
NANO = ROOT / 'config/nano.py'
TINY = ['--n_layer=1', '--n_head=1', '--n_embd=32', '--n_ffn=32', '--vocab_size=512']


def make_text(folder):
    """A .jsonl of a size that takes seconds to tokenize."""
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=rng.randrange(2, 9)))
             for _ in range(3000)]
    texts = [' '.join(rng.choices(words, k=1500)) for _ in range(4000)]
    lines = [json.dumps({'text': text}) + '\n' for text in texts]
    (folder / 'text.jsonl').write_text(''.join(lines))


def has(folder, pattern):
    def there():
        with suppress(FileNotFoundError):                        # of a folder that is removed now
            return any(folder.rglob(pattern))
        return False
    return there


# place -> (the command's words, a function that says whether it is at work), for a folder
PLACES = {
    'data_prep.py': lambda folder: (
        [ROOT / 'data_prep.py', folder / 'text.jsonl', f'--out_dir={folder}/data',
         '--vocab_size=512'],
        has(folder, '.data.*.tmp/train.bin')),
    'train.py, preparing data': lambda folder: (
        [ROOT / 'train.py', NANO, *TINY, f'--sources.stdlib={folder}/text.jsonl',
         f'--data_dir={folder}/data', f'--out_dir={folder}/out'],
        has(folder, '.stdlib.*.tmp/train.bin')),
    'train.py, training': lambda folder: (
        [ROOT / 'train.py', NANO, *TINY, '--sources.stdlib=stdlib --max_mb=0.3',
         f'--data_dir={folder}/data', f'--out_dir={folder}/out', '--checkpoint_interval=1',
         '--steps_scale=100'],
        has(folder, 'out/step_*.pt')),
    'lab.sweep': lambda folder: (
        ['-m', 'lab.sweep', 'transfer', '--widths=64', '--exponents=-7,-6', '--seeds=1',
         '--rules=sp', '--jobs=2', '--name=x', '--steps=100000',
         f'--config={ROOT}/config/transfer.py'],
        has(folder, 'tmp/.nano-xmodel-trials.*.tmp/*/run/log.jsonl')),
    'lab.sandbox': lambda folder: (['-m', 'lab.sandbox'],
                                   has(folder, 'tmp/.nano-xmodel-sandbox.*.tmp/*/at_work')),
    'lab.bench': lambda folder: (
        ['-m', 'lab.bench', '--variants=ours-eager', '--rounds=100000', '--n_layer=2',
         '--full_vocab_size=0', '--batch_size=1', '--block_size=64', '--vocab_size=512'],
        lambda: False),                                          # at work once it has a child
}
PROGRAM = 'open("at_work", "w").close()\nimport time\ntime.sleep(1000)\n'


def processes_of(mark):
    """Numbers of the processes whose environment has MARK=mark."""
    found = set()
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            environment = (folder / 'environ').read_bytes().split(b'\0')
        except OSError:                                          # ended by now, or another user's
            continue
        if f'MARK={mark}'.encode() in environment and runs(int(folder.name)):
            found.add(int(folder.name))
    return found


def runs(pid):
    """Whether there is a process of this number that has not ended."""
    try:
        status = Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return False
    return status.rpartition(')')[2].split()[0] != 'Z'           # Z: ended, not yet waited for


def send(pid, sign):
    """Send a signal to a process that may have ended by now."""
    with suppress(ProcessLookupError):
        os.kill(pid, sign)


def wait_for(condition, seconds):
    """Whether a condition comes true in the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def kill_once(place, target, sign, folder):
    """What went wrong with one kill, as text; '' if nothing did, None if there is no such target.

    folder: holds text.jsonl, and is left as it was.
    """
    (folder / 'tmp').mkdir()
    mark = f'{place} {target} {sign} {random.random()}'
    words, at_work = PLACES[place](folder)
    log = open(folder / 'log', 'w')  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=folder, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=log, stderr=log,
        env=os.environ | {'MARK': mark, 'TMPDIR': str(folder / 'tmp'), 'OMP_NUM_THREADS': '1',
                         'PYTHONPATH': str(ROOT)})
    try:
        if place == 'lab.sandbox':
            process.stdin.write(PROGRAM)
        process.stdin.close()

        def children():
            # (the sandbox gives its program no environment, so it is found by its parent)
            own = [pid for pid in processes_of(mark) if pid != process.pid]
            path = Path(f'/proc/{process.pid}/task/{process.pid}/children')
            return sorted({*own, *map(int, path.read_text().split())})

        def ready():
            return at_work() or (place == 'lab.bench' and len(children()) >= 2)
        wait_for(lambda: ready() or process.poll() is not None, 120)
        if process.poll() is not None or not ready():
            return f'never came to work: {(folder / "log").read_text()[-300:]}'
        own = children()
        if target == 'child':
            if not own:
                return None
            for pid in own if place == 'lab.sweep' else own[-1:]:
                send(pid, sign)
        elif target == 'parent':
            send(process.pid, sign)
        else:
            for pid in (process.pid, *own):
                send(pid, sign)
        if not wait_for(lambda: process.poll() is not None, SECONDS):
            return f'{place} is still there after {SECONDS} s'
        left = {*processes_of(mark), *own}
        if not wait_for(lambda: not any(map(runs, left)), SECONDS):
            return f'processes are left: {[pid for pid in left if runs(pid)]}'
        lines = (folder / 'log').read_text()
        if process.returncode == 0:
            return f'exit code 0: {lines[-300:]}'
        if 'Traceback' in lines:
            return f'a traceback: {lines[-300:]}'
        half = [path.name for path in folder.rglob('*.tmp')]
        killed = sign == signal.SIGKILL and target != 'child'
        if half and not killed:
            return f'left behind: {half}'
        return ''
    finally:
        for pid in processes_of(mark):
            send(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        log.close()
        for path in folder.iterdir():
            if path.name != 'text.jsonl':
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)


def main():
    times = int(sys.argv[1]) if sys.argv[1:] else 10
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_text(folder)
        for place in PLACES:
            for target in TARGETS:
                cells = []
                for sign in SIGNALS:
                    results = Counter(kill_once(place, target, sign, folder)
                                      for _ in range(times))
                    for result, n in results.items():
                        if result:
                            print(f'{place}, {target}, {sign.name}: {n} x {result}', flush=True)
                            bad += n
                    tries = times - results[None]                # the others had no child by then
                    good = f'{results[""]} of {tries}' if tries else 'no child'
                    cells.append(good)
                rows.append((place, target, *cells))
                print(*rows[-1], sep=' | ', flush=True)
    table = '| what is at work | who is killed | SIGTERM | SIGINT | SIGKILL |\n' \
        '| --- | --- | --- | --- | --- |\n'
    table += ''.join(f'| {" | ".join(row)} |\n' for row in rows)
    (ROOT / 'results/kills.md').write_text(
        f'# Kills\n\n`python tests/kills.py`, {times} times each: how often all ended within '
        f'{SECONDS} s and left\nneither a process nor a temporary file. (After SIGKILL of the '
        'command itself a temporary folder may\nstay; the next such command removes it.)\n\n'
        + table)
    sys.exit(bad > 0)


if __name__ == '__main__':
    main()
