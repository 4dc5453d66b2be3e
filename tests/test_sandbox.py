"""sandbox.py: what a program that a model wrote can do, and what not."""
import itertools
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from conftest import refused, run

from lab import sandbox

WAYS = {'alone': None, 'bwrap': 'bwrap --ro-bind / / --unshare-all true',
        'unshare': 'unshare --user --map-root-user --net --pid --fork true'}


@pytest.fixture(params=WAYS)
def wrapper(request, monkeypatch):
    """The words of each way to run a program; a way that this machine does not have is skipped."""
    name = request.param
    if name != 'alone':
        if not shutil.which(name):
            pytest.skip(f'{name} is not installed')
        if subprocess.run(WAYS[name].split(), capture_output=True, check=False).returncode:
            pytest.skip(f'{name} is installed, and may not make namespaces here')
    monkeypatch.setattr(sandbox, 'WRAPPERS', tuple(
        wrap for wrap in sandbox.WRAPPERS if wrap.startswith(name)))
    sandbox.wrapper.cache_clear()
    words = sandbox.wrapper()
    assert [os.path.basename(word) for word in words[:1]] == ([] if name == 'alone' else [name])
    yield words
    sandbox.wrapper.cache_clear()


# tells by a pipe, which is open in each way, that the program has begun, what stopped it, if an
# exception did, and that it has come to its end
TELLING = """
import os
_pipe = os.open({pipe!r}, os.O_WRONLY)
os.dup2(_pipe, 100)
os.close(_pipe)
def tell(text):
    os.write(100, f'{{text}}\\n'.encode())
tell('begins')
try:
{program}
except BaseException as e:
    tell(f'{{type(e).__name__}}: {{e}}')
    raise
tell('ends')
"""


@pytest.fixture
def told(tmp_path):
    """(a function program -> that program, telling what happens to it; a function -> its lines)."""
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def telling(program):
        return TELLING.format(pipe=str(pipe), program=textwrap.indent(program, '    '))

    def lines():
        return os.read(reader, 65_536).decode(errors='replace').splitlines()

    yield telling, lines
    os.close(reader)


@pytest.fixture
def watched(wrapper, monkeypatch, told):
    """watched(program) -> what it told, and how its process ended."""
    telling, lines = told
    seen = SimpleNamespace()

    class Watched(subprocess.Popen):
        def __init__(self, argv, **how):
            self.of_a_program, self.how = '--child' in argv, how
            super().__init__(argv, **how)

        def communicate(self, content=None, timeout=None):
            if not self.of_a_program:
                return super().communicate(content, timeout)
            seen.late, seen.folder = False, self.how['cwd']
            try:
                return super().communicate(content, seen.patience or timeout)
            except subprocess.TimeoutExpired:
                seen.late = True                                   # its time was over
                raise
            finally:
                seen.code = self.poll()
                seen.said = os.pread(self.how['stdout'].fileno(), 100, 0)

    monkeypatch.setattr(subprocess, 'Popen', Watched)

    def watched(program, by_clock=False):
        # without the clock, which on a busy machine might come before what is to stop the program
        seen.patience = None if by_clock else 60
        seen.passed = sandbox.passes(telling(program), 2.0 if by_clock else 1.0)
        seen.told = lines()
        assert not os.path.exists(seen.folder)                     # in any case
        return seen
    return watched


@pytest.mark.usefixtures('wrapper')
def test_each_way_has_the_namespaces_that_it_should(watched, request):
    way = request.node.callspec.params['wrapper']
    own = {'alone': set(), 'unshare': {'user', 'net', 'ipc', 'pid'},
           'bwrap': {'user', 'net', 'ipc', 'pid', 'mnt', 'uts'}}[way]
    seen = watched('for name in ("user", "net", "ipc", "pid", "mnt", "uts"):\n'
                   '    tell(name + " " + os.readlink("/proc/self/ns/" + name))')
    assert seen.passed and seen.told[0] == 'begins' and seen.told[-1] == 'ends'
    theirs = dict(line.split() for line in seen.told[1:-1])
    assert len(theirs) == 6
    assert {name for name, link in theirs.items()
            if link != os.readlink(f'/proc/self/ns/{name}')} == own


# of a program that is killed: itself, as bwrap tells of it, and as unshare does, of some versions
KILLED = -9, 128 + 9, 1
STILL_THERE = None,                              # when its time is over
WRITES = 'for n in range(3, 30):\n    try: os.write(n, {})\n    except OSError: pass'
# the program, the same without what it should not do, what it tells, and its exit code, one of
# these
HOSTILE = {
    'endless loop': ('while True: pass', 'for _ in range(10**5): pass', '', KILLED),
    'sleep': ('import time; time.sleep(60)', 'import time; time.sleep(0)', '', STILL_THERE),
    '10 GB': ('x = bytearray(10 << 30)', 'x = bytearray(10 << 20)', 'MemoryError: ', (1,)),
    '3 GB that nobody reads': (
        'import mmap; mmap.mmap(-1, 3 << 30)', 'import mmap; mmap.mmap(-1, 1 << 30)',
        'OSError: [Errno 12] Cannot allocate memory', (1,)),
    'large file': ('open("a", "w").write("x" * (100 << 20))', 'open("a", "w").write("x" * 10**6)',
                   'OSError: [Errno 27] File too large', (1,)),
    'leaves early': ('import sys; sys.exit(0)', 'import sys', 'SystemExit: 0', (1,)),
    'leaves early by force': ('import os; os._exit(0)', 'import os', '', (0,)),
    'wrong': ('assert 1 == 2', 'assert 1 == 1', 'AssertionError: ', (1,)),
    'wrong, and does not leave': (
        'import os; os._exit = lambda code: 0; assert 1 == 2',
        'import os; os._exit = lambda code: 0; assert 1 == 1', 'AssertionError: ', (1,)),
    'writes what is no text': (WRITES.format('b"\\xff"'), WRITES.format('b""'), 'ends', (0,)),
    'deep folders': ('for _ in range(2000): os.mkdir("a"); os.chdir("a")\n1 / 0',
                     'for _ in range(20): os.mkdir("a"); os.chdir("a")\n1 / 1',
                     'ZeroDivisionError: division by zero', (1,)),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_program_does_not_pass(name, watched):
    program, harmless, told, codes = HOSTILE[name]
    seen = watched(program, by_clock=name == 'sleep')
    assert not seen.passed
    assert seen.told == ['begins', *filter(None, [told])]
    assert seen.code in codes and seen.late == (codes is STILL_THERE)
    if name == 'writes what is no text':                           # beside the word it cannot know
        assert seen.said[:1] == b'\xff' and len(seen.said) == 33
    else:
        assert seen.said == b''
    seen = watched(harmless)
    assert seen.passed and seen.told == ['begins', 'ends']
    assert seen.code == 0 and len(seen.said) == 32


def test_what_is_no_python_does_not_pass(watched):
    for program, right in (('def f(:', False), ('def f(): pass', True)):
        seen = watched(program)
        assert seen.passed == right and seen.code == (0 if right else 1)
        # nothing of it ran, not even the part before the mistake
        assert seen.told == (['begins', 'ends'] if right else [])


def test_the_whole_word_and_nothing_else_is_a_pass(monkeypatch):
    word = '0123456789abcdef' * 2
    monkeypatch.setattr(sandbox.secrets, 'token_hex', lambda n: word)
    for text, right in ((word, True), (word[:-1], False), (word[1:], False), (word[:1], False),
                        (f'{word}0', False), (word.upper(), False), ('', False)):
        # a program that knows it, and leaves before its end
        program = WRITES.format(text.encode()) + '\nos._exit(0)'
        assert sandbox.passes(f'import os\n{program}') == right, text


def test_a_program_has_no_names_but_its_own_and_pythons():
    # and is no __main__, as for lm-eval
    for program, right in (('assert math.pi > 3', False), ('import math; assert math.pi > 3', True),
                           ('assert len(os.name)', False), ('assert len("a")', True),
                           ('if __name__ == "__main__": 1 / 0', True)):
        assert sandbox.passes(program) == right, program


@pytest.mark.parametrize('name', ['3 GB that nobody reads', 'large file'])
def test_without_the_sandbox_the_same_acts_are_possible(name, told, tmp_path):
    telling, lines = told
    subprocess.run([sys.executable, '-c', telling(HOSTILE[name][0])], cwd=tmp_path, check=True)
    assert lines() == ['begins', 'ends']
    if name == 'large file':
        assert (tmp_path / 'a').stat().st_size == 100 << 20
        (tmp_path / 'a').unlink()


def test_what_else_is_contained_or_said_not_to_be(wrapper, watched, tmp_path):
    def ran(program):
        seen = watched(program)
        assert seen.told[0] == 'begins' and seen.passed == (seen.told[-1] == 'ends')
        return seen.told[-1]

    assert ran('assert not os.listdir(); open("a", "w").write("x")') == 'ends'
    allowed = {'HOME', 'TMPDIR', 'PWD', 'LC_CTYPE'}
    assert not set(os.environ) <= allowed
    assert ran(f'assert set(os.environ) <= {allowed}') == 'ends'
    assert ran('print("x" * 10**6)') == 'ends'
    outside, shut = tmp_path / 'outside', any('bwrap' in word for word in wrapper[:1])
    writes = f'open({str(outside)!r}, "w").write("x")'
    read_only = f"OSError: [Errno 30] Read-only file system: '{outside}'"
    assert ran(writes) == (read_only if shut else 'ends')
    assert outside.exists() != shut
    if shut:                                     # else root could mount it writable
        assert ran(f"""
import ctypes
failed = ctypes.CDLL(None, use_errno=True).mount(None, b'/', None, 32 | 4096, None)
tell(f'{{failed}} {{os.strerror(ctypes.get_errno())}}')
{writes}
""") == read_only and not outside.exists()
        assert watched("""
import ctypes
failed = ctypes.CDLL(None, use_errno=True).mount(None, b'/', None, 32 | 4096, None)
tell(f'{failed} {os.strerror(ctypes.get_errno())}')
""").told[1] == '-1 Operation not permitted'
        fill = 'for n in range({}):\n    open(f"/dev/shm/{{n}}", "wb").write(bytes(15 << 20))'
        assert ran(fill.format(9)) == 'OSError: [Errno 28] No space left on device'
        assert ran(fill.format(1)) == 'ends'     # nor fill the memory there
    exec(writes)  # noqa: S102                   (outside of it anybody can)
    assert outside.read_text() == 'x'
    with socket.create_server(('127.0.0.1', 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        connects = f'import socket; socket.create_connection(("127.0.0.1", {port}), 1)'
        exec(connects, {})  # noqa: S102         (it does listen)
        server.accept()[0].close()
        if wrapper == []:
            assert ran(connects) == 'ends'
            server.accept()[0].close()
        else:
            assert ran(connects) in ('OSError: [Errno 101] Network is unreachable',
                                     'ConnectionRefusedError: [Errno 111] Connection refused')
            with pytest.raises(BlockingIOError):                   # nobody came
                server.accept()


def test_a_modest_fork_bomb_leaves_nothing_behind(wrapper, tmp_path):
    # each of them holds the file open, until it is killed
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert not sandbox.passes(f"""
import os, time
file = os.open({str(pipe)!r}, os.O_WRONLY)
os.write(file, b'x')
for _ in range(100):
    if os.fork() == 0:
        os.write(file, b'x')
        time.sleep(60)
time.sleep(60)
""", seconds=1.0)
    os.set_blocking(reader, True)
    # they did run; without a namespace of its own a user's limit counts all of that user's
    # processes, so that there may be none but the first
    fewest = 1 if wrapper == [] and os.geteuid() else 2
    assert len(os.read(reader, 1000)) >= fewest
    assert os.read(reader, 1000) == b''                            # and none has it open now
    os.close(reader)


def test_pass_at_k_is_the_chance_of_a_right_one_among_k():
    right, wrong = 'def f(x):\n    return x', 'def f(x):\n    return -x'
    programs = [right, wrong, wrong, right, wrong]
    found, passed = sandbox.CodeEval.compute(references=['assert f(1) == 1'],
                                             predictions=[programs], k=[1, 2, 6])
    assert passed == [[True, False, False, True, False]]
    for k in (1, 2):
        draws = list(itertools.combinations([True, False, False, True, False], k))
        assert found[f'pass@{k}'] == pytest.approx(sum(map(any, draws)) / len(draws))
    assert 'pass@6' not in found                                   # of five


def test_the_script_tells_by_its_exit_code():
    for program, code in (('print(1)', 0), ('1 / 0', 1), ('import sys; sys.exit(0)', 1)):
        done = run('lab.sandbox', stdin=program)
        assert (done.returncode, done.stdout) == (code, ''), done.stderr
        assert 'Traceback' not in done.stderr
    assert 'wants a program on standard input' in refused(run('lab.sandbox', 'program.py'))
