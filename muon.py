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
import torch.distributed as dist


def ranks():
    """(rank of this process, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@functools.cache
def has_bf16(device):
    """Whether 'cuda', 'cpu' or 'mps' multiplies bf16 in hardware.

    A CPU without such units takes hundreds of times as long for it as for fp32.
    """
    return device == 'cpu' and torch.cpu._is_avx512_bf16_supported() or \
        device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)


def matmul_dtype(device):
    return torch.bfloat16 if has_bf16(device) else torch.float32


def newton_schulz_flops(shape, steps=5):
    """FLOPs of zeropower_via_newtonschulz5 for a matrix: X Xᵀ, A A, and their sum times X."""
    n, m = sorted(shape)
    return steps * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)


def share_out(matrices, world):
    """{matrix: rank}: the costliest first, to the rank that has the least to do (Graham 1969)."""
    loads, owner = [0] * world, {}
    for p in sorted(matrices, key=lambda p: -newton_schulz_flops(p.shape)):
        owner[p] = loads.index(min(loads))
        loads[owner[p]] += newton_schulz_flops(p.shape)
    return owner


def zeropower_via_newtonschulz5(G, steps=5, dtype=None):
    """G (..., rows, cols) -> about U Vᵀ of its SVD, same shape; batched over (...).

    dtype: of the products; by default bf16 where the hardware has it.

    Iterates X <- a X + (b A + c A²) X with A = X Xᵀ, an odd quintic applied to the singular values.
    The coefficients (Keller Jordan, 2024) are tuned for a steep slope at zero: five steps carry
    singular values of 0.01...1 to about 0.7...1.2, which serves as well as exactly 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype or matmul_dtype(G.device.type))
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

    Of several ranks each has its own matrices, with about the same FLOPs: it alone keeps their
    momentum and orthogonalises them. The others get U Vᵀ, while they are busy with the matrices of
    the next shape; then every rank takes the same step.
    """

    kept = ('momentum_buffer',)                               # state that is as large as a weight

    def __init__(self, params, lr=0.01, momentum=0.95, weight_decay=0.1, split=False, dtype=None):
        super().__init__(params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay,
                                  'split': split, 'parts': None})
        self.dtype = dtype                                    # of Newton–Schulz
        self.owner = share_out([p for group in self.param_groups for p in group['params']],
                               ranks()[1])

    def part_of(self, p, t):
        """What this rank keeps of t, a tensor of the shape of the weight p: all, or nothing."""
        return t if self.owner[p] == ranks()[0] else None

    @torch.no_grad()
    def step(self):
        sent = None                    # of the last shape: on its way while this one is computed
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for ps in by_shape.values():
                sending = group, ps, self.orthogonalise(group, ps)
                if sent:
                    self.move(*sent)
                sent = sending
        if sent:
            self.move(*sent)

    def orthogonalise(self, group, ps):
        """For each rank (its weights among ps, their U Vᵀ, what to wait for or None)."""
        (rank, world), parts, found = ranks(), self.parts_of(group, ps), []
        device = ps[0].device
        dtype = self.dtype or matmul_dtype(device.type)
        for r in range(world):
            share = [p for p in ps if self.owner[p] == r]
            if not share:
                continue
            if r == rank:
                u = self.momentum(share, group['momentum'])       # (len(share), rows, cols)
                # cat also makes one part, which may be a transposed view, contiguous
                X = torch.cat([zeropower_via_newtonschulz5(part, dtype=dtype)
                               for part in u.split(parts, dim=1)], dim=1)
            else:
                X = torch.empty(len(share), *ps[0].shape, dtype=dtype, device=device)
            found.append((share, X, dist.broadcast(X, r, async_op=True) if world > 1 else None))
        return found

    def parts_of(self, group, ps):
        return group['split'] and group['parts'] or (len(ps[0]),)

    def momentum(self, ps, momentum):
        """Add the gradients to the momentum of weights of one shape; returns u, stacked."""
        for p in ps:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        grads, bufs = [p.grad for p in ps], [self.state[p]['momentum_buffer'] for p in ps]
        torch._foreach_mul_(bufs, momentum)
        torch._foreach_add_(bufs, grads)
        return torch.stack(torch._foreach_add(grads, bufs, alpha=momentum))

    def move(self, group, ps, received):
        """Step the weights ps along what `orthogonalise` found for them."""
        cols = ps[0].size(1)
        scale = torch.cat([torch.full((rows, 1), 0.2 * math.sqrt(max(rows, cols)),
                                      device=ps[0].device) for rows in self.parts_of(group, ps)])
        for share, X, work in received:
            if work:
                work.wait()
            torch._foreach_mul_(share, 1 - group['lr'] * group['weight_decay'])
            torch._foreach_sub_(share, (X.to(ps[0].dtype) * scale).unbind(), alpha=group['lr'])


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which treats every number alone; so each rank steps an equal part of the rows.

    A rank keeps moments for its part of each tensor; after the step all ranks exchange their parts.
    A group's `params`, by which torch files the state, are these parts: views of the parameters in
    `whole`, where gradients are and names belong.
    """

    kept = ('exp_avg', 'exp_avg_sq')

    def __init__(self, groups, betas):
        # parts, which share the memory of the whole, are what torch's AdamW sees
        super().__init__([g | {'params': [self.part_of(p, p.detach()) for p in g['params']],
                               'whole': g['params']} for g in groups],
                         betas=betas, eps=1e-8, fused=True)

    def part_of(self, p, t):
        """What this rank keeps of t, a tensor of the shape of the parameter p: some rows."""
        rank, world = ranks()
        return t.tensor_split(world)[rank]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for part, p in zip(group['params'], group['whole']):
                part.grad = None if p.grad is None else self.part_of(p, p.grad)
        super().step()
        rank, world = ranks()
        whole = [p.detach() for group in self.param_groups for p in group['whole']]
        for r in range(world) if world > 1 else ():                # one message a rank
            parts = [p.tensor_split(world)[r] for p in whole]
            sizes = [part.numel() for part in parts]
            flat = torch.cat([part.flatten() for part in parts]) if r == rank else \
                parts[0].new_empty(sum(sizes))
            dist.broadcast(flat, r)
            torch._foreach_copy_(parts, [new.view_as(part)
                                         for new, part in zip(flat.split(sizes), parts)])
            del flat                                               # before there is the next


def make_optimizers(kind, groups, betas=(0.9, 0.95), momentum=0.95, split=False, dtype=None):
    """Fresh optimizers for Xmodel.param_groups: [AdamW] or, with kind 'muon', [Muon, AdamW].

    Muon gets the matrices of the blocks. The embedding, whose rows are looked up one by one, and
    the norm gains, which are vectors, keep AdamW.
    """
    if kind == 'adamw':
        return [AdamW(groups, betas)]
    matrices = [g | {'lr_mult': g['muon_lr_mult']} for g in groups
                if g['role'] in ('matrix', 'branch_out')]
    rest = [g for g in groups if g['role'] not in ('matrix', 'branch_out')]
    return [Muon(matrices, momentum=momentum, split=split, dtype=dtype), AdamW(rest, betas)]


def step_all(optimizers, lrs):
    """Step with lrs {knob: learning rate} times µP's factor for each group; clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lrs[group['lr_knob']] * group['lr_mult']
        optimizer.step()
    # in place, as they lie in DDP's buckets
    torch._foreach_zero_([p.grad for _, _, p, _ in parameters_of(optimizers) if p.grad is not None])


# --------------------------------------------------------------------------------------------------
# State in checkpoints: in full and by name, so that it does not matter how many ranks there are

def parameters_of(optimizers):
    """Yield (optimizer, name, parameter, what of it the optimizer steps)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            whole = group.get('whole', group['params'])
            for name, p, part in zip(group['names'], whole, group['params']):
                yield optimizer, name, p, part


@torch.no_grad()
def gather_state(optimizers):
    """{name: {'exp_avg': whole tensor, ...}} on rank 0, on the CPU; all ranks have to call it."""
    found, (rank, world) = {}, ranks()
    for optimizer, name, p, part in parameters_of(optimizers):
        state = optimizer.state.get(part, {})
        found[name] = {'step': state['step'].to('cpu', copy=True)} if 'step' in state else {}
        for key in optimizer.kept:
            whole = torch.zeros_like(p)
            if key in state:
                optimizer.part_of(p, whole).copy_(state[key])
            if world > 1:
                dist.reduce(whole, 0)                              # the others have zeros there
            if rank == 0:
                found[name][key] = whole.cpu()
    return found


@torch.no_grad()
def load_state(optimizers, state):
    """Take this rank's parts of what gather_state gave, with whatever number of ranks.

    ValueError where there is none, as in bare weights, or that of another model.
    """
    for optimizer, name, p, part in parameters_of(optimizers):
        if name not in state:
            raise ValueError(f'it holds no state of the optimizer for {name}')
        if isinstance(optimizer, AdamW) and 'step' not in state[name]:
            continue                                               # it had not made one yet
        if any(key not in state[name] or state[name][key].shape != p.shape
               for key in optimizer.kept):
            raise ValueError(f'its state of the optimizer for {name} is that of another model')
        mine = {key: optimizer.part_of(p, whole) for key, whole in state[name].items()
                if key in optimizer.kept}
        if all(t is not None for t in mine.values()):
            optimizer.state[part] = {key: t.to(p.device, copy=True) for key, t in mine.items()}
            if 'step' in state[name]:
                optimizer.state[part]['step'] = state[name]['step'].to(p.device, copy=True)


if __name__ == '__main__':
    for rows, cols in ((256, 256), (1280, 256), (256, 640)):
        G = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
        for name, M in (('Gaussian', G), ('Newton–Schulz', zeropower_via_newtonschulz5(G).float())):
            s = torch.linalg.svdvals(M)
            print(f'{name:14} {rows:4} x {cols:3}: singular values {s.min():.3f} to {s.max():.3f}')
