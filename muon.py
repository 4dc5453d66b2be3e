"""Muon: momentum, then every weight matrix steps along the nearest orthogonal matrix.

A gradient matrix is dominated by a few singular directions, so SGD and Adam mostly move the weight
along those. Muon replaces the momentum matrix U S Vᵀ by U Vᵀ: all directions move equally. An SVD
would be slow; Newton–Schulz gets there with matrix products only, for which bf16 is exact enough.
Xmodel-2.5 (arXiv 2511.19496) trains with AdamW through the stable phases and switches to Muon as
decay begins.

    python muon.py         # how close five Newton–Schulz steps come to an orthogonal matrix
"""
import functools
import math

import torch


@functools.cache
def has_bf16(device):
    """Whether 'cuda', 'cpu' or 'mps' multiplies bf16 in hardware.

    A CPU without such units takes hundreds of times as long for it as for fp32.
    """
    return device == 'cpu' and torch.cpu._is_avx512_bf16_supported() or \
        device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)


def zeropower_via_newtonschulz5(G, steps=5):
    """G (..., rows, cols) -> about U Vᵀ of its SVD, same shape; batched over (...).

    Iterates X <- a X + (b A + c A²) X with A = X Xᵀ, an odd quintic applied to the singular values.
    The coefficients (Keller Jordan, 2024) are tuned for a steep slope at zero: five steps carry
    singular values of 0.01...1 to about 0.7...1.2, which serves as well as exactly 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16() if has_bf16(G.device.type) else G.float()
    if tall := G.size(-2) > G.size(-1):
        X = X.mT                                              # so that X Xᵀ is the smaller product
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)       # all singular values at most 1
    for _ in range(steps):
        A = X @ X.mT                                          # (..., n, n), n = min(rows, cols)
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights; embedding and norm gains stay with AdamW, an optimizer beside this one.

        buf <- momentum · buf + g;   u = g + momentum · buf                               (Nesterov)
        w   <- w · (1 - lr · weight_decay) - lr · 0.2 sqrt(max(rows, cols)) · NewtonSchulz(u)

    U Vᵀ of a rows × cols matrix has RMS 1 / sqrt(max(rows, cols)); the factor brings every update
    to RMS 0.2, about AdamW's, so lr and decay carry over at one width (Moonlight, arXiv 2502.16982,
    eq. 4). Across widths the update's spectral norm, and with it what activations move by, then
    grows as lr sqrt(width), which asks for lr 1/sqrt(m) (`muon_lr_mult` in model.mup_table).
    Xmodel-2.5's own decay used 1/m, Adam's rule; its searches with Muon alone, 1/sqrt(m).
    Weights of one shape are stacked and orthogonalised together. A fused weight (qkv, gate-up) is
    one matrix, as in Xmodel-2.5's code; split=True takes its group's `parts` (rows, ...) singly.
    """

    def __init__(self, params, lr=0.01, momentum=0.95, weight_decay=0.1, split=False):
        super().__init__(params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay,
                                  'split': split, 'parts': None})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, _), ps in by_shape.items():
                parts = group['split'] and group['parts'] or (rows,)
                self.step_same_shape(ps, parts, group['lr'], group['momentum'],
                                     group['weight_decay'])

    def step_same_shape(self, ps, parts, lr, momentum, weight_decay):
        for p in ps:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        grads, bufs = [p.grad for p in ps], [self.state[p]['momentum_buffer'] for p in ps]
        torch._foreach_mul_(bufs, momentum)
        torch._foreach_add_(bufs, grads)
        u = torch.stack(torch._foreach_add(grads, bufs, alpha=momentum))    # (len(ps), rows, cols)
        torch._foreach_mul_(ps, 1 - lr * weight_decay)
        update = torch.cat([zeropower_via_newtonschulz5(part).to(u.dtype)
                            * (0.2 * math.sqrt(max(part.shape[1:])))
                            for part in u.split(parts, dim=1)], dim=1)      # (len(ps), rows, cols)
        torch._foreach_sub_(ps, update.unbind(), alpha=lr)


def make_optimizers(kind, groups, betas=(0.9, 0.95), momentum=0.95, split=False):
    """Fresh optimizers for Xmodel.param_groups: [AdamW] or, with kind 'muon', [Muon, AdamW].

    Muon gets the matrices of the blocks. The embedding, whose rows are looked up one by one, and
    the norm gains, which are vectors, keep AdamW.
    """
    def adamw(groups):
        return torch.optim.AdamW(groups, betas=betas, eps=1e-8, fused=True)
    if kind == 'adamw':
        return [adamw(groups)]
    matrices = [g | {'lr_mult': g['muon_lr_mult']} for g in groups
                if g['role'] in ('matrix', 'branch_out')]
    rest = [g for g in groups if g['role'] not in ('matrix', 'branch_out')]
    return [Muon(matrices, momentum=momentum, split=split), adamw(rest)]


def step_all(optimizers, lrs):
    """Step with lrs {knob: learning rate} times µP's factor for each group; clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lrs[group['lr_knob']] * group['lr_mult']
        optimizer.step()
        optimizer.zero_grad()


if __name__ == '__main__':
    for rows, cols in ((256, 256), (1280, 256), (256, 640)):
        G = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
        for name, M in (('Gaussian', G), ('Newton–Schulz', zeropower_via_newtonschulz5(G).float())):
            s = torch.linalg.svdvals(M)
            print(f'{name:14} {rows:4} x {cols:3}: singular values {s.min():.3f} to {s.max():.3f}')
