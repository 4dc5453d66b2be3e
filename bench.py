"""Speed and memory of a training step: our model beside transformers' Granite, the same network.

    python bench.py                              # the 20M proxy: minutes on two CPU cores
    python bench.py --n_layer=2 --rounds=3 --full_vocab_size=0        # a trial
    python bench.py --device=cuda --batch_size=16 --json=bench.json
    python bench.py --variants=ours-compiled,fp8-compiled,dynamic-compiled     # FP8 on this machine
    python bench.py --fp8                        # at 1.3B: an estimate; on a GPU also measured
    python bench.py config/xmodel25.py --plan --gpus=8       # what a run will take: see plan.py
    python bench.py --generate                   # decoding, multiple choice: beside transformers,
                                                 # and lm-evaluation-harness's own model

A step is forward, backward and AdamW (fused) on the same tokens: weights fp32, matmuls bf16 where
the hardware has them. Each variant has a process of its own, so its peak memory is its own. The
processes take turns, one step each a round, so that what else the machine does slows all alike;
ratios are taken within a round. (On a GPU, whose memory would not hold them all, one runs after the
other.) The GEMM peak is the FLOP/s of a bare matrix product, the most the machine gave in a round.
"""
import importlib.util
import itertools
import math
import multiprocessing
import random
import re
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from json import dumps
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

import plan
from checkpoint import replace_file
from configurator import check_range, configure, fail, knob_values
from export import hf_config
from fp8 import convert_to_float8
from model import Xmodel, XmodelConfig, rope_angles
from muon import has_bf16
from plan import (
    GPUS,
    WAYS,
    gain_of_fp8,
    linears,
    roofline,
    work_of_a_block,
    work_of_a_step,
)

variants = 'ours-eager,ours-compiled,granite-eager,granite-compiled'    # also fp8-, dynamic-
fp8 = False                   # bf16 beside FP8 at 1.3B: roofline and, on a GPU, measured
generate = False              # in place of training: text, and likelihoods of choices, in fp32
rounds = 7                    # timed steps of each variant
json = ''                     # file for the figures of every round; '': none
device = 'auto'               # 'auto' | 'cpu' | 'cuda': 'auto' takes cuda where there is one
dtype = 'auto'                # 'auto' | 'bfloat16' | 'float32': of matmuls
# --- shape: the proxy's; with --fp8 the 1.3B model's, and 4 x 3712 tokens, as in its stable phase
batch_size = 4
block_size = 512
n_layer = 24
n_head = 4
n_kv_head = 1
n_embd = 256
n_ffn = 640
vocab_size = 16_384
full_vocab_size = 129_280     # peak memory is measured with this vocabulary as well; 0: it is not


# --- a variant, in its own process ---

def granite(c):
    """The GraniteForCausalLM that computes what Xmodel(c) computes."""
    from transformers import GraniteConfig, GraniteForCausalLM
    return GraniteForCausalLM(GraniteConfig(**hf_config(c) | {'use_cache': False}))


def peak_memory(device):
    """Bytes: the most that this process has held so far, on the GPU if that is the device."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated()
    if sys.platform == 'linux':                                  # where getrusage counts the parent
        return 1024 * int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss    # in bytes on macOS


def worker(pipe, variant, c, B, device, dtype):
    """Answer each message by a training step's (seconds, [peak MB so far, MB beyond weights,
    gradients and AdamW's moments]), or by what went wrong."""
    kind, mode = variant.split('-')
    try:
        if kind == 'granite':
            import transformers.models.granite.modeling_granite  # noqa: F401
        if mode == 'compiled':
            torch.compile(torch.sin)(torch.zeros(1))             # loads the compiler
        libraries = peak_memory(device)                          # which are not the step's
        torch.manual_seed(0)
        x = torch.randint(c.vocab_size, (B, c.block_size), device=device)       # (B, T)
        y = torch.cat((x[:, 1:], torch.full_like(x[:, :1], -1)), dim=1)         # (B, T)
        model = net = (granite if kind == 'granite' else Xmodel)(c).to(device)
        scaling = kind in ('fp8', 'dynamic') and convert_to_float8(model, kind == 'dynamic')
        n_params = sum(p.numel() for p in model.parameters())
        with torch.device('meta'):
            assert n_params == Xmodel(c).num_params(), f'{n_params} parameters'
        if kind != 'granite':
            model.set_compiled(mode == 'compiled')
        elif mode == 'compiled':
            net = torch.compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        while pipe.recv():
            began = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
                loss = net(x, labels=x).loss if kind == 'granite' else net(x, y)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if scaling:
                scaling.update(scaling.collect())
            if device == 'cuda':
                torch.cuda.synchronize()
            seconds, peak = time.perf_counter() - began, peak_memory(device) - libraries
            pipe.send((seconds, [peak / 1e6, (peak - 16 * n_params) / 1e6]))    # four in fp32
    except (EOFError, BrokenPipeError):
        pass                                                     # nobody asks any more
    except Exception as e:  # noqa: BLE001                       (out of memory, no compiler, ...)
        pipe.send(f'{type(e).__name__}: {str(e)[:150]!r}')


# --- what FP8 can give, by the hardware's figures alone ---

def print_roofline(c, B):
    """GEMM by GEMM, block and model; then the gains that others measured beside the same count."""
    def row(name, work, sizes='', times=1):
        each = [roofline(work, way) * 1e6 * times for way in WAYS]
        moved = [sum(part.moved[i] for part in work) / 1e6 * times for i in range(3)]
        print(f'{name:32}{sizes:20}{sum(part.flops for part in work) / 1e9 * times:8,.0f} '
              + '{:9,.0f}{:8,.0f}{:8,.0f} {:9,.0f}{:8,.0f}{:8,.0f}'.format(*moved, *each)
              + f'{each[0] / each[1]:7.2f}{each[0] / each[2]:6.2f}')

    block, h100 = work_of_a_block(c, B), GPUS['h100']
    print(f'Forward and backward pass of {B} x {c.block_size} tokens on an H100, if every part '
          f'took the time of its FLOPs\n({h100.bf16 / 1e12:.0f} TFLOP/s in bf16, '
          f'{h100.fp8 / 1e12:.0f} in FP8) or of its bytes ({h100.bandwidth / 1e12} TB/s), '
          'whichever is more. An estimate, not measured:\n')
    print(f'{"a block":32}{"m x k x n":20}{"GFLOP":>8}{"MB: bf16":>10}{"delayed":>8}{"dynamic":>8}'
          f'{"us: bf16":>10}{"delayed":>8}{"dynamic":>8}{"gain of each":>14}')
    for part in block:
        row(f'{part.layer:13}{part.what}', [part], ' x '.join(map(str, part.sizes)))
    row('its four linears', [part for part in block if '.' in part.layer])
    row('block', block)
    row(f'{c.n_layer} blocks, logits, loss', work_of_a_step(c, B))

    print('\nThe same count of others (in blocks of our kind, as large), and what they measured:\n')
    llama = XmodelConfig(32, 32, 8, 4096, 14_336, 128_256, 8192)
    of_26 = XmodelConfig(26, 13, 13, 1664, 6656 * 2 // 3, 32_768, 2048)
    of_12 = XmodelConfig(12, 6, 6, 768, 2048, 32_768, 2048)
    ours = work_of_a_step(replace(XmodelConfig(), block_size=3712), 4)
    up = [part for part in work_of_a_block(replace(of_26, n_ffn=6656 // 2), 32)
          if part.layer == 'ffn.gate_up']
    for who, measured, way, work in (
            ('Xmodel-2.5, by its paper', '30 %', 'delayed', ours),
            ('the same, this code', f'{100 * gain_of_fp8() - 100:.0f} %', 'delayed', ours),
            ('Llama 3 8B, 1 x 8192 (torchao)', '25 %', 'dynamic', work_of_a_step(llama, 1)),
            ('26 layers, 32 x 2048 (nanochat)', '17 %', 'dynamic', work_of_a_step(of_26, 32)),
            ('12 layers, 32 x 2048 (nanochat)', 'slower', 'dynamic', work_of_a_step(of_12, 32)),
            ('a linear alone, 65536 x 1664 x 6656 (nanochat)', '18 %', 'dynamic', up)):
        gain = roofline(work, 'bf16') / roofline(work, way) - 1
        print(f'{who:48} {way}: estimated {gain:4.0%}, measured {measured}')


def kept_bytes(c, B, fp8):
    """Bytes that a block of (B, T, C) inputs keeps for its backward pass, beside its weights."""
    with FakeTensorMode():                                       # shapes, no data
        model = Xmodel(replace(c, n_layer=1))
        if fp8:
            convert_to_float8(model)
        x = torch.zeros(B, c.block_size, c.n_embd, requires_grad=True)
        angles = rope_angles(torch.arange(c.block_size), c.hd, c.rope_theta)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), \
                torch.autocast('cpu', torch.bfloat16):
            model.blocks[0](x, *angles)
        size = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
        for p in model.parameters():
            size.pop(p.untyped_storage()._cdata, None)
        return sum(size.values())


def time_linears(c, B, device, passes=20):
    """{name: {way: seconds a pass in each round}} of a block's linears, compiled.

    A pass is forward and backward; many follow one another, so that a GPU waits for none. Amaxes
    are collected after them, untimed: a model does that once for all its layers.
    """
    found = {}
    for name, like in linears(c).items():
        steps, found[name] = {}, {way: [] for way in WAYS}
        for way in WAYS:
            net = nn.Module()
            net.blocks = nn.ModuleList([nn.Linear(like.in_features, like.out_features, bias=False)])
            net.to(device)
            steps[way] = net.blocks[0], way != 'bf16' and convert_to_float8(net, way == 'dynamic')
            net.blocks[0].compile(dynamic=False)
        x, grad = (torch.randn(B * c.block_size, size, device=device, dtype=torch.bfloat16)
                   for size in (like.in_features, like.out_features))
        x.requires_grad_()
        for i in range(rounds + 3):                              # three to compile and warm up
            for way, (layer, scaling) in steps.items():
                began = time.perf_counter()
                for _ in range(passes):
                    x.grad = layer.weight.grad = None
                    with torch.autocast(device, torch.bfloat16):
                        y = layer(x)
                    y.backward(grad)
                if device == 'cuda':
                    torch.cuda.synchronize()
                if i >= 3:
                    found[name][way].append((time.perf_counter() - began) / passes)
                if scaling:
                    scaling.update(scaling.collect())
    return found


def compare_fp8(c, B, device):
    """--fp8: the estimate, memory and, on a GPU with FP8 units, each linear measured -> figures."""
    plain, eight = (kept_bytes(c, B, fp8) for fp8 in (False, True))      # refuses what cannot be
    print_roofline(c, B)
    figures = {'estimated_s': {way: roofline(work_of_a_step(c, B), way) for way in WAYS},
               'kept_bytes_a_block': {'bf16': plain, 'fp8': eight}}
    print(f'\nA block keeps for its backward pass {plain / 1e6:,.0f} MB in bf16, '
          f'{eight / 1e6:,.0f} MB with FP8, {1 - eight / plain:.0%} less; {c.n_layer} blocks '
          f'{plain * c.n_layer / 1e9:.1f} and {eight * c.n_layer / 1e9:.1f} GB,\n'
          f'with activation checkpointing {4e-9 * B * c.block_size * c.n_embd * c.n_layer:.1f} GB '
          "and one block's. (Counted in eager mode on a CPU, with the bf16 copies\nof weights that "
          'FP8 does not need.)')
    if device != 'cuda':
        print('\nThere is no GPU here: nothing was measured. On one, this times each linear and '
              'the whole step.')
        return figures
    figures['linears_s'] = time_linears(c, B, device)
    torch.cuda.empty_cache()                                     # is for other processes now
    print('\nMeasured, forward and backward of a linear, medians of rounds taken in turn:')
    for name, times in figures['linears_s'].items():
        gains = [median(a / b for a, b in zip(times['bf16'], times[way])) for way in WAYS[1:]]
        print(f'{name:13}' + ''.join(f'{median(times[way]) * 1e6:9,.0f} us {way}' for way in WAYS)
              + '; gain {:.2f}, {:.2f}'.format(*gains))
    return figures


# --- generation: text, and the likelihood of given text ---

def ratio_of(a, b):
    """[median, least, most] of a / b, round by round."""
    ratios = [x / y for x, y in zip(a, b)]
    return [median(ratios), min(ratios), max(ratios)]


def take_turns(ways):
    """{name: seconds in each of the rounds} of functions that return the same, called in turn."""
    seconds = {name: [] for name in ways}
    for i in tqdm(range(rounds + 1), leave=False, disable=None):               # one to warm up
        for name, way in ways.items():
            began = time.perf_counter()
            found = way()
            if i:
                seconds[name].append(time.perf_counter() - began)
            elif name == next(iter(ways)):
                right = found
            elif found != right:
                fail(f'{name} does not give what {next(iter(ways))} gives')
    return seconds


def compare_generation(c, device, batches=(1, 8)):
    """--generate -> {what: {way: seconds}}; ids and choices are compared, and have to be equal."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from export import export
    from generate import generate as decode
    from harness import XmodelLM
    # branches this strong keep a model without training from repeating one token
    c, told = replace(c, residual_scale=60.0, block_size=4096), {}
    with tempfile.TemporaryDirectory() as folder:
        run, there = Path(folder, 'run'), Path(folder, 'hf')
        run.mkdir()
        torch.manual_seed(0)
        torch.save({'config': asdict(c), 'model': Xmodel(c).state_dict()}, run / 'step_0.pt')
        export(run, there)                             # by export.py's own defaults: in fp32
        theirs = HFLM(str(there), device=device, dtype='float32', batch_size=1)
        ours = XmodelLM(run, device)

    prompt, new = 32, 128
    for B in batches:
        x = torch.randint(3, c.vocab_size, (B, prompt), device=device)

        def text(compiled, x=x):
            return [ids.tolist() for ids, _ in decode(ours.model, x.tolist(), new, 0.0,
                                                      compiled=compiled)]

        def hf(x=x):
            y = theirs.model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=new,
                                      do_sample=False, eos_token_id=None, pad_token_id=2)
            return y[:, prompt:].T.tolist()

        told[f'{B} x {new} tokens'] = take_turns({
            'transformers': hf, 'eager': partial(text, False), 'compiled': partial(text, True)})

    rng = random.Random(0)
    words = sorted(set(Path(__file__).read_text(encoding='utf-8').split()))

    def say(n):
        return ' ' + ' '.join(rng.choices(words, k=n))

    shots, letters = say(120), [' A', ' B', ' C', ' D']
    for what, questions in (
            ('5 questions of 4 choices, with examples of their own',
             [(say(140), [say(8) for _ in range(4)]) for _ in range(5)]),
            ('20 questions of 4 letters, with the same examples',
             [(shots + say(20), letters) for _ in range(20)]),
            ('20 questions of 2 choices, no examples',
             [(say(10), [say(5) for _ in range(2)]) for _ in range(20)])):
        asked = [(question, choice) for question, choices in questions for choice in choices]
        requests = [Instance('loglikelihood', {}, pair, i) for i, pair in enumerate(asked)]

        def choose(lm, asked=asked, requests=requests):
            scores = lm.loglikelihood(requests, disable_tqdm=True)
            best = {}
            for (context, ending), (score, _) in zip(asked, scores):
                best[context] = max(best.get(context, (-math.inf, '')), (score, ending))
            return [ending for _, ending in best.values()]

        told[what] = take_turns({'lm-eval, hf': partial(choose, theirs),
                                 'ours': partial(choose, ours)})
    print(f'{ours.model.num_params():,} parameters, {device}, fp32, {torch.get_num_threads()} '
          f'threads; choices: hf one at a time, ours {ours.batch_tokens} tokens at a time\n'
          'How many times as fast as the first, in a round: median (least..most)')
    for what, seconds in told.items():
        (first, base), *others = seconds.items()
        print(f'{what}: {first} {median(base):.2f} s')
        for name, times in others:
            print('    {:12} {:.2f} s, {:.2f} ({:.2f}..{:.2f})'.format(
                name, median(times), *ratio_of(base, times)))
    return told


# --- the process that directs them ---

def ask(variant, pipe):
    """A worker's answer; a failure ends the program in one line."""
    try:
        pipe.send('step')
        answer = pipe.recv()
    except (EOFError, OSError):
        answer = 'its process was killed, as happens where memory is short'
    if isinstance(answer, str):
        fail(f'{variant}: {answer}; --variants=... leaves it out')
    return answer


def gemm_flops(device, dtype):
    """FLOP/s of the fastest of some square matrix products."""
    best = 0.0
    for n in (1024, 2048) if device == 'cpu' else (4096, 8192):
        a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
        for _ in range(3):
            began = time.perf_counter()
            (a @ a)[0, 0].item()                                 # waits for the GPU
            best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def save(figures):
    """Write the knobs and these figures to the file `json`, if one is wanted."""
    if json:
        text = dumps({'knobs': knob_values(globals()), **figures}, indent=1)
        replace_file(Path(json), lambda f: f.write(text.encode()))


def main():
    names = list(dict.fromkeys(variants.split(',')))
    known = [f'{kind}-{mode}' for kind in ('ours', 'fp8', 'dynamic', 'granite')
             for mode in ('eager', 'compiled')]
    if odd := [name for name in names if name not in known]:
        fail(f'variants: {odd[0]!r} should be one of {", ".join(known)}')
    check_range(globals(), 1, math.inf, 'rounds', 'batch_size')
    if not Path(json).absolute().parent.is_dir():
        fail(f'json={json}: there is no such folder')
    where = device if device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    if where == 'cuda' and not torch.cuda.is_available():
        fail("device='cuda' cannot be used here: torch finds no GPU")
    how = 'bfloat16' if dtype == 'auto' and has_bf16(where) else dtype.replace('auto', 'float32')
    told = {}
    try:
        c = XmodelConfig(n_layer, n_head, n_kv_head, n_embd, n_ffn, vocab_size, block_size)
        if fp8:
            told['fp8'] = compare_fp8(c, batch_size, where)
            if where != 'cuda':
                return save(told)
        if generate:
            return save(compare_generation(c, where))
    except ModuleNotFoundError as e:
        fail(f'{e.name} is missing: pip install lm_eval accelerate safetensors')
    except ValueError as e:
        fail(e)
    if 'granite' in variants and not importlib.util.find_spec('transformers'):
        print('bench.py: Granite is left out: pip install transformers', file=sys.stderr)
        names = [name for name in names if 'granite' not in name] or sys.exit(2)

    # --- with the full vocabulary one by one, for memory; then in turn ---
    peaks, speeds = {name: {} for name in names}, {name: [] for name in names}
    pipes, gemm, spawn = {}, [], multiprocessing.get_context('spawn')
    vocabs = [V for V in dict.fromkeys((full_vocab_size, vocab_size)) if V > 0]
    bar = tqdm(total=(len(vocabs) + rounds) * len(names), disable=None)

    def time_step(name):
        seconds, peaks[name][vocab_size] = ask(name, pipes[name])
        speeds[name].append(batch_size * block_size / seconds)
        bar.update()

    for V, name in itertools.product(vocabs, names):
        bar.set_postfix_str(f'{name}, vocabulary {V:,}')
        pipes[name], theirs = spawn.Pipe()
        args = theirs, name, replace(c, vocab_size=V), batch_size, where, how
        process = spawn.Process(target=worker, args=args, daemon=True)
        process.start()
        theirs.close()                                           # so that its death ends the pipe
        for _ in range(2):                                       # compile; have AdamW's state
            peaks[name][V] = ask(name, pipes[name])[1]
        if V == vocab_size and where == 'cuda':                  # a GPU has memory for one of them
            for _ in range(rounds):
                time_step(name)
        if V != vocab_size or where == 'cuda':
            pipes.pop(name).close()                              # which ends its worker
            process.join()
        bar.update()
    for _ in range(rounds):
        gemm.append(gemm_flops(where, how))
        for name in pipes:
            time_step(name)
    bar.close()
    for pipe in pipes.values():
        pipe.close()
    for process in multiprocessing.active_children():
        process.join()

    # --- the table ---
    with torch.device('meta'):
        model = Xmodel(c)
    base, flops = max(names, key='granite-eager'.__eq__), model.flops_per_token(block_size)
    print(f'{model.num_params():,} parameters, {batch_size} x {block_size} tokens, {where}, '
          f'{how}, {torch.get_num_threads()} threads; GEMM {median(gemm) / 1e12:.3g} TFLOP/s')
    print("MB at the peak, and (beyond weights, gradients and AdamW's moments)")
    rows = [['variant', 'tok/s', f'/ {base}', 'of GEMM', *(f'MB, V = {V:,}' for V in vocabs)]]
    figures = {}
    for name in names:
        ratio = ratio_of(speeds[name], speeds[base])
        share = median(speed * flops / peak for speed, peak in zip(speeds[name], gemm))
        rows.append([name, f'{median(speeds[name]):,.0f}',
                     '{:.2f} ({:.2f}..{:.2f})'.format(*ratio), f'{share:.1%}',
                     *('{:,.0f} ({:,.0f})'.format(*peaks[name][V]) for V in vocabs)])
        figures[name] = {'tok_per_s': speeds[name], 'ratio': ratio, 'gemm_share': share,
                         'peak_mb': peaks[name]}
    for row in rows:
        print(f'{row[0]:17}' + ''.join(map('{:>{}}'.format, row[1:], (8, 20, 9, 17, 17))))
    save(told | {'gemm_flops': gemm, 'variants': figures})


if __name__ == '__main__':
    if '--plan' in sys.argv:
        plan.main([argument for argument in sys.argv[1:] if argument != '--plan'])
        sys.exit()
    if {'--fp8', '--fp8=True', '--fp8=true'} & set(sys.argv):              # other defaults
        shape = {key: value for key, value in vars(XmodelConfig()).items() if key in globals()}
        globals().update(shape, batch_size=4, block_size=3712, full_vocab_size=0,
                         variants='ours-compiled,fp8-compiled,dynamic-compiled')
    configure(globals())
    main()
