"""Speed and memory of a training step: our model beside transformers' Granite, the same network.

    python -m lab.bench                              # the 20M proxy: minutes on two CPU cores
    python -m lab.bench --n_layer=2 --rounds=3 --full_vocab_size=0        # a trial
    python -m lab.bench --device=cuda --batch_size=16 --json=bench.json
    python -m lab.bench --variants=ours-compiled,fp8-compiled,dynamic-compiled      # FP8, here
    python -m lab.bench --fp8                        # at 1.3B: an estimate; on a GPU also measured
    python -m lab.bench gpu                          # all that an H100 can tell in eight minutes:
                                                     # see gpu.py
    python -m lab.bench config/xmodel25.py --plan --gpus=8       # what a run will take: see plan.py
    python -m lab.bench --generate                   # decoding and multiple choice, beside
                                                     # transformers and lm-evaluation-harness

A step is forward, backward and AdamW (fused) on the same tokens: weights fp32, matmuls bf16 where
the hardware has them. Each variant runs in a process of its own, so that its peak memory is its
own. The processes take turns, one step each a round: what else the machine does slows all alike,
and ratios are taken within a round. (A GPU's memory would not hold them all; there one runs after
the other.) The GEMM peak is the FLOP/s of a bare matrix product, the most in a round.
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
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from checkpoint import replace_file
from configurator import check_range, configure, fail, knob_values
from export import hf_config
from fp8 import convert_to_float8
from hardware import GPUS, gemm_flops, has_bf16
from lab import gpu, plan
from lab.plan import gain_of_fp8
from lab.roofline import (
    WAYS,
    roofline,
    work_of_a_block,
    work_of_a_step,
)
from model import Xmodel, XmodelConfig, rope_angles
from processes import STOPPED, signals_as_ctrl_c, start_worker

variants = 'ours-eager,ours-compiled,granite-eager,granite-compiled'    # also fp8-, dynamic-
fp8 = False                   # bf16 beside FP8 at 1.3B: roofline and, on a GPU, measured
generate = False              # in place of training: text, and likelihoods of choices
rounds = 7                    # timed steps of each variant
json = ''                     # file for the figures of every round; '': none
device = 'auto'               # 'auto' | 'cpu' | 'cuda': 'auto' takes cuda where there is one
dtype = 'auto'                # 'auto' | 'bfloat16' | 'float32': of matmuls; --generate: of weights
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


# --------------------------------------------------------------------------------------------------
# Training: a variant, in its own process

def granite(c):
    """The GraniteForCausalLM that computes what Xmodel(c) computes."""
    from transformers import GraniteConfig, GraniteForCausalLM
    return GraniteForCausalLM(GraniteConfig(**hf_config(c) | {'use_cache': False}))


def peak_memory(device):
    """Bytes: the most that this process has held so far, on the GPU if that is the device."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated()
    if sys.platform == 'linux':                                  # where getrusage counts the parent
        status = Path('/proc/self/status').read_text()
        return 1024 * int(re.search(r'VmHWM:\s+(\d+)', status)[1])
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss    # in bytes on macOS


def load_libraries(kind, mode):
    """Import what a variant's step needs, so that its memory is not counted as the step's."""
    if kind == 'granite':
        import transformers.models.granite.modeling_granite  # noqa: F401
    if mode == 'compiled':
        torch.compile(torch.sin)(torch.zeros(1))                 # loads the compiler


def make_step(kind, mode, c, B, device, dtype):
    """(a function that runs one training step of B rows, number of parameters) of a variant."""
    torch.manual_seed(0)
    x = torch.randint(c.vocab_size, (B, c.block_size), device=device)           # (B, T)
    y = torch.cat((x[:, 1:], torch.full_like(x[:, :1], -1)), dim=1)             # (B, T)
    model = granite(c) if kind == 'granite' else Xmodel(c)
    model.to(device)
    scaling = None
    if kind in ('fp8', 'dynamic'):
        scaling = convert_to_float8(model, kind == 'dynamic')
    n_params = sum(p.numel() for p in model.parameters())
    with torch.device('meta'):
        assert n_params == Xmodel(c).num_params(), f'{n_params} parameters'
    compiled_model = model
    if kind != 'granite':
        model.set_compiled(mode == 'compiled')
    elif mode == 'compiled':
        compiled_model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        if scaling:
            scaling.round_weights()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
            if kind == 'granite':
                loss = compiled_model(x, labels=x).loss
            else:
                _, loss = compiled_model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scaling:
            scaling.update(scaling.collect())
        if device == 'cuda':
            torch.cuda.synchronize()
    return step, n_params


def worker(pipe, variant, c, B, device, dtype):
    """Answer each message by a training step's figures, or by what went wrong, as text.

    The figures are (seconds, [peak MB so far, MB beyond weights, gradients and AdamW's moments]).
    """
    kind, mode = variant.split('-')
    try:
        load_libraries(kind, mode)
        memory_before = peak_memory(device)
        step, n_params = make_step(kind, mode, c, B, device, dtype)
        while pipe.recv():
            began = time.perf_counter()
            step()
            seconds = time.perf_counter() - began
            peak = peak_memory(device) - memory_before
            beyond = peak - 16 * n_params                        # those four, in fp32
            pipe.send((seconds, [peak / 1e6, beyond / 1e6]))
    except (EOFError, BrokenPipeError):
        pass                                                     # the parent has closed the pipe
    except Exception as e:  # noqa: BLE001                       (out of memory, no compiler, ...)
        pipe.send(f'{type(e).__name__}: {str(e)[:150]!r}')


# --------------------------------------------------------------------------------------------------
# Training: the process that directs them

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


def measure_steps(names, c, vocabs, device, dtype):
    """Run all variants -> (peak MB, tokens/s, FLOP/s of a GEMM).

    These are {name: {vocabulary: [peak, what is beyond weights, gradients and moments]}},
    {name: [one a round]} and [one a round]. With the full vocabulary variants run one by one, for
    their memory alone. With that of c they are timed: in turn or, on a GPU, one by one as well.
    """
    one_by_one = device == 'cuda'
    peaks, speeds, gemm = {name: {} for name in names}, {name: [] for name in names}, []
    pipes = {}
    bar = tqdm(total=(len(vocabs) + rounds) * len(names), disable=None)

    def time_step(name):
        seconds, peaks[name][c.vocab_size] = ask(name, pipes[name])
        speeds[name].append(batch_size * c.block_size / seconds)
        bar.update()

    for V, name in itertools.product(vocabs, names):
        bar.set_postfix_str(f'{name}, vocabulary {V:,}')
        process, pipes[name] = start_worker(worker, name, replace(c, vocab_size=V), batch_size,
                                            device, dtype)
        for _ in range(2):                                       # compile; have AdamW's state
            _, peaks[name][V] = ask(name, pipes[name])
        timed = V == c.vocab_size
        if timed and one_by_one:
            for _ in range(rounds):
                time_step(name)
        if not timed or one_by_one:
            pipes.pop(name).close()                              # which ends its worker
            process.join()
        bar.update()
    for _ in range(rounds):
        gemm.append(gemm_flops(device, getattr(torch, dtype), seconds=0.5))
        for name in pipes:
            time_step(name)
    bar.close()
    for pipe in pipes.values():
        pipe.close()
    for process in multiprocessing.active_children():
        process.join()
    return peaks, speeds, gemm


def ratio_of(a, b):
    """[median, least, most] of a / b, round by round."""
    ratios = [x / y for x, y in zip(a, b)]
    return [median(ratios), min(ratios), max(ratios)]


def compare_steps(names, c, device, dtype):
    """Measure the variants and print their table -> figures of every round, for JSON."""
    vocabs = [V for V in dict.fromkeys((full_vocab_size, vocab_size)) if V > 0]
    peaks, speeds, gemm = measure_steps(names, c, vocabs, device, dtype)
    with torch.device('meta'):
        model = Xmodel(c)
    flops = model.flops_per_token(block_size)
    base = 'granite-eager' if 'granite-eager' in names else names[0]
    print(f'{model.num_params():,} parameters, {batch_size} x {block_size} tokens, {device}, '
          f'{dtype}, {torch.get_num_threads()} threads; GEMM {median(gemm) / 1e12:.3g} TFLOP/s')
    print("MB at the peak, and (beyond weights, gradients and AdamW's moments)")
    head = ['variant', 'tok/s', f'/ {base}', 'of GEMM', *(f'MB, V = {V:,}' for V in vocabs)]
    rows, figures = [head], {}
    for name in names:
        ratio = ratio_of(speeds[name], speeds[base])
        share = median(speed * flops / peak for speed, peak in zip(speeds[name], gemm))
        memory = ['{:,.0f} ({:,.0f})'.format(*peaks[name][V]) for V in vocabs]
        rows.append([name, f'{median(speeds[name]):,.0f}',
                     '{:.2f} ({:.2f}..{:.2f})'.format(*ratio), f'{share:.1%}', *memory])
        figures[name] = {'tok_per_s': speeds[name], 'ratio': ratio, 'gemm_share': share,
                         'peak_mb': peaks[name]}
    widths = (8, 20, 9, 17, 17)
    for name, *cells in rows:
        aligned = [f'{cell:>{width}}' for cell, width in zip(cells, widths)]
        print(f'{name:17}' + ''.join(aligned))
    return {'gemm_flops': gemm, 'variants': figures}


# --------------------------------------------------------------------------------------------------
# --fp8: what FP8 can give, by the hardware's figures alone

def print_work(name, work, sizes='', times=1):
    """Print a row of the roofline: FLOPs, bytes and seconds of some work, and what FP8 gains."""
    flops = sum(part.flops for part in work) / 1e9 * times
    moved = [sum(part.moved[i] for part in work) / 1e6 * times for i in range(len(WAYS))]
    bf16, delayed, dynamic = (roofline(work, way) * 1e6 * times for way in WAYS)
    print(f'{name:32}{sizes:20}{flops:8,.0f} '
          f'{moved[0]:9,.0f}{moved[1]:8,.0f}{moved[2]:8,.0f} '
          f'{bf16:9,.0f}{delayed:8,.0f}{dynamic:8,.0f}'
          f'{bf16 / delayed:7.2f}{bf16 / dynamic:6.2f}')


def print_roofline(c, B):
    """Print FLOPs, bytes and time of each GEMM, of a block and of the model."""
    h100 = GPUS['h100']
    print(f'Forward and backward pass of {B} x {c.block_size} tokens on an H100, if every part '
          f'took the time of its FLOPs\n({h100.bf16 / 1e12:.0f} TFLOP/s in bf16, '
          f'{h100.fp8 / 1e12:.0f} in FP8) or of its bytes ({h100.bandwidth / 1e12} TB/s), '
          'whichever is more. An estimate, not measured:\n')
    print(f'{"a block":32}{"m x k x n":20}{"GFLOP":>8}{"MB: bf16":>10}{"delayed":>8}{"dynamic":>8}'
          f'{"us: bf16":>10}{"delayed":>8}{"dynamic":>8}{"gain of each":>14}')
    block = work_of_a_block(c, B)
    for part in block:
        print_work(f'{part.layer:13}{part.what}', [part], ' x '.join(map(str, part.sizes)))
    print_work('its four linears', [part for part in block if '.' in part.layer])
    print_work('block', block)
    print_work(f'{c.n_layer} blocks, logits, loss', work_of_a_step(c, B))


def print_published_gains():
    """Print the gains that others measured beside the same estimate for their models."""
    print('\nThe same count of others (in blocks of our kind, as large), and what they measured:\n')
    llama = XmodelConfig(32, 32, 8, 4096, 14_336, 128_256, 8192)
    of_26 = XmodelConfig(26, 13, 13, 1664, 6656 * 2 // 3, 32_768, 2048)
    of_12 = XmodelConfig(12, 6, 6, 768, 2048, 32_768, 2048)
    ours = work_of_a_step(replace(XmodelConfig(), block_size=3712), 4)
    linear = [part for part in work_of_a_block(replace(of_26, n_ffn=6656 // 2), 32)
              if part.layer == 'ffn.gate_up']
    measured_here = f'{100 * gain_of_fp8() - 100:.0f} %'
    rows = (('Xmodel-2.5, by its paper', '30 %', 'delayed', ours),
            ('the same, this code', measured_here, 'delayed', ours),
            ('Llama 3 8B, 1 x 8192 (torchao)', '25 %', 'dynamic', work_of_a_step(llama, 1)),
            ('26 layers, 32 x 2048 (nanochat)', '17 %', 'dynamic', work_of_a_step(of_26, 32)),
            ('12 layers, 32 x 2048 (nanochat)', 'slower', 'dynamic', work_of_a_step(of_12, 32)),
            ('a linear alone, 65536 x 1664 x 6656 (nanochat)', '18 %', 'dynamic', linear))
    for who, measured, way, work in rows:
        gain = roofline(work, 'bf16') / roofline(work, way) - 1
        print(f'{who:48} {way}: estimated {gain:4.0%}, measured {measured}')


def kept_bytes(c, B, fp8):
    """Bytes that a block of (B, T, C) inputs keeps for its backward pass, beside its weights."""
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with FakeTensorMode():                                       # shapes, no data
        model = Xmodel(replace(c, n_layer=1))
        weights = list(model.parameters())
        if fp8:
            scaling = convert_to_float8(model)
            scaling.round_weights()
            for layer in scaling.layers.values():
                weights += layer.rounded[:2]
        x = torch.zeros(B, c.block_size, c.n_embd, requires_grad=True)
        angles = rope_angles(torch.arange(c.block_size), c.hd, c.rope_theta)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), \
                torch.autocast('cpu', torch.bfloat16):
            model.blocks[0](x, *angles)
        # tensors can share a storage, which counts once
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
        for weight in weights:
            storages.pop(weight.untyped_storage()._cdata, None)
        return sum(storages.values())


def compare_fp8(c, B, device):
    """--fp8: the estimate, and memory -> figures."""
    plain = kept_bytes(c, B, fp8=False)
    eight = kept_bytes(c, B, fp8=True)                           # ValueError: sizes FP8 refuses
    print_roofline(c, B)
    print_published_gains()
    estimated = {way: roofline(work_of_a_step(c, B), way) for way in WAYS}
    figures = {'estimated_s': estimated, 'kept_bytes_a_block': {'bf16': plain, 'fp8': eight}}
    with_checkpointing = 4e-9 * B * c.block_size * c.n_embd * c.n_layer
    print(f'\nA block keeps for its backward pass {plain / 1e6:,.0f} MB in bf16, '
          f'{eight / 1e6:,.0f} MB with FP8, {1 - eight / plain:.0%} less; {c.n_layer} blocks '
          f'{plain * c.n_layer / 1e9:.1f} and {eight * c.n_layer / 1e9:.1f} GB,\n'
          f"with activation checkpointing {with_checkpointing:.1f} GB and one block's. "
          '(Counted in eager mode on a CPU, with the bf16 copies\nof weights that FP8 does not '
          'need.)')
    if device != 'cuda':
        print('\nThere is no GPU here: nothing was measured. On one, this times the whole step,\n'
              'and python -m lab.bench gpu what it consists of.')
    return figures


# --------------------------------------------------------------------------------------------------
# --generate: text, and the likelihood of given text

PROMPT_TOKENS, NEW_TOKENS = 32, 128

def take_turns(ways, exact=True):
    """{name: seconds in each of the rounds} of functions, called in turn.

    exact: they have to return the same. (In bf16 two likely tokens are often closer than rounding.)
    """
    seconds = {name: [] for name in ways}
    first = next(iter(ways))
    for i in tqdm(range(rounds + 1), leave=False, disable=None):               # one to warm up
        for name, function in ways.items():
            began = time.perf_counter()
            result = function()
            if i > 0:
                seconds[name].append(time.perf_counter() - began)
            elif name == first:
                expected = result
            elif result != expected and exact:
                fail(f'{name} does not give what {first} gives')
    return seconds


def load_both(c, device, weights):
    """(our model, lm-evaluation-harness's own), with the same random weights, in one dtype."""
    from lm_eval.models.huggingface import HFLM

    from export import export
    from lab.harness import XmodelLM
    with tempfile.TemporaryDirectory() as folder:
        run, hf_folder = Path(folder, 'run'), Path(folder, 'hf')
        run.mkdir()
        torch.manual_seed(0)
        state = {'config': asdict(c), 'model': Xmodel(c).state_dict()}
        torch.save(state, run / 'step_0.pt')
        export(run, hf_folder)                       # in fp32, which is export.py's own default
        theirs = HFLM(str(hf_folder), device=device, dtype=weights, batch_size=1)
        ours = XmodelLM(run, device, dtype=weights)
    return ours, theirs


def compare_decoding(ours, theirs, B, vocab_size, device):
    """{way: seconds} of decoding B texts, greedily."""
    from generate import generate as decode
    x = torch.randint(3, vocab_size, (B, PROMPT_TOKENS), device=device)
    exact = ours.model.embed.weight.dtype == torch.float32

    def decode_ours(compiled):
        steps = decode(ours.model, x.tolist(), NEW_TOKENS, 0.0, compiled=compiled)
        return [ids.tolist() for ids, _ in steps]

    def decode_theirs():
        y = theirs.model.generate(x, attention_mask=torch.ones_like(x), do_sample=False,
                                  max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=2)
        return y[:, PROMPT_TOKENS:].T.tolist()

    return take_turns({'transformers': decode_theirs, 'eager': partial(decode_ours, False),
                       'compiled': partial(decode_ours, True)}, exact)


def make_questions():
    """{description: [(question, [choice])]} of random words, of the kinds that benchmarks have."""
    rng = random.Random(0)
    words = sorted(set(Path(__file__).read_text(encoding='utf-8').split()))

    def text(n):
        return ' ' + ' '.join(rng.choices(words, k=n))

    examples, letters = text(120), [' A', ' B', ' C', ' D']
    return {
        '5 questions of 4 choices, with examples of their own':
            [(text(140), [text(8) for _ in range(4)]) for _ in range(5)],
        '20 questions of 4 letters, with the same examples':
            [(examples + text(20), letters) for _ in range(20)],
        '20 questions of 2 choices, no examples':
            [(text(10), [text(5) for _ in range(2)]) for _ in range(20)],
    }


def compare_choices(ours, theirs, questions):
    """{way: seconds} of finding the most likely choice of each question."""
    from lm_eval.api.instance import Instance
    pairs = [(question, choice) for question, choices in questions for choice in choices]
    exact = ours.model.embed.weight.dtype == torch.float32
    requests = [Instance('loglikelihood', {}, pair, i) for i, pair in enumerate(pairs)]

    def choose(lm):
        scores = lm.loglikelihood(requests, disable_tqdm=True)
        best = {}
        for (question, choice), (score, _) in zip(pairs, scores):
            best[question] = max(best.get(question, (-math.inf, '')), (score, choice))
        return [choice for _, choice in best.values()]

    ways = {'lm-eval, hf': partial(choose, theirs), 'ours': partial(choose, ours)}
    return take_turns(ways, exact)


def compare_generation(c, device, batches=(1, 8), weights='float32'):
    """--generate -> {what: {way: seconds}}; in fp32 ids and choices have to be equal."""
    # branches this strong keep a model without training from repeating one token
    c = replace(c, residual_scale=60.0, block_size=4096)
    ours, theirs = load_both(c, device, weights)
    figures = {}
    for B in batches:
        seconds = compare_decoding(ours, theirs, B, c.vocab_size, device)
        figures[f'{B} x {NEW_TOKENS} tokens'] = seconds
    for what, questions in make_questions().items():
        figures[what] = compare_choices(ours, theirs, questions)

    print(f'{ours.model.num_params():,} parameters, {device}, {weights}, {torch.get_num_threads()} '
          f'threads; choices: hf one at a time, ours {ours.batch_tokens} tokens at a time\n'
          'How many times as fast as the first, in a round: median (least..most)')
    for what, seconds in figures.items():
        (first, base), *others = seconds.items()
        print(f'{what}: {first} {median(base):.2f} s')
        for name, times in others:
            ratio = '{:.2f} ({:.2f}..{:.2f})'.format(*ratio_of(base, times))
            print(f'    {name:12} {median(times):.2f} s, {ratio}')
    return figures


# --------------------------------------------------------------------------------------------------

def save(figures):
    """Write the knobs and these figures to the file `json`, if one is wanted."""
    if json:
        text = dumps({'knobs': knob_values(globals()), **figures}, indent=1)
        replace_file(Path(json), lambda f: f.write(text.encode()))


def variant_names():
    """The names in the knob `variants`, each once; ends the program where one is unknown."""
    names = list(dict.fromkeys(variants.split(',')))
    kinds, modes = ('ours', 'fp8', 'dynamic', 'granite'), ('eager', 'compiled')
    known = [f'{kind}-{mode}' for kind in kinds for mode in modes]
    for name in names:
        if name not in known:
            fail(f'variants: {name!r} should be one of {", ".join(known)}')
    return names


def without_granite(names):
    """The variants that are ours; says so, and ends the program if none is left."""
    print('bench.py: Granite is left out: pip install transformers', file=sys.stderr)
    names = [name for name in names if 'granite' not in name]
    if not names:
        sys.exit(2)
    return names


def pick_device():
    """'cpu' or 'cuda', by the knob `device`."""
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cuda' and not torch.cuda.is_available():
        fail("device='cuda' cannot be used here: torch finds no GPU")
    return device


def pick_dtype(device):
    """'bfloat16' or 'float32', by the knob `dtype` and what the device has."""
    if dtype != 'auto':
        return dtype
    return 'bfloat16' if has_bf16(device) else 'float32'


def main():
    names = variant_names()
    check_range(globals(), 1, math.inf, 'rounds', 'batch_size')
    if not Path(json).absolute().parent.is_dir():
        fail(f'json={json}: there is no such folder')
    on = pick_device()
    matmul_dtype = pick_dtype(on)
    figures = {}
    try:
        c = XmodelConfig(n_layer, n_head, n_kv_head, n_embd, n_ffn, vocab_size, block_size)
        if fp8:
            figures['fp8'] = compare_fp8(c, batch_size, on)
            if on != 'cuda':
                return save(figures)
        if generate:
            return save(compare_generation(c, on, weights=matmul_dtype))
    except ModuleNotFoundError as e:
        fail(f'{e.name} is missing: pip install lm_eval accelerate safetensors')
    except ValueError as e:
        fail(e)
    if 'granite' in variants and not importlib.util.find_spec('transformers'):
        names = without_granite(names)
    save(figures | compare_steps(names, c, on, matmul_dtype))


if __name__ == '__main__':
    if {'--fp8', '--fp8=True', '--fp8=true'} & set(sys.argv):              # other defaults
        shape = {key: value for key, value in vars(XmodelConfig()).items() if key in globals()}
        globals().update(shape, batch_size=4, block_size=3712, full_vocab_size=0,
                         variants='ours-compiled,fp8-compiled,dynamic-compiled')
    try:
        with signals_as_ctrl_c():
            if 'gpu' in sys.argv[1:2]:
                gpu.main(sys.argv[2:])
            elif '--plan' in sys.argv:
                plan.main([arg for arg in sys.argv[1:] if arg != '--plan'])
            else:
                configure(globals())
                main()
    except KeyboardInterrupt:
        fail('stopped', STOPPED)
