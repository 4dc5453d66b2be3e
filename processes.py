"""What a process begins, it ends: signals, temporary folders, processes that it has started.

    with signals_as_ctrl_c():        SIGTERM and SIGHUP clean up as Ctrl-C does
    with ending_in_one_line(...):    the same, and what ended the program is said in one line
    with temporary_folder(...):      removed at the end; after a SIGKILL, by the next process
    start_worker(function, ...)      ends when told to, at a signal, and at the end of the program
    python processes.py SCRIPT ...   run a script that ends when its standard input closes, as it
                                     does when whoever started it is killed
"""
import multiprocessing
import os
import platform
import runpy
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

from configurator import fail

STOPPED = 130                                                    # exit code at Ctrl-C, as in shells
STOPPING = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def signals_as_ctrl_c():
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that what is half-written is removed.

    Those that come after the first one are ignored, or they would interrupt that.
    """
    before, came = {}, []

    def stop(number, frame):
        came.append(number)
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():    # only it may set handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:       # as nohup sets SIGHUP
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        if not came:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def ending_in_one_line(file, note=''):
    """signals_as_ctrl_c; Ctrl-C and errors of the system end the program in one line.

    file: what it writes to, named where the error names none. note: what is not lost.
    """
    try:
        with signals_as_ctrl_c():
            yield
    except OSError as e:
        fail(f'{e.filename or file}: {e.strerror}{note}')
    except KeyboardInterrupt:
        fail(f'stopped{note}', STOPPED)


def worker_process(function, *args):
    """function(*args) in a process of its own, which a signal ends without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    function(*args)


def start_worker(function, *args):
    """(process, pipe to it) of a worker that calls function(its end of the pipe, *args)."""
    spawn = multiprocessing.get_context('spawn')
    pipe, workers_end = spawn.Pipe()
    process = spawn.Process(target=worker_process, daemon=True,
                            args=(function, workers_end, *args))

    def start():
        resource_tracker.ensure_running()                        # which would unblock them
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)       # here, and in it until it works
        process.start()

    # in a thread, which no KeyboardInterrupt cuts short: the worker would be half-started
    with ThreadPoolExecutor(1) as thread:
        thread.submit(start).result()
    workers_end.close()                              # so that the worker's death closes the pipe
    return process, pipe


def is_alive(pid):
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)                                          # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:                                      # someone else's
        pass
    return True


@contextmanager
def temporary_folder(parent, name):
    """A new folder, .NAME.PID.MACHINE.tmp in `parent`, which is removed at the end.

    Those that processes on this machine have left, which were killed, are removed at once.
    """
    machine = platform.node()
    folder = Path(parent, f'.{name}.{os.getpid()}.{machine}.tmp')
    for other in Path(parent).glob(f'.{name}.*.{machine}.tmp'):
        pid = other.name.removeprefix(f'.{name}.').removesuffix(f'.{machine}.tmp')
        if pid == str(os.getpid()) or (pid.isdecimal() and not is_alive(int(pid))):
            shutil.rmtree(other, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def end_with_standard_input():
    """End this process when its standard input closes."""
    def wait():
        # (not sys.stdin: a read that waits has its lock, for which Python waits at the end)
        while os.read(0, 4096):
            pass
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


if __name__ == '__main__':
    end_with_standard_input()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
