"""fp8.py: rounding and GEMMs against float64, delayed scaling's rules, layouts, compile, ranks."""
import copy
import functools
import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SERVER, free_port, log, refused, run, same
from torch import distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fp8
import start
import train
from checkpoint import checkpoints, read_checkpoint
from distributed import data_parallel, gradients_stay_here
from fp8 import E4M3, E5M2, convert_to_float8
from model import Xmodel, XmodelConfig, rope_angles

SMALL = XmodelConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_ffn=160, vocab_size=96,
                     block_size=32)


def values(bits_exponent, bits_mantissa, largest):
    """All finite values of a format, in float64, from its definition: 0 and up."""
    bias, steps = 2**(bits_exponent - 1) - 1, 2**bits_mantissa
    subnormal = [k / steps * 2.0**(1 - bias) for k in range(steps)]
    normal = [(1 + k / steps) * 2.0**(e - bias) for e in range(1, 2**bits_exponent)
              for k in range(steps)]
    return np.array([v for v in subnormal + normal if v <= largest])


TABLES = {E4M3: values(4, 3, 448), E5M2: values(5, 2, 57344)}


def rounded(x, scale, dtype):
    """x · scale to the nearest value of the format, in float64; ties to the even neighbour."""
    table = TABLES[dtype]
    x = (x.float() * scale).double().numpy()             # the product is fp32's, as a GPU has it
    size = np.minimum(np.abs(x), table[-1])
    above = np.searchsorted(table, size).clip(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    up = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return torch.from_numpy(np.copysign(np.where(up, high, low), x))


def linear(n_in=64, n_out=96, seed=0, **knobs):
    """(Float8Linear, its DelayedScaling)."""
    torch.manual_seed(seed)
    holder = nn.Module()
    holder.blocks = nn.ModuleList([nn.Linear(n_in, n_out, bias=False)])
    return holder.blocks[0], convert_to_float8(holder, **knobs)


def gaussian(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(layer, x, grad):
    """(output, gradient of x, gradient of the weight) of a forward and backward pass."""
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, layer.weight.grad


# --- rounding and GEMMs ---

@pytest.mark.parametrize('dtype', [E4M3, E5M2])
def test_quantise_rounds_to_the_nearest_and_saturates(dtype):
    x = torch.cat([gaussian(5000) * 2.0**k for k in range(-24, 24, 4)])
    table = torch.from_numpy(TABLES[dtype])
    ties = (table[1:] + table[:-1]) / 2
    x = torch.cat([x, ties.float(), -ties.float(), table.float(), torch.tensor([1e30, -1e30])])
    for scale in (torch.tensor(1.0), torch.tensor(3.7)):
        assert torch.equal(fp8.quantise(x, scale, dtype).double(), rounded(x, scale, dtype))
        bf16 = x.bfloat16()                                      # is not rounded to bf16 once more
        assert torch.equal(fp8.quantise(bf16, scale, dtype).double(), rounded(bf16, scale, dtype))
    inf = fp8.quantise(torch.tensor([math.inf, -math.inf, math.nan]), torch.tensor(1.0), dtype)
    assert inf[:2].float().tolist() == [table[-1], -table[-1]] and inf[2].float().isnan()


@pytest.mark.parametrize('grad_format', [E5M2, E4M3])
def test_the_three_gemms_equal_float64(grad_format):
    layer, _ = linear(grad_format=grad_format)
    x, grad, w = gaussian(48, 64), gaussian(48, 96, seed=2) * 1e-4, layer.weight.detach()
    scales = [torch.finfo(dtype).max / t.abs().max() for t, dtype in
              ((x, E4M3), (w, E4M3), (grad, grad_format))]
    x8, w8, g8 = (rounded(t, s, dtype) / s.double() for t, s, dtype in
                  zip((x, w, grad), scales, (E4M3, E4M3, grad_format)))
    for found, right in zip(step(layer, x, grad), (x8 @ w8.T, g8 @ w8, g8.T @ x8)):
        assert (found - right).abs().max() < 1e-6 * right.abs().max()
    assert layer.amax.tolist() == [t.abs().max() for t in (x, w, grad)]


def test_errors_on_gaussian_data():
    layer, _ = linear(1024, 512)
    x, grad = gaussian(1024, 1024), gaussian(1024, 512, seed=2)
    right = x @ layer.weight.T, grad @ layer.weight, grad.T @ x
    output, *gradients = (((a - b).norm() / b.norm()).item()
                          for a, b in zip(step(layer, x, grad), right))
    assert 0.02 < output < 0.04 and all(0.02 < e < 0.08 for e in gradients)


def test_outliers_of_100_times_are_borne_and_reported():
    # a float's relative error is the same for small values, until they underflow: 100 x is nothing
    layer, scaling = linear(1024, 512)
    x, grad = gaussian(1024, 1024), gaussian(1024, 512, seed=2)
    x[::10, ::100] *= 100
    scaling.watch(True)
    for found, right in zip(step(layer, x, grad), (x @ layer.weight.T, grad @ layer.weight,
                                                   grad.T @ x)):
        assert (found - right).norm() < 0.08 * right.norm()
    scaling.update(scaling.collect())
    assert scaling.report()['input']['saturated'] == (0, 0)
    step(layer, 100 * x, grad)                                   # no warning in the history
    assert scaling.report()['input']['saturated'][0] > 0.0005
    scaling.watch(True)
    scaling.update(scaling.collect())
    assert scaling.report()['input']['jump'] == pytest.approx(math.log2(100))
    printed = subprocess.run([sys.executable, fp8.__file__], capture_output=True, text=True,
                             check=True).stdout
    errors = [float(e) for e in re.findall(r'([\d.]+)%', printed)]
    assert len(errors) == 6 and all(3 < e < 4 for e in errors[::3]) and max(errors) < 8


@pytest.mark.parametrize('a_format, b_format', [(E4M3, E4M3), (E5M2, E4M3)])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_without_fp8_units_the_gemm_is_that_of_scaled_mm(a_format, b_format, dtype):
    sa, sb = torch.tensor(37.3), torch.tensor(4.1)
    a = fp8.quantise(gaussian(512, 320), sa, a_format)
    b = fp8.quantise(gaussian(640, 320), sb, b_format)
    ours = fp8.gemm(a, b.mT, sa, sb, dtype).float()
    theirs = torch._scaled_mm(a, b.mT, scale_a=1 / sa, scale_b=1 / sb, out_dtype=dtype).float()
    differ = ours != theirs
    if dtype == torch.bfloat16:
        assert differ.float().mean() < 1e-3
        one_step = 2.0**-7 * theirs.abs() + 1e-6 * theirs.abs().max()
        assert ((ours - theirs).abs() <= one_step).all()
    else:
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


# --- scales ---

def test_a_steps_amax_changes_the_scales_from_the_next_step_on():
    layer, scaling = linear()
    x, grad = gaussian(32, 64), gaussian(32, 96, seed=2)
    step(layer, x, grad)
    scaling.update(scaling.collect())
    first = layer.scale.clone()
    assert first.tolist() == pytest.approx(
        [top / t.abs().max().item() for top, t in ((448, x), (448, layer.weight), (57344, grad))])
    step(layer, 3 * x, grad / 2)                                 # two micro-batches
    step(layer, 2 * x, 5 * grad)
    assert torch.equal(layer.scale, first)
    scaling.update(scaling.collect())
    assert layer.scale.tolist() == pytest.approx((first / torch.tensor([3, 1, 5])).tolist())


@pytest.mark.parametrize('length', [1, 7, 128])
def test_an_outlier_is_forgotten_when_the_history_is_over(length):
    layer, scaling = linear(history_len=length)
    x, grad = gaussian(32, 64), gaussian(32, 96, seed=2)
    seen = []
    for i in range(length + 3):
        step(layer, 100 * x if i == 1 else x, grad)
        scaling.update(scaling.collect())
        seen.append(round((448 / x.abs().max() / layer.scale[0]).item(), 3))
    assert seen == [1] + [100] * length + [1] * 2


@pytest.mark.parametrize('margin', [-2, 0, 3])
def test_the_margin_leaves_powers_of_two(margin):
    layer, scaling = linear(margin=margin)
    x = gaussian(32, 64)
    step(layer, x, gaussian(32, 96))
    scaling.update(scaling.collect())
    assert layer.scale[0] == pytest.approx((448 / x.abs().max() / 2**margin).item())


@pytest.mark.parametrize('length', [1, 4])
@pytest.mark.parametrize('bad', [0, math.inf, math.nan])
def test_the_last_good_scale_stays(bad, length):
    layer, scaling = linear(history_len=length)
    x, grad = gaussian(32, 64), gaussian(32, 96, seed=2)
    step(layer, x, grad)
    scaling.update(scaling.collect())
    good = layer.scale.clone()
    odd_x, odd_grad = x.clone(), grad.clone()
    if bad == 0:
        odd_x, odd_grad = x * 0, grad * 0
    odd_x[3, 3], odd_grad[3, 3] = bad, bad
    step(layer, odd_x, odd_grad)
    scaling.update(scaling.collect())
    assert torch.equal(layer.scale, good)
    step(layer, 2 * x, 2 * grad)                                 # and does not stay for ever
    scaling.update(scaling.collect())
    assert layer.scale.tolist() == pytest.approx((good / torch.tensor([2, 1, 2])).tolist())


def traces(scaling):
    return [t.clone() for t in (scaling.history, *scaling.amaxes, *scaling.scales)]


def test_evaluation_leaves_no_trace():
    layer, scaling = linear()
    x, grad = gaussian(32, 64), gaussian(32, 96, seed=2)
    for _ in range(2):                                           # without history, and with it
        before = traces(scaling)
        with torch.no_grad():
            layer(1000 * x)
        assert all(map(torch.equal, traces(scaling), before))
        step(layer, x, grad)
        assert not all(map(torch.equal, traces(scaling), before))
        scaling.update(scaling.collect())


def small_model(**knobs):
    torch.manual_seed(0)
    model = Xmodel(SMALL)
    idx = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(1))
    return model, convert_to_float8(model, **knobs), idx[:, :-1], idx[:, 1:]


def test_checkpointed_blocks_give_the_same_gradients_and_amaxes():
    found = []
    for on in (False, True):
        model, scaling, x, y = small_model()
        model.activation_checkpointing = on
        for _ in range(3):
            model.zero_grad()
            model(x, y)[1].backward()
            scaling.update(scaling.collect())
        model(x, y)[1].backward()
        found.append(traces(scaling) + [p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_the_input_is_saved_in_fp8():
    layer, _ = linear(64, 96)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(gaussian(2, 24, 64).requires_grad_())
    assert [t.dtype for t in saved if t.numel() == 48 * 64] == [E4M3]


def test_the_first_step_goes_by_its_own_amax_and_later_ones_do_not():
    layer, scaling = linear()
    x, grad = gaussian(32, 64) * 1000, gaussian(32, 96, seed=2)
    y, _, _ = step(layer, x, grad)
    assert (y - x @ layer.weight.T).norm() < 0.04 * y.norm() and scaling.own_amax
    scaling.update(scaling.collect())
    assert not scaling.own_amax
    y, _, _ = step(layer, 100 * x, grad)                         # saturates
    assert (y - 100 * x @ layer.weight.T).norm() > 0.5 * (100 * x @ layer.weight.T).norm()
    assert y.isfinite().all()
    layer, scaling = linear(dynamic=True)
    for factor in (1, 100):
        y, _, _ = step(layer, factor * x, grad)
        assert (y - factor * x @ layer.weight.T).norm() < 0.04 * y.norm()
        scaling.update(scaling.collect())


def test_monitors_count_what_is_lost():
    layer, scaling = linear()
    scaling.watch(True)
    x, grad = gaussian(32, 64), gaussian(32, 96, seed=2)
    step(layer, x, grad)
    scaling.update(scaling.collect())
    odd_x, odd_grad = x * 0, grad * 0
    odd_x[:8], odd_grad[:3] = 2 * x.abs().max(), 1e-12
    scaling.watch(True)
    step(layer, odd_x, odd_grad)
    report = scaling.report()
    assert report['input']['saturated'] == (0.25, 0.25)
    assert report['gradient']['underflowed'] == pytest.approx((3 / 32, 3 / 32))
    assert report['input']['underflowed'] == report['gradient']['saturated'] == (0, 0)
    scaling.update(scaling.collect())
    jumps = [row['jump'] for row in scaling.report().values()]
    assert jumps == pytest.approx([1, 0, 0])                     # x has doubled
    scaling.watch(True)
    step(layer, odd_x, odd_grad)                                 # a skipped step: no update
    assert [row['jump'] for row in scaling.report().values()] == [0, 0, 0]


@pytest.mark.parametrize('role, largest, least', [('input', 448, 2**-9),
                                                  ('gradient', 57344, 2**-16)])
def test_what_rounds_to_0_is_counted_and_nothing_else(role, largest, least):
    layer, scaling = linear()
    scaling.watch(True)
    row = torch.zeros(64 if role == 'input' else 96)
    row[:6] = torch.tensor([largest, least, 0.51 * least, 0.5 * least, 0.1 * least, -0.1 * least])
    x, grad = (row, gaussian(96)) if role == 'input' else (gaussian(64), row)
    step(layer, x.expand(16, -1), grad.expand(16, -1))
    rounded_to_0 = (rounded(row, torch.tensor(1.0), E4M3 if role == 'input' else E5M2) == 0)
    assert (rounded_to_0 & (row != 0)).sum() == 3
    assert scaling.report()[role]['underflowed'][0] == pytest.approx(3 / len(row))


def test_scales_that_would_be_infinite_are_not_taken():
    layer, scaling = linear()
    x, grad = gaussian(32, 64), gaussian(32, 96, seed=2)
    for own_amax in (True, False):
        assert scaling.own_amax == own_amax
        y, _, _ = step(layer, x * 0 + 1e-40, grad)               # 448 / 1e-40 is beyond fp32
        assert y.isfinite().all()
        scaling.update(scaling.collect())
        assert layer.scale[0] == 1 and layer.scale.isfinite().all()


def test_own_amaxes_are_in_force_until_every_tensor_has_a_history():
    layer, scaling = linear(margin=2)
    x, grad = gaussian(32, 64), gaussian(32, 96, seed=2)
    step(layer, x, 0 * grad)
    scaling.update(scaling.collect())
    assert scaling.own_amax                                      # as there was no gradient
    quantised = []
    original = fp8.quantise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, 'quantise', lambda x, scale, dtype: quantised.append(scale)
                      or original(x, scale, dtype))
        step(layer, 5 * x, grad)
    tops = 448 / 4, 448 / 4, 57344 / 4                           # in whatever order
    assert torch.stack(quantised).sort()[0].tolist() == pytest.approx(sorted(
        top / t.abs().max().item() for top, t in zip(tops, (layer.weight, 5 * x, grad))))
    scaling.update(scaling.collect())
    assert not scaling.own_amax


def test_a_stored_state_is_the_whole_state():
    x, grad = gaussian(32, 64), gaussian(32, 96, seed=2)
    layer, scaling = linear(history_len=1)
    for g in (grad, 0 * grad):                                   # the gradient's scale is kept,
        step(layer, x, g)                                        # though its history is empty again
        scaling.update(scaling.collect())
    other, loaded = linear(history_len=1)
    loaded.load_state_dict(scaling.state_dict())
    assert not scaling.own_amax and not loaded.own_amax
    assert torch.equal(other.scale, layer.scale) and layer.scale[2] == 57344 / grad.abs().max()
    for a, b in zip(step(layer, 3 * x, grad), step(other, 3 * x, grad)):
        assert torch.equal(a, b)


@pytest.mark.parametrize('role, name', [
    ('input', 'blocks.1.attn.qkv'), ('weight', 'blocks.0.ffn.down'),
    ('gradient', 'blocks.1.ffn.down')])
def test_a_nan_is_traced_to_where_it_began(role, name):
    model, scaling, x, y = small_model()
    model(x, y)[1].backward()
    amax = scaling.collect()
    scaling.update(amax)
    assert scaling.trace(amax) == ''
    with torch.no_grad():
        if role == 'weight':
            model.blocks[0].ffn.down.weight[3, 3] = math.nan
        elif role == 'input':
            model.blocks[1].norm1.weight[5] = math.inf
    if role == 'gradient':
        model.norm.register_full_backward_pre_hook(lambda m, g: (g[0] * math.inf,))
    model(x, y)[1].backward()
    assert scaling.trace(scaling.collect()).startswith(f'; {name}: its {role} has amax ')


def test_a_trace_tells_the_last_amaxes_in_order():
    layer, scaling = linear(history_len=5)
    x, grad = torch.ones(16, 64), gaussian(16, 96)
    for i in range(1, 8):
        step(layer, i * x, grad)
        scaling.update(scaling.collect())
    step(layer, math.nan * x, grad)
    assert scaling.trace(scaling.collect()) == \
        '; blocks.0: its input has amax nan; before 4, 5, 6, 7; scale 64'
    layer, scaling = linear(dynamic=True)
    step(layer, math.nan * x, grad)
    assert scaling.trace(scaling.collect()) == \
        '; blocks.0: its input has amax nan; before none; scale its own'


def test_all_amaxes_go_in_one_collective(monkeypatch):
    model, scaling, x, y = small_model()
    model(x, y)[1].backward()
    calls = []
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'all_reduce', lambda t, op: calls.append((t.shape, op)) or t.mul_(3))
    before = torch.stack(scaling.amaxes)
    amax = scaling.collect()
    scaling.update(amax)
    assert calls == [((8, 3), dist.ReduceOp.MAX)]
    assert torch.equal(amax, 3 * before)                         # the others' amaxes are larger
    monkeypatch.setattr(dist, 'all_reduce', lambda t, op: None)
    for bad in (math.inf, math.nan):                             # on any rank, for all ranks
        scaling.amaxes[2][1] = bad
        assert scaling.collect()[2, 1] == math.inf


# --- weights rounded once a step, beside the plain way ---

class PlainMatmul(torch.autograd.Function):
    """x · weightᵀ as fp8.py's docstring tells it: every tensor is rounded anew at each use."""

    @staticmethod
    def forward(ctx, x, weight, layer, dtype):
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.dtype = layer, dtype
        return plain_product(layer.round(0, x), layer.round(1, weight, transpose=True), dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        by, dtype = ctx.layer.round, ctx.dtype
        grad_x = plain_product(by(2, grad), by(1, weight), dtype)
        grad_w = plain_product(by(2, grad, transpose=True), by(0, x), dtype)
        return grad_x.to(x.dtype), grad_w.to(weight.dtype), None, None


def plain_product(a, b, dtype):
    """Of (FP8 values, scale) each; in the layouts of fp8.gemm, so that sums are equal."""
    (a, a_scale), (b, b_scale) = a, b
    a, b = a.to(dtype).contiguous(), b.to(dtype).T.contiguous().T
    factor = (1 / (a_scale * b_scale)).item()
    return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=factor)


class PlainLinear(nn.Linear):
    """amaxes: three of each step before, now: of this one; a step without any goes by its own."""
    dynamic, history_len = False, 4

    def round(self, role, x, transpose=False):
        fmt, top = ((E4M3, 448.), (E4M3, 448.), (E5M2, 57344.))[role]
        amax = x.detach().float().abs().max()
        scale = top / amax
        if self.training:
            self.now[role] = max(self.now[role], amax.item())
        if self.amaxes and not self.dynamic:
            largest = max(step[role] for step in self.amaxes[-self.history_len:])
            scale = torch.tensor(top) / torch.tensor(largest)    # `top / tensor` rounds twice
        rounded = (x.detach().float() * scale).clamp(-top, top).to(fmt)
        return rounded.T if transpose else rounded, scale

    def forward(self, x):
        dtype = torch.bfloat16 if torch.is_autocast_enabled('cpu') else x.dtype
        y = PlainMatmul.apply(x.flatten(0, -2), self.weight, self, dtype)
        return y.view(*x.shape[:-1], -1)


class PlainScaling:
    """The hooks of a step for a model of PlainLinears."""

    def __init__(self, model, dynamic):
        self.layers = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
        for layer in self.layers:
            layer.__class__, layer.dynamic = PlainLinear, dynamic
            layer.amaxes, layer.now = [], [0., 0., 0.]

    def round_weights(self):
        pass

    def collect(self):
        amax = torch.tensor([layer.now for layer in self.layers])
        if dist.is_initialized():
            dist.all_reduce(amax, dist.ReduceOp.MAX)
        return amax

    def update(self, amax):
        for layer, now in zip(self.layers, amax.tolist()):
            layer.amaxes.append(now)
            layer.now = [0., 0., 0.]


def make_model(plain, checkpointing, dynamic):
    torch.manual_seed(0)
    model = Xmodel(SMALL)
    model.activation_checkpointing = checkpointing
    if plain:
        return model, PlainScaling(model, dynamic)
    return model, convert_to_float8(model, dynamic, history_len=PlainLinear.history_len)


def trained(plain, bf16=True, checkpointing=False, dynamic=False, resume=False, rank=0):
    """Losses of micro-batches and validations, and weights, of 20 steps of 3 micro-batches.

    A skipped step is among them; resume: after step 10 all comes from state_dicts.
    """
    model, scaling = make_model(plain, checkpointing, dynamic)
    net = data_parallel(model, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=bf16)
    seen = []
    for step in range(20):
        if resume and step == 10:
            states = copy.deepcopy([t.state_dict() for t in (model, scaling, optimizer)])
            model, scaling = make_model(plain, checkpointing, dynamic)
            net, optimizer = model, torch.optim.AdamW(model.parameters())
            for target, state in zip((model, scaling, optimizer), states):
                target.load_state_dict(state)
        scaling.round_weights()
        for i in range(3):
            idx = np.random.default_rng([step, i, rank]).integers(96, size=(2, 33))
            x, y = torch.from_numpy(idx[:, :-1]), torch.from_numpy(idx[:, 1:])
            with gradients_stay_here(net) if i < 2 else nullcontext():
                with autocast:
                    loss = net(x, y)[1]
                loss.backward()
            seen.append(loss.detach())
        amax = scaling.collect()
        if step != 5:
            optimizer.step()
            scaling.update(amax)
        elif plain:
            for layer in scaling.layers:
                layer.now = [0., 0., 0.]
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad(), autocast:                          # of the weights as they are now
            model.eval()
            seen.append(model(x, y)[1])
            model.train()
        seen += [p.detach().clone() for p in model.parameters()]
    return seen


@pytest.mark.parametrize('how', [{}, {'bf16': False}, {'checkpointing': True}, {'dynamic': True},
                                 {'resume': True}], ids=str)
def test_weights_rounded_once_a_step_train_as_those_rounded_at_each_use(how):
    plain, ours = (trained(plain, **how | ({'resume': False} if plain else {}))
                   for plain in (True, False))
    assert len(ours) == 20 * (4 + 2 * 6 + 2) and same(plain, ours)


def train_on_a_rank(rank, world, port):
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=world)
    for dynamic in (False, True):
        plain, ours = (trained(plain, dynamic=dynamic, rank=rank) for plain in (True, False))
        assert same(plain, ours)


def test_weights_rounded_once_a_step_train_as_those_rounded_at_each_use_on_two_ranks():
    port = free_port()
    processes = [SERVER.Process(target=train_on_a_rank, args=(rank, 2, port)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_weight_is_rounded_once_a_step_and_no_longer_held_after_it(monkeypatch):
    model, scaling, x, y = small_model()
    rounded_shapes, quantise = [], fp8.quantise
    monkeypatch.setattr(fp8, 'quantise', lambda t, scale, fmt: rounded_shapes.append(t.shape)
                        or quantise(t, scale, fmt))
    weights = [layer.weight.shape for layer in scaling.layers.values()]
    state = set(model.state_dict())
    scaling.round_weights()
    assert rounded_shapes == weights
    model.activation_checkpointing = True
    for _ in range(3):
        model(x, y)[1].backward()
    assert len(rounded_shapes) == len(weights) * (1 + 3 * (1 + 1 + 1))   # x twice and the gradient
    assert set(model.state_dict()) == state == {name for name, _ in model.named_parameters()}
    scaling.update(scaling.collect())
    del rounded_shapes[:]
    model(x, y)[1].backward()                                    # without the call: as they are now
    assert len(rounded_shapes) == len(weights) * (2 + 2 + 1)
    assert all(layer.rounded is None for layer in scaling.layers.values())


def test_the_backward_pass_reads_the_input_as_it_was_saved():
    layer, _ = linear(64, 96)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(gaussian(2, 24, 64).requires_grad_())
    assert [t.shape for t in saved if t.dtype == E4M3] == [(64, 48), (64, 96)]  # x8ᵀ, weightᵀ
    assert all(t.is_contiguous() for t in saved if t.dtype == E4M3)


# --- compiled, fake GPU ---

def test_a_compiled_block_equals_eager_and_has_no_graph_break():
    found = []
    for compiled in (False, True):
        model, scaling, x, y = small_model()
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=False, fullgraph=True)
        for _ in range(2):
            model.zero_grad()
            model(x, y)[1].backward()
            amaxes = torch.stack(scaling.amaxes)
            scaling.update(scaling.collect())
        found.append([amaxes, *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        assert (a - b).norm() < 0.02 * b.norm()                  # some values round the other way


def test_a_compiled_block_is_as_exact_as_eager_under_bf16_autocast():
    # compiled, what is fused is not rounded to bf16 in between, and some values then round to
    # another FP8 value: so compare both with the block in fp32, without FP8
    h = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(3))
    angles, found = rope_angles(torch.arange(32), 32, 1e4), {}
    for way in ('plain', 'eager', 'compiled'):
        torch.manual_seed(0)
        model, x = Xmodel(SMALL), h.clone().requires_grad_()
        scaling = convert_to_float8(model) if way != 'plain' else None
        if way == 'compiled':
            model.blocks[0].compile(dynamic=False, fullgraph=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=way != 'plain'):
            out = model.blocks[0](x, *angles)
        out.square().mean().backward()
        found[way] = [out - h, x.grad, *(p.grad for p in model.blocks[0].parameters())]
        assert not scaling or (torch.stack(scaling.amaxes)[:4] > 0).all()
    for plain, eager, compiled in zip(*found.values()):
        errors = [((t - plain).norm() / plain.norm()).item() for t in (eager, compiled)]
        assert errors[1] == pytest.approx(errors[0], rel=0.25) and errors[1] < 0.2


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
@pytest.mark.parametrize('once', [False, True])                  # weights rounded once a step
def test_only_another_length_or_kind_of_step_compiles_again(monkeypatch, once):
    model, scaling, _, _ = small_model()
    monkeypatch.setattr(nn.Module, 'compile', functools.partialmethod(
        nn.Module.compile, backend='eager', fullgraph=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.set_compiled(True)

    def steps(T):
        angles = rope_angles(torch.arange(T), 32, 1e4)
        for watched in (False, True, False):                     # the first without history
            scaling.watch(watched)
            if once:
                scaling.round_weights()
            model.hidden(torch.arange(2 * T).view(2, T) % 96, *angles).sum().backward()
            scaling.update(scaling.collect())
        with torch.no_grad():
            model.hidden(torch.arange(2 * T).view(2, T) % 96, *angles)
    for T in (16, 32, 48):                                       # as a curriculum has lengths
        steps(T)
    # of each length training, watched and validation, and the first step: shared by both blocks
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 3 * 3 + 1
    with torch.compiler.set_stance('fail_on_recompile'):
        for T in (16, 48):
            steps(T)


def on_a_gpu(a, b, dtype=torch.bfloat16, fast=False):
    """fp8.gemm of operands with these shapes, strides and formats on a GPU that is not there."""
    with FakeTensorMode():
        a, b = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device='cuda')
                for t in (a, b))
        one = torch.ones((), device='cuda')
        return fp8.gemm(a, b, one, one, dtype, fast)


def test_all_gemms_of_a_step_have_layouts_that_a_gpu_takes(monkeypatch):
    model, scaling, x, y = small_model()
    shapes, here = [], fp8.gemm_without_fp8_units

    def checked(a, b, factor, dtype):
        shapes.append(on_a_gpu(a, b).shape)
        return here(a, b, factor, dtype)
    monkeypatch.setattr(fp8, 'gemm_without_fp8_units', checked)
    for _ in range(2):
        model(x, y)[1].backward()
        scaling.update(scaling.collect())
    assert len(shapes) == 2 * 2 * 4 * 3 and set(shapes[:3]) == {(64, 128), (64, 64), (64, 320)}


def test_the_forward_gemm_alone_adds_up_with_fewer_bits_on_a_gpu(monkeypatch):
    layer, _ = linear()
    fast, real = [], fp8.gemm

    def record(a, b, use_fast_accum=False, **how):
        fast.append(use_fast_accum)

    def gemm(a, b, scale_a, scale_b, *how, **more):
        with FakeTensorMode():
            operands = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device='cuda')
                        for t in (a, b, scale_a, scale_b))
            real(*operands, *how, **more)
        return real(a, b, scale_a, scale_b, *how, **more)

    monkeypatch.setattr(torch, '_scaled_mm', record)
    monkeypatch.setattr(fp8, 'gemm', gemm)
    step(layer, gaussian(32, 64), gaussian(32, 96))
    assert fast == [True, False, False]                          # output, and the two gradients


def test_a_gpu_writes_the_weights_gradient_in_fp32_and_takes_all_layouts(monkeypatch):
    kinds, real = [], torch._scaled_mm

    def scaled_mm(a, b, **how):
        kinds.append(how['out_dtype'])
        return real(a, b, **how)                                 # RuntimeError: a layout it refuses

    monkeypatch.setattr(torch, '_scaled_mm', scaled_mm)
    # (autograd and copy_ would want a real GPU)
    monkeypatch.setattr(fp8, 'observe', lambda x, fmt, record, mode: record.scale)
    layer, scaling = linear(64, 96)
    with FakeTensorMode():
        x, grad = (torch.empty(32, n, dtype=torch.bfloat16, device='cuda') for n in (64, 96))
        layer.weight = nn.Parameter(torch.empty(96, 64, device='cuda'))
        record = fp8.Record(*(torch.empty(size, device='cuda') for size in ((), (), 2)))
        rounded = layer.round_weight(record, scaling.mode())
        ctx = SimpleNamespace(save_for_backward=lambda *t: setattr(ctx, 'saved_tensors', t))
        fp8.Float8Matmul.forward(ctx, x, layer.weight, *rounded, record.scale, *record,
                                 scaling.mode(), torch.bfloat16)
        grad_x, grad_w, *_ = fp8.Float8Matmul.backward(ctx, grad)
    assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert (grad_x.shape, grad_w.shape, grad_w.dtype) == ((32, 64), (96, 64), torch.float32)


@pytest.mark.parametrize('case', ['row-major second', 'inner size', 'outer size'])
def test_a_gpu_refuses_other_layouts(case):
    a, b = torch.empty(64, 32, dtype=E4M3), torch.empty(48, 32, dtype=E4M3).mT
    assert on_a_gpu(a, b).shape == (64, 48)
    a, b = {'row-major second': (a, b.contiguous()), 'inner size': (a[:, :24], b[:24]),
            'outer size': (a, b[:, :40])}[case]
    with pytest.raises((RuntimeError, ValueError)):
        on_a_gpu(a, b)


# --- in training ---

def fp8_run(tiny, folder, *flags, launcher=()):
    done = subprocess.run([sys.executable, *launcher, str(ROOT / 'train.py'), *tiny, '--fp8=True',
                           '--fp8_amax_history_len=4', '--compile=False', f'--out_dir={folder}',
                           *flags], capture_output=True, text=True, check=False,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_goes_on_bit_for_bit(tiny, tmp_path):
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    fp8_run(tiny, whole)
    fp8_run(tiny, broken)
    for file in checkpoints(broken)[2:]:
        file.unlink()
    assert checkpoints(broken)[1].name == 'step_15.pt'           # 15 % 4: within a history
    fp8_run(tiny, broken, '--resume')
    a, b = (read_checkpoint(folder) for folder in (whole, broken))
    assert a['fp8']['step'] == 20 and a['fp8']['history'].shape == (8, 3, 4)
    for key in ('history', 'scale'):
        assert torch.equal(a['fp8'][key], b['fp8'][key])
    assert all(torch.equal(a['model'][name], b['model'][name]) for name in a['model'])


def test_two_ranks_have_the_scales_and_weights_of_one(tiny, tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'                # of the same micro-batches
    flags = ['--micro_batch_tokens=128', '--dtype=float32', '--phases.stable.steps=4',
             '--phases.decay.steps=0', '--phases.long.steps=0']
    fp8_run(tiny, one, *flags)
    fp8_run(tiny, two, *flags, launcher=['-m', 'torch.distributed.run', '--standalone',
                                         '--nproc_per_node=2'])
    a, b = (read_checkpoint(folder) for folder in (one, two))
    for key in ('history', 'scale'):
        assert torch.allclose(a['fp8'][key], b['fp8'][key], rtol=0.02), key
        assert (a['fp8'][key] == b['fp8'][key]).float().mean() > 0.5
    for name, weight in a['model'].items():
        assert (weight - b['model'][name]).abs().max() < 1e-3 * weight.abs().max(), name


def test_five_steps_in_a_row_that_are_not_finite_end_the_run(tiny, tmp_path):
    done = run('train.py', *tiny, '--fp8=True', f'--learning_rate={2.0**60}',
               f'--out_dir={tmp_path / "run"}')
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert 'step 6 is the fifth in a row that is not finite: it has loss' in done.stderr
    assert len(re.findall(r'step \d+ is skipped: it has loss .*, gradient norm', done.stdout)) == 5


def train_here(monkeypatch, *args):
    """train.py in this process -> what happened at each step: seen[i], see `hidden`."""
    bad, seen = [], []

    def hidden(self, *args, real=Xmodel.hidden):
        """In a bad step the first block sees inputs a million times as large, the last one inf,
        which saturates, so that the loss stays finite."""
        if not torch.is_grad_enabled():
            return real(self, *args)
        scaling = self.blocks[0].attn.qkv.scaling
        seen.append({'watched': scaling.watched, 'own_amax': scaling.own_amax,
                     'checkpointing': self.activation_checkpointing,
                     'gradients': any(p.grad is not None and p.grad.any()
                                  for p in self.parameters())})
        if len(seen) - 1 not in bad:
            return real(self, *args)
        first, later = self.blocks[0].norm1.weight, self.blocks[1].norm2.weight
        first.data.mul_(1e6), later.data.mul_(torch.inf)
        out = real(self, *args)
        first.data.div_(1e6), later.data.fill_(1)
        return out

    def try_compile(model, x, y, autocast):
        """Leaves amaxes, as a trial does."""
        torch._foreach_add_(model.blocks[0].attn.qkv.scaling.amaxes, 1e9)
        return f'trial of {len(x)} x {x.size(1)} after step {len(seen)}'
    with monkeypatch.context() as patch:
        patch.setattr(Xmodel, 'hidden', hidden)
        patch.setattr('run.try_compile', try_compile)
        bad += [int(n) for arg in args if arg.startswith('bad=') for n in arg[4:].split(',')]
        patch.setattr(sys, 'argv', ['train.py', *(a for a in args if not a.startswith('bad='))])
        runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
    return seen


@pytest.mark.parametrize('flags, tops', [
    (['--fp8=True', '--fp8_margin=1', '--fp8_format=e4m3'], (224, 224, 224)),
    (['--fp8=dynamic'], (448, 448, 57344))])
def test_the_knobs_mean_what_they_say(tiny, tmp_path, monkeypatch, flags, tops):
    seen = train_here(monkeypatch, *tiny, *flags, '--fp8_amax_history_len=5',
                      f'--out_dir={tmp_path}/run')
    state = read_checkpoint(tmp_path / 'run')['fp8']
    assert state['history'].shape == (8, 3, 5)
    for row in (state['history'].amax(-1) * state['scale']).tolist():
        assert row == pytest.approx(tops)
    assert not any(s['watched'] or s['checkpointing'] for s in seen)
    assert [s['own_amax'] for s in seen] == [True] + 19 * ['--fp8=dynamic' in flags]


def test_another_history_or_step_begins_anew(tiny, tmp_path, monkeypatch):
    run_dir, knobs = tmp_path / 'run', [*tiny, '--fp8=True', '--phases.long.steps=0']
    train_here(monkeypatch, *knobs, f'--out_dir={run_dir}')
    for name, flags, steps, anew in (('longer', ['--fp8_amax_history_len=200'], 8, True),
                                     ('earlier', ['--init_step=10'], 6, True),
                                     ('same', [], 16, False)):
        seen = train_here(monkeypatch, *knobs, *flags, f'--init_from={run_dir}/step_8.pt',
                          f'--out_dir={tmp_path / name}')
        assert read_checkpoint(tmp_path / name)['fp8']['step'] == steps
        assert seen[0]['own_amax'] == anew
    assert same(*(read_checkpoint(folder)['fp8'] for folder in (run_dir, tmp_path / 'same')))


def test_knobs_that_decide_what_is_learned_are_fixed_on_resume():
    knobs = {name for name in vars(train) if name.startswith('fp8')}
    assert knobs & start.FREE == {'fp8_monitor'} and len(knobs) == 5


def test_monitoring_changes_nothing_and_watches_logged_steps_alone(tiny, tmp_path, monkeypatch):
    knobs = [*tiny, '--fp8=True', '--log_interval=5']
    for name, flags in (('plain', []), ('watched', ['--fp8_monitor=True', '--compile=True',
                                                    '--activation_checkpointing=True'])):
        seen = train_here(monkeypatch, *knobs, *flags, f'--out_dir={tmp_path / name}')
    assert [s['watched'] for s in seen] == 4 * [True, False, False, False, False]
    assert all(s['checkpointing'] for s in seen)
    plain, watched = (read_checkpoint(tmp_path / name) for name in ('plain', 'watched'))
    for key in ('model', 'fp8', 'optimizer_state', 'recent'):   # nor did the trials leave a trace
        assert same(plain[key], watched[key]), key
    reports = {line['step']: line['fp8'] for line in log(tmp_path / 'watched') if 'fp8' in line}
    assert list(reports) == [0, 5, 10, 15] and list(reports[5]) == list(fp8.ROLES)
    jumps = [report['input']['jump'] for report in reports.values()]
    assert jumps[0] == 0 and max(jumps) > 0
    assert not any('fp8' in line for line in log(tmp_path / 'plain'))


def test_validations_leave_no_trace_in_training(tiny, tmp_path, monkeypatch):
    for n in (1, 100):
        train_here(monkeypatch, *tiny, '--fp8=True', f'--eval_interval={n}', '--eval_rows=16',
                   f'--out_dir={tmp_path}/{n}')
    assert sum('val_loss' in line for line in log(tmp_path / '1')) == 20
    often, seldom = (read_checkpoint(tmp_path / name) for name in ('1', '100'))
    for key in ('model', 'fp8', 'optimizer_state', 'recent'):
        assert same(often[key], seldom[key]), key


def test_each_kind_of_step_has_its_trial_compile(tiny, tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, *tiny, '--fp8=True', '--compile=True', f'--out_dir={tmp_path}/run')
    assert re.findall('trial of .*', capsys.readouterr().out) == [
        'trial of 4 x 64 after step 0', 'trial of 4 x 64 after step 1',      # with a history
        'trial of 8 x 64 after step 8', 'trial of 4 x 128 after step 16']


def test_a_skipped_step_leaves_no_trace(tiny, tmp_path, monkeypatch, capsys):
    bad = [2, 3, 4, 5, 7, 8]                                     # never five in a row
    seen = train_here(monkeypatch, *tiny, '--fp8=True', '--fp8_monitor=True', '--log_interval=4',
                      f'--out_dir={tmp_path}/run', f'bad={",".join(map(str, bad))}')
    told = capsys.readouterr().out
    assert re.search(r'step 2 is skipped: .*; blocks.1.ffn.gate_up: its input has amax .*; '
                     r'with FP8 look at .* fp8_amax_history_len=128 .128.; --replay=2', told)
    lines, state = log(tmp_path / 'run'), read_checkpoint(tmp_path / 'run')
    assert [line['step'] for line in lines if line.get('skipped')] == bad
    assert not any(s['gradients'] for s in seen)
    assert [row['jump'] for n in (4, 8) for row in lines[n]['fp8'].values()] == 6 * [0]
    good = [line['loss'] for line in lines if 'skipped' not in line]
    assert state['recent'] == good and len(good) == 14
    assert state['step'] == 20 and state['fp8']['step'] == 14
    assert state['fp8']['history'].max() < 1e4
    assert all(p.isfinite().all() for p in state['model'].values())


def test_the_line_after_five_skipped_steps_names_the_tensor(tiny, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='train.py: step 7 is the fifth .*; blocks.1.ffn.gate_up: '
                                         'its input has amax inf.*; try a lower learning_rate'):
        train_here(monkeypatch, *tiny, '--fp8=True', f'--out_dir={tmp_path}/run', 'bad=3,4,5,6,7')
    assert log(tmp_path / 'run')[-1]['skipped']


def test_a_phase_of_skipped_steps_alone_is_survived(tiny, tmp_path, monkeypatch):
    train_here(monkeypatch, *tiny, '--fp8=True', '--phases.stable.steps=4',
               '--phases.decay.steps=3', '--phases.long.steps=0', f'--out_dir={tmp_path}/run',
               'bad=0,1,2,3')
    assert read_checkpoint(tmp_path / 'run')['fp8']['step'] == 3


def test_nothing_saturates_by_its_own_amax():
    layer, scaling = linear(dynamic=True)
    scaling.watch(True)
    for seed in range(100):
        step(layer, gaussian(32, 64, seed=seed), gaussian(32, 96, seed=seed + 100))
        assert all(row['saturated'] == (0, 0) for row in scaling.report().values())
        scaling.watch(True)
        scaling.update(scaling.collect())
        assert all(row['jump'] == 0 for row in scaling.report().values())


def test_scales_of_another_format_follow_from_the_same_history():
    x, grad = gaussian(32, 64), gaussian(32, 96, seed=2)
    (layer, hybrid), (other, e4m3) = linear(), linear(grad_format=E4M3, margin=1)
    step(layer, x, grad)
    hybrid.update(hybrid.collect())
    e4m3.load_state_dict(hybrid.state_dict())
    assert other.scale.tolist() == pytest.approx(
        [448 / 2 / t.abs().max().item() for t in (x, layer.weight, grad)])


@pytest.mark.parametrize('flag, says', [
    ('--n_ffn=72', 'blocks.0.ffn.down is (32, 72); FP8 GEMMs need multiples of 16'),
    ('--phases.stable.block_size=40', "block_size of phase 'stable' should be a multiple of 16"),
    ('--fp8_amax_history_len=0', 'fp8_amax_history_len=0'), ('--fp8_margin=99', 'fp8_margin=99'),
    ('--fp8=dynamo', "should be one of False, True, 'dynamic'")])
def test_what_fp8_cannot_do_gets_one_line(tiny, tmp_path, flag, says):
    assert says in refused(run('train.py', *tiny, '--fp8=True', flag,
                               f'--out_dir={tmp_path / "run"}'))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('device, says', [('mps', 'no 8-bit floats on MPS'),
                                          ('cuda', 'A100 has no FP8 units')])
def test_a_device_without_fp8_is_refused_in_one_line(monkeypatch, capsys, device, says):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'A100')
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]))
    knobs = SimpleNamespace(fp8=True, fp8_amax_history_len=4, fp8_margin=0, fp8_format='e5m2')
    with pytest.raises(SystemExit):
        start.delayed_scaling(model, knobs, None)
    error = capsys.readouterr().err
    assert says in error and error.count('\n') == 1
