"""start.py, beside what test_train.py sees of it in whole runs."""
import os
import shutil
from types import SimpleNamespace

import pytest

import start
from checkpoint import checkpoints, read_checkpoint


@pytest.mark.parametrize('damaged, on', [((16,), 8), ((20,), 16), ((16, 20), 8), ((8, 16, 20), '')])
def test_the_newest_checkpoint_that_is_whole_is_offered(tiny_run, tmp_path, damaged, on):
    steps = [n for n in (8, 16, 20) if n <= damaged[-1]]
    for n in steps:
        shutil.copy(tiny_run / f'step_{n}.pt', tmp_path)
        if n in damaged:
            os.truncate(tmp_path / f'step_{n}.pt', 1000)
    config = read_checkpoint(tiny_run)['config']
    advice = start.older_checkpoint(checkpoints(tmp_path), config, replay=False)
    without = ', '.join(f'step_{n}.pt' for n in damaged)
    assert advice == (f'; --resume without {without} goes on from step_{on}.pt' if on else '')


def test_of_two_runs_that_begin_in_one_folder_the_later_is_refused(tmp_path, capsys):
    (tmp_path / 'log.jsonl').write_text('')                      # by now
    knobs = SimpleNamespace(replay=-1, out_dir=str(tmp_path), reference='', resume=False)
    late = start.Start(None, None, None, False, None, existing=[])
    with pytest.raises(SystemExit):
        start.open_folder(late, knobs, {}, 'cpu')
    assert 'holds a run by now, which began when this one did' in capsys.readouterr().err
