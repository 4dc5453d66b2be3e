"""hardware.py: what is claimed of a device, and that a training step waits once for a GPU."""
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import log, run, run_ranks

import hardware
from lab import roofline

CUDA = SimpleNamespace(type='cuda')


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 0.0), ('NVIDIA H100 NVL', 0.0),
    ('NVIDIA A100 80GB PCIe', 312e12), ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', 0.0),
    ('NVIDIA H200', 989e12), ('NVIDIA B200', 2250e12), ('NVIDIA GeForce RTX 4090', 0.0)])
def test_a_peak_is_only_claimed_of_a_gpu_that_is_known(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    for dtype in (torch.bfloat16, torch.float32):                # of bf16, by convention
        assert hardware.peak_flops(CUDA, dtype) == peak
    assert roofline.GPUS is hardware.GPUS                        # the planner's table


def test_a_measured_peak_is_that_of_the_fastest_product(monkeypatch):
    before = torch.get_rng_state()
    # a clock that goes on by 2 s when it is read: so each product takes 2 s, and its turn 6 s
    ticks = itertools.count(0, 2)
    monkeypatch.setattr(hardware.time, 'perf_counter', lambda: next(ticks))
    for seconds, n in ((1, 256), (11, 256), (13, 512), (25, 1024)):
        assert hardware.gemm_flops('cpu', torch.float32, seconds) == 2 * n**3 / 2
    assert torch.equal(torch.get_rng_state(), before)            # the run's numbers are not drawn


@pytest.mark.parametrize('world', [1, 2])
def test_the_log_has_mfu_and_the_loaders_seconds(world, tiny, tmp_path):
    config = tmp_path / 'peak.py'                                # of a rank
    config.write_text("import sys\nsys.modules['__main__'].peak_flops = lambda *_: 4e9\n")
    args = [*tiny, config, f'--out_dir={tmp_path / "run"}', '--steps_scale=0.2']
    done = run_ranks(world, 'train.py', *args) if world > 1 else [run('train.py', *args)]
    assert not any(process.returncode for process in done), done[0].stderr
    about = json.loads((tmp_path / 'run/log.jsonl').read_text().splitlines()[0])
    parameters = 512 * 32 + 2 * (32 * 64 + 32 * 32 + 3 * 32 * 80 + 2 * 32) + 32
    flops = 6 * parameters + 2 * 12 * 32 * 64 / 2                # of a token
    mfu = flops * about['tok_per_s'] / (4e9 * world)
    assert about['mfu'] == pytest.approx(mfu, abs=6e-5) and about['data_s'] > 0
    assert f'MFU {about["mfu"]:.1%}' in done[0].stdout
    assert 'mfu' not in log(tmp_path / 'run')[0]                 # a clock's, as tok_per_s


# --- a GPU's queue ---

class Event:
    """An event in a queue of work: it has a time when a wait has let the GPU come so far."""
    queue = done = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = Event.queue

    def elapsed_time(self, other):
        assert max(self.time, other.time) <= Event.done, 'would be an error on a GPU'
        return 1000 * (other.time - self.time)


def test_a_gpus_clock_is_read_without_a_wait_of_its_own(monkeypatch):
    waits = []

    def wait():
        waits.append(Event.queue)
        Event.done = Event.queue
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'synchronize', wait)
    clock, told = hardware.StepClock(CUDA), []
    steps = [('adamw', 3.0, 1.0), ('adamw', 4.0, 1.5), ('muon', 5.0, 9.0), ('muon', 6.0, 8.0)]
    for kind, passes, optimizer in steps:
        clock.mark()
        Event.queue += passes
        clock.mark()
        Event.done = Event.queue                                 # the loop reads the loss
        Event.queue += optimizer
        clock.mark()
        told.append(clock.seconds(kind))
    # the optimizer's seconds are the step before's, but of no other kind's
    assert told == [(3.0, 1.0), (4.0, 1.0), (5.0, 9.0), (6.0, 9.0)]
    assert len(waits) == 2                                       # the first steps of both kinds


# A config that counts, in each step of a run on a CPU, where a GPU would have to be waited for.
# Tensors are "there" that would be on the GPU: parameters, what to_device returns, and all that is
# computed from them. To read a number of theirs is a wait, and so is any copy but to_device's.
WAITS = """
import collections, json, sys, traceback
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
_main, _run = sys.modules['__main__'], sys.modules['run']
_waits, _steps, _storages = collections.Counter(), [], {}

def _tensors(value):
    return [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor)]

def _put_there(*tensors):
    for t in tensors:
        storage = t.untyped_storage()
        _storages[storage._cdata] = storage                      # kept, so that none takes its id

def _is_there(t):
    return t.untyped_storage()._cdata in _storages

def _wait(what):
    names = {frame.name for frame in traceback.extract_stack()}
    if not names & {'evaluate', 'save', 'compile_for'}:          # not of every step
        _waits[what] += 1

class _GPU(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        inputs = _tensors((args, kwargs))
        if any(map(_is_there, inputs)):
            name = op._schema.name.split('::')[1]
            if name in ('_local_scalar_dense', 'is_nonzero', 'nonzero', 'masked_select', 'equal'):
                _wait(name)
            changed = inputs if name.endswith('_') else []
            _put_there(*_tensors(result), *changed)
        return result

def _before(owner, name, watch):
    call = getattr(owner, name)
    def watched(*args, **kwargs):
        watch(*args, **kwargs)
        return call(*args, **kwargs)
    setattr(owner, name, watched)

def _copied(t, where=None, *rest, **kwargs):
    if isinstance(where, torch.device) and not _is_there(t):
        _wait('copy')

def _read(t):
    if _is_there(t):
        _wait('tolist')

def _step_begins(*_):
    _steps.append(dict(_waits))
    _waits.clear()

def _to_device(t, device):
    t = t.clone()
    _put_there(t)
    return t

def _sum_over_ranks(numbers, device, call=_main.sum_over_ranks):
    total = call(numbers, device)
    if device != 'cpu':
        _put_there(total)
    return total

_before(torch.Tensor, 'to', _copied)
_before(torch.Tensor, 'tolist', _read)
_before(torch.accelerator, 'synchronize', lambda: _wait('synchronize'))
_before(_main, 'data_parallel', lambda model, dtype: _put_there(*model.parameters()))
_before(_run.RunFiles, 'heartbeat', _step_begins)
_before(_main, 'end_of_run', lambda *_: print('waits', json.dumps([*_steps[1:], _waits])))
_main.to_device, _main.sum_over_ranks = _to_device, _sum_over_ranks
_GPU().__enter__()
"""


@pytest.mark.parametrize('fp8', [False, True])
def test_a_step_waits_for_a_gpu_once(fp8, tiny, tmp_path):
    config = tmp_path / 'waits.py'
    config.write_text(WAITS)
    done = run('train.py', *tiny, config, f'--out_dir={tmp_path / "run"}', f'--fp8={fp8}',
               '--micro_batch_tokens=128')
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith('waits '))
    waits = json.loads(line.removeprefix('waits '))
    assert len(waits) == 20
    if fp8:                                                      # has every tensor an amax now?
        assert waits[0].pop('_local_scalar_dense') == 1
    assert waits == [{'tolist': 1}] * 20
