"""sandbox.py: what a program that a model wrote can do, and what not."""
import itertools
import os
import shutil
import socket
import subprocess

import pytest
from conftest import run

import sandbox

WAYS = {'alone': None, 'bwrap': 'bwrap --ro-bind / / --unshare-all true',
        'unshare': 'unshare --user --map-root-user --net --pid --fork true'}


@pytest.fixture(params=WAYS)
def wrapper(request, monkeypatch):
    """Each way to run a program that this machine has; where it has not, alone once more."""
    monkeypatch.setattr(sandbox, 'WRAPPERS', tuple(
        wrap for wrap in sandbox.WRAPPERS if wrap.startswith(request.param)))
    sandbox.wrapper.cache_clear()
    words, probe = sandbox.wrapper(), (WAYS[request.param] or 'false').split()
    works = shutil.which(probe[0]) and not subprocess.run(probe, check=False).returncode
    assert [os.path.basename(word) for word in words[:1]] == ([request.param] if works else [])
    yield words
    sandbox.wrapper.cache_clear()


HOSTILE = {
    'endless loop': 'while True: pass',
    'sleep': 'import time; time.sleep(60)',
    '10 GB': 'x = bytearray(10 << 30)',
    'large file': 'open("a", "w").write("x" * (100 << 20))',
    'leaves early': 'import sys; sys.exit(0)',
    'leaves early by force': 'import os; os._exit(0)',
    'wrong': 'assert 1 == 2',
    'wrong, and does not leave': 'import os; os._exit = lambda code: 0; assert 1 == 2',
    'writes what is no text': (
        'import os\nfor n in range(3, 30):\n    try: os.write(n, b"\\xff")\n'
        '    except OSError: pass'),
    'deep folders': 'import os\nfor _ in range(2000): os.mkdir("a"); os.chdir("a")\n1 / 0',
    'no Python': 'def f(:',
}


@pytest.mark.parametrize('program', HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_program_does_not_pass(program, wrapper):
    assert not sandbox.passes(program, seconds=1.0)


def test_what_else_is_contained_or_said_not_to_be(wrapper, tmp_path):
    assert sandbox.passes('import os; assert not os.listdir(); open("a", "w").write("x")')
    allowed = {'HOME', 'TMPDIR', 'PWD', 'LC_CTYPE'}
    assert sandbox.passes(f'import os; assert set(os.environ) <= {allowed}')
    assert sandbox.passes('print("x" * 10**6)')
    outside, shut = tmp_path / 'outside', any('bwrap' in word for word in wrapper[:1])
    assert sandbox.passes(f'open({str(outside)!r}, "w").write("x")') != shut
    assert outside.exists() != shut
    if shut:                                     # else root could mount it writable
        assert not sandbox.passes(f'''
import ctypes
ctypes.CDLL(None).mount(None, b'/', None, 32 | 4096, None)
open({str(outside)!r}, 'w').write('x')
''') and not outside.exists()
        assert not sandbox.passes('for n in range(9):\n'         # nor fill the memory there
                                  '    open(f"/dev/shm/{n}", "wb").write(bytes(15 << 20))')
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        connects = f'import socket; socket.create_connection(("127.0.0.1", {port}), 1)'
        assert sandbox.passes(connects) == (wrapper == [])


@pytest.mark.usefixtures('wrapper')
def test_a_modest_fork_bomb_leaves_nothing_behind(tmp_path):
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
    assert os.read(reader, 1000)                                   # they did run
    assert os.read(reader, 1000) == b''                            # and none has it open now


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
    for program, code in (('print(1)', 0), ('1 / 0', 1)):
        assert run('sandbox.py', stdin=program).returncode == code
