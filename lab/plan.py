"""What a run will take, phase by phase: memory of a GPU, FLOPs, communication, time.

    python -m lab.plan config/xmodel25.py                          # on 8 H100, as Markdown
    python -m lab.plan config/xmodel25.py --gpus=16 --gpu=h200 --activation_checkpointing
    python -m lab.bench config/xmodel25.py --plan --gpus=8 --gpu=h100          # the same

No GPU is needed. For memory, the code itself runs (forward, backward and optimizer step) on tensors
without data, torch's FakeTensorMode, while torch's MemTracker adds up what is alive. Time is an
estimate by roofline.py: FLOPs and bytes, over the share of the hardware's figures that kernels
reached on an H100.
"""
import itertools
import json
import math
import shlex
import sys
import textwrap
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from tqdm import tqdm

import kernels
import train
from configurator import check_range, configure, fail
from fp8 import convert_to_float8
from hardware import GPUS
from lab.roofline import (
    MICRO_BATCHES,
    REACHED,
    roofline,
    seconds_of_a_micro_batch,
    work_of_a_step,
)
from model import Xmodel, XmodelConfig
from muon import assign_owners, make_optimizers, newton_schulz_flops
from processes import STOPPED
from start import check_knobs, complete_phases, model_config, rows_of_a_micro_batch

gpus = 8
gpu = 'h100'                  # 'a100' | 'h100' | 'h200' | 'b200'
# all other knobs are train.py's; without a config file they are those of config/xmodel25.py

NETWORK = 8 * 50e9               # of a node, bytes/s each way: 8 cards, which NCCL uses together
LINK_REACHED = 0.8               # share of link or network that large collectives reach: assumed
USABLE_MEMORY = 0.9              # share of a GPU's memory; the rest is for CUDA, NCCL and gaps
MEASUREMENTS = Path(__file__).parents[1] / 'results/h100/gpu.json'             # by lab/gpu.py


class Measured(NamedTuple):
    fp8: bool
    rows: int
    T: int
    peak: float                  # bytes that PyTorch had allocated, beside weights and gradients
    seconds: float               # of forward and backward, the median of five

    def planned(self):
        """(bytes in eager mode, seconds of compiled blocks), as estimated."""
        c = replace(XmodelConfig(), block_size=self.T)
        # FP8's weights were rounded before, as for the second of many micro-batches
        seconds = seconds_of_a_micro_batch(c, self.rows, GPUS['h100'], self.fp8,
                                           micro_batches=math.inf)
        return activations(c, self.rows, False, self.fp8), seconds


def measured_on_an_h100():
    """[Measured] of the 1.3B model with compiled blocks, as `python -m lab.bench gpu` wrote it.

    The weights in FP8 are part of FP8's peak. They were in memory beside bf16's as well, which is
    left out.
    """
    parts = json.loads(MEASUREMENTS.read_text())['parts']
    with torch.device('meta'):
        model = Xmodel(XmodelConfig())
    weights_and_gradients = 8 * model.num_params()
    in_fp8 = 2 * model.num_params(embedding=False)
    rows = []
    for is_fp8, (B, T) in itertools.product((False, True), ((1, 3712), (4, 3712), (1, 16_384))):
        figures = parts[f'step {B} x {T}'][name_of_way(is_fp8, False)]
        peak = 1e9 * figures['peak GB'] - weights_and_gradients
        if not is_fp8:
            peak -= in_fp8
        rows.append(Measured(is_fp8, B, T, peak, figures['ms'] / 1000))
    return rows


# --------------------------------------------------------------------------------------------------
# Memory: the code itself, run on tensors without data

def alive(tracker, when):
    """Bytes of the tensors that a MemTracker knows; when: 'peak' or 'current'."""
    snapshot = tracker.get_tracker_snapshot(when)
    return sum(sum(kinds.values()) - kinds['Total'] for kinds in snapshot.values())


def peak_of_a_step(c, rows, checkpointing=False, fp8=False, bf16=True, as_on_gpu=True):
    """(peak of the forward pass, peak of the step) in bytes beside weights and gradients.

    In eager mode. as_on_gpu: with a GPU's softmax, attention and chunks of logits, in place of the
    CPU's. (RMSNorm keeps the same on both: its input and 1 / rms.)
    """
    before = F.log_softmax, kernels.CHUNK, kernels.MATMUL_MAX_T
    if as_on_gpu:
        F.log_softmax = lambda x, dim, dtype: torch.empty_like(x, dtype=dtype)  # one kernel
        kernels.CHUNK = kernels.CHUNK_ON_GPU
        kernels.MATMUL_MAX_T = 0                                 # always the fused kernel
    try:
        with FakeTensorMode():
            model = Xmodel(c)
            model.activation_checkpointing = checkpointing
            for p in model.parameters():                         # as DDP's buckets hold them
                p.grad = torch.zeros_like(p)
            scaling = None
            if fp8:
                scaling = convert_to_float8(model)
                scaling.own_amax = False                         # as from the second step on
            x = torch.zeros(rows, c.block_size, dtype=torch.long)
            tracker = MemTracker()
            tracker.track_external(model, *(p.grad for p in model.parameters()))
            with tracker:
                if scaling:
                    scaling.round_weights()
                with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
                    _, loss = model(x, x)
                forward_peak = alive(tracker, 'peak')
                loss.backward()
            weights_and_gradients = 8 * model.num_params()
            step_peak = alive(tracker, 'peak')
            return forward_peak - weights_and_gradients, step_peak - weights_and_gradients
    finally:
        F.log_softmax, kernels.CHUNK, kernels.MATMUL_MAX_T = before


@cache
def activations(c, rows, checkpointing, fp8):
    """The most bytes that a step of the whole model holds beside weights and gradients.

    Measured with 2 and 3 blocks: all blocks are alike, so each peak is linear in their number. Both
    peaks are followed. The forward pass has the higher one unless tokens are so few that the
    gradient of the embedding counts more than they do.
    """
    with_two = peak_of_a_step(replace(c, n_layer=2), rows, checkpointing, fp8)
    with_three = peak_of_a_step(replace(c, n_layer=3), rows, checkpointing, fp8)
    return max(two + (c.n_layer - 2) * (three - two) for two, three in zip(with_two, with_three))


def most_rows(c, checkpointing, fp8, free):
    """How many rows a micro-batch can have whose activations fit into `free` bytes."""
    # with two chunks of logits or more, which do not grow further, memory is linear in rows
    two_chunks = math.ceil(2 * kernels.CHUNK_ON_GPU / c.vocab_size / c.block_size)
    held = activations(c, two_chunks, checkpointing, fp8)
    a_row = activations(c, two_chunks + 1, checkpointing, fp8) - held
    rows = two_chunks + math.floor((free - held) / a_row)
    if rows >= two_chunks:
        return rows
    return bisect_right(range(1, two_chunks), free,
                        key=lambda r: activations(c, r, checkpointing, fp8))


@cache
def optimizer_bytes(c, kind):
    """(state of the optimizers of `kind`, what a step takes beside it) on one rank, in bytes."""
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
        state = 0
        for optimizer in optimizers:
            for moments in optimizer.state.values():
                state += sum(t.nbytes for t in moments.values())
        return state, max(passing)


# --------------------------------------------------------------------------------------------------
# A phase on some number of GPUs

def seconds_to_receive(sent, world, on):
    """Until every rank has had its part of `sent` bytes from the others, as in a ring."""
    slowest = on.link
    if world > 8:                                                # more than one node
        slowest = min(on.link, NETWORK)
    return sent * (world - 1) / world / slowest / LINK_REACHED


class MuonLoad(NamedTuple):
    """What Muon's share of a step is, on the busiest of some ranks."""
    P: int                       # parameters that Muon steps, on all ranks together
    flops: float                 # of Newton-Schulz
    uneven: float                # bytes of momentum beyond an even share
    arriving: float              # bytes of U Vᵀ, in bf16, that are there from all ranks at a time


def muon_load(model, kind, world):
    """The MuonLoad of a model whose phase has optimizer `kind`, on `world` ranks."""
    if kind != 'muon':
        return MuonLoad(0, 0, 0, 0)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    flops, momentum, by_shape = Counter(), Counter(), Counter()
    for p, rank in assign_owners(matrices, world).items():
        flops[rank] += newton_schulz_flops(p.shape)
        momentum[rank] += 4 * p.numel()
        by_shape[p.shape] += 2 * p.numel()
    two_largest = sorted(by_shape.values())[-2:]                 # two shapes are sent at a time
    return MuonLoad(P=sum(p.numel() for p in matrices), flops=max(flops.values()),
                    uneven=max(momentum.values()) - sum(momentum.values()) / world,
                    arriving=sum(two_largest))


def plan_phase(phase, c, world, on):
    """What a phase takes on `world` GPUs, as a dict; bytes and seconds, of the busiest GPU.

    Where the batch cannot be divided evenly, which train.py refuses, a GPU has the next whole
    number of rows.
    """
    with torch.device('meta'):
        model = Xmodel(c)
    P, T = model.num_params(), c.block_size
    checkpointing, fp8 = train.activation_checkpointing, bool(train.fp8)
    gpu_rows = math.ceil(phase['batch'] / world)
    rows = rows_of_a_micro_batch(gpu_rows, T, train.micro_batch_tokens)
    muon = muon_load(model, phase['optimizer'], world)
    P_adamw = P - muon.P

    # --- memory ---
    # (a config that is the same in all phases, so that the optimizer is measured once)
    all_state, own_passing = optimizer_bytes(replace(c, block_size=1), phase['optimizer'])
    state = all_state / world + muon.uneven
    fixed = 8 * P + state                                        # weights, gradients, state
    passing = own_passing / world
    if world > 1:
        passing += max(muon.arriving, 4 * P_adamw / world)       # AdamW's weights, a rank's a time
    held = activations(c, rows, checkpointing, fp8)

    # --- computing ---
    micro_batches = math.ceil(gpu_rows / rows)
    micro = seconds_of_a_micro_batch(c, rows, on, train.fp8, checkpointing, micro_batches)
    forward_backward = micro * gpu_rows / rows
    newton_schulz = muon.flops / on.bf16 / REACHED['Newton-Schulz']
    # Bytes a parameter: 12 for the gradient's norm and clipping, 4 for zeros; 28 for AdamW's step,
    # 34 for Muon's beside Newton-Schulz; 8 for AdamW's exchange
    moved = 16 * P + 28 * P_adamw / world + 34 * muon.P
    if world > 1:
        moved += 8 * P_adamw
    optimizer = newton_schulz + moved / on.bandwidth / REACHED['AdamW']

    # --- communication ---
    gradient_bytes = 2 if train.reduce_dtype == 'bfloat16' else 4
    all_gradients = 2 * gradient_bytes * P                       # sent twice: reduced, gathered
    embedding_gradient = 2 * gradient_bytes * model.embed.weight.numel()
    weights = 4 * P_adamw + 2 * muon.P                           # Muon's U Vᵀ is in bf16
    # Gradients are added up during the last micro-batch's backward pass, two thirds of its time;
    # but that of the embedding, which is the output matrix, too, is only there at its end.
    not_hidden = max(seconds_to_receive(embedding_gradient, world, on),
                     seconds_to_receive(all_gradients, world, on) - micro * 2 / 3)
    exposed = seconds_to_receive(weights, world, on) + not_hidden

    step = forward_backward + optimizer + exposed
    return {'name': phase['name'], 'batch': phase['batch'], 'T': T, 'gpu_rows': gpu_rows,
            'rows': rows, 'weights': 4 * P, 'gradients': 4 * P, 'state': state,
            'activations': held, 'passing': passing, 'memory': fixed + max(held, passing),
            'chunk': 4 * min(kernels.CHUNK_ON_GPU, rows * T * c.vocab_size),
            'most_rows': most_rows(c, checkpointing, fp8, USABLE_MEMORY * on.memory - fixed),
            'flops': model.flops_per_token(T),
            'received': (all_gradients + weights) * (world - 1) / world,
            'micro': forward_backward, 'newton_schulz': newton_schulz, 'optimizer': optimizer,
            'exposed': exposed, 'step': step, 'tok_per_s': phase['batch'] * T / step,
            'steps': phase['steps'], 'days': phase['steps'] * step / 86400}


# --------------------------------------------------------------------------------------------------
# The plan, as Markdown

def print_table(head, rows):
    """Print a Markdown table."""
    for row in (head, ['---'] * len(head), *rows):
        print('| ' + ' | '.join(map(str, row)) + ' |')
    print()


def print_paragraph(text):
    print(textwrap.fill(text, 100, break_on_hyphens=False), end='\n\n')


def print_item(text):
    """Print a point of a list."""
    print(textwrap.fill(f'- {text}', 100, subsequent_indent='  ', break_on_hyphens=False))


def short(number):
    """Three digits of it or, from 1000 on, all before the point."""
    return f'{number:.3g}' if number < 1000 else f'{number:,.0f}'


def gb(size):
    """Bytes -> text in GB."""
    return short(size / 1e9)


def print_plan(c, plans, on, may_be_fp8):
    """Print the plan for `gpus` GPUs and, at its end, for other numbers of them.

    plans: {number of GPUs: [plan_phase(...) of each phase]}. may_be_fp8: whether the blocks' sizes
    allow FP8.
    """
    phases = plans[gpus]
    with torch.device('meta'):
        P = Xmodel(c).num_params()
    print(f'# {P:,} parameters on {gpus} x {gpu}\n')
    print_settings(phases)
    print('## Memory of a GPU, GB\n')
    print_memory(c, phases, on, may_be_fp8)
    print('## Time\n')
    print_time(phases)
    print_assumptions(phases, on)
    print('\n## More GPUs, on paper\n')
    print_other_numbers(plans, P)


def print_settings(phases):
    script = Path(sys.argv[0]).stem                              # plan, or bench with --plan
    command = shlex.join(['python', '-m', f'lab.{script}', *sys.argv[1:]])
    print_paragraph(
        f'Printed by `{command}`. Blocks in {"FP8" if train.fp8 else "bf16"}, activation '
        f'checkpointing {"on" if train.activation_checkpointing else "off"}, gradients added up in '
        f'{train.reduce_dtype}, at most {train.micro_batch_tokens:,} tokens a micro-batch.')
    uneven = [p for p in phases if p['batch'] % gpus]
    if uneven:
        print_paragraph(
            f'**train.py refuses this: the {uneven[0]["batch"]} rows of {uneven[0]["name"]} cannot '
            f'be shared out evenly among {gpus} GPUs.**')
    few_tokens = [p for p in phases if p['rows'] * p['T'] < 10_000]
    if few_tokens:
        p = few_tokens[0]
        print_paragraph(f'**It will take longer: with micro-batches of {p["rows"]} x {p["T"]} '
                        'tokens a GPU waits for Python.**')


def print_memory(c, phases, on, may_be_fp8):
    print_paragraph(
        '"Activations" is all that forward and backward hold at their peak beside weights and '
        'gradients, in eager mode (compiled blocks hold less: see the last table). A chunk of '
        'logits, in fp32, is part of it. "Passing" is what the optimizer takes while it steps, '
        f'when activations are gone. The largest micro-batch leaves {1 - USABLE_MEMORY:.0%} of '
        f'{gb(on.memory)} GB for CUDA, NCCL and gaps.')
    head = ('phase', 'micro-batch', 'weights', 'gradients', 'optimizer', 'activations', 'a chunk',
            'passing', 'at the peak', 'largest micro-batch')
    columns = ('weights', 'gradients', 'state', 'activations', 'chunk', 'passing', 'memory')
    print_table(head, [(p['name'], f'{p["rows"]} x {p["T"]}', *(gb(p[key]) for key in columns),
                        f'{p["most_rows"]} x {p["T"]}') for p in phases])

    print_paragraph('Activations of these micro-batches in other ways:')
    names, ways = ['phase'], []
    for checkpointing in (False, True):
        for fp8 in (False, True):
            if fp8 and not may_be_fp8:
                continue
            names.append(name_of_way(fp8, checkpointing))
            ways.append((checkpointing, fp8))
    rows = []
    for p in phases:
        in_phase = replace(c, block_size=p['T'])
        rows.append((p['name'], *(gb(activations(in_phase, p['rows'], *way)) for way in ways)))
    print_table(names, rows)


def name_of_way(fp8, checkpointing):
    name = 'FP8' if fp8 else 'bf16'
    return f'{name}, checkpointing' if checkpointing else name


def print_time(phases):
    print_paragraph(
        "A step is forward and backward of a GPU's rows, the optimizer (of it Newton-Schulz, as a "
        'share of the step), and that part of the communication which nothing hides.')
    head = ('phase', 'GFLOP a token', 'batch', 'micro-batches', 'received a step, GB',
            'forward, backward, s', 'optimizer, s', 'Newton-Schulz', 'communication, s', 'step, s',
            'tokens/s', 'steps', 'tokens, 10^9', 'days')
    rows = []
    for p in phases:
        tokens = p['batch'] * p['T'] * p['steps']
        rows.append((
            p['name'],
            f'{p["flops"] / 1e9:.3g}',
            f'{p["batch"]} x {p["T"]}',
            p['gpu_rows'] // p['rows'],
            gb(p['received']),
            short(p['micro']),
            f'{p["optimizer"]:.2g}',
            f'{p["newton_schulz"] / p["step"]:.2%}',
            f'{p["exposed"]:.2g}',
            short(p['step']),
            f'{p["tok_per_s"]:,.0f}',
            f'{p["steps"]:,}',
            short(tokens / 1e9),
            short(p['days'])))
    print_table(head, rows)


def print_assumptions(phases, on):
    """Print the sum over all phases, and on what it rests."""
    tokens = sum(p['batch'] * p['T'] * p['steps'] for p in phases)
    days = sum(p['days'] for p in phases)
    print_paragraph(f'In all {tokens / 1e12:.4g}T tokens in {short(days)} days, if:')
    in_fp8 = f', {on.fp8 / 1e12:.0f} in FP8' if on.fp8 else ''
    print_item(
        f'each {gpu} has {on.bf16 / 1e12:.0f} TFLOP/s in bf16{in_fp8}, memory of '
        f'{on.bandwidth / 1e12:.3g} TB/s, {on.link / 1e9:.0f} GB/s to the others of its node, and '
        f'a node {NETWORK / 1e9:.0f} GB/s to others, {LINK_REACHED:.0%} of which are reached, '
        'without latency;')
    reached = ', '.join(f'{kind} {share:.0%}' for kind, share in REACHED.items())
    print_item(f'kernels reach of that what they reach of one H100: {reached};')
    print_item('micro-batches have 10,000 tokens or more, as with fewer a GPU waits for Python;')
    print_item('data, validation, checkpoints and failures take no time.')


def print_other_numbers(plans, P):
    head = ('GPUs', 'phase', 'rows a GPU', 'peak, GB', 'forward, backward, s', 'communication',
            'step, s', 'tokens/s a GPU', 'days')
    rows = []
    for world, phases in plans.items():
        for p in phases:
            uneven = ' (does not divide)' if p['batch'] % world else ''
            rows.append((
                f'{world:,}',
                p['name'],
                f'{p["batch"] / world:.3g}{uneven}',
                gb(p['memory']),
                short(p['micro']),
                f'{p["exposed"] / p["step"]:.0%} of a step',
                short(p['step']),
                f'{p["tok_per_s"] / world:,.0f}',
                short(p['days'])))
    print_table(head, rows)
    most_gpus = math.gcd(*(p['batch'] for p in plans[gpus]))
    print_paragraph(
        'Where DDP with a sharded optimizer stops being enough: train.py gives every GPU the same '
        f'number of whole rows, so it takes at most {most_gpus} GPUs, '
        'the largest number that divides every batch, and of fewer only a divisor of that. Before, '
        'a GPU has so few tokens between two steps that it waits for Python (the last table: a '
        'third of the time with 1 x 3712 and FP8). Memory is no reason to shard: weights and '
        f'gradients take {gb(8 * P)} GB. Nor is communication, as long as the network has its '
        'bandwidth. Beyond, take torchtitan: context or tensor parallelism, which give a row to '
        'several GPUs, with HSDP; or a larger batch, which is another recipe.')


def gain_of_fp8():
    """How many times as fast as bf16, measured: 4 x 3712 tokens."""
    seconds = {m.fp8: m.seconds for m in measured_on_an_h100() if (m.rows, m.T) == (4, 3712)}
    return seconds[False] / seconds[True]


def print_measurements():
    """Print what was measured of the 1.3B model, and what others published, beside estimates."""
    print('## Beside measurements\n')
    print_paragraph(
        'The 1.3B model on one H100 80GB (PyTorch 2.11, blocks compiled): what PyTorch had '
        'allocated at the peak beside weights and gradients, and the seconds of forward and '
        'backward. Planned memory is that of eager mode, which holds more. With 1 x 3712 tokens '
        'the GPU waits for Python.')
    rows = []
    for m in measured_on_an_h100():
        planned, seconds = m.planned()
        rows.append((name_of_way(m.fp8, False), f'{m.rows} x {m.T}', gb(planned), gb(m.peak),
                     f'{m.peak / planned:.2f}', f'{seconds:.3f}', f'{m.seconds:.3f}'))
    print_table(('blocks', 'tokens', 'planned, GB', 'measured', 'ratio', 'planned, s', 'measured'),
                rows)

    work = work_of_a_step(replace(XmodelConfig(), block_size=3712), 4)
    planned, ideal = (
        roofline(work, 'bf16', reached=reached) / roofline(work, 'delayed', reached=reached) - 1
        for reached in (REACHED, None))
    print_item(
        f'FP8 makes 4 x 3712 tokens {gain_of_fp8() - 1:.0%} faster as measured; '
        f'in a step of {MICRO_BATCHES} such micro-batches, for which weights are rounded once, '
        f"{planned:.0%} as planned, {ideal:.0%} by the hardware's figures. The paper (arXiv "
        '2511.19496) says about 30 %.')
    print_item("The paper's 1.4T tokens are those of stable1 and stable2.")
    tiny_llama = XmodelConfig(22, 32, 4, 2048, 5632, 32_000, 2048)
    a100_40gb = GPUS['a100']._replace(bandwidth=1.555e12)
    speed = 8 * 2048 / seconds_of_a_micro_batch(tiny_llama, 8, a100_40gb)
    print_item(f'TinyLlama 1.1B on A100 40GB: planned {speed:,.0f} tokens/s a GPU, '
               'published 24,000.')


# --------------------------------------------------------------------------------------------------

def sizes_allow_fp8(c):
    """Whether the blocks' linears can be FP8; ends the program where they cannot but should be."""
    try:
        with torch.device('meta'):
            convert_to_float8(Xmodel(c))
    except ValueError as e:
        if train.fp8:
            fail(e)
        return False
    return True


def main(argv):
    """Print the plan for argv: a config file and flags, of this script and of train.py."""
    own = []
    for i, arg in enumerate(argv):
        after_own = i > 0 and argv[i - 1] in ('--gpus', '--gpu')         # --gpus 8 is refused here
        if after_own or arg.partition('=')[0] in ('--gpus', '--gpu', '--help', '-h'):
            own.append(arg)
    configure(globals(), own)
    check_range(globals(), 1, 2**16 + 1, 'gpus')
    configure(vars(train), [arg for arg in argv if arg not in own], default='config/xmodel25.py')
    complete_phases(train.phases, train.steps_scale)
    check_knobs(SimpleNamespace(**vars(train)), 1)
    on = GPUS[gpu]
    if train.fp8 and not on.fp8:
        fail(f'fp8: {gpu} has no FP8 units: --fp8=False')
    try:
        c = model_config(vars(train))
    except ValueError as e:
        fail(e)
    may_be_fp8 = sizes_allow_fp8(c)

    most_gpus = math.gcd(*(phase['batch'] for phase in train.phases))
    numbers = sorted({gpus, 8, 64, most_gpus, 512, 4096})
    plans = {}
    for world in tqdm(numbers, disable=None, leave=False):
        plans[world] = [plan_phase(phase, replace(c, block_size=phase['block_size']), world, on)
                        for phase in train.phases]
    print_plan(c, plans, on, may_be_fp8)
    shape = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_ffn', 'vocab_size')
    if all(getattr(c, key) == getattr(XmodelConfig, key) for key in shape):
        print_measurements()


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        fail('stopped', STOPPED)
