"""plan.py: what it says of memory beside what a process took, its FLOPs beside torch's counter, its
communication beside what DDP and the optimizers send, its times beside an H100's.

Figures of an H100 are in results/h100/gpu.json.
"""
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import distributed
import hardware
import muon
import start
import train
from configurator import knob_values, run_config
from lab import plan, roofline
from model import Xmodel, XmodelConfig

C = XmodelConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_ffn=96, vocab_size=96, block_size=8)
PHASE = {'name': 'decay', 'steps': 20_000, 'batch': 960, 'block_size': 3776, 'optimizer': 'muon'}


# --- FLOPs and time ---

def test_flops_of_the_estimate_are_those_that_torch_counts(monkeypatch):
    monkeypatch.setattr('kernels.MATMUL_MAX_T', 0)            # the fused kernel, as on a GPU
    c, B = replace(C, block_size=64, vocab_size=128), 2
    idx = torch.zeros(B, c.block_size, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Xmodel(c)
        with FlopCounterMode(display=False) as counter:
            model(idx, idx)[1].backward()
    block, logits = roofline.work_of_a_block(c, B), roofline.work_of_logits(c, B)
    ours = {part.layer: 0 for part in block}
    for part in block:
        ours[part.layer] += part.flops
    attention = ours.pop('attention')
    # torch counts none of attention on a CPU
    assert c.n_layer * sum(ours.values()) + logits[0].flops == counter.get_total_flops()
    q = B, c.n_head, 64, c.hd                                    # half, as the mask is causal
    assert attention == (sdpa_flop_count(q, q, q) + sdpa_backward_flop_count(q, q, q, q)) / 2


def test_a_gemm_bound_by_flops_gains_two_and_one_by_bytes_what_it_moves():
    def gain(M, K, N):
        c = replace(C, n_embd=K, n_ffn=N // 2, block_size=M, n_head=1)
        part = next(part for part in roofline.work_of_a_block(c, 1) if part.sizes == (M, K, N))
        return roofline.roofline([part], 'bf16') / roofline.roofline([part], 'delayed')
    assert gain(16384, 8192, 8192) == pytest.approx(1979 / 989)
    assert gain(16, 1024, 1024) == pytest.approx(2 * (16 + 1024 + 16) / (16 + 1024 + 2 * 16))


def test_a_micro_batch_takes_the_time_of_its_own_way_of_scaling():
    c, on = replace(XmodelConfig(), block_size=3712), roofline.GPUS['h100']
    work = roofline.work_of_a_step(c, 2)
    seconds = []
    for knob, way in ((False, 'bf16'), (True, 'delayed'), ('dynamic', 'dynamic')):
        seconds.append(roofline.seconds_of_a_micro_batch(c, 2, on, knob))
        right = roofline.roofline(work, way, on, roofline.REACHED)
        assert seconds[-1] == pytest.approx(right), way
    bf16, delayed, dynamic = seconds
    assert delayed < dynamic and delayed < bf16                  # dynamic has more to move


def test_seconds_are_those_that_an_h100_took():
    for m in plan.measured_on_an_h100():
        if m.rows * m.T > 10_000:
            assert m.planned()[1] == pytest.approx(m.seconds, rel=0.1), m


def test_tokens_a_second_of_another_model_on_another_gpu_are_near_the_published_ones():
    # TinyLlama 1.1B (arXiv 2401.02385, section 2.3): 24 000 tokens a second on an A100 40GB, whose
    # memory gives 1.555 TB/s
    tiny_llama = XmodelConfig(22, 32, 4, 2048, 5632, 32_000, 2048)
    a100 = roofline.GPUS['a100']._replace(bandwidth=1.555e12)
    speed = 8 * 2048 / roofline.seconds_of_a_micro_batch(tiny_llama, 8, a100)
    assert speed == pytest.approx(24_000, rel=0.1)


def test_optimizers_take_what_they_took_on_an_h100():
    c = replace(XmodelConfig(), block_size=PHASE['block_size'])
    parts = json.loads(plan.MEASUREMENTS.read_text())['parts']
    took = {name: figures['ms'] / 1000 for name, figures in parts['optimizers'].items()
            if 'ms' in figures}
    for kind in ('adamw', 'muon'):
        planned = plan.plan_phase(PHASE | {'optimizer': kind}, c, 1, roofline.GPUS['h100'])
        assert planned['optimizer'] == pytest.approx(took['clipping'] + took[kind], rel=0.1)


# --- memory ---

# a step of few tokens first, which loads what libraries load
ONE_STEP = """
import gc, re, sys
from pathlib import Path
import torch
from fp8 import convert_to_float8
from model import Xmodel, XmodelConfig
checkpointing, fp8, bf16, *shape, rows = map(int, sys.argv[1:])

def status(key):
    return 1024 * int(re.search(key + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])

def step(x):
    if fp8:
        scaling.round_weights()
    with torch.autocast('cpu', torch.bfloat16, enabled=bool(bf16)):
        loss = model(x, x)[1]
    loss.backward()
    if fp8:
        scaling.collect()

model = Xmodel(XmodelConfig(*shape))
model.activation_checkpointing = bool(checkpointing)
for p in model.parameters():
    p.grad = torch.zeros_like(p)
if fp8:
    scaling = convert_to_float8(model)
    scaling.own_amax = False
step(torch.zeros(1, 16, dtype=torch.long))
gc.collect()
before = status('VmRSS')
Path('/proc/self/clear_refs').write_text('5')                    # the peak begins anew
step(torch.zeros(rows, shape[-1], dtype=torch.long))
print(status('VmHWM') - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('checkpointing, fp8', [(0, 0), (1, 0), (0, 1)])
def test_memory_of_a_step_is_what_a_process_takes(checkpointing, fp8):
    bf16 = hardware.has_bf16('cpu')                                  # else it takes minutes
    shape, rows = (4, 4, 2, 256, 640, 4096, 512), 16
    argv = map(str, (checkpointing, fp8, int(bf16), *shape, rows))
    # freed memory goes back to the system at once, so that resident is what is alive
    done = subprocess.run([sys.executable, '-c', ONE_STEP, *argv], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'},
                          check=True)
    planned = plan.peak_of_a_step(XmodelConfig(*shape), rows, checkpointing, fp8, bf16,
                                  as_on_gpu=False)[1]
    assert planned == pytest.approx(int(done.stdout), rel=0.1)


def test_compiled_blocks_held_less_on_an_h100_than_is_planned():
    for m in plan.measured_on_an_h100():
        if m.rows * m.T > 10_000:
            assert 0.8 < m.peak / m.planned()[0] < 0.87, m


@pytest.mark.parametrize('again', [False, True])
def test_two_and_three_blocks_tell_of_all(again):
    c = XmodelConfig(9, 2, 1, 64, 160, 2**10, 1024)
    assert plan.activations(c, 3, again, False) == \
        pytest.approx(plan.peak_of_a_step(c, 3, again)[1], rel=0.01)
    few = XmodelConfig(24, 4, 1, 256, 640, 16_384, 64)           # where it is the embedding's
    assert plan.activations(few, 1, again, False) == \
        pytest.approx(plan.peak_of_a_step(few, 1, again)[1], rel=0.05)


@pytest.mark.parametrize('vocab_size', [2**18, 2**12])           # the latter's logits are one chunk
def test_the_largest_micro_batch_fits_and_one_more_row_does_not(vocab_size):
    c = XmodelConfig(3, 2, 1, 64, 160, vocab_size, 16384)
    for rows in (1, 5):
        room = plan.activations(c, rows, False, False)
        assert plan.most_rows(c, False, False, room) == rows
    assert plan.most_rows(c, False, False, 1e6) == 0


def test_planning_leaves_the_model_as_it_was():
    before = plan.kernels.CHUNK, torch.nn.functional.log_softmax
    plan.peak_of_a_step(C, 1)
    assert before == (plan.kernels.CHUNK, torch.nn.functional.log_softmax)


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_state_of_the_optimizers_is_as_large_as_that_of_torchs_own(kind):
    c = XmodelConfig(3, 2, 1, 64, 160, 512)
    matrices, others = [], []
    for name, p in Xmodel(c).named_parameters():
        p.grad = torch.zeros_like(p)
        if kind == 'muon' and re.search(r'qkv|out|gate_up|down', name):
            matrices.append(p)
        else:
            others.append(p)
    optimizers = [torch.optim.AdamW(others)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices))
    for optimizer in optimizers:
        optimizer.step()
    kept = sum(t.nbytes for o in optimizers for state in o.state.values() for t in state.values())
    state, passing = plan.optimizer_bytes(c, kind)
    assert state == kept
    # Muon orthogonalises all matrices of a shape together, in bf16, and holds more than one copy
    largest = max((p.numel() for p in matrices), default=0)
    assert (passing > 2 * 2 * largest * c.n_layer) == (kind == 'muon')


@pytest.mark.parametrize('kind, gigabytes', [('adamw', 16.2), ('muon', 11.6)])
def test_weights_and_state_fill_a_checkpoint_as_one_that_an_h100_wrote(kind, gigabytes):
    c = replace(XmodelConfig(), block_size=PHASE['block_size'])
    planned = plan.plan_phase(PHASE | {'optimizer': kind}, c, 1, roofline.GPUS['h100'])
    assert (planned['weights'] + planned['state']) / 1e9 == pytest.approx(gigabytes, abs=0.05)


# --- a phase on some GPUs ---

@pytest.mark.parametrize('reduce_dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_bytes_received_are_those_that_ddp_and_the_optimizers_exchange(kind, reduce_dtype,
                                                                       monkeypatch, tmp_path):
    c, world = XmodelConfig(3, 2, 1, 64, 160, 512, 8), 4
    reduced, broadcast_bytes = [], []
    all_reduce = torch.distributed.all_reduce

    class Work:
        wait = staticmethod(lambda: None)

    def count_reduced(t, async_op):
        reduced.append(t.nbytes)
        return all_reduce(t, async_op=async_op)

    def count_broadcast(t, source, async_op=False):
        broadcast_bytes.append(t.nbytes)
        return Work
    for room in (distributed, muon):                             # as if it were one rank of four
        monkeypatch.setattr(room, 'ranks', lambda: (1, world))
    monkeypatch.setattr(torch.distributed, 'all_reduce', count_reduced)
    monkeypatch.setattr(torch.distributed, 'broadcast', count_broadcast)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0,
                                         world_size=1)
    try:
        model = Xmodel(c)
        net = distributed.data_parallel(model, getattr(torch, reduce_dtype))
        x = torch.zeros(2, c.block_size, dtype=torch.long)
        net(x, x)[1].backward()
        for optimizer in muon.make_optimizers(kind, model.param_groups(), dtype=torch.bfloat16):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    # In a ring, each rank receives (world - 1) / world of a message that is broadcast in parts from
    # all, and twice that of one that is reduced, as its sums have to be gathered, too.
    received = (2 * sum(reduced) + sum(broadcast_bytes)) * (world - 1) / world
    monkeypatch.setattr(train, 'reduce_dtype', reduce_dtype)
    planned = plan.plan_phase(PHASE | {'optimizer': kind}, c, world, roofline.GPUS['h100'])
    assert planned['received'] == received


def test_muon_takes_less_than_a_twentieth_of_the_paper_runs_step():
    c = replace(XmodelConfig(), block_size=PHASE['block_size'])
    for world in (8, 16, 240):
        told = plan.plan_phase(PHASE, c, world, roofline.GPUS['h100'])
        assert 0 < told['newton_schulz'] < 0.05 * told['step']


def test_a_phase_of_the_paper_run_by_hand(monkeypatch):
    monkeypatch.setattr(train, 'micro_batch_tokens', 4 * 3776)
    c, h100 = replace(XmodelConfig(), block_size=PHASE['block_size']), roofline.GPUS['h100']
    one, eight, sixteen = (plan.plan_phase(PHASE, c, world, h100) for world in (1, 8, 16))
    assert one['exposed'] == one['received'] == 0
    assert one['newton_schulz'] / eight['newton_schulz'] == pytest.approx(8, rel=0.01)
    assert eight['state'] == pytest.approx(one['state'] / 8)
    # What nothing hides, in GB: 0.795 of embedding and gains in fp32, 2.303 of U V^T in bf16, and
    # the gradient of the embedding, 0.794 in fp32, twice. Of these 4.686, 7/8 at 80 % of 450 GB/s;
    # between nodes, 15/16 at 80 % of 400.
    assert eight['exposed'] == pytest.approx(0.01139, rel=1e-3)
    assert sixteen['exposed'] == pytest.approx(0.01373, rel=1e-3)
    # AdamW on eight: norm and zeros read or write 16 bytes a parameter, the step 28 / 8,
    # the exchange 8: in all 37.1 GB at 62 % of 3.35 TB/s
    adamw = plan.plan_phase(PHASE | {'optimizer': 'adamw'}, c, 8, h100)
    assert adamw['optimizer'] == pytest.approx(0.01787, rel=1e-3)
    # 120 rows a GPU, 4 at a time: an H100 took 0.341 s for 4 rows of 3712 in bf16
    measured = 30 * 0.341 * 3776 / 3712 + 0.112 / 8
    assert eight['step'] == pytest.approx(measured, rel=0.05)
    assert eight['days'] == pytest.approx(20_000 * measured / 86_400, rel=0.05)
    assert eight['tok_per_s'] == pytest.approx(960 * 3776 / measured, rel=0.05)


def test_the_state_is_that_of_the_rank_that_keeps_most(monkeypatch):
    phase, world = PHASE | {'batch': 6, 'block_size': C.block_size}, 3
    state = plan.plan_phase(phase, C, world, roofline.GPUS['h100'])['state']
    monkeypatch.setattr(muon, 'ranks', lambda: (0, world))
    matrices, adamw = muon.make_optimizers('muon', Xmodel(C).param_groups())
    momentum = [sum(4 * p.numel() for p, rank in matrices.owner.items() if rank == own)
                for own in range(world)]
    others = sum(p.numel() for group in adamw.param_groups for p in group['whole'])
    assert state == pytest.approx(max(momentum) + 8 * others / world, rel=1e-3)
    assert max(momentum) > 1.05 * sum(momentum) / world         # they cannot be shared evenly


def test_the_plan_in_results_is_of_this_code(monkeypatch):
    knobs, assigned = run_config(str(ROOT / 'config/xmodel25.py'), knob_values(vars(train)))
    for key in assigned.keys() & vars(train).keys():
        monkeypatch.setattr(train, key, knobs[key])
    c = replace(start.model_config(knobs), block_size=3712)
    told = plan.plan_phase(knobs['phases'][0], c, 8, roofline.GPUS['h100'])
    row = f'| 8 | stable1 | 60 | {told["memory"] / 1e9:.3g} | {told["micro"]:.3g} | ' \
        f'{told["exposed"] / told["step"]:.0%} of a step | {told["step"]:.3g} | ' \
        f'{told["tok_per_s"] / 8:,.0f} | {told["days"]:.3g} |\n'
    assert row in (ROOT / 'results/plan.md').read_text()


def test_a_plan_is_printed_for_a_config():
    done = run('lab.bench', 'config/nano.py', '--plan', '--gpus=2', '--gpu=a100')
    assert (done.returncode, done.stderr) == (0, '')
    tables = [line.split(' | ') for line in done.stdout.splitlines() if line.startswith('| ')]
    told = [row for row in tables if row[0][2:] in ('stable1', 'stable2', 'decay', 'long')]
    assert len(told) == 3 * 4 and '# 238,144 parameters on 2 x a100' in done.stdout
    assert [row[2] for row in told[8:]] == ['4 x 128', '8 x 128', '8 x 128', '2 x 512']
    assert '| 512 | stable1 | 0.00781 (does not divide) |' in done.stdout
    assert 'Beside measurements' not in done.stdout              # those are of another model


def test_a_plan_that_is_stopped_is_one_line(tmp_path):
    (tmp_path / 'stopped.py').write_text('raise KeyboardInterrupt')
    done = run('lab.plan', tmp_path / 'stopped.py')
    assert (done.returncode, done.stderr) == (130, 'plan.py: stopped\n')
