"""What a rented GPU can tell in eight minutes: where the time of a training step goes.

    python -m lab.bench gpu                       # on one H100 -> gpu.json and gpu.md
    python -m lab.bench gpu --minutes=4           # what is worth most
    python -m lab.bench gpu --parts=machine,step  # parts by the first word of their names
    python -m lab.bench gpu --device=cpu --compile=False --shape.n_layer=1 ...       # a trial

Parts run one after the other, what is worth most first, each in a process of its own or with those
that need the same compiled model. A part that fails, is killed or hangs past its limit becomes a
line of the table, and the next one goes on. Figures are written as they come.

bf16 and FP8 (delayed scaling, with a history) share weights and gradients, so that a GPU holds
both; they take turns, so that what slows the machine slows both alike.
"""
import copy
import functools
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from json import dumps
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.profiler import profile, record_function

import fp8
import hardware
from checkpoint import replace_file
from configurator import check_range, configure, fail, knob_values
from lab.roofline import linears
from model import Xmodel, XmodelConfig
from muon import make_optimizers, step_all
from processes import start_worker

minutes = 8.0                 # a part that still runs after them is ended
parts = ''                    # those to run, such as machine,step,kernels; '': all
json = 'gpu.json'             # a new file for all figures; the table goes beside it, as .md
device = 'cuda'               # 'cuda' | 'cpu': 'cpu' is for trials of this script, in small
compile = True                # False: blocks and loss run eagerly
rounds = 5                    # timed turns; tables show medians
shape = {}                    # what differs from the 1.3B model, XmodelConfig()
steps = [(4, 3712), (1, 3712), (1, 16_384)]           # rows x tokens, what is worth most first
proxy_step = (16, 512)        # the same of the 20M proxy
gemm_size = 8192              # of the square products that show the GPU's peak


class Part(NamedTuple):
    name: str
    process: str                  # parts that name the same share it
    limit: int                    # seconds
    function: object              # yields (label, {figure: value} or text), called with:
    args: tuple = ()
    needs_gpu: str = ''           # why a CPU cannot run it; '': it can


def all_parts():
    """[Part], what is worth most first."""
    least = min(steps, key=math.prod)
    first, *others = [Part(f'step {B} x {T}', 'model', 200, time_steps, (B, T)) for B, T in steps]
    return [
        Part('machine', 'machine', 60, machine),
        first,
        Part('kernels', 'kernels', 150, time_kernels, steps[0], 'the profiler sees none on a CPU'),
        Part('optimizers', 'model', 60, time_optimizers),
        Part('attention', 'attention', 60, time_attention),
        Part('accuracy', 'accuracy', 60, accuracy, steps[0]),
        *others[:1],
        Part('graph {} x {}'.format(*least), 'model', 90, time_graphs, least, 'a CPU has none'),
        *others[1:],
        Part('proxy', 'proxy', 120, time_proxy, proxy_step),
        Part('autotune', 'autotune', 240, time_autotuned, least, 'it tunes kernels of GPUs')]


# --------------------------------------------------------------------------------------------------
# Measuring, in a part's process

def wait():
    if device == 'cuda':
        torch.cuda.synchronize()


def take_turns(ways, passes=1, before=None):
    """{name: [seconds a pass in each round]} of functions, `passes` of them in a row each turn.

    Two rounds more, the first, compile and warm up. before: runs untimed before each turn.
    """
    seconds = {name: [] for name in ways}
    for i in range(-2, rounds):
        for name, function in ways.items():
            if before:
                before()
            wait()
            began = time.perf_counter()
            for _ in range(passes):
                function()
            wait()
            if i >= 0:
                seconds[name].append((time.perf_counter() - began) / passes)
    return seconds


def figures_of(seconds, **figures):
    """Figures of timed rounds: the median and, for the file alone, each round."""
    return {'ms': 1e3 * median(seconds), **figures, 'ms of rounds': [1e3 * s for s in seconds]}


def report(times, model, B, T):
    """Yield (name, figures) of ways that took turns with B x T tokens; the first is the base."""
    base, base_seconds = next(iter(times.items()))
    for name, seconds in times.items():
        speed = B * T / median(seconds)
        share = speed * model.flops_per_token(T) / peak_flops()
        figures = {'tokens/s': speed, 'MFU %': 100 * share}
        if name != base:
            ratios = [a / b for a, b in zip(base_seconds, seconds)]
            figures[f'times as fast as {base}'] = median(ratios)
        yield name, figures_of(seconds, **figures)


@functools.cache
def peak_flops():
    """FLOP/s in bf16: by the data sheet or, of a GPU that hardware.py does not know, measured."""
    on = torch.device(device)
    known = hardware.peak_flops(on, torch.bfloat16)
    if known:
        return known
    return hardware.gemm_flops(on, torch.bfloat16, seconds=0.5)


def random_ids(B, T, c):
    return torch.randint(c.vocab_size, (B, T), device=device)


def micro_batch(model, x):
    """Forward and backward of x (B, T); gradients are added to those before, as in training."""
    with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'):
        _, loss = model(x, x)
    loss.backward()


@functools.cache
def both_models():
    """{'bf16': model, 'FP8': the same with FP8 linears}, which share their parameters."""
    torch.manual_seed(0)
    with torch.device(device):
        plain = Xmodel(XmodelConfig(**shape))
    in_fp8 = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
    scaling = fp8.convert_to_float8(in_fp8)
    # the step without a history is another graph: it runs eagerly, which takes less time
    micro_batch(in_fp8, random_ids(1, 64, plain.config))
    scaling.update(scaling.collect())
    assert not scaling.own_amax
    scaling.round_weights()                                      # once a step: see time_optimizers
    for model in (plain, in_fp8):
        model.set_compiled(compile)
    return {'bf16': plain, 'FP8': in_fp8}


def in_short(e):
    """An exception as one line."""
    return f'{type(e).__name__}: {" ".join(str(e).split())[:200]}'


# --------------------------------------------------------------------------------------------------
# The parts

def nvidia_smi():
    fields = 'driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu'
    command = ['nvidia-smi', '--id=0', f'--query-gpu={fields}', '--format=csv,noheader']
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return dict(zip(fields.split(','), done.stdout.strip().split(', ')))


def machine():
    """What it is, and the most that it can do: matrix products and copies."""
    yield 'versions', {'torch': torch.__version__, 'CUDA': str(torch.version.cuda)}
    if device == 'cuda':
        gpu = torch.cuda.get_device_properties(0)
        yield gpu.name, {'GB': gpu.total_memory / 1e9}
    n = gemm_size
    a, one = torch.randn(n, n, device=device), torch.ones((), device=device)
    copied, half, eight = torch.empty_like(a), a.bfloat16(), fp8.quantise(a, one, fp8.E4M3)
    in_fp8 = partial(fp8.gemm, eight, eight.mT, one, one, torch.bfloat16)
    ways = {'GEMM bf16': lambda: half @ half, 'GEMM FP8': in_fp8,
            'GEMM FP8, fast accumulation': partial(in_fp8, fast=True),
            'copy': lambda: copied.copy_(a)}
    for name, seconds in take_turns(ways, passes=10).items():
        rate = {'TFLOP/s': 2 * n**3 / median(seconds) / 1e12}
        if name == 'copy':
            rate = {'GB/s': 2 * a.nbytes / median(seconds) / 1e9}
        yield name, figures_of(seconds, **rate)
    if device == 'cuda':
        yield 'nvidia-smi, warm', nvidia_smi()


def time_steps(B, T):
    """Forward and backward of B x T tokens; activations are checkpointed if they do not fit.

    FP8's weights stay rounded: `rounding weights` of the optimizers comes on top, once a step. They
    are in memory with both models, 2.3 GB of either peak.
    """
    models = both_models()
    x = random_ids(B, T, models['bf16'].config)
    ways = {name: partial(micro_batch, model, x) for name, model in models.items()}
    try:
        for function in ways.values():
            function()
    except torch.OutOfMemoryError:
        yield 'activations', 'checkpointed, as they do not fit otherwise'
        for model in models.values():
            model.activation_checkpointing = True
    for name, figures in report(take_turns(ways, passes=3), models['bf16'], B, T):
        if device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            ways[name]()
            figures['peak GB'] = torch.cuda.max_memory_allocated() / 1e9
        yield name, figures
    for model in models.values():
        model.activation_checkpointing = False
        model.zero_grad()                                        # leaves memory to other processes


def captured(function):
    """A CUDA graph of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                              # what is made lazily, is made
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def time_graphs(B, T):
    """Forward and backward as one CUDA graph, so that no kernel waits for Python."""
    models = both_models()
    x = random_ids(B, T, models['bf16'].config)
    ways = {}
    for name, model in models.items():
        ways[name] = partial(micro_batch, model, x)
        ways[f'{name}, graph'] = captured(ways[name]).replay
    yield from report(take_turns(ways, passes=3), models['bf16'], B, T)


def time_autotuned(B, T):
    """Blocks in bf16, compiled in the mode that tries out kernels for each GEMM."""
    model = both_models()['bf16']
    x = random_ids(B, T, model.config)
    step = partial(micro_batch, model, x)
    times = take_turns({'default': step}, passes=3)
    for block in model.blocks:
        block.compile(dynamic=False, mode='max-autotune-no-cudagraphs')
    times |= take_turns({'autotuned': step}, passes=3)
    yield from report(times, model, B, T)


LR_0 = {'learning_rate': 0.0, 'embedding_lr': 0.0}               # leaves weights as they are


def time_optimizers():
    """Clipping, AdamW and Muon, each with gradients that are not 0; FP8's weights, once a step."""
    model, in_fp8 = both_models().values()

    def new_gradients():
        for p in model.parameters():
            p.grad = torch.randn_like(p)

    ways = {'clipping': lambda: clip_grad_norm_(model.parameters(), 1.0),
            'rounding weights': in_fp8.blocks[0].ffn.down.scaling.round_weights}
    for kind in ('adamw', 'muon'):
        ways[kind] = partial(step_all, make_optimizers(kind, model.param_groups()), LR_0)
    for name, seconds in take_turns(ways, before=new_gradients).items():
        yield name, figures_of(seconds)
    model.zero_grad()


def time_proxy(B, T):
    """Training steps of config/proxy20m.py's model: forward, backward, clipping, AdamW."""
    with torch.device(device):
        model = Xmodel(XmodelConfig(24, 4, 1, 256, 640, 16_384))
    model.set_compiled(compile)
    optimizers = make_optimizers('adamw', model.param_groups())
    x = random_ids(B, T, model.config)

    def step():
        micro_batch(model, x)
        clip_grad_norm_(model.parameters(), 1.0)
        step_all(optimizers, LR_0)

    yield from report(take_turns({f'{B} x {T}': step}, passes=3), model, B, T)


def time_attention():
    """One layer's attention, forward and backward, by each backend of torch."""
    c = XmodelConfig(**shape)
    backends = 'FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION', 'FA3', 'FA4'
    dtype = torch.bfloat16 if device == 'cuda' else torch.float32

    def forward_backward(q, k, v, grad):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / c.hd,
                                           enable_gqa=q.size(1) != k.size(1))
        torch.autograd.grad(y, (q, k, v), grad)

    for name, (B, T) in itertools.product(backends, steps):
        kv_heads = c.n_kv_head
        if name == 'EFFICIENT_ATTENTION':                        # wants as many as query heads
            kv_heads = c.n_head
        q, k, v, grad = (torch.randn(B, T, heads, c.hd, device=device, dtype=dtype).transpose(1, 2)
                         for heads in (c.n_head, kv_heads, kv_heads, c.n_head))
        for t in (q, k, v):
            t.requires_grad_()
        try:
            if name in ('FA3', 'FA4'):
                activate_flash_attention_impl(name)              # in place of FLASH_ATTENTION
            with sdpa_kernel(getattr(SDPBackend, name, SDPBackend.FLASH_ATTENTION)):
                seconds = take_turns({'': partial(forward_backward, q, k, v, grad)}, passes=5)['']
        except Exception as e:  # noqa: BLE001                   (each refuses in its own way)
            yield f'{name} {B} x {T}', in_short(e)
            continue
        # T/2 keys a token: 2 products forward, 4 backward, and q·k once more
        rate = {'TFLOP/s': 7 * B * T * T * c.n_embd / median(seconds) / 1e12}
        yield f'{name} {B} x {T}', figures_of(seconds, **rate)


def accuracy(B, T):
    """FP8 products beside float64 products of the same rounded operands."""
    for name, layer in linears(XmodelConfig(**shape)).items():
        M, K, N = B * T, layer.in_features, layer.out_features
        for what, (m, k, n) in {'output': (M, K, N), 'gradient of input': (M, N, K),
                                'gradient of weight': (N, M, K)}.items():
            format_a = fp8.E4M3 if what == 'output' else fp8.E5M2
            a, b = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
            scale_a = torch.finfo(format_a).max / a.abs().max()
            scale_b = torch.finfo(fp8.E4M3).max / b.abs().max()
            a, b = fp8.quantise(a, scale_a, format_a), fp8.quantise(b, scale_b, fp8.E4M3)
            exact = a.double() @ b.double().mT / scale_a / scale_b
            errors = {}
            for dtype, fast in itertools.product((torch.float32, torch.bfloat16), (False, True)):
                y = fp8.gemm(a, b.mT, scale_a, scale_b, dtype, fast).double()
                key = str(dtype).removeprefix('torch.')
                if fast:
                    key += ' fast'
                errors[f'{key} %'] = 100 * float((y - exact).norm() / exact.norm())
            yield f'{name}, {what}, {m} x {k} x {n}', errors


# --------------------------------------------------------------------------------------------------
# Kernels by class

GEMM = re.compile(r'gemm|nvjet|cutlass|cublas|splitk|triton_tem')
GEMM_IN_FP8 = re.compile(r'e4m3|e5m2|nvjet_(sm\d+_)?[qr]|_scaled_mm')
# in a name by Inductor, which lists the operations that it has fused
ROUNDING = re.compile(r'amax|clamp|reciprocal|scaled_mm|maximum|float8')
OTHER_WORK = re.compile(r'_(silu|pow|rsqrt|cat|neg|add)(_|$)')


def kernel_class(kernel, ops):
    """What a GPU kernel is for, by its name and the operations and ranges that launched it.

    ops: the innermost first; none where the profiler does not know.
    """
    name, innermost = kernel.lower(), ''.join(ops[:1]).lower()
    for known in ('optimizer', 'logits and loss'):               # ranges of time_kernels
        if known in ops:
            return known
    if re.search('attention|flash|fmha|sdpa', ' '.join([name, *ops]).lower()):
        return 'attention'
    if re.search('^triton_(poi|red|per)', name):                 # no GEMM, if perhaps made for one
        if not ROUNDING.search(name):
            return 'other element-wise'
        if OTHER_WORK.search(name):
            return 'rounding to FP8, fused with other work'
        return 'rounding to FP8'
    if GEMM.search(name) or innermost in ('aten::mm', 'aten::addmm', 'aten::_scaled_mm'):
        return 'GEMMs, FP8' if GEMM_IN_FP8.search(f'{name} {innermost}') else 'GEMMs, bf16'
    return 'rounding to FP8' if ROUNDING.search(name) else 'other element-wise'


def launched(events):
    """Yield (kernel, ops that launched it, the innermost first, ms) of a profiler's events."""
    unknown = Counter()                                          # {kernel: ms} with no known op
    for event in events:
        if event.device_type != DeviceType.CPU and not event.is_user_annotation:
            unknown[event.name] += event.time_range.elapsed_us() / 1e3
    for event in events:
        # The profiler attributes kernels to its own waiting, too, a second time.
        if event.device_type == DeviceType.CPU and event.name != 'Command Buffer Full':
            ops, around = [], event
            while around is not None:
                ops.append(around.name)
                around = around.cpu_parent
            for kernel in event.kernels:
                unknown[kernel.name] -= kernel.duration / 1e3
                yield kernel.name, ops, kernel.duration / 1e3
    for name, ms in unknown.items():
        if ms > 1e-3:
            yield name, [], ms


def in_range(name, function):
    """The function within a range that the profiler shows."""
    def wrapped(*args):
        with record_function(name):
            return function(*args)
    return wrapped


def time_kernels(B, T):
    """Kernels of one step with AdamW, by class."""
    models = both_models()
    x = random_ids(B, T, models['bf16'].config)
    optimizers = make_optimizers('adamw', models['bf16'].param_groups())
    update = in_range('optimizer', partial(step_all, optimizers, LR_0))

    def step(model):
        micro_batch(model, x)
        update()
        wait()

    for name, model in models.items():
        model.cross_entropy = in_range('logits and loss', model.cross_entropy)
        for _ in range(2):                                       # compile and warm up
            step(model)
        with profile() as profiler:
            step(model)
        by_class, by_kernel = Counter(), Counter()
        for kernel, ops, ms in launched(profiler.events()):
            kind = kernel_class(kernel, ops)
            by_class[kind] += ms
            by_kernel[kind, kernel, ''.join(ops[:1])] += ms
        yield name, {'ms': by_class.total(), 'kernels': by_kernel.most_common(100)}
        for kind, ms in by_class.most_common():
            yield f'{name}, {kind}', {'ms': ms, '%': 100 * ms / by_class.total()}


# --------------------------------------------------------------------------------------------------
# Processes

def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def worker(pipe, knobs):
    """Run each part received: send its (label, figures) as they come, then None.

    A failed part is the last one: its GPU may be unusable.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    globals().update(knobs)
    try:
        while True:
            part = pipe.recv()
            for label_and_figures in part.function(*part.args):
                pipe.send(label_and_figures)
            if device == 'cuda':
                torch.cuda.empty_cache()                         # is for other processes now
            pipe.send(None)
    except (EOFError, BrokenPipeError):
        pass                                                     # the parent has closed the pipe
    except Exception as e:  # noqa: BLE001                       (out of memory, no compiler, ...)
        pipe.send(('failed', in_short(e)))
        pipe.send(None)


def ask(part, process, pipe, limit):
    """Have a worker run a part; yields its (label, figures), and at the end what went wrong."""
    end = time.monotonic() + limit
    try:
        pipe.send(part)
        while pipe.poll(max(0.0, end - time.monotonic())):
            answer = pipe.recv()
            if answer is None:
                return
            yield answer
        yield 'failed', f'ended after {limit:.0f} s: it hung, or was too slow'
    except (EOFError, OSError):
        process.join(10)
        yield 'failed', f'its process was killed, or crashed: exit code {process.exitcode}'


def end_worker(process, pipe, patience=0):
    """End a worker; one that waits for a part ends by itself, within the seconds of patience."""
    pipe.close()
    process.join(patience)
    process.kill()
    process.join()


def run_parts(wanted):
    """Run parts in turn -> {part: {label: figures}}; each label is written as it comes."""
    end = time.monotonic() + 60 * minutes
    workers, results = {}, {}
    try:
        for i, part in enumerate(wanted):
            print(part.name, '...', file=sys.stderr)
            figures = results[part.name] = {}
            began = time.monotonic()
            limit = min(part.limit, end - began)
            if part.needs_gpu and device == 'cpu':
                figures['left out'] = part.needs_gpu
            elif limit <= 0:
                figures['left out'] = f'the {minutes:g} minutes were over'
            else:
                if part.process not in workers:
                    workers[part.process] = start_worker(worker, knob_values(globals()))
                process, pipe = workers[part.process]
                for label, values in ask(part, process, pipe, limit):
                    figures[label] = values
                    save(results)
                figures['took'] = {'s': time.monotonic() - began}
            later = [part.process for part in wanted[i + 1:]]
            if 'failed' in figures:
                end_worker(*workers.pop(part.process))
            elif part.process in workers and part.process not in later:       # free its memory
                end_worker(*workers.pop(part.process), patience=10)
            save(results)
    finally:                                                     # also at Ctrl-C
        for process_and_pipe in workers.values():
            end_worker(*process_and_pipe)
        print(table(results))
    return results


def save(results):
    """Write the file `json`, and the table beside it."""
    text = dumps({'knobs': knob_values(globals()), 'parts': results}, indent=1)
    replace_file(Path(json), lambda f: f.write(text.encode()))
    replace_file(Path(json).with_suffix('.md'), lambda f: f.write(table(results).encode()))


def cell(values):
    """Figures, or text, as a table shows them: lists are for the file alone."""
    if isinstance(values, str):
        return values.replace('|', '/')
    shown = []
    for key, value in values.items():
        if isinstance(value, float):
            value = f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'
        if not isinstance(value, list):
            shown.append(f'{key} {value}')
    return ', '.join(shown)


def table(results):
    """{part: {label: figures}} as Markdown."""
    lines = ['| part | what | figures |', '| --- | --- | --- |']
    for part, figures in results.items():
        lines += [f'| {part} | {label} | {cell(values)} |' for label, values in figures.items()]
    return '\n'.join(lines) + '\n'


def main(argv):
    configure(globals(), argv)
    check_range(globals(), 1, math.inf, 'rounds')
    if device == 'cuda' and not torch.cuda.is_available():
        fail('gpu: torch finds no GPU here; --device=cpu is for trials, in small')
    file = Path(json)
    if file.suffix != '.json' or file.exists() or not file.absolute().parent.is_dir():
        fail(f'json={json} should be a new file, NAME.json, in a folder that is there')
    known = list(dict.fromkeys(part.name.split()[0] for part in all_parts()))
    names = parts.split(',') if parts else known
    if set(names) - set(known):
        fail(f'parts={parts} should be some of {",".join(known)}')
    run_parts([part for part in all_parts() if part.name.split()[0] in names])
