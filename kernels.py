"""What the network computes in another way than one would write it down, for speed or memory.

    RMSNorm                  on a CPU in half the time of torch's own
    causal_attention         on a CPU, of short texts, by two matrix products a block of queries
    chunked_cross_entropy    the loss, without all logits in memory at once

Each equals the plain formula of its docstring; elsewhere the first two are torch's own kernels.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from hardware import product_dtype

# --------------------------------------------------------------------------------------------------
# RMSNorm

def rms_norm_on_cpu(x, gain, eps):
    """x (..., C) -> (x / rms(x) · gain, 1 / rms(x) (..., 1))."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)                    # (..., 1)
    scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return (x * scale).mul_(gain), scale


class RMSNormOnCPU(torch.autograd.Function):
    """rms_norm_on_cpu with its gradients."""

    @staticmethod
    def forward(ctx, x, gain, eps):
        y, scale = rms_norm_on_cpu(x, gain, eps)
        ctx.save_for_backward(x, gain, scale)
        return y

    @staticmethod
    @once_differentiable                           # scale would count as a constant
    def backward(ctx, grad):
        x, gain, scale = ctx.saved_tensors
        normed = x * scale
        product = (grad * normed).flatten(0, -2)                                # (rows, C)
        # scale falls as x grows: that takes from grad · gain its part along x
        along = (product @ gain).view_as(scale).div_(-x.size(-1))               # (..., 1)
        return torch.addcmul(grad * gain, normed, along).mul_(scale), product.sum(0), None


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm; on a CPU, where torch's has no kernel and makes a dozen passes, twice as fast."""

    def forward(self, x):
        if not x.is_cpu or x.dtype != torch.float32:
            return super().forward(x)
        if torch.is_grad_enabled():
            return RMSNormOnCPU.apply(x, self.weight, self.eps)
        return rms_norm_on_cpu(x, self.weight, self.eps)[0]


# --------------------------------------------------------------------------------------------------
# Attention

QUERY_BLOCK = 256                  # queries at a time in attention_by_matmuls
MATMUL_MAX_T = 1024                # above it, scores kept for the backward pass take much memory


def causal_attention(q, k, v, scale):
    """softmax(scale · q kᵀ) v, where position t sees positions 0 to t.

    q (B, n_head, T, hd); k, v (B, n_kv_head, T, hd) -> (B, n_head, T, hd).
    """
    if q.is_cpu and q.size(2) <= MATMUL_MAX_T:
        return attention_by_matmuls(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def attention_by_matmuls(q, k, v, scale):
    """causal_attention of short texts on a CPU, where torch's fused kernel is slower than this.

    Queries go in blocks. A block needs two products, q kᵀ and weights · v, with the keys up to its
    last query. The query heads that share a key head are stacked: they are rows of one product.
    """
    B, n_head, T, hd = q.shape
    n_kv_head = k.size(1)
    G = n_head // n_kv_head                                        # query heads of a key head
    q = q.view(B, n_kv_head, G, T, hd).transpose(2, 3)             # (B, n_kv_head, T, G, hd)
    k, v = k.flatten(0, 1), v.flatten(0, 1)                        # (B n_kv_head, T, hd)
    position = torch.arange(T)
    blocks = []
    for begin in range(0, T, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, T)
        q_block = q[:, :, begin:end].reshape(B * n_kv_head, -1, hd)          # (.., n G, hd)
        q_position = position[begin:end].repeat_interleave(G)                # (n G,)
        mask = torch.zeros(len(q_position), end, dtype=q.dtype)              # (n G, end)
        mask.masked_fill_(position[:end] > q_position[:, None], -math.inf)
        keys, values = k[:, :end], v[:, :end]                                # (.., end, hd)
        scores = torch.baddbmm(mask, q_block, keys.mT, alpha=scale)          # (.., n G, end)
        blocks.append(scores.softmax(-1) @ values)                           # (.., n G, hd)
    y = torch.cat(blocks, dim=1).view(B, n_kv_head, T, G, hd)
    return y.transpose(2, 3).reshape(B, n_head, T, hd)


# --------------------------------------------------------------------------------------------------
# Loss in chunks: with 129 280 tokens, the logits of one 16 384-token row would fill 8.5 GB in fp32

CHUNK, CHUNK_ON_GPU = 2**22, 2**28             # logits at a time: 16 MB, and 1 GB of fp32
LEAST_ROWS = 128                               # for each chunk passes through a (V, C) of gradients


def loss_of_chunk(x, w, targets, grad_w):
    """x (rows, C), w (V, C), targets (rows,) -> (sum of the rows' losses, its gradient for x).

    The gradient for w is added to grad_w (V, C), in fp32; without grad_w there are no gradients.
    """
    valid = (targets >= 0)[:, None]                                             # (rows, 1)
    targets = targets.clamp(min=0)[:, None]                                     # (rows, 1)
    logits = x @ w.T                                                            # (rows, V)
    logp = F.log_softmax(logits, dim=-1, dtype=torch.float32)                   # (rows, V)
    target_logp = logp.gather(1, targets)                                       # (rows, 1)
    loss = -(target_logp * valid).sum()
    if grad_w is None:
        return loss, None
    # softmax - onehot, in place: one more chunk would take 1 GB on a GPU. The target's entry,
    # p - 1, comes from fp32: bf16 rounds a p near 1 to exactly 1.
    grad = logits.copy_(logp.exp_())                                            # (rows, V)
    grad.scatter_(1, targets, target_logp.expm1().to(grad.dtype))
    del logp
    grad_w += grad.T @ (x * valid)
    return loss, grad @ w * valid                                               # (rows, C)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(multiplier · x Wᵀ); gradients are computed in the forward pass.

    d loss / d logits = (softmax - onehot) / n_targets needs nothing from later layers.
    So each chunk of rows makes its logits, takes the loss and both gradients from them, and drops
    them: no product is computed twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, multiplier, dtype, with_grad, loss_of_chunk):
        # the multiplier goes to x, which is V / C times smaller than the logits
        w, x = weight.to(dtype), (x * multiplier).to(dtype)                     # (V, C), (N, C)
        rows = max(LEAST_ROWS, (CHUNK_ON_GPU if x.is_cuda else CHUNK) // len(w))
        n_targets = (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if with_grad else None
        grad_w = torch.zeros_like(w, dtype=torch.float32) if with_grad else None
        for i in range(0, len(x), rows):
            part = slice(i, i + rows)
            loss, grad_rows = loss_of_chunk(x[part], w, targets[part], grad_w)
            total += loss
            if with_grad:
                grad_x[part] = grad_rows
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w, n_targets)
            ctx.multiplier = multiplier
        return total / n_targets                                               # the mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_w, n_targets = ctx.saved_tensors
        scale = grad_loss / n_targets
        # in place, as grad_w is as large as the embedding; torch refuses a second backward pass
        return grad_x * (scale * ctx.multiplier), grad_w.mul_(scale), *(None,) * 5


def compiled_cross_entropy():
    """chunked_cross_entropy, of which each chunk is compiled: the loop as a whole would hold
    several chunks at a time."""
    compiled = torch.compile(loss_of_chunk, dynamic=False)
    return partial(chunked_cross_entropy, loss_of_chunk=compiled)


def chunked_cross_entropy(x, weight, targets, multiplier, loss_of_chunk=loss_of_chunk):
    """x (N, C), weight (V, C), targets (N,) with -1 = ignored -> scalar loss in nats."""
    return ChunkedCrossEntropy.apply(x, weight, targets, multiplier, product_dtype(x),
                                     torch.is_grad_enabled(), loss_of_chunk)
