"""train.py's learning rates in the 1.3B run, against figures worked out by hand.

The phases are those of Xmodel-2.5's released scripts (arXiv 2511.19496): 270 000 + 260 000 stable
steps, 20 000 of decay, 10 000 of long context. Matrices run at learning_rate / m, m = 6.
"""
from pathlib import Path

import pytest
import torch

import configurator
import start
import train


@pytest.fixture(autouse=True)
def xmodel25(monkeypatch):
    knobs = dict(vars(train))
    configurator.configure(knobs, [str(Path(train.__file__).parent / 'config/xmodel25.py')])
    for key, value in configurator.knob_values(knobs).items():
        monkeypatch.setattr(train, key, value)
    start.complete_phases(train.phases, train.steps_scale)


@pytest.mark.parametrize('step, matrices, embedding', [
    (0,       0,           0),                  # warmup: linear from 0 over 2000 steps
    (500,     4.166667e-4, 0.0025),
    (1_999,   1.665833e-3, 0.009995),           # 1999 / 2000 of the peak
    (2_000,   1.666667e-3, 0.01),               # stable: 0.01 / 6 and 0.01
    (269_999, 1.666667e-3, 0.01),
    (270_000, 1.666667e-3, 0.01),
    (529_999, 1.666667e-3, 0.01),
    (530_000, 1.666667e-3, 0.01),               # decay begins at the peak, to peak / 16
    (540_000, 7.513753e-4, 4.508252e-3),        # half: min + (2 sqrt(1/2) - 1) (max - min)
    (549_999, 1.042208e-4, 6.253249e-4),        # min + (2^(1/20000) - 1) (max - min)
    (550_000, 1e-6,        1e-6),               # long: 500 steps of warmup
    (550_250, 5.258333e-5, 3.13e-4),            # half of it
    (550_500, 1.041667e-4, 6.25e-4),
    (555_250, 5.708333e-5, 3.175e-4),           # linear: half of the way to 1e-5
    (559_999, 1.000991e-5, 1.006474e-5),        # 1 / 9500 of the way left
])
def test_learning_rates(step, matrices, embedding):
    learning_rate, embedding_lr = train.lr_at(step)
    assert learning_rate / 6 == pytest.approx(matrices, rel=1e-6)
    assert embedding_lr == pytest.approx(embedding, rel=1e-6)


def test_a_cosine_is_that_of_torch():
    steps, peak, end = 40, 0.02, 0.002
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=end)
    phase = {'steps': steps + 10, 'warmup': 10, 'decay': 'cosine'}
    for i in range(steps):
        assert train.factor_at(phase, 10 + i, (0, peak, end)) == \
            pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_past_the_end():
    with pytest.raises(ValueError, match='560000'):
        train.lr_at(560_000)


def test_tokens_and_optimizers_of_the_phases():
    tokens = [p['steps'] * p['batch'] * p['block_size'] / 1e9 for p in train.phases]
    assert tokens == pytest.approx([481.1, 926.5, 72.5, 39.3], abs=0.05)     # billions
    assert [p['optimizer'] for p in train.phases] == ['adamw', 'adamw', 'muon', 'muon']


@pytest.mark.parametrize('scale, steps, warmups, half', [
    (0.01, [2700, 2600, 200, 100], [20, 0, 0, 5], 10),
    (0.002, [540, 520, 40, 20], [4, 0, 0, 1], 2)])
def test_a_run_in_small_has_a_short_warmup(scale, steps, warmups, half):
    start.complete_phases(train.phases, scale)
    assert [phase['steps'] for phase in train.phases] == steps
    assert [phase['warmup'] for phase in train.phases] == warmups
    assert train.lr_at(half) == (pytest.approx(0.005), pytest.approx(0.005))
    assert train.lr_at(2 * half) == (0.01, 0.01)
