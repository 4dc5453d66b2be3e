"""FP8 matmuls as in Xmodel-2.5: E4M3 forward, E5M2 backward, delayed scaling, in torch._scaled_mm.

An H100 multiplies 8-bit floats twice as fast as bf16, and they take half the memory. Two formats:

    E4M3  4 bits of exponent, 3 of mantissa: up to 448, down to 2^-9, neighbours 1/8 to 1/16 apart
    E5M2  5 bits of exponent, 2 of mantissa: up to 57 344, down to 2^-16, neighbours 1/4 to 1/8

Weights and activations need the finer steps, gradients, which spread over more powers of two, the
wider range. A value beyond the largest saturates, one below half of the smallest becomes 0. bf16
has the range of fp32 and needs no care; here every tensor is multiplied by a scale that brings its
largest magnitude, amax, to the format's largest value before it is rounded. The GEMM's sums leave
it multiplied by both reciprocals, which are constant in the sum: so one scale a tensor costs
nothing. Errors of rounding are independent, so that a sum's is no larger than its terms' (4 %).

Delayed scaling. A tensor's own amax is known only when all of it has been computed: to wait for it
costs a pass over memory, while with a scale at hand the rounding fuses with what computes the
tensor. So the scale is taken from the amaxes of earlier steps,

    scale = largest value of the format / max(amaxes of the last 128 steps) / 2^margin,

as by NVIDIA's Transformer Engine, with which Xmodel-2.5 was trained (arXiv 2511.19496); each layer
has one for input, weight and output's gradient. What outgrows it saturates; step 0 has own amaxes.

FP8 is for the blocks' linears alone, 69 % of the 1.3B model's FLOPs. In bf16 or fp32 stay attention
and logits, for what feeds a softmax must be exact; embedding, norms, residual stream, for they are
no GEMMs; and the weights, of which an update is a small part.

    python fp8.py         # relative errors of a linear's output and gradients on Gaussian data
"""
import torch
import torch.distributed as dist
from torch import nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROLES = 'input', 'weight', 'gradient'


def quantise(x, scale, dtype):
    """x · scale, rounded to the nearest FP8 value; the largest for what is beyond, NaN for NaN."""
    top = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-top, top).to(dtype)


def scale_for(amax, top, old):
    """The scale that brings amax to `top`; the old one where amax is 0, inf or NaN."""
    return torch.where((amax > 0) & (top / amax).isfinite() & amax.isfinite(), top / amax, old)


def gemm(a, b, scale_a, scale_b, dtype, fast=False):
    """(M, K) · (K, N) of FP8 operands quantised with these scales -> (M, N) in dtype.

    a is row-major, b column-major, all sizes multiples of 16: as the tensor cores read them. fast
    adds up with fewer bits, which the forward pass can bear.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b, scale_a=1 / scale_a, scale_b=1 / scale_b, out_dtype=dtype,
                                use_fast_accum=fast)
    return gemm_without_fp8_units(a, b, 1 / (scale_a * scale_b), dtype)


def transposed(x):
    """xᵀ in memory, row-major: at one byte a value, cheaper than to round from bf16 again."""
    return x.mT.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op('nano_xmodel::gemm_without_fp8_units', mutates_args=())
def gemm_without_fp8_units(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor,
                           dtype: torch.dtype) -> torch.Tensor:
    """The same by a matmul in dtype, in which FP8 values are exact: several times as fast as
    torch._scaled_mm without FP8 units. An opaque operator, as the factor must be a Python number
    for the sums to be rounded once, after they are multiplied."""
    def decode(x):                         # there are 256 FP8 values; a cast takes 6 x as long
        values = torch.arange(256, dtype=torch.uint8, device=x.device).view(x.dtype).to(dtype)
        return values.index_select(0, x.view(torch.uint8).int().flatten()).view(x.shape)

    a, b = decode(a.contiguous()), decode(b.mT.contiguous()).mT
    return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=factor.item())


@gemm_without_fp8_units.register_fake
def _(a, b, factor, dtype):
    return a.new_empty(a.size(0), b.size(1), dtype=dtype)


def observe(x, dtype, margin, own_amax, watched, amax, scale, lost):
    """The scale by which to quantise x; notes x's amax and, if watched, how much of x is lost.

    amax, scale (scalars), lost (2,) belong to x's role in its layer. amax becomes the maximum over
    the step's micro-batches, NaN above all; lost this one's shares that saturate and that become 0.
    """
    info, size = torch.finfo(dtype), x.detach().abs().float()
    now = size.amax()
    if own_amax:
        scale = scale_for(now, info.max / 2**margin, scale)
    amax.copy_(torch.maximum(amax, now))
    if watched:
        zero = (size > 0) & (size * scale <= info.smallest_normal * info.eps / 2)   # half the least
        lost.copy_(torch.stack([size * scale > 1.001 * info.max, zero]).float().mean((1, 2)))
    return scale


class Float8Matmul(torch.autograd.Function):
    """x (N, in), weight (out, in) -> x · weightᵀ (N, out), its three GEMMs in FP8. scales: of x and
    weight; the rest is for the gradient of the output, see `observe`."""
    @staticmethod
    def forward(ctx, x, weight, scales, amax, scale, lost, how, dtype):
        x8, w8 = quantise(x, scales[0], E4M3), quantise(weight, scales[1], E4M3)
        ctx.save_for_backward(x8, weight, scales, amax, scale, lost)         # a byte a value of x
        ctx.how, ctx.x_dtype, ctx.dtype = how, x.dtype, dtype
        return gemm(x8, w8.mT, *scales, dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):                                                 # (N, out)
        x8, weight, scales, amax, scale, lost = ctx.saved_tensors
        scale = observe(grad, *ctx.how, amax, scale, lost)
        g8, w8 = quantise(grad, scale, ctx.how[0]), quantise(weight, scales[1], E4M3)
        grad_x = gemm(g8, transposed(w8).mT, scale, scales[1], ctx.dtype)                # (N, in)
        grad_w = gemm(transposed(g8), transposed(x8).mT, scale, scales[0], ctx.dtype)    # (out, in)
        return (grad_x.to(ctx.x_dtype), grad_w.to(weight.dtype), *[None] * 6)


class Float8Linear(nn.Linear):
    """A linear without bias with GEMMs in FP8; convert_to_float8 makes nn.Linears into these.

    amax, scale (3,), lost (3, 2): of each of ROLES, see `observe`. The flags of `scaling`, which is
    the model's, are Python's, so that torch.compile makes a graph for either value, and the usual
    one pays nothing for the other. One forward pass, then its backward pass.
    """
    def forward(self, x):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        how = self.scaling.margin, self.scaling.own_amax, self.scaling.watched
        rows, state = x.reshape(-1, x.size(-1)), (self.amax, self.scale, self.lost)      # (N, in)
        if not torch.is_grad_enabled():              # evaluation and generation leave no trace;
            state = tuple(t.clone() for t in state)  # a checkpointed block, computed again from the
        with torch.no_grad():                        # same input, none that was not there before
            scales = torch.stack([observe(t, E4M3, *how, *(s[role] for s in state))
                                  for role, t in enumerate((rows, self.weight))])
        y = Float8Matmul.apply(rows, self.weight, scales, *(s[2] for s in state),
                               (self.scaling.grad_format, *how), dtype)
        return y.view(*x.shape[:-1], -1)                                     # (..., out)


class DelayedScaling:
    """The amaxes of layers, {name: Float8Linear}, and the scales that follow from them.

    own_amax: tensors are scaled by their own amaxes, as one of them has no history yet; dynamic:
    for ever. watched: steps count what they lose, which takes a pass over each tensor.
    """
    def __init__(self, layers, dynamic, history_len, margin, grad_format):
        self.layers, self.dynamic, self.own_amax, self.watched = layers, dynamic, True, False
        self.margin, self.grad_format, self.step = margin, grad_format, 0
        self.amaxes, self.scales = zip(*((layer.amax, layer.scale) for layer in layers.values()))
        self.history = torch.zeros(len(layers), 3, history_len, device=self.scales[0].device)
        self.tops = torch.tensor([torch.finfo(fmt).max / 2**margin
                                  for fmt in (E4M3, E4M3, grad_format)]).to(self.history.device)

    def collect(self):
        """After the backward passes of a step: its amaxes, (layers, roles), over all ranks."""
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

    def follow_history(self, old):
        """Scales by the history, the old one where it has no amax."""
        most = self.history.amax(-1)                                                     # (n, 3)
        torch._foreach_copy_(self.scales, scale_for(most, self.tops, old).unbind())
        self.own_amax = self.dynamic or (self.own_amax and not bool((most > 0).all()))

    def state_dict(self):
        return {'history': self.history, 'scale': torch.stack(self.scales), 'step': self.step,
                'own_amax': self.own_amax}

    def load_state_dict(self, state):
        self.history.copy_(state['history'])
        self.step, self.own_amax = state['step'], state['own_amax']
        self.follow_history(state['scale'].to(self.history.device))

    def watch(self, on):
        """Before a step: whether it is watched, for a report."""
        self.watched, self.before = on, torch.stack(self.scales)

    def report(self):
        """After a watched step: {role: (mean, largest) shares of layers, jump of scales' log2}."""
        lost = torch.stack([layer.lost for layer in self.layers.values()])               # (n, 3, 2)
        jumps = (torch.stack(self.scales) / self.before).log2().abs() * (self.before != 1)
        rows = zip(ROLES, lost.mean(0).tolist(), lost.amax(0).tolist(), jumps.amax(0).tolist())
        return {role: {'saturated': (mean[0], most[0]), 'underflowed': (mean[1], most[1]),
                       'jump': 0.0 if self.dynamic else jump} for role, mean, most, jump in rows}

    def trace(self, amax):
        """The first tensor of a step with these amaxes that was not finite, in words, or ''."""
        amax, names = amax.tolist(), list(self.layers)
        order = [(n, role) for n in range(len(amax)) for role in (1, 0)]     # forward, then back
        order += [(n, 2) for n in reversed(range(len(amax)))]
        for n, role in order:
            if not abs(amax[n][role]) < torch.inf:
                last = [f'{x:.3g}' for x in self.history[n, role].roll(-self.step).tolist() if x]
                scale = 'its own' if self.own_amax else f'{self.scales[n][role]:.3g}'
                return (f'; {names[n]}: its {ROLES[role]} has amax {amax[n][role]}; before '
                        f'{", ".join(last[-4:]) or "none"}; scale {scale}')
        return ''


def convert_to_float8(model, dynamic=False, history_len=128, margin=0, grad_format=E5M2):
    """Make the linears of model.blocks Float8Linears, in place -> their DelayedScaling.

    For a model on its device; weights and names stay. ValueError for sizes or a GPU without FP8.
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
        zeros = torch.zeros(3, device=device)
        layer.amax, layer.scale, layer.lost = zeros, zeros + 1, torch.stack([zeros, zeros], dim=1)
    scaling = DelayedScaling(layers, dynamic, history_len, margin, grad_format)
    for layer in layers.values():
        layer.scaling = scaling
    return scaling


if __name__ == '__main__':
    net = nn.ModuleDict({'blocks': nn.ModuleList([nn.Linear(1024, 1024, bias=False)])})
    x, grad, found = torch.randn(4096, 1024), torch.randn(4096, 1024), []
    for _ in range(2):
        for t in (x, torch.where(torch.arange(1024) % 100 < 1, 100 * x, x)):
            y = net.blocks[0](t.requires_grad_())
            found += y, *torch.autograd.grad(y, (t, net.blocks[0].weight), grad)
        convert_to_float8(net)
    errors = [f'{(a - b).norm() / a.norm():.2%}' for a, b in zip(found, found[6:])]
    print('relative errors of output, gradient of input, gradient of weight:', *errors[:3],
          '\nwith every hundredth column of the input 100 times as large:', *errors[3:])
