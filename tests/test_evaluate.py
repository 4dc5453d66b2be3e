"""train.evaluate, the held-out loss of a run, beside the same loss in float64."""
import faulthandler
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import log, run

import train
from checkpoint import checkpoints, load_model
from loader import get_windows, open_data

NAMES = ['arith', 'stdlib']                                      # SFT data and plain text


def evaluate(monkeypatch, model, data, T, rows, eval_rows, completion_only):
    """train.evaluate on the CPU in fp32; the one place here that knows how it is called."""
    monkeypatch.setattr(train, 'eval_rows', eval_rows)
    monkeypatch.setattr(train, 'completion_only', completion_only)
    phase = {'block_size': T, 'data': dict.fromkeys(data, 1)}
    try:
        return train.evaluate(model, data, phase, rows, torch.device('cpu'), nullcontext())
    finally:
        faulthandler.cancel_dump_traceback_later()               # its timer would end the tests


def loss_in_float64(model, dataset, T, eval_rows, completion_only):
    """Mean loss of a model in double over eval_rows windows spread over the validation split."""
    available = dataset.n_windows('val', T)
    n = min(eval_rows, available)
    total = count = 0
    for j in range(n):                                           # one by one, so nothing is padded
        x, y = get_windows(dataset, 'val', [j * available // n], T, completion_only)
        with torch.no_grad():
            logits = model(x)[0][0]
        assert logits.dtype == torch.float64
        total += F.cross_entropy(logits, y[0], ignore_index=-1, reduction='sum').item()
        count += (y >= 0).sum().item()
    return total / count


@pytest.fixture(scope='module')
def data(data_dir):
    return open_data(data_dir, NAMES, 512)


@pytest.fixture(scope='module')
def models(tiny_run):
    """The same trained model in fp32 and in float64."""
    return load_model(tiny_run)[0], load_model(tiny_run)[0].double()


@pytest.mark.parametrize('T, rows, eval_rows, completion_only', [
    (64, 4, 12, False), (64, 4, 10, False), (64, 8, 3, False), (256, 8, 1000, False),
    (128, 4, 10, True), (256, 8, 1000, True)],
    ids=['full micro-batches', 'a last one with rows that do not count', 'less than a micro-batch',
         'fewer windows than eval_rows', 'completions', 'completions of all windows'])
def test_the_held_out_loss_is_that_of_float64(models, data, monkeypatch, T, rows, eval_rows,
                                              completion_only):
    model, double = models
    ours = evaluate(monkeypatch, model, data, T, rows, eval_rows, completion_only)
    right = {name: loss_in_float64(double, dataset, T, eval_rows, completion_only)
             for name, dataset in data.items()}
    assert ours == pytest.approx(right, abs=1e-5) and list(ours) == NAMES


def test_completion_only_is_another_loss_on_sft_data_alone(models, data, monkeypatch):
    every, completions = (evaluate(monkeypatch, models[0], data, 128, 4, 10, completion_only)
                          for completion_only in (False, True))
    assert abs(every['arith'] - completions['arith']) > 0.01
    assert every['stdlib'] == completions['stdlib']


def test_a_run_logs_the_loss_of_its_checkpoint_and_the_mixtures_mean(tiny, data, tmp_path):
    folder, mixture = tmp_path / 'run', {'arith': 3, 'stdlib': 1}
    done = run('train.py', *tiny, f'--out_dir={folder}', '--dtype=float32',
               '--phases.stable.steps=0', '--phases.decay.steps=4', '--phases.long.steps=0',
               f'--phases.decay.data={mixture}', '--eval_interval=2', '--checkpoint_interval=2',
               '--eval_rows=7', '--micro_batch_tokens=256', '--completion_only=True')
    assert done.returncode == 0, done.stderr
    entries = {entry['step'] + 1: entry for entry in log(folder) if 'val_loss' in entry}
    assert list(entries) == [2, 4] == [int(path.stem[5:]) for path in checkpoints(folder)]
    for step, entry in entries.items():
        model = load_model(folder / f'step_{step}.pt')[0].double()
        right = {name: loss_in_float64(model, dataset, 64, 7, True)
                 for name, dataset in data.items()}
        assert entry['val_losses'] == pytest.approx(right, abs=1e-5)
        mean = (3 * right['arith'] + right['stdlib']) / 4
        assert entry['val_loss'] == pytest.approx(mean, abs=1e-5)
        assert abs(right['arith'] - right['stdlib']) > 0.01
