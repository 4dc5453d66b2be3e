"""Muon: momentum, then every weight matrix steps along the nearest orthogonal matrix.

A gradient matrix is dominated by a few singular directions, so SGD and Adam mostly move the weight
along those. Muon replaces the momentum matrix U S Vᵀ by U Vᵀ: all directions move equally. An SVD
would be slow; Newton–Schulz gets there with matrix products only, for which bf16 is exact enough.
Xmodel-2.5 (arXiv 2511.19496) trains with AdamW through the stable phases and switches to Muon as
decay begins.

    python muon.py         # how close five Newton–Schulz steps come to an orthogonal matrix
"""
import math

import torch
import torch.distributed as dist

from distributed import AdamW, parameters_of, ranks
from hardware import matmul_dtype


def zeropower_via_newtonschulz5(G, steps=5, dtype=None):
    """G (..., rows, cols) -> about U Vᵀ of its SVD, same shape; batched over (...).

    dtype: of the products and the result, whatever G's; by default bf16 where the hardware has it.

    Iterates X <- a X + (b A + c A²) X with A = X Xᵀ, an odd quintic applied to the singular values
    (of a tall matrix all of it transposed, so that A is the smaller product).
    The coefficients (Keller Jordan, 2024) are tuned for a steep slope at zero: five steps carry
    singular values of 0.01...1 to about 0.7...1.2, which serves as well as exactly 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype or matmul_dtype(G.device.type)).reshape(-1, *G.shape[-2:])
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)       # all singular values at most 1
    tall = G.size(-2) > G.size(-1)
    for _ in range(steps):
        # baddbmm adds b A, or a X, before it rounds: a rounding and a pass over memory fewer
        A = X.mT @ X if tall else X @ X.mT                    # (batch, n, n), n = min(rows, cols)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)           # b A + c A²
        if tall:
            X = torch.baddbmm(X, X, B, beta=a)                # the same, transposed
        else:
            X = torch.baddbmm(X, B, X, beta=a)                # a X + B X
    return X.reshape(G.shape)


STACK = 8                          # weights at a time: a whole role's would not fit a CPU's cache


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights; embedding and norm gains stay with AdamW, an optimizer beside this one.

        buf <- momentum · buf + g;   u = g + momentum · buf                               (Nesterov)
        w   <- w · (1 - lr · weight_decay) - lr · 0.2 sqrt(max(rows, cols)) · NewtonSchulz(u)

    U Vᵀ of a rows × cols matrix has RMS 1 / sqrt(max(rows, cols)); the factor brings every update
    to RMS 0.2, about AdamW's, so lr and decay carry over at one width (Moonlight, arXiv 2502.16982,
    eq. 4). Across widths the update's spectral norm, and with it what activations move by, then
    grows as lr sqrt(width), which asks for lr 1/sqrt(m) (`muon_lr_mult` in model.mup_table).
    Xmodel-2.5's own decay used 1/m, Adam's rule; its searches with Muon alone, 1/sqrt(m).

    Weights of one shape are orthogonalised together, STACK at a time. A fused weight (qkv,
    gate-up) is one matrix, as in Xmodel-2.5's code; split=True takes its group's `parts` (rows,
    ...) singly.
    """

    state_keys = ('momentum_buffer',)                         # state that is as large as a weight

    def __init__(self, params, lr=0.01, momentum=0.95, weight_decay=0.1, split=False, dtype=None):
        super().__init__(params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay,
                                  'split': split, 'parts': None})
        matrices = [p for group in self.param_groups for p in group['params']]
        self.dtype = dtype or matmul_dtype(matrices[0].device.type)          # of Newton–Schulz
        self.owner = assign_owners(matrices, ranks()[1])      # {matrix: rank}, of one process all 0

    @torch.no_grad()
    def step(self):
        # with one process, exchange yields what updates yields
        for group, weights, update in exchange(self.updates(), self.owner, self.dtype):
            rms = self.rms_scale(group, weights[0])
            for p, u in zip(weights, update):
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.addcmul_(u.to(p.dtype), rms, value=-group['lr'])

    def updates(self):
        """Yield (group, weights of one shape, U Vᵀ of those that this rank owns)."""
        rank, world = ranks()
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for same_shape in by_shape.values():
                for i in range(0, len(same_shape), STACK * world):
                    weights = same_shape[i:i + STACK * world]
                    own = [p for p in weights if self.owner[p] == rank]
                    yield group, weights, self.orthogonal_update(group, own)

    def orthogonal_update(self, group, weights):
        """U Vᵀ of the momentum of n weights of one shape: (n, rows, cols); None of no weights."""
        if not weights:
            return None
        u = torch.stack([self.nesterov_momentum(p, group['momentum']) for p in weights])
        parts = [zeropower_via_newtonschulz5(part, dtype=self.dtype)
                 for part in u.split(self.parts_of(group, weights[0]), dim=1)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def nesterov_momentum(self, p, momentum):
        """Add a weight's gradient to its momentum -> u, in Newton–Schulz's dtype."""
        if not self.state[p]:
            self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        buf = self.state[p]['momentum_buffer'].mul_(momentum).add_(p.grad)
        return p.grad.add(buf, alpha=momentum).to(self.dtype)

    def parts_of(self, group, p):
        """Rows of each matrix that Newton–Schulz takes: all of p's or, if split, its parts."""
        if group['split'] and group['parts']:
            return group['parts']
        return (len(p),)

    def rms_scale(self, group, p):
        """0.2 sqrt(max(rows, cols)) of the matrix that each row of p belongs to: (rows, 1)."""
        cols, like = p.size(1), {'dtype': p.dtype, 'device': p.device}
        return torch.cat([torch.full((rows, 1), 0.2 * math.sqrt(max(rows, cols)), **like)
                          for rows in self.parts_of(group, p)])

    def own_part(self, p, t):
        """What this rank keeps of t, a tensor of the shape of the weight p: all of it, or None."""
        return t if self.owner[p] == ranks()[0] else None


# --------------------------------------------------------------------------------------------------
# Which parameter gets which optimizer

def make_optimizers(kind, groups, betas=(0.9, 0.95), momentum=0.95, split=False, dtype=None):
    """Fresh optimizers for Xmodel.param_groups: [AdamW] or, with kind 'muon', [Muon, AdamW].

    Muon gets the matrices of the blocks. The embedding, whose rows are looked up one by one, and
    the norm gains, which are vectors, keep AdamW.
    """
    if kind == 'adamw':
        return [AdamW(groups, betas)]
    matrices, others = [], []
    for group in groups:
        if group['role'] in ('matrix', 'branch_out'):
            matrices.append(group | {'lr_mult': group['muon_lr_mult']})
        else:
            others.append(group)
    return [Muon(matrices, momentum=momentum, split=split, dtype=dtype), AdamW(others, betas)]


def step_all(optimizers, lrs):
    """Step with lrs {knob: learning rate} times µP's factor for each group; clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lrs[group['lr_knob']] * group['lr_mult']
        optimizer.step()
    grads = [p.grad for _, _, p, _ in parameters_of(optimizers) if p.grad is not None]
    torch._foreach_zero_(grads)                               # in place, as DDP's buckets hold them


# --------------------------------------------------------------------------------------------------
# Several ranks: who owns which matrix, and what travels
#
# Newton–Schulz wants whole matrices, so a matrix is one rank's: it alone keeps the momentum and
# computes U Vᵀ, and sends it to the others. Then every rank takes the same step.

def newton_schulz_flops(shape, steps=5):
    """FLOPs of zeropower_via_newtonschulz5 for a matrix: X Xᵀ, A A, and their sum times X."""
    n, m = sorted(shape)
    return steps * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)


def assign_owners(matrices, world):
    """{matrix: rank}: the costliest first, to the rank that has the least to do (Graham 1969)."""
    loads, owner = [0] * world, {}
    for p in sorted(matrices, key=lambda p: -newton_schulz_flops(p.shape)):
        owner[p] = loads.index(min(loads))
        loads[owner[p]] += newton_schulz_flops(p.shape)
    return owner


def exchange(updates, owner, dtype):
    """Muon.updates of this rank -> those of all ranks: yields (group, weights, U Vᵀ).

    U Vᵀ of one shape travels while the ranks are busy with the next shape.
    """
    rank, world = ranks()
    if world == 1:
        yield from updates
        return
    in_flight = []
    for group, weights, own_update in updates:
        previous, in_flight = in_flight, []
        for sender in range(world):
            of_sender = [p for p in weights if owner[p] == sender]
            if not of_sender:
                continue
            if sender == rank:
                update = own_update
            else:
                update = torch.empty(len(of_sender), *weights[0].shape, dtype=dtype,
                                     device=weights[0].device)
            work = dist.broadcast(update, sender, async_op=True)
            in_flight.append((group, of_sender, update, work))
        yield from arrived(previous)
    yield from arrived(in_flight)


def arrived(in_flight):
    for group, weights, update, work in in_flight:
        work.wait()
        yield group, weights, update


if __name__ == '__main__':
    for rows, cols in ((256, 256), (1280, 256), (256, 640)):
        G = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
        for name, M in (('Gaussian', G), ('Newton–Schulz', zeropower_via_newtonschulz5(G).float())):
            s = torch.linalg.svdvals(M)
            print(f'{name:14} {rows:4} x {cols:3}: singular values {s.min():.3f} to {s.max():.3f}')
