"""processes.py: what begins with a process ends with it, however it ends."""
import os
import platform
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, make_chain

import processes

WORK = """
import os, sys
from pathlib import Path
from processes import signals_as_ctrl_c, temporary_folder
try:
    with signals_as_ctrl_c(), temporary_folder(sys.argv[1], 'x') as folder:
        (folder / 'half').write_text('half')
        print('ready', flush=True)
        sys.stdin.read()
except KeyboardInterrupt:
    sys.exit(2)
"""


def start(*argv, **options):
    """A process that has printed its first line."""
    process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, **options)
    process.stdout.readline()
    return process


@pytest.mark.parametrize('sign', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_removes_what_is_half_written(tmp_path, sign):
    process = start('-c', WORK, tmp_path, preexec_fn=lambda: signal.signal(
        signal.SIGINT, signal.default_int_handler))
    assert len(os.listdir(tmp_path)) == 1
    process.send_signal(sign)
    assert process.wait(10) == 2 and os.listdir(tmp_path) == []


STOPPED = {   # script: (its arguments, a file that it reads, what it says)
    'eval.py': (['run'], 'run/step_0.eval.json', 'eval.py: stopped; with --tasks'),
    'export.py': (['run', 'new'], 'run/log.jsonl', 'export.py: stopped; nothing was written'),
    'lab.coord_check': (['--data_dir=run', '--out=new'], 'run/stdlib/meta.json',
                        'coord_check.py: stopped'),
    'lab.speed': (['--redraw', '--out=run'], 'run/speed.json', 'speed.py: stopped'),
    'sample.py': (['run', '--batch=run/b.jsonl'], 'run/b.jsonl', '')}


@pytest.mark.parametrize('script', STOPPED)
@pytest.mark.parametrize('sign', [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_is_stopped_says_so_in_one_line_and_leaves_nothing(tmp_path, script, sign):
    arguments, file, told = STOPPED[script]
    make_chain(tmp_path / 'run', [5, 6])
    (tmp_path / 'run/stdlib').mkdir()
    os.mkfifo(tmp_path / file)                                   # it waits here for a writer
    words = [ROOT / script] if script.endswith('.py') else ['-m', script]
    process = subprocess.Popen(
        [sys.executable, *words, *arguments], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(  # noqa: PLW1509
            signal.SIGINT, signal.default_int_handler))
    with open(tmp_path / file, 'w'):
        process.send_signal(sign)
        output, error = process.communicate(timeout=20)
    exit_code = 130
    if script == 'sample.py' and sign == signal.SIGTERM:         # it has nothing to remove
        exit_code = -signal.SIGTERM
    assert (process.returncode, output) == (exit_code, ''), error
    assert error.startswith(told) and error.count('\n') == bool(told)
    assert os.listdir(tmp_path) == ['run']


def test_a_process_of_someone_else_is_alive(monkeypatch):
    def kill(pid, sign):
        raise PermissionError
    monkeypatch.setattr(os, 'kill', kill)
    assert processes.is_alive(1)


def test_nohup_holds(tmp_path):
    process = start('-c', WORK, tmp_path, preexec_fn=lambda: signal.signal(
        signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.communicate('', 10)
    assert process.returncode == 0 and os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else(tmp_path):
    alive, killed = start('-c', WORK, tmp_path), start('-c', WORK, tmp_path)
    killed.kill()
    killed.wait()
    others = ['.y.1.tmp', f'.x.{killed.pid}.elsewhere.tmp', f'.x.y.{killed.pid}.tmp', 'x']
    for name in others:
        (tmp_path / name).mkdir()
    own = [f'.x.{pid}.{platform.node()}.tmp' for pid in (alive.pid, os.getpid())]
    assert f'.x.{killed.pid}.{platform.node()}.tmp' in os.listdir(tmp_path)
    with processes.temporary_folder(tmp_path, 'x') as folder:
        assert folder.is_dir() and sorted(os.listdir(tmp_path)) == sorted([*others, *own])
    alive.communicate('')
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_script_ends_with_its_standard_input_and_else_as_it_would(tmp_path):
    (tmp_path / 'x.py').write_text('import sys, threading\nprint(*sys.argv, flush=True)\n'
                                   'if sys.argv[1] == "wait":\n    threading.Event().wait()\n'
                                   'sys.exit(7)\n')
    process = start('processes.py', tmp_path / 'x.py', 'wait')
    process.stdin.close()                                        # as if its parent had been killed
    assert process.wait(10) == 1
    process = start('processes.py', tmp_path / 'x.py', 'go')
    assert process.wait(10) == 7 and process.stderr.read() == ''


def test_a_second_signal_does_not_interrupt_what_cleans_up(tmp_path):
    work = WORK.replace("print('ready'", """
        import shutil, signal
        remove = shutil.rmtree
        def rmtree(*args, **options):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
            remove(*args, **options)
        shutil.rmtree = rmtree
        print('ready'""")
    process = start('-c', work, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 2 and os.listdir(tmp_path) == []


INTERRUPTED = """
import os, signal, sys, threading, traceback
from multiprocessing import util
import processes

def work(pipe):
    pipe.send('works')
    pipe.recv()

if __name__ == '__main__':
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # signals may come here
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    spawn = util.spawnv_passfds

    def main_waits():
        frame = sys._current_frames()[threading.main_thread().ident]
        return 'result' in [each.name for each in traceback.extract_stack(frame)]

    def interrupted(*args):
        pid = spawn(*args)
        if 'spawn_main' in str(args[1]):            # not the process that tracks resources
            for _ in range(10_000):                 # it never does if it starts workers itself
                if main_waits():
                    break
            os.kill(os.getpid(), signal.SIGINT)
            os.read(read, 1)                        # the signal has come
        return pid
    util.spawnv_passfds = interrupted
    processes.start_worker(work)
"""


def test_ctrl_c_while_a_worker_starts_does_not_leave_it_half_started(tmp_path):
    (tmp_path / 'x.py').write_text(INTERRUPTED)
    done = subprocess.run([sys.executable, tmp_path / 'x.py'], check=False, cwd=ROOT, text=True,
                          timeout=60, capture_output=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.stderr.count('Traceback') == 1 and 'KeyboardInterrupt' in done.stderr
    assert 'EOFError' not in done.stderr
