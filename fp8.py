"""FP8 matmuls as in Xmodel-2.5: E4M3, gradients in E5M2, delayed scaling, in torch._scaled_mm.

An H100 multiplies 8-bit floats twice as fast as bf16, and they take half the memory. Two formats:

    E4M3  4 bits of exponent, 3 of mantissa: up to 448, down to 2^-9, neighbours 1/8 to 1/16 apart
    E5M2  5 bits of exponent, 2 of mantissa: up to 57 344, down to 2^-16, neighbours 1/4 to 1/8

Weights and activations need the finer steps. Gradients spread over more powers of two and need the
wider range. bf16 has the range of fp32; FP8 has not, so each tensor is first multiplied by a scale
that brings its largest magnitude, amax, to the format's largest value. With an amax of 4 the scale
is 448 / 4 = 112: the value 0.3 becomes 33.6, which is rounded to 32 (from 32 to 64 the steps are 4)
and stands for 32 / 112 = 0.286. A value above 4 saturates, one below 2^-10 / 112 becomes 0.

The sums of a GEMM come out multiplied by both operands' scales. These are constant in the sum, so
one division at the end undoes them: one scale a tensor costs nothing. Rounding errors are
independent, so a sum has no larger relative error than its terms (4 %), unless they cancel.

Delayed scaling. A tensor's own amax is known only when all of it has been computed, and waiting for
it costs a pass over memory. With a scale at hand, rounding fuses with what computes the tensor. So
the scale comes from the amaxes of earlier steps,

    scale = largest value of the format / max(amaxes of the last 128 steps) / 2^margin,

as in NVIDIA's Transformer Engine, with which Xmodel-2.5 was trained (arXiv 2511.19496). Each layer
has three: for its input, its weight and the gradient of its output. A tensor that outgrows its
history saturates for a step. Until all tensors have a history (step 0 has none), each goes by its
own amax.

FP8 is for the linears of the blocks alone, 71 % of the 1.3B model's FLOPs at 3712 tokens (45 % at
16 384, where attention has most). The rest stays in bf16 or fp32: attention and logits, because a
softmax needs exact inputs; embedding, norms and residual stream, because they are no GEMMs; the
weights, because an update is a small part of them.

    python fp8.py         # relative errors of a linear's output and gradients on Gaussian data
"""
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from hardware import product_dtype

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# --------------------------------------------------------------------------------------------------
# Rounding and GEMMs

def quantise(x, scale, fmt):
    """x · scale, rounded to the nearest FP8 value; what is too large saturates, NaN stays NaN."""
    top = torch.finfo(fmt).max
    return (x.float() * scale).clamp(-top, top).to(fmt)


def gemm(a, b, scale_a, scale_b, dtype, fast=False):
    """(M, K) · (K, N) of FP8 operands quantised with these scales -> (M, N) in dtype.

    Tensor cores want a row-major, b column-major, and all sizes multiples of 16. fast: they add up
    with fewer bits, which is enough for the forward pass.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b, scale_a=1 / scale_a, scale_b=1 / scale_b, out_dtype=dtype,
                                use_fast_accum=fast)
    return gemm_without_fp8_units(a, b, 1 / (scale_a * scale_b), dtype)


def transposed(x):
    """xᵀ in memory, row-major: at one byte a value, cheaper than to round from bf16 again."""
    return x.mT.clone(memory_format=torch.contiguous_format)


# An opaque operator for torch.compile: `factor` must become a Python number here, so that addmm
# multiplies the sums by it before it rounds them.
@torch.library.custom_op('nano_xmodel::gemm_without_fp8_units', mutates_args=())
def gemm_without_fp8_units(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor,
                           dtype: torch.dtype) -> torch.Tensor:
    """factor · a · b by a matmul in dtype, which holds FP8 values exactly.

    Without FP8 units this is several times as fast as torch._scaled_mm.
    """
    def decode(x):                         # look up the 256 FP8 values; a cast takes 6 x as long
        values = torch.arange(256, dtype=torch.uint8, device=x.device).view(x.dtype).to(dtype)
        return values.index_select(0, x.view(torch.uint8).int().flatten()).view(x.shape)

    a = decode(a.contiguous())
    b = decode(b.mT.contiguous()).mT
    return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=factor.item())


@gemm_without_fp8_units.register_fake
def _(a, b, factor, dtype):
    return a.new_empty(a.size(0), b.size(1), dtype=dtype)


# --------------------------------------------------------------------------------------------------
# The scale of a tensor

ROLES = 'input', 'weight', 'gradient'      # of a linear: its x, its weight, its output's gradient
INPUT, WEIGHT, GRADIENT = range(3)


class Record(NamedTuple):
    """What a linear keeps about the tensor in one of its roles; observe writes amax and lost."""
    amax: torch.Tensor                     # scalar: largest magnitude in this step so far
    scale: torch.Tensor                    # scalar: the delayed scale, from earlier steps' amaxes
    lost: torch.Tensor                     # (2,): see lost_shares; of the last micro-batch


class Mode(NamedTuple):
    """How a step scales its tensors. These are constants of torch.compile's graphs: most steps,
    which are not watched, share one that does not count what is lost."""
    margin: int                            # powers of two left free above an amax
    grad_format: torch.dtype
    own_amax: bool                         # scale by a tensor's own amax, not by the delayed scale
    watched: bool                          # count what is lost, in one more pass over each tensor


def scale_for(amax, top, old):
    """The scale that brings amax to `top`; the old one where either is 0, inf or NaN."""
    new = top / amax
    return torch.where((amax > 0) & new.isfinite() & amax.isfinite(), new, old)


def observe(x, fmt, record, mode):
    """Return the scale by which to quantise x to an FP8 format, and note the amax of x in `record`.

    record.amax becomes the maximum over the micro-batches of a step; a NaN stays.
    """
    magnitude = x.detach().abs().float()
    # By rows first: inductor splits a reduction to a scalar into two kernels and fuses neither with
    # the rounding of x (pytorch 143464, torchao 1469).
    amax = magnitude.amax(-1).amax()
    scale = record.scale
    if mode.own_amax:
        scale = scale_for(amax, torch.finfo(fmt).max / 2**mode.margin, scale)
    record.amax.copy_(torch.maximum(record.amax, amax))
    if mode.watched:
        record.lost.copy_(lost_shares(magnitude, scale, fmt))
    return scale


# --------------------------------------------------------------------------------------------------
# The linear layer

class Float8Matmul(torch.autograd.Function):
    """x (N, in), weight (out, in) -> x · weightᵀ (N, out), with all three GEMMs in FP8.

    w8, w8_t (in, out), w_scale: the rounded weight. (The weight itself is here for its gradient.)
    The output's gradient has not been computed yet: its record goes to the backward pass. (In three
    arguments, as autograd sees no tensors inside a tuple.)
    """

    @staticmethod
    def forward(ctx, x, weight, w8, w8_t, w_scale, x_scale, grad_amax, grad_scale, grad_lost, mode,
                dtype):
        x8 = quantise(x, x_scale, E4M3)
        # The backward pass reads the input once, transposed, in the gradient of the weight. So this
        # is what is kept, at a byte a value, and it is written while x8 is at hand.
        ctx.save_for_backward(transposed(x8), w8_t, x_scale, w_scale, grad_amax, grad_scale,
                              grad_lost)
        ctx.mode, ctx.x_dtype, ctx.w_dtype, ctx.dtype = mode, x.dtype, weight.dtype, dtype
        return gemm(x8, w8.mT, x_scale, w_scale, dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):                                                 # (N, out)
        x8_t, w8_t, x_scale, w_scale, *grad_record = ctx.saved_tensors
        grad_format = ctx.mode.grad_format
        g_scale = observe(grad, grad_format, Record(*grad_record), ctx.mode)
        g8 = quantise(grad, g_scale, grad_format)
        grad_x = gemm(g8, w8_t.mT, g_scale, w_scale, ctx.dtype)                          # (N, in)
        # A GPU sums in fp32 in any case, so the weight's gradient is taken in fp32: no rounding, no
        # cast. On a CPU an fp32 product would take twice as long.
        w_dtype = ctx.w_dtype if grad.is_cuda else ctx.dtype
        grad_w = gemm(transposed(g8), x8_t.mT, g_scale, x_scale, w_dtype)                # (out, in)
        return grad_x.to(ctx.x_dtype), grad_w.to(ctx.w_dtype), *(None,) * 9      # of w8 to dtype


class Float8Linear(nn.Linear):
    """A linear without bias with its GEMMs in FP8; convert_to_float8 makes them of nn.Linears.

    amax, scale (3,) and lost (3, 2) hold a Record for each of ROLES; scaling is the model's
    DelayedScaling. rounded: what round_weight returned for this step's micro-batches; None outside
    of a step, as in evaluation, where each forward pass rounds the weight itself. Each forward pass
    with gradients should be followed by its backward pass: the gradient's amax is noted there, and
    a history without it would keep the old scale.
    """

    def forward(self, x):
        dtype = product_dtype(x)
        records, mode = self.records(), self.scaling.mode()
        if not torch.is_grad_enabled():
            # Evaluation and generation should leave no trace. (A checkpointed block, which is
            # computed twice, has gradients both times: the same amaxes, so the same maximum.)
            records = [Record(*(t.clone() for t in record)) for record in records]
        rows = x.reshape(-1, x.size(-1))                                     # (N, in)
        x_scale = observe(rows, E4M3, records[INPUT], mode)
        rounded = self.rounded
        if rounded is None:
            rounded = self.round_weight(records[WEIGHT], mode)
        y = Float8Matmul.apply(rows, self.weight, *rounded, x_scale, *records[GRADIENT], mode,
                               dtype)
        return y.view(*x.shape[:-1], -1)                                     # (..., out)

    def records(self):
        return [Record(self.amax[i], self.scale[i], self.lost[i]) for i in range(len(ROLES))]

    def round_weight(self, record, mode):
        """(weight in FP8 (out, in), the same transposed, its scale)."""
        weight = self.weight.detach()
        scale = observe(weight, E4M3, record, mode)
        w8 = quantise(weight, scale, E4M3)
        return w8, transposed(w8), scale


def convert_to_float8(model, dynamic=False, history_len=128, margin=0, grad_format=E5M2):
    """Make the linears of model.blocks Float8Linears, in place -> their DelayedScaling.

    The model should be on its device; weights and their names stay. dynamic: scale by own amaxes in
    all steps. ValueError for sizes that are no multiples of 16, or a GPU without FP8.
    """
    device = next(model.parameters()).device
    if device.type == 'mps':
        raise ValueError('fp8: torch has no 8-bit floats on MPS: --device=cpu or --fp8=False')
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f'fp8: {torch.cuda.get_device_name(device)} has no FP8 units, which '
                         'compute capability 8.9 brings: --fp8=False')
    layers = {f'blocks.{name}': module for name, module in model.blocks.named_modules()
              if isinstance(module, nn.Linear)}
    for name, layer in layers.items():
        if any(size % 16 for size in layer.weight.shape):
            raise ValueError(f'fp8: {name} is {tuple(layer.weight.shape)}; FP8 GEMMs need '
                             'multiples of 16: change n_embd, n_ffn or n_kv_head')
        layer.__class__ = Float8Linear
        layer.amax = torch.zeros(3, device=device)
        layer.scale = torch.ones(3, device=device)
        layer.lost = torch.zeros(3, 2, device=device)
        layer.rounded = None
    scaling = WatchedScaling(layers, dynamic, history_len, margin, grad_format)
    for layer in layers.values():
        layer.scaling = scaling
    return scaling


# --------------------------------------------------------------------------------------------------
# The history of amaxes

class DelayedScaling:
    """The amaxes of layers, {name: Float8Linear}, and the scales that follow from them.

    own_amax: tensors are scaled by their own amaxes, because one of them has no history yet, or in
    all steps (dynamic).
    """

    def __init__(self, layers, dynamic, history_len, margin, grad_format):
        self.layers = layers
        self.dynamic = dynamic
        self.margin = margin
        self.grad_format = grad_format
        self.own_amax = True
        self.watched = False
        self.step = 0
        self.amaxes = [layer.amax for layer in layers.values()]                          # n of (3,)
        self.scales = [layer.scale for layer in layers.values()]
        device = self.scales[0].device
        self.history = torch.zeros(len(layers), len(ROLES), history_len, device=device)
        formats = E4M3, E4M3, grad_format                                    # of ROLES
        self.tops = torch.tensor([torch.finfo(fmt).max / 2**margin for fmt in formats],
                                 device=device)

    def mode(self):
        return Mode(self.margin, self.grad_format, self.own_amax, self.watched)

    def round_weights(self):
        """Before a step's micro-batches: round the weights once for all of them.

        Neither weights nor scales change within a step. What is held, two bytes a weight, ends with
        `collect`, so that nothing rounded before an update is used after it.
        """
        for layer in self.layers.values():
            layer.rounded = layer.round_weight(layer.records()[WEIGHT], self.mode())

    def collect(self):
        """After the backward passes of a step: its amaxes, (layers, roles), over all ranks."""
        for layer in self.layers.values():
            layer.rounded = None
        amax = torch.stack(self.amaxes)
        torch._foreach_zero_(self.amaxes)
        if dist.is_initialized():                                # one collective for all layers
            amax = amax.nan_to_num(torch.inf, torch.inf)         # a maximum may drop NaN
            dist.all_reduce(amax, dist.ReduceOp.MAX)
        return amax

    def update(self, amax):
        """After each optimizer step: its finite amaxes enter the history, new scales follow."""
        self.history[..., self.step % self.history.size(-1)] = amax.nan_to_num(0, 0)
        self.step += 1
        self.follow_history(torch.stack(self.scales))

    def follow_history(self, old_scales):
        """Set scales by the history; to the old ones, (n, 3), where it has no amax."""
        largest = self.history.amax(-1)                                                  # (n, 3)
        torch._foreach_copy_(self.scales, scale_for(largest, self.tops, old_scales).unbind())
        if self.dynamic:
            self.own_amax = True
        elif self.own_amax:
            self.own_amax = not bool((largest > 0).all())

    def state_dict(self):
        return {'history': self.history, 'scale': torch.stack(self.scales), 'step': self.step,
                'own_amax': self.own_amax}

    def load_state_dict(self, state):
        self.history.copy_(state['history'])
        self.step = state['step']
        self.own_amax = state['own_amax']
        self.follow_history(state['scale'].to(self.history.device))


# --------------------------------------------------------------------------------------------------
# Watching: how much is lost, and where a number was first not finite. No result depends on it.

def lost_shares(magnitude, scale, fmt):
    """(2,): the shares of a tensor that saturate and that become 0 when x · scale is rounded."""
    info = torch.finfo(fmt)
    scaled = magnitude * scale
    saturated = scaled > 1.001 * info.max
    half_the_least = info.smallest_normal * info.eps / 2         # a tie, rounded to 0
    underflowed = (magnitude > 0) & (scaled <= half_the_least)
    return torch.stack([saturated, underflowed]).float().mean((1, 2))


class WatchedScaling(DelayedScaling):
    """DelayedScaling that can report on a step."""

    def watch(self, on):
        """Before a step: whether to count what it loses, for a report."""
        self.watched = on
        self.scales_before = torch.stack(self.scales)

    def report(self):
        """After a watched step: {role: saturated, underflowed (mean, largest over layers), jump}.

        jump: the largest change of a scale since `watch`, in powers of two; 0 from the first scale.
        """
        lost = torch.stack([layer.lost for layer in self.layers.values()])               # (n, 3, 2)
        before = self.scales_before
        jumps = (torch.stack(self.scales) / before).log2().abs() * (before != 1)         # (n, 3)
        mean, largest, jump = lost.mean(0).tolist(), lost.amax(0).tolist(), jumps.amax(0).tolist()
        report = {}
        for i, role in enumerate(ROLES):
            report[role] = {'saturated': (mean[i][0], largest[i][0]),
                            'underflowed': (mean[i][1], largest[i][1]),
                            'jump': 0.0 if self.dynamic else jump[i]}
        return report

    def trace(self, amax):
        """The first tensor that was not finite in a step with these amaxes (n, 3), in words; or ''.

        First in the order of computation: forward through the layers, then backward.
        """
        amax = amax.tolist()
        order = [(n, role) for n in range(len(amax)) for role in (WEIGHT, INPUT)]
        order += [(n, GRADIENT) for n in reversed(range(len(amax)))]
        for n, role in order:
            if not math.isfinite(amax[n][role]):
                name = list(self.layers)[n]
                oldest_first = self.history[n, role].roll(-self.step).tolist()
                last = [f'{x:.3g}' for x in oldest_first if x][-4:]
                scale = 'its own' if self.own_amax else f'{self.scales[n][role]:.3g}'
                return (f'; {name}: its {ROLES[role]} has amax {amax[n][role]}; before '
                        f'{", ".join(last) or "none"}; scale {scale}')
        return ''


# --------------------------------------------------------------------------------------------------

def products(layer, x, grad):
    """A linear's output, the gradient of its input, and that of its weight."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, layer.weight), grad)


if __name__ == '__main__':
    net = nn.ModuleDict({'blocks': nn.ModuleList([nn.Linear(1024, 1024, bias=False)])})
    layer = net.blocks[0]
    x, grad = torch.randn(4096, 1024), torch.randn(4096, 1024)
    with_outliers = torch.where(torch.arange(1024) % 100 < 1, 100 * x, x)
    exact = products(layer, x, grad) + products(layer, with_outliers, grad)
    convert_to_float8(net)
    rounded = products(layer, x, grad) + products(layer, with_outliers, grad)
    errors = [f'{(a - b).norm() / a.norm():.2%}' for a, b in zip(exact, rounded)]
    print('relative errors of output, gradient of input, gradient of weight:', *errors[:3],
          '\nwith every hundredth column of the input 100 times as large:', *errors[3:])
