"""Speed and memory of a training step: our model beside transformers' Granite, the same network.

    python bench.py                              # the 20M proxy: minutes on two CPU cores
    python bench.py --n_layer=2 --rounds=3 --full_vocab_size=0        # a trial
    python bench.py --device=cuda --batch_size=16 --json=bench.json

A step is forward, backward and AdamW (fused) on the same tokens: weights fp32, matmuls bf16. Each
variant has a process of its own, so its peak memory is its own. The processes take turns, one step
each a round, so that what else the machine does slows all alike; ratios are taken within a round.
The GEMM peak is the FLOP/s of a bare matrix product, the most the machine gave in that round.
"""
import importlib.util
import itertools
import math
import multiprocessing
import re
import sys
import time
from dataclasses import replace
from json import dumps
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from checkpoint import replace_file
from configurator import check_range, configure, fail, knob_values
from model import Xmodel, XmodelConfig, mup_table

variants = 'ours-eager,ours-compiled,granite-eager,granite-compiled'
rounds = 7                    # timed steps of each variant
json = ''                     # file for the figures of every round; '': none
device = 'auto'               # 'auto' | 'cpu' | 'cuda': 'auto' takes cuda where there is one
dtype = 'bfloat16'            # 'bfloat16' | 'float32': of matmuls
# --- shape: the proxy's ---
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
    factor = {role: rule.multiplier for role, rule in mup_table(c).items()}
    return GraniteForCausalLM(GraniteConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_ffn,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps, tie_word_embeddings=True,
        rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta}, use_cache=False,
        embedding_multiplier=factor['embedding'], attention_multiplier=factor['attention'],
        residual_multiplier=factor['branch_out'], logits_scaling=1 / factor['logits']))


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
        model = net = {'ours': Xmodel, 'granite': granite}[kind](c).to(device)
        n_params = sum(p.numel() for p in model.parameters())
        with torch.device('meta'):
            assert n_params == Xmodel(c).num_params(), f'{n_params} parameters'
        if kind == 'ours':
            model.set_compiled(mode == 'compiled')
        elif mode == 'compiled':
            net = torch.compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        while pipe.recv():
            began = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
                loss = net(x, y)[1] if kind == 'ours' else net(x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == 'cuda':
                torch.cuda.synchronize()
            seconds, peak = time.perf_counter() - began, peak_memory(device) - libraries
            pipe.send((seconds, [peak / 1e6, (peak - 16 * n_params) / 1e6]))    # four in fp32
    except (EOFError, BrokenPipeError):
        pass                                                     # nobody asks any more
    except Exception as e:  # noqa: BLE001                       (out of memory, no compiler, ...)
        pipe.send(f'{type(e).__name__}: {str(e)[:150]!r}')


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
    for n in (1024, 2048, 4096) if device == 'cpu' else (4096, 8192):
        a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
        for _ in range(3):
            began = time.perf_counter()
            (a @ a)[0, 0].item()                                 # waits for the GPU
            best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def main():
    names = list(dict.fromkeys(variants.split(',')))
    known = ('ours-eager', 'ours-compiled', 'granite-eager', 'granite-compiled')
    if odd := [name for name in names if name not in known]:
        fail(f'variants: {odd[0]!r} should be one of {", ".join(known)}')
    check_range(globals(), 1, math.inf, 'rounds', 'batch_size')
    if not Path(json).absolute().parent.is_dir():
        fail(f'json={json}: there is no such folder')
    where = device if device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        c = XmodelConfig(n_layer, n_head, n_kv_head, n_embd, n_ffn, vocab_size, block_size)
    except ValueError as e:
        fail(e)
    if 'granite' in variants and not importlib.util.find_spec('transformers'):
        print('bench.py: Granite is left out: pip install transformers', file=sys.stderr)
        names = [name for name in names if 'granite' not in name] or sys.exit(2)

    # --- with the full vocabulary one by one, for memory; then in turn ---
    peaks, speeds = {name: {} for name in names}, {name: [] for name in names}
    pipes, gemm, spawn = {}, [], multiprocessing.get_context('spawn')
    vocabs = [V for V in dict.fromkeys((full_vocab_size, vocab_size)) if V > 0]
    bar = tqdm(total=len(names) * len(vocabs) + rounds, disable=None)
    for V, name in itertools.product(vocabs, names):
        bar.set_postfix_str(f'{name}, vocabulary {V:,}')
        pipes[name], theirs = spawn.Pipe()
        args = theirs, name, replace(c, vocab_size=V), batch_size, where, dtype
        spawn.Process(target=worker, args=args, daemon=True).start()
        theirs.close()                                           # so that its death ends the pipe
        for _ in range(2):                                       # compile; have AdamW's state
            peaks[name][V] = ask(name, pipes[name])[1]
        if V != vocab_size:
            pipes.pop(name).close()
        bar.update()
    for _ in range(rounds):
        gemm.append(gemm_flops(where, dtype))
        for name, pipe in pipes.items():
            seconds, peaks[name][vocab_size] = ask(name, pipe)
            speeds[name].append(batch_size * block_size / seconds)
        bar.update()
    bar.close()
    for pipe in pipes.values():
        pipe.close()                                             # which ends its worker
    for process in multiprocessing.active_children():
        process.join()

    # --- the table ---
    with torch.device('meta'):
        model = Xmodel(c)
    base, flops = max(names, key='granite-eager'.__eq__), model.flops_per_token(block_size)
    print(f'{model.num_params():,} parameters, {batch_size} x {block_size} tokens, {where}, '
          f'{dtype}, {torch.get_num_threads()} threads; GEMM {median(gemm) / 1e12:.3g} TFLOP/s')
    print("MB at the peak, and (beyond weights, gradients and AdamW's moments)")
    rows = [['variant', 'tok/s', f'/ {base}', 'of GEMM', *(f'MB, V = {V:,}' for V in vocabs)]]
    figures = {}
    for name in names:
        ratios = [a / b for a, b in zip(speeds[name], speeds[base])]
        ratio = [median(ratios), min(ratios), max(ratios)]
        share = median(speed * flops / peak for speed, peak in zip(speeds[name], gemm))
        rows.append([name, f'{median(speeds[name]):,.0f}',
                     '{:.2f} ({:.2f}..{:.2f})'.format(*ratio), f'{share:.1%}',
                     *('{:,.0f} ({:,.0f})'.format(*peaks[name][V]) for V in vocabs)])
        figures[name] = {'tok_per_s': speeds[name], 'ratio': ratio, 'gemm_share': share,
                         'peak_mb': peaks[name]}
    for row in rows:
        print(f'{row[0]:17}' + ''.join(map('{:>{}}'.format, row[1:], (8, 20, 9, 17, 17))))
    if json:
        about = {'knobs': knob_values(globals()), 'gemm_flops': gemm, 'variants': figures}
        replace_file(Path(json), lambda f: f.write(dumps(about, indent=1).encode()))


if __name__ == '__main__':
    configure(globals())
    main()
