"""run.py: what is said of a run beside its numbers."""
import signal
from types import SimpleNamespace

import pytest
from conftest import log
from conftest import run as run_script

import run
from checkpoint import TrainState
from model import Xmodel, XmodelConfig

PHASES = [{'name': 'stable', 'steps': 100, 'batch': 4, 'block_size': 64, 'optimizer': 'adamw'},
          {'name': 'decay', 'steps': 50, 'batch': 8, 'block_size': 64, 'optimizer': 'muon'}]


def test_the_time_left_counts_muons_steps_by_a_muon_step(monkeypatch, capsys):
    monkeypatch.setattr(run, 'seconds_of_a_muon_step', lambda model: 30.0)
    model = Xmodel(XmodelConfig(1, 1, 1, 16, 32, 64, 64))
    progress = run.Progress(SimpleNamespace(phases=PHASES), model, TrainState(), 150)
    for step in range(5):
        progress.time_step(PHASES[0], 2.0, 1.0, step)
    # step 4 was the last: 95 steps of 2 + 1 s, and 50 of twice the rows with a Muon step of 30 s
    assert progress.seconds_left(5) == pytest.approx(95 * 3 + 50 * (4 + 30))
    for step in range(100, 105):                                 # now Muon's own are measured
        progress.time_step(PHASES[1], 4.0, 6.0, step)
    assert progress.seconds_left(105) == pytest.approx(45 * (4 + 6))
    assert capsys.readouterr().out.splitlines() == ['about 33 minutes to go',
                                                    'about 8 minutes to go']


def test_a_muon_step_is_measured_on_the_matrices_of_the_blocks():
    assert run.seconds_of_a_muon_step(Xmodel(XmodelConfig(2, 1, 1, 16, 32, 64, 64))) > 0


@pytest.mark.parametrize('after, told', [
    (3.0, ['step 109: loss 3.000 after the change of optimizer is above 2.000']), (1.9, [])])
def test_the_newest_ten_losses_are_compared_with_those_before_the_switch(capsys, after, told):
    state = TrainState(loss_history=[2.0] * 50)
    watch = run.LossWatch(SimpleNamespace(), state, None, [])
    watch.expect_no_spike(100)
    for step in range(100, 160):
        watch.record(step, 100, after, [0, 1])
    lines = capsys.readouterr().out.splitlines()                 # one, at the tenth step
    assert [line.partition(',')[0] for line in lines] == told


def test_the_hang_timer_is_off_while_the_last_checkpoint_is_written(tiny, tmp_path):
    config = tmp_path / 'told.py'
    config.write_text("""
import faulthandler, sys
_RunFiles = sys.modules['run'].RunFiles
_start, _stop, _wait = faulthandler.dump_traceback_later, \\
    faulthandler.cancel_dump_traceback_later, _RunFiles.wait
def _started(*args, **how):
    print('timer on')
    _start(*args, **how)
def _stopped():
    print('timer off')
    _stop()
def _waits(self):
    print('waits')
    _wait(self)
faulthandler.dump_traceback_later, faulthandler.cancel_dump_traceback_later = _started, _stopped
_RunFiles.wait = _waits
""")
    done = run_script('train.py', *tiny, config, f'--out_dir={tmp_path / "run"}')
    assert done.returncode == 0, done.stderr
    events = [line for line in done.stdout.splitlines() if line.startswith(('timer', 'waits'))]
    assert events[-2:] == ['timer off', 'waits'] and events.count('timer on') > 20


def test_under_nohup_a_closed_terminal_ends_no_run(tiny, tmp_path):
    config = tmp_path / 'hang_up.py'
    config.write_text("""
import os, signal, sys
_main = sys.modules['__main__']
_get_batch = _main.get_batch
def _hung_up(data, weights, rows, *rest):
    os.kill(os.getpid(), signal.SIGHUP)
    return _get_batch(data, weights, rows, *rest)
_main.get_batch = _hung_up
""")
    done = run_script('train.py', *tiny, config, f'--out_dir={tmp_path / "run"}',
                      preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(log(tmp_path / 'run')) == 20
