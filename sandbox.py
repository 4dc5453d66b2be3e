"""Run a program that a model wrote, away from the rest as far as this machine lets.

    python sandbox.py < program.py          # exit code 0 if it ran to its end, and 1 if not

It runs in a process of its own, in an empty folder that is deleted afterwards, for 3 seconds of CPU
and 4 in all, with 2 GB of memory a process and files of 16 MB, in 64 processes (of root, in any
number), none of your environment variables, and no input or output; then all of them are killed.
Where bubblewrap (bwrap) is installed, it has no network either, sees only its own processes, and
cannot write files outside its folder (named sockets and pipes it can open, such as Docker's, if you
can); with util-linux's unshare alone it can write what you can. Without both (macOS) it has your
network as well, and a process it started may survive. It can read what you can read in each case;
and it can say that it has run to its end when it has not, if it looks for the way: this catches
accidents, not cheats. For more, use a container.
"""
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache

SECONDS, MEMORY, FILE_SIZE = 3.0, 2 << 30, 16 << 20        # lm-eval's code_eval also gives 3 s
WRAPPERS = (
    ('bwrap --ro-bind / / --dev /dev --size 16777216 --tmpfs /dev/shm --proc /proc --bind {0} {0} '
     '--chdir {0} --unshare-all --cap-drop ALL --die-with-parent --new-session'),
    'unshare --user --map-root-user --net --ipc --pid --fork --kill-child')


@lru_cache
def wrapper():
    """The words of the first of WRAPPERS that works here, [] where none does."""
    for first, *rest in (wrap.split() for wrap in WRAPPERS):
        words = [shutil.which(first) or first, *rest]      # in full: programs get no PATH
        with tempfile.TemporaryDirectory() as folder, suppress(OSError):
            command = [*(word.format(folder) for word in words), sys.executable, '-c', '']
            if not subprocess.run(command, capture_output=True, check=False).returncode:
                return words
    return []


def passes(program, seconds=SECONDS):
    """Whether the text of a Python program runs to its end, with no exception, in the time."""
    # It cannot say so by its exit code, which sys.exit(0) gives, too, but by a word that it does
    # not know unless it looks for it, written after its last line.
    word, folder = secrets.token_hex(16), tempfile.mkdtemp()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*(part.format(folder) for part in wrapper()), sys.executable, '-I', __file__,
             '--child'], stdin=subprocess.PIPE, stdout=said, stderr=subprocess.DEVNULL,
            cwd=folder, env={'TMPDIR': folder, 'HOME': folder}, start_new_session=True)
        try:
            with suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate(json.dumps([program, word, seconds]).encode(), seconds + 1)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # Python's own removal fails at thousands of folders in one another
            subprocess.run(['rm', '-rf', folder], stderr=subprocess.DEVNULL, check=False)
        said.seek(0)
        return said.read(100) == word.encode()


def child():
    """The process that becomes the program: text, word and time are on standard input."""
    import resource
    program, word, seconds = json.load(sys.stdin)
    out = os.dup(1)
    for n in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), n)
    # without unshare, NPROC counts all processes of yours: then it can start none
    for what, most in (('CPU', math.ceil(seconds)), ('AS', MEMORY), ('FSIZE', FILE_SIZE),
                       ('CORE', 0), ('NPROC', 64)):
        with suppress(ValueError, OSError):                        # macOS has no RLIMIT_AS
            resource.setrlimit(getattr(resource, f'RLIMIT_{what}'), (most, most))
    leave, write = os._exit, os.write                              # the program may change os
    try:
        exec(program, {})  # noqa: S102                            (as lm-eval: no __main__)
    except BaseException:  # noqa: BLE001                          (sys.exit is no success either)
        leave(1)
    write(out, word.encode())
    leave(0)


class CodeEval:
    """What the library evaluate calls the metric code_eval (Chen et al. 2021, arXiv 2107.03374)."""

    @staticmethod
    def compute(references, predictions, k=(1,)):
        """({'pass@K': mean over problems}, whether each program passes) of lists of programs.

        references: each problem's test code. pass@K (eq. 1) is 1 - C(n - c, K) / C(n, K), the
        chance that of K among its n programs, c of which pass, at least one does.
        """
        passed = [[passes(f'{program}\n{test}') for program in programs]
                  for test, programs in zip(references, predictions, strict=True)]
        return {f'pass@{K}': sum(1 - math.comb(len(p) - sum(p), K) / math.comb(len(p), K)
                                 for p in passed) / len(passed)
                for K in k if all(len(p) >= K for p in passed)}, passed


if __name__ == '__main__':
    if sys.argv[1:] == ['--child']:
        child()
    elif sys.argv[1:] or sys.stdin is None or sys.stdin.isatty():
        print('sandbox.py: wants a program on standard input, and no argument', file=sys.stderr)
        sys.exit(2)
    elif not wrapper():
        print('sandbox.py: neither bwrap nor unshare works here: the program has your network',
              file=sys.stderr)
    sys.exit(0 if passes(sys.stdin.read()) else 1)
