"""What a run will take, phase by phase: memory of a GPU, FLOPs, communication, time.

    python plan.py config/xmodel25.py                          # on 8 H100, as Markdown
    python plan.py config/xmodel25.py --gpus=16 --gpu=h200 --activation_checkpointing
    python bench.py config/xmodel25.py --plan --gpus=8 --gpu=h100          # the same

No GPU is needed. For memory the code itself runs, forward, backward and optimizer step, on tensors
without data (torch's FakeTensorMode), while torch's MemTracker adds up what is alive. Time is an
estimate: each part of a step takes the time of its FLOPs or of its bytes by the hardware's figures,
whichever is more, over the share of these that kernels were found to reach on an H100.
"""
import itertools
import math
import shlex
import sys
import textwrap
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from tqdm import tqdm

import model as network
import train
from configurator import check_range, configure, fail
from fp8 import convert_to_float8
from model import Xmodel, XmodelConfig
from muon import make_optimizers, newton_schulz_flops, share_out

gpus = 8
gpu = 'h100'                  # 'a100' | 'h100' | 'h200' | 'b200'
# all other knobs are train.py's; without a config file they are those of config/xmodel25.py


class GPU(NamedTuple):
    """By data sheets: SXM, products without sparsity; memory as nvidia-smi tells."""
    bf16: float                  # FLOP/s of matrix products
    fp8: float                   # the same; 0.0: it has no such units
    bandwidth: float             # of its memory, bytes/s
    memory: float                # bytes
    link: float                  # to the other seven of its node, bytes/s each way


GPUS = {'a100': GPU(312e12, 0.0, 2.04e12, 85e9, 300e9),
        'h100': GPU(989e12, 1979e12, 3.35e12, 85e9, 450e9),
        'h200': GPU(989e12, 1979e12, 4.8e12, 150e9, 450e9),
        'b200': GPU(2250e12, 4500e12, 7.7e12, 190e9, 900e9)}
NETWORK = 8 * 50e9               # of a node, bytes/s each way: 8 cards, which NCCL uses together
SHARED = 0.8                     # of link or network, that large collectives reach: assumed
ROOM = 0.9                       # of a GPU's memory; the rest is for CUDA, NCCL and gaps

# What kernels reach of the above, measured on one H100 (PyTorch 2.11, blocks compiled, the 1.3B
# model, 4 x 3712 tokens, by torch's profiler), and what of the clock's time they take. Attention is
# between what was found there, 0.345, and what follows from 1 x 16384. Newton–Schulz and AdamW are
# of steps of the optimizers alone: 148 and 15.5 ms.
REACHED = {'GEMM, bf16': 0.75, 'GEMM, FP8': 0.66, 'attention': 0.37, 'bytes': 0.71,
           'rounding to FP8': 0.22, 'Newton-Schulz': 0.32, 'AdamW': 0.73, 'step': 0.97}


class Measured(NamedTuple):
    fp8: bool
    compiled: bool
    checkpointing: bool
    rows: int
    T: int
    peak: float                  # bytes that PyTorch had allocated, beside weights and gradients
    seconds: float               # of forward and backward, the median of three


# of the 1.3B model, on the same H100
MEASURED = [Measured(*row) for row in (
    (False, False, False, 1, 3712, 19.32e9, 0.151), (False, False, False, 4, 3712, 53.05e9, 0.510),
    (False, False, False, 1, 16384, 57.38e9, 0.796), (False, False, True, 1, 3712, 9.34e9, 0.206),
    (False, False, True, 4, 3712, 13.33e9, 0.632), (False, False, True, 1, 16384, 13.82e9, 1.004),
    (False, True, False, 1, 3712, 13.22e9, 0.109), (False, True, False, 4, 3712, 43.02e9, 0.336),
    (False, True, False, 1, 16384, 46.73e9, 0.618), (False, True, True, 4, 3712, 8.70e9, 0.428),
    (False, True, True, 1, 16384, 9.29e9, 0.797), (True, True, False, 1, 3712, 9.90e9, 0.152),
    (True, True, False, 4, 3712, 36.81e9, 0.312), (True, True, False, 1, 16384, 40.18e9, 0.593),
    (True, True, True, 4, 3712, 8.70e9, 0.400), (True, True, True, 1, 16384, 9.29e9, 0.759))]


# --------------------------------------------------------------------------------------------------
# FLOPs and bytes of a step, and the time that they take

WAYS = 'bf16', 'delayed', 'dynamic'


class Part(NamedTuple):
    """Of the work of a step: what it does in which layer, and what that takes."""
    layer: str
    what: str
    sizes: tuple                 # (m, k, n) of a GEMM that FP8 would compute, else ()
    flops: float
    moved: tuple                 # bytes in each of WAYS
    again: float = 1 / 3         # the share of it that is forward, which checkpointing repeats


def linears(c):
    """{name: the nn.Linear} of a block of Xmodel(c), without data."""
    with torch.device('meta'):
        block = Xmodel(replace(c, n_layer=1)).blocks[0]
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}


def work_of_a_block(c, B):
    """[Part] of the forward and backward pass of (B, T) tokens.

    Bytes as if every operand and result were read or written once. In FP8 GEMMs of (m, k) · (k, n)
    read a byte a value. 'rounding' is what FP8 adds. Every input x and output gradient g is
    transposed: 1 byte read, 1 written. What computes it writes 1 byte with a scale at hand, in
    place of bf16's 2; dynamic scaling has it write 2, then reads 2 and writes 1. So delayed 2 - 1,
    dynamic 2 + 3. Each weight, 4 bytes in memory, is rounded twice and transposed.
    """
    M, C, T, kv = B * c.block_size, c.n_embd, c.block_size, c.n_kv_head * c.hd
    work = []
    for name, layer in linears(c).items():
        K, N = layer.in_features, layer.out_features
        x, w, g = M * K, N * K, M * N
        for what, m, k, n in (('output', M, K, N), ('gradient of input', M, N, K),
                              ('gradient of weight', N, M, K)):
            read, written = m * k + k * n, 2 * m * n
            work.append(Part(name, what, (m, k, n), 2 * m * k * n,
                             (2 * read + written, read + written, read + written)))
        # attention writes 2 bytes in any case: read and written once more, or twice for its amax
        delayed, dynamic = (5, 7) if name == 'attn.out' else (1, 5)
        work.append(Part(name, 'rounding', (), 0,
                         (6 * w, 12 * w + delayed * x + g, 16 * w + dynamic * x + 5 * g)))
        # the weight's gradient to fp32, 2 + 4, and to the sum of the micro-batches before, 12
        work.append(Part(name, 'accumulation', (), 0, (18 * w,) * 3, 0))
    # T / 2 keys a token: 2 products forward, 4 backward, and q·k once more
    work.append(Part('attention', '', (), 7 * M * T * C, (12 * M * (C + kv),) * 3, 2 / 7))
    # Two additions to the fp32 residual stream, each with the norm after it: x 4 + 4 bytes, branch
    # 2, normed 2; backward 4 + 4 + 4, 2, 2. Rotation of q and k. SwiGLU: gate, up and product.
    element_wise = M * (24 * C + 32 * C + 8 * (C + kv) + (6 + 10) * c.n_ffn)
    return [*work, Part('element-wise', '', (), 0, (element_wise,) * 3)]


def work_of_logits(c, B):
    """The same of logits and loss, which stay in bf16."""
    M, C, V = B * c.block_size, c.n_embd, c.vocab_size
    weight = C * V * math.ceil(M * V / network.CHUNK_ON_GPU)     # is read in each chunk of rows
    # softmax reads logits twice, writes gradients; a chunk's is added to the fp32 one of the weight
    return [Part('logits', '', (), 6 * M * C * V, (6 * (M * C + M * V + weight),) * 3),
            Part('loss', '', (), 0, (6 * M * V + 10 * weight,) * 3)]


def work_of_a_step(c, B):
    """The same of all blocks, logits and loss."""
    return work_of_a_block(c, B) * c.n_layer + work_of_logits(c, B)


def roofline(work, way, on=None, reached=None):
    """Seconds of the work, each part taking the time of its FLOPs or of its bytes.

    on: a GPU, by default an H100; reached: the share of its figures that kernels attain, such as
    REACHED, by default all.
    """
    on, reached = on or GPUS['h100'], reached or dict.fromkeys(REACHED, 1)
    total = 0
    for part in work:
        eight = part.sizes and way != 'bf16'
        compute = 'attention' if part.layer == 'attention' else \
            'GEMM, FP8' if eight else 'GEMM, bf16'
        move = 'rounding to FP8' if part.what == 'rounding' and way != 'bf16' else 'bytes'
        total += max(part.flops / (on.fp8 if eight else on.bf16) / reached[compute],
                     part.moved[WAYS.index(way)] / on.bandwidth / reached[move])
    return total / reached['step']


def seconds_of_a_micro_batch(c, rows, on, fp8=False, checkpointing=False):
    """Forward and backward of (rows, T) tokens; checkpointing computes blocks a second time."""
    way = {False: 'bf16', True: 'delayed'}.get(fp8, fp8)
    block = work_of_a_block(c, rows)
    if checkpointing:
        block += [part._replace(flops=part.flops * part.again,
                                moved=tuple(moved * part.again for moved in part.moved))
                  for part in block]
    return roofline(block * c.n_layer + work_of_logits(c, rows), way, on, REACHED)


# --------------------------------------------------------------------------------------------------
# Memory: the code itself, run on tensors without data

class KernelRMSNorm(torch.autograd.Function):
    """RMSNorm as a GPU computes it: one kernel, which keeps its input and 1 / rms."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x[..., :1].float())
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def alive(tracker, when):
    """Bytes that a MemTracker knows of, at the 'peak' or 'current'ly."""
    return sum(sum(kinds.values()) - kinds['Total']
               for kinds in tracker.get_tracker_snapshot(when).values())


def peak_of_a_step(c, rows, checkpointing=False, fp8=False, bf16=True, as_on_gpu=True):
    """Bytes beside weights and gradients, in eager mode, at the peak of (forward, all of it)."""
    before = F.rms_norm, network.CHUNK
    if as_on_gpu:
        F.rms_norm = lambda x, shape, weight, eps: KernelRMSNorm.apply(x, weight)
        network.CHUNK = network.CHUNK_ON_GPU
    try:
        with FakeTensorMode():
            model = Xmodel(c)
            model.activation_checkpointing = checkpointing
            for p in model.parameters():                         # as DDP's buckets hold them
                p.grad = torch.zeros_like(p)
            if fp8:
                convert_to_float8(model).own_amax = False        # as from the second step on
            x = torch.zeros(rows, c.block_size, dtype=torch.long)
            tracker = MemTracker()
            tracker.track_external(model, *(p.grad for p in model.parameters()))
            with tracker:
                with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
                    loss = model(x, x)[1]
                forward = alive(tracker, 'peak')
                loss.backward()
            return forward - 8 * model.num_params(), alive(tracker, 'peak') - 8 * model.num_params()
    finally:
        F.rms_norm, network.CHUNK = before


@cache
def activations(c, rows, checkpointing, fp8):
    """The most that a step of the whole model holds: blocks are alike, so 2 and 3 of them tell all.

    The peak is where forward ends or, with so few tokens that they count less than the embedding's
    gradient, where backward does: so both are followed, as each is linear in the number of blocks.
    """
    two, three = (peak_of_a_step(replace(c, n_layer=n), rows, checkpointing, fp8) for n in (2, 3))
    return max(a + (c.n_layer - 2) * (b - a) for a, b in zip(two, three))


def most_rows(c, checkpointing, fp8, room):
    """How many rows a micro-batch can have whose activations fit into `room` bytes."""
    # with two chunks of logits or more, which do not grow further, memory is linear
    full = math.ceil(2 * network.CHUNK_ON_GPU / c.vocab_size / c.block_size)
    one, two = (activations(c, full + more, checkpointing, fp8) for more in (0, 1))
    rows = full + math.floor((room - one) / (two - one))
    return rows if rows >= full else bisect_right(
        range(1, full), room, key=lambda r: activations(c, r, checkpointing, fp8))


@cache
def optimizer_bytes(c, kind):
    """(state, what a step takes beside it) on one rank."""
    with FakeTensorMode():
        model = Xmodel(c)
        optimizers = make_optimizers(kind, model.param_groups(), dtype=torch.bfloat16)
        for _ in range(2):                                       # the first step makes the state
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            passing = []
            for optimizer in optimizers:
                tracker = MemTracker()
                tracker.track_external(model, optimizer, *(p.grad for p in model.parameters()))
                with tracker:
                    optimizer.step()
                passing.append(alive(tracker, 'peak') - alive(tracker, 'current'))
        state = [t for o in optimizers for one in o.state.values() for t in one.values()]
        return sum(t.nbytes for t in state), max(passing)


# --------------------------------------------------------------------------------------------------
# A phase on some number of GPUs

def seconds_to_receive(sent, world, on):
    """Until every rank has had its part of `sent` bytes from the others, as in a ring."""
    slowest = on.link if world <= 8 else min(on.link, NETWORK)
    return sent * (world - 1) / world / slowest / SHARED


def plan_phase(phase, c, world, on):
    """What a phase takes on `world` GPUs, as a dict; bytes and seconds, of the busiest GPU.

    Where the batch cannot be shared out evenly, which train.py refuses, a GPU has the next whole
    number of rows.
    """
    with torch.device('meta'):
        model = Xmodel(c)
    P, T, several = model.num_params(), c.block_size, world > 1
    how = train.activation_checkpointing, bool(train.fp8)
    share = math.ceil(phase['batch'] / world)
    rows = train.rows_of_a_micro_batch(share, T)
    # (of the same model in all phases, so that it is measured once)
    state, own = optimizer_bytes(replace(c, block_size=1), phase['optimizer'])
    state /= world
    matrices, busiest, arriving = [], 0, 0
    if phase['optimizer'] == 'muon':
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        loads, sizes = Counter(), Counter()
        for p, rank in share_out(matrices, world).items():
            loads[rank] += newton_schulz_flops(p.shape)
            sizes[rank] += 4 * p.numel()                         # its momentum
        busiest = max(loads.values())
        state += max(sizes.values()) - sum(sizes.values()) / world
        # U Vᵀ in bf16 from all ranks, of two shapes at a time
        arriving = sum(sorted(2 * sum(p.numel() for p in matrices if p.shape == shape)
                              for shape in {p.shape for p in matrices})[-2:])
    orthogonal = sum(p.numel() for p in matrices)
    stepped = P - orthogonal                                     # by AdamW
    arriving = max(arriving, 4 * stepped / world)                # its weights, a rank's at a time

    # --- memory ---
    held, fixed = activations(c, rows, *how), 8 * P + state
    passing = own / world + arriving * several

    # --- time ---
    micro = seconds_of_a_micro_batch(c, rows, on, train.fp8, train.activation_checkpointing)
    newton_schulz = busiest / on.bf16 / REACHED['Newton-Schulz']
    # Bytes a parameter: 12 for the gradient's norm and clipping, 4 for zeros; 28 for AdamW's step,
    # 34 for Muon's beside Newton–Schulz; 8 for AdamW's exchange
    moved = 16 * P + 28 * stepped / world + 34 * orthogonal + 8 * stepped * several
    optimizer = newton_schulz + moved / on.bandwidth / REACHED['AdamW']
    gradient = 2 if train.reduce_dtype == 'bfloat16' else 4      # bytes, of each parameter
    weights = 4 * stepped + 2 * orthogonal                       # Muon's U Vᵀ is in bf16
    # Gradients are added up during the last micro-batch's backward pass, two thirds of its time;
    # but that of the embedding, which is the output matrix, too, is only there at its end.
    late = seconds_to_receive(2 * gradient * model.embed.weight.numel(), world, on)
    exposed = seconds_to_receive(weights, world, on) + max(
        late, seconds_to_receive(2 * gradient * P, world, on) - micro * 2 / 3)
    step = micro * share / rows + optimizer + exposed
    return {'name': phase['name'], 'batch': phase['batch'], 'T': T, 'share': share, 'rows': rows,
            'weights': 4 * P, 'gradients': 4 * P, 'state': state, 'activations': held,
            'passing': passing, 'memory': fixed + max(held, passing),
            'chunk': 4 * min(network.CHUNK_ON_GPU, rows * T * c.vocab_size),
            'most_rows': most_rows(c, *how, ROOM * on.memory - fixed),
            'flops': model.flops_per_token(T),
            'received': (2 * gradient * P + weights) * (world - 1) / world,
            'micro': micro * share / rows, 'newton_schulz': newton_schulz, 'optimizer': optimizer,
            'exposed': exposed, 'step': step, 'tok_per_s': phase['batch'] * T / step,
            'steps': phase['steps'], 'days': phase['steps'] * step / 86400}


# --------------------------------------------------------------------------------------------------
# The plan, as Markdown

def table(*rows):
    """Print a Markdown table; the first row is its head."""
    for row in (rows[0], ['---'] * len(rows[0]), *rows[1:]):
        print('| ' + ' | '.join(map(str, row)) + ' |')
    print()


def say(text, end='\n\n', indent=''):
    """Print a paragraph, or a point of a list."""
    print(textwrap.fill(text, 100, subsequent_indent=indent, break_on_hyphens=False), end=end)


def short(number):
    """Three digits of it or, from 1000 on, all before the point."""
    return f'{number:.3g}' if number < 1000 else f'{number:,.0f}'


def gb(size):
    return short(size / 1e9)


def tell(c, plans, on, may_be_fp8):
    """The plan for `gpus` GPUs, what it assumes, and the same for more of them."""
    ours = plans[gpus]
    with torch.device('meta'):
        P = Xmodel(c).num_params()
    print(f'# {P:,} parameters on {gpus} x {gpu}\n')
    say(f'Printed by `python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`. '
        f'Blocks in {"FP8" if train.fp8 else "bf16"}, activation checkpointing '
        f'{"on" if train.activation_checkpointing else "off"}, gradients added up in '
        f'{train.reduce_dtype}, at most {train.micro_batch_tokens:,} tokens a micro-batch.')
    if odd := [p for p in ours if p['batch'] % gpus]:
        say(f'**train.py refuses this: the {odd[0]["batch"]} rows of {odd[0]["name"]} cannot be '
            f'shared out evenly among {gpus} GPUs.**')
    if few := [p for p in ours if p['rows'] * p['T'] < 10_000]:
        say(f'**It will take longer: with micro-batches of {few[0]["rows"]} x {few[0]["T"]} tokens '
            'a GPU waits for Python.**')
    print('## Memory of a GPU, GB\n')
    say('"Activations" is all that forward and backward hold at their peak beside weights and '
        'gradients, in eager mode (compiled blocks hold less: see the last table). A chunk of '
        'logits, in fp32, is part of it. "Passing" is what the optimizer takes while it steps, '
        f'when activations are gone. The largest micro-batch leaves {1 - ROOM:.0%} of '
        f'{gb(on.memory)} GB for CUDA, NCCL and gaps.')
    table(('phase', 'micro-batch', 'weights', 'gradients', 'optimizer', 'activations', 'a chunk',
           'passing', 'at the peak', 'largest micro-batch'),
          *((p['name'], f'{p["rows"]} x {p["T"]}', gb(p['weights']), gb(p['gradients']),
             gb(p['state']), gb(p['activations']), gb(p['chunk']), gb(p['passing']),
             gb(p['memory']), f'{p["most_rows"]} x {p["T"]}') for p in ours))
    kinds = list(itertools.product((False, True), (False, True) if may_be_fp8 else (False,)))
    say('Activations of these micro-batches in other ways:')
    table(('phase', *(('FP8' if fp8 else 'bf16') + ', checkpointing' * again
                      for again, fp8 in kinds)),
          *((p['name'], *(gb(activations(replace(c, block_size=p['T']), p['rows'], *kind))
                          for kind in kinds)) for p in ours))
    print('## Time\n')
    say("A step is forward and backward of a GPU's rows, the optimizer (of it Newton-Schulz, as a "
        'share of the step), and that part of the communication which nothing hides.')
    table(('phase', 'GFLOP a token', 'batch', 'micro-batches', 'received a step, GB',
           'forward, backward, s', 'optimizer, s', 'Newton-Schulz', 'communication, s', 'step, s',
           'tokens/s', 'steps', 'tokens, 10^9', 'days'),
          *((p['name'], f'{p["flops"] / 1e9:.3g}', f'{p["batch"]} x {p["T"]}',
             p['share'] // p['rows'], gb(p['received']), short(p['micro']),
             f'{p["optimizer"]:.2g}', f'{p["newton_schulz"] / p["step"]:.2%}',
             f'{p["exposed"]:.2g}', short(p['step']), f'{p["tok_per_s"]:,.0f}',
             f'{p["steps"]:,}', short(p['batch'] * p['T'] * p['steps'] / 1e9), short(p['days']))
            for p in ours))
    tokens = sum(p['batch'] * p['T'] * p['steps'] for p in ours)
    say(f'In all {tokens / 1e12:.4g}T tokens in {short(sum(p["days"] for p in ours))} days, if:')
    for line in (
            f'each {gpu} has {on.bf16 / 1e12:.0f} TFLOP/s in bf16'
            + (f', {on.fp8 / 1e12:.0f} in FP8' if on.fp8 else '')
            + f', memory of {on.bandwidth / 1e12:.3g} TB/s, {on.link / 1e9:.0f} GB/s to the others '
            f'of its node, and a node {NETWORK / 1e9:.0f} GB/s to others, {SHARED:.0%} of which '
            'are reached, without latency;',
            'kernels reach of that what they reach of one H100: '
            + ', '.join(f'{kind} {share:.0%}' for kind, share in REACHED.items()) + ';',
            'micro-batches have 10,000 tokens or more, as with fewer a GPU waits for Python;',
            'data, validation, checkpoints and failures take no time.'):
        say('- ' + line, end='\n', indent='  ')
    print('\n## More GPUs, on paper\n')
    table(('GPUs', 'phase', 'rows a GPU', 'peak, GB', 'forward, backward, s', 'communication',
           'step, s', 'tokens/s a GPU', 'days'),
          *((f'{world:,}', p['name'], f'{p["batch"] / world:.3g}'
             + ' (does not divide)' * bool(p['batch'] % world), gb(p['memory']),
             short(p['micro']), f'{p["exposed"] / p["step"]:.0%} of a step', short(p['step']),
             f'{p["tok_per_s"] / world:,.0f}', short(p['days']))
            for world, phases in plans.items() for p in phases))
    say('Where DDP with a sharded optimizer stops being enough: train.py gives every GPU the same '
        f'number of whole rows, so it takes at most {math.gcd(*(p["batch"] for p in ours))} GPUs, '
        'the largest number that divides every batch, and of fewer only a divisor of that. Before, '
        'a GPU has so few tokens between two steps that it waits for Python (the last table: half '
        f'of the time with 1 x 3712). Memory is no reason to shard: weights and gradients take '
        f'{gb(8 * P)} GB. Nor is communication, as long as the network has its bandwidth. Beyond, '
        'take torchtitan: context or tensor parallelism, which give a row to several GPUs, with '
        'HSDP; or a larger batch, which is another recipe.')


def gain_of_fp8():
    """How many times as fast as bf16, measured: 4 x 3712 tokens, compiled, no checkpointing."""
    bf16, fp8 = (m.seconds for m in MEASURED if m[1:5] == (True, False, 4, 3712))
    return bf16 / fp8


def tell_of_measurements():
    """What was measured of the 1.3B model, and what others published, beside these estimates."""
    on, c = GPUS['h100'], XmodelConfig()
    print('## Beside measurements\n')
    say('The 1.3B model on one H100 80GB (PyTorch 2.11): what PyTorch had allocated at the peak '
        'beside weights and gradients, and the seconds of forward and backward. Planned memory is '
        'that of eager mode, planned time that of compiled blocks.')
    rows = []
    for m in MEASURED:
        how = ('FP8' if m.fp8 else 'bf16', 'compiled' if m.compiled else 'eager',
               'checkpointing')[:2 + m.checkpointing]
        at = replace(c, block_size=m.T)
        planned = activations(at, m.rows, m.checkpointing, m.fp8)
        seconds = seconds_of_a_micro_batch(at, m.rows, on, m.fp8, m.checkpointing)
        rows.append((', '.join(how), f'{m.rows} x {m.T}', gb(planned), gb(m.peak),
                     f'{m.peak / planned:.2f}', f'{seconds:.3f}' if m.compiled else '',
                     f'{m.seconds:.3f}'))
    table(('blocks', 'tokens', 'planned, GB', 'measured', 'ratio', 'planned, s', 'measured'), *rows)
    work = work_of_a_step(replace(c, block_size=3712), 4)
    planned, ideal = (roofline(work, 'bf16', on, reached) / roofline(work, 'delayed', on, reached)
                      for reached in (REACHED, None))
    tiny = XmodelConfig(22, 32, 4, 2048, 5632, 32_000, 2048)
    a100 = GPUS['a100']._replace(bandwidth=1.555e12)             # that with 40 GB
    speed = 8 * 2048 / seconds_of_a_micro_batch(tiny, 8, a100)
    say(f'- FP8 makes a step of 4 x 3712 tokens {gain_of_fp8() - 1:.0%} faster as measured, '
        f'{planned - 1:.0%} as planned, {ideal - 1:.0%} by the hardware\'s figures; the paper '
        '(arXiv 2511.19496) says about 30 %.', end='\n', indent='  ')
    say("- The paper's 1.4T tokens are those of stable1 and stable2.", end='\n')
    say(f'- TinyLlama 1.1B on A100 40GB: planned {speed:,.0f} tokens/s a GPU, published 24,000.',
        end='\n', indent='  ')


def main(argv):
    own = [a for a in argv if a.partition('=')[0] in ('--gpus', '--gpu', '--help', '-h')]
    configure(globals(), own)
    check_range(globals(), 1, 2**16 + 1, 'gpus')
    configure(vars(train), [a for a in argv if a not in own], default='config/xmodel25.py')
    train.check_knobs(1)
    on = GPUS[gpu]
    if train.fp8 and not on.fp8:
        fail(f'fp8: {gpu} has no FP8 units: --fp8=False')
    try:
        c = train.model_config(vars(train))
    except ValueError as e:
        fail(e)
    may_be_fp8 = True
    try:
        with torch.device('meta'):
            convert_to_float8(Xmodel(c))
    except ValueError as e:
        may_be_fp8 = train.fp8 and fail(e)
    most = math.gcd(*(phase['batch'] for phase in train.phases))
    plans = {}
    for world in tqdm(sorted({gpus, 8, 64, most, 512, 4096}), disable=None, leave=False):
        plans[world] = [plan_phase(phase, replace(c, block_size=phase['block_size']), world, on)
                        for phase in train.phases]
    tell(c, plans, on, may_be_fp8)
    shape = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_ffn', 'vocab_size')
    if all(getattr(c, key) == getattr(XmodelConfig, key) for key in shape):
        tell_of_measurements()


if __name__ == '__main__':
    main(sys.argv[1:])
