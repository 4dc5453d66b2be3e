"""FLOPs and bytes of a training step, and the time that they take on a GPU: a roofline estimate.

A step is a list of parts, such as one GEMM or the loss. Each part takes the time of its FLOPs or of
its bytes, whichever is more (Williams et al. 2009). plan.py divides that by the share of the
hardware's figures that kernels reach, measured on an H100; bench.py --fp8 takes the figures as
they are, to see what FP8 could gain at best.
"""
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

import kernels
from hardware import GPUS
from model import Xmodel

# Share of the figures in GPUS that kernels reach, on one H100 (results/h100/gpu.json: PyTorch 2.11,
# the 1.3B model, blocks compiled, 4 x 3712 tokens by torch's profiler). Attention reaches 0.34
# there and 0.44 at 1 x 16384, so 0.40 is chosen. 'weights' is their rounding to FP8, timed alone,
# as were the optimizers. 'step' is the share of the clock's time in which kernels run.
REACHED = {'bf16 GEMMs': 0.74, 'FP8 GEMMs': 0.66, 'attention': 0.40, 'bytes': 0.63,
           'rounding to FP8': 0.16, 'weights to FP8': 0.37, 'Newton-Schulz': 0.49, 'AdamW': 0.62,
           'step': 0.96}


# --------------------------------------------------------------------------------------------------
# The work of a step

WAYS = 'bf16', 'delayed', 'dynamic'       # linears in bf16, or in FP8 with either scaling
MICRO_BATCHES = 15                        # of a step, as in the 1.3B run's first phase on 8 GPUs


class Part(NamedTuple):
    """A part of a step's work: what it does in which layer, and what that takes."""
    layer: str
    what: str
    sizes: tuple                 # (m, k, n) of a GEMM that FP8 would compute, else ()
    flops: float
    moved: tuple                 # bytes in each of WAYS
    forward: float = 1 / 3       # its share in the forward pass, which checkpointing repeats


def linears(c):
    """{name: nn.Linear} of a block of Xmodel(c), without data."""
    with torch.device('meta'):
        block = Xmodel(replace(c, n_layer=1)).blocks[0]
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}


def work_of_a_linear(name, layer, M, micro_batches):
    """[Part] of the forward and backward pass of M tokens through one linear of a block.

    In FP8 a GEMM of (m, k) · (k, n) reads a byte a value, and 'rounding' is what FP8 adds. Of each
    input x, what computes it writes 1 byte in either layout with a scale at hand, in place of
    bf16's 2; dynamic scaling has it write 2, then reads 2 and writes 1 in either layout. So delayed
    0, dynamic 4. The output gradient g is transposed by itself, which reads 1 and writes 1: so 1
    and 5. Each weight w, 4 bytes in memory, is rounded and transposed once for all micro-batches of
    a step, by kernels that are not fused: they read or write 35 bytes.
    """
    K, N = layer.in_features, layer.out_features
    x, w, g = M * K, N * K, M * N                                 # values of each
    gemms = {'output': (M, K, N), 'gradient of input': (M, N, K), 'gradient of weight': (N, M, K)}
    parts = []
    for what, (m, k, n) in gemms.items():
        read = m * k + k * n                                      # values
        written = 2 * m * n                                       # bytes, as the result is in bf16
        in_fp8 = read + written
        if what == 'gradient of weight':                          # in fp32
            in_fp8 = read + 4 * m * n
        moved = 2 * read + written, in_fp8, in_fp8
        parts.append(Part(name, what, (m, k, n), 2 * m * k * n, moved))

    # bytes of rounding a value of x
    delayed, dynamic = 0, 4
    if name == 'attn.out':        # attention writes 2 bytes in any case: read and written once
        delayed, dynamic = 4, 6   # more, or twice for its amax
    rounding = 6 * w, delayed * x + g, dynamic * x + 5 * g
    parts.append(Part(name, 'rounding', (), 0, rounding))
    weights = 35 * w / micro_batches
    parts.append(Part(name, 'weights', (), 0, (0, weights, weights), forward=0))

    # the weight's gradient to fp32 if it is in bf16, 2 + 4, and to the sum of the micro-batches
    # before, 12
    parts.append(Part(name, 'accumulation', (), 0, (18 * w, 12 * w, 12 * w), forward=0))
    return parts


def work_of_a_block(c, B, micro_batches=MICRO_BATCHES):
    """[Part] of the forward and backward pass of (B, T) tokens through a block.

    What a step does once for its micro-batches is shared out among them.
    Bytes are counted as if every operand and result were read or written once.
    """
    M, C, T, kv = B * c.block_size, c.n_embd, c.block_size, c.n_kv_head * c.hd
    work = []
    for name, layer in linears(c).items():
        work += work_of_a_linear(name, layer, M, micro_batches)
    # T / 2 keys a token: 2 products forward, 4 backward, and q·k once more
    attention_bytes = 12 * M * (C + kv)
    work.append(Part('attention', '', (), 7 * M * T * C, (attention_bytes,) * 3, forward=2 / 7))
    # Two additions to the fp32 residual stream, each with the norm after it: x 4 + 4 bytes, branch
    # 2, normed 2; backward 4 + 4 + 4, 2, 2. Rotation of q and k. SwiGLU: gate, up and product.
    element_wise_bytes = M * (24 * C + 32 * C + 8 * (C + kv) + (6 + 10) * c.n_ffn)
    work.append(Part('element-wise', '', (), 0, (element_wise_bytes,) * 3))
    return work


def work_of_logits(c, B):
    """[Part] of logits and loss of (B, T) tokens, which stay in bf16."""
    M, C, V = B * c.block_size, c.n_embd, c.vocab_size
    weight = C * V * math.ceil(M * V / kernels.CHUNK_ON_GPU)      # is read in each chunk of rows
    logits_bytes = 6 * (M * C + M * V + weight)
    # softmax reads logits twice, writes gradients; a chunk's is added to the fp32 one of the weight
    loss_bytes = 6 * M * V + 10 * weight
    return [Part('logits', '', (), 6 * M * C * V, (logits_bytes,) * 3),
            Part('loss', '', (), 0, (loss_bytes,) * 3)]


def work_of_a_step(c, B):
    """[Part] of all blocks, logits and loss of (B, T) tokens."""
    return work_of_a_block(c, B) * c.n_layer + work_of_logits(c, B)


# --------------------------------------------------------------------------------------------------
# The time that work takes

def roofline(work, way, on=None, reached=None):
    """Seconds of the work, each part taking the time of its FLOPs or of its bytes.

    way: one of WAYS. on: a GPU, by default an H100. reached: the share of its figures that kernels
    reach, such as REACHED; by default all.
    """
    if on is None:
        on = GPUS['h100']
    if reached is None:
        reached = dict.fromkeys(REACHED, 1)
    total = 0
    for part in work:
        in_fp8 = bool(part.sizes) and way != 'bf16'
        flop_rate, compute = on.bf16, 'bf16 GEMMs'
        if in_fp8:
            flop_rate, compute = on.fp8, 'FP8 GEMMs'
        if part.layer == 'attention':
            compute = 'attention'
        move = 'bytes'
        if part.what == 'rounding' and way != 'bf16':
            move = 'rounding to FP8'
        if part.what == 'weights':
            move = 'weights to FP8'
        moved = part.moved[WAYS.index(way)]
        total += max(part.flops / flop_rate / reached[compute],
                     moved / on.bandwidth / reached[move])
    return total / reached['step']


def way_of(fp8):
    """The entry of WAYS for the knob fp8 of train.py: False, True or 'dynamic'."""
    return {False: 'bf16', True: 'delayed', 'dynamic': 'dynamic'}[fp8]


def seconds_of_a_micro_batch(c, rows, on, fp8=False, checkpointing=False,
                             micro_batches=MICRO_BATCHES):
    """Forward and backward of (rows, T) tokens; checkpointing computes blocks a second time."""
    block = work_of_a_block(c, rows, micro_batches)
    if checkpointing:
        block += [part._replace(flops=part.flops * part.forward,
                                moved=tuple(moved * part.forward for moved in part.moved))
                  for part in block]
    work = block * c.n_layer + work_of_logits(c, rows)
    return roofline(work, way_of(fp8), on, REACHED)
