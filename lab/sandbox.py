"""Run a program that a model wrote, as far away from the rest as this machine lets.

    python -m lab.sandbox < program.py          # exit code 0 if it ran to its end, else 1

The program runs in a process of its own, in an empty folder that is deleted afterwards. It has
3 seconds of CPU time and 4 in all, 2 GB of memory a process, files of at most 16 MB, at most 64
processes (any number as root), none of your environment variables, and neither input nor output. At
the end all its processes are killed. What else it can reach depends on what is installed:

    bubblewrap (bwrap)     no network; it sees only its own processes, and cannot write files
                           outside its folder (but it can open named sockets and pipes, such as
                           Docker's, if you can)
    util-linux's unshare   no network; it can write the files that you can write
    neither (macOS)        your network as well; and a process that it started may survive

In each case it can read the files that you can read. It can also claim to have run to its end when
it has not, if it looks for the way. This catches accidents, not cheats: for more, use a container.
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

SECONDS = 3.0                 # as lm-eval's code_eval
MEMORY = 2 << 30              # bytes
FILE_SIZE = 16 << 20          # bytes
# commands to put before a program's, the best first; {0} is its folder
WRAPPERS = (
    ('bwrap --ro-bind / / --dev /dev --size 16777216 --tmpfs /dev/shm --proc /proc --bind {0} {0} '
     '--chdir {0} --unshare-all --cap-drop ALL --die-with-parent --new-session'),
    'unshare --user --map-root-user --net --ipc --pid --fork --kill-child')


@lru_cache
def wrapper():
    """The words of the first of WRAPPERS that works here; [], and a warning, if none does."""
    for command in WRAPPERS:
        name, *rest = command.split()
        words = [shutil.which(name) or name, *rest]        # the full path: programs get no PATH
        if works(words):
            return words
    print('sandbox.py: neither bwrap nor unshare works here: programs have your network',
          file=sys.stderr)
    return []


def in_folder(words, folder):
    return [word.format(folder) for word in words]


def works(words):
    """Whether a program that does nothing runs with these words before it."""
    from processes import temporary_folder  # to which -I gives no path
    with temporary_folder(tempfile.gettempdir(), 'nano-xmodel-wrapper') as folder, \
            suppress(OSError):
        command = [*in_folder(words, folder), sys.executable, '-c', '']
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def passes(program, seconds=SECONDS):
    """Whether the text of a Python program runs to its end, with no exception, in the time."""
    # Its exit code does not tell: sys.exit(0) gives the same. So the child writes a secret word
    # after the program's last line, which the program does not know unless it looks for it.
    from processes import temporary_folder  # to which -I gives no path
    word = secrets.token_hex(16)
    with temporary_folder(tempfile.gettempdir(), 'nano-xmodel-sandbox') as parent, \
            tempfile.TemporaryFile() as output:
        folder = tempfile.mkdtemp(dir=parent)
        command = [*in_folder(wrapper(), folder), sys.executable, '-I', __file__, '--child']
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL,
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
        output.seek(0)
        return output.read(100) == word.encode()


def limit_resources(seconds):
    """Limits of this process, and of each that it starts."""
    import resource
    limits = {
        'CPU': math.ceil(seconds), 'AS': MEMORY, 'FSIZE': FILE_SIZE, 'CORE': 0,
        # without unshare this counts all of your processes: then the program can start none
        'NPROC': 64}
    for name, limit in limits.items():
        with suppress(ValueError, OSError):                        # macOS has no RLIMIT_AS
            resource.setrlimit(getattr(resource, f'RLIMIT_{name}'), (limit, limit))


def child():
    """The process that becomes the program: text, word and time are on standard input."""
    program, word, seconds = json.load(sys.stdin)
    output = os.dup(1)
    for n in range(3):                                             # stdin, stdout, stderr
        os.dup2(os.open(os.devnull, os.O_RDWR), n)
    limit_resources(seconds)
    leave, write = os._exit, os.write                              # the program may change os
    # Where who should kill this process was killed. (With a handler, as the first process of a
    # namespace does not die of a signal that has none.)
    signal.signal(signal.SIGALRM, lambda *_: leave(1))
    signal.alarm(math.ceil(seconds) + 2)
    try:
        exec(program, {})  # noqa: S102                            (as lm-eval: no __main__)
    except BaseException:  # noqa: BLE001                          (sys.exit is no success either)
        leave(1)
    write(output, word.encode())
    leave(0)


def pass_at_k(n, c, k):
    """The chance that of k among n programs, c of which pass, at least one does (eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


class CodeEval:
    """What the library evaluate calls the metric code_eval (Chen et al. 2021, arXiv 2107.03374)."""

    @staticmethod
    def compute(references, predictions, k=(1,)):
        """({'pass@K': mean over problems}, whether each program passes) of lists of programs.

        references: each problem's test code. pass@K is left out if a problem has fewer programs.
        """
        passed = []                                                # [problem][program]
        for test, programs in zip(references, predictions, strict=True):
            passed.append([passes(f'{program}\n{test}') for program in programs])
        scores = {}
        for K in k:
            if all(len(results) >= K for results in passed):
                chances = [pass_at_k(len(results), sum(results), K) for results in passed]
                scores[f'pass@{K}'] = sum(chances) / len(passed)
        return scores, passed


if __name__ == '__main__':
    if sys.argv[1:] == ['--child']:
        child()
    elif sys.argv[1:] or sys.stdin is None or sys.stdin.isatty():
        print('sandbox.py: wants a program on standard input, and no argument', file=sys.stderr)
        sys.exit(2)
    from configurator import fail
    from processes import STOPPED, signals_as_ctrl_c
    try:
        with signals_as_ctrl_c():
            sys.exit(0 if passes(sys.stdin.read()) else 1)
    except KeyboardInterrupt:
        fail('stopped', STOPPED)
