"""Write text with a trained model, token by token.

    python sample.py out/proxy20m --prompt="def fib(n):"       # newest checkpoint of the run
    python sample.py out/proxy20m/step_800.pt --num_samples=3 --temperature=0.7
    cat question.txt | python sample.py out/proxy20m --prompt=-

The text streams to stdout as it is made, the speed goes to stderr. A KV cache keeps each token's
keys and values, so a new token costs one pass over one position, not over the whole text.
"""
import contextlib
import math
import sys
import time

import torch

from checkpoint import load_model
from configurator import check_range, configure, fail
from model import rope_angles
from tokenizer import tokenizer_of

checkpoint = 'out/proxy20m'   # a step_N.pt, or a run's folder: its newest checkpoint
prompt = 'def '               # text to continue; - reads it from standard input
num_samples = 1
max_new_tokens = 200          # a sample ends earlier where the model ends the document
temperature = 0.8             # 0.0 always takes the likeliest token
top_k = 0                     # sample from the top_k likeliest tokens; 0: from all
top_p = 0.95                  # sample from the likeliest tokens that make up this mass
seed = 1337
device = 'cpu'                # or 'cuda', 'mps'; at batch 1 a small model is fast enough on a CPU


# --------------------------------------------------------------------------------------------------
# Generation

class KVCache:
    """One layer's keys and values, (B, n_kv_head, max_len, hd) each, filled from the left."""

    def __init__(self, B, c, max_len):
        self.shape, self.end, self.kv = (B, c.n_kv_head, max_len, c.hd), 0, None

    def append(self, k, v):
        """k, v (B, n_kv_head, T, hd) of the next T positions -> those of all positions so far."""
        if self.kv is None:                                        # now dtype and device are known
            self.kv = k.new_empty(2, *self.shape)
        self.end += k.size(2)
        self.kv[0, :, :, self.end - k.size(2):self.end] = k
        self.kv[1, :, :, self.end - k.size(2):self.end] = v
        return self.kv[:, :, :, :self.end]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=None,
             generator=None):
    """Continue B prompts, non-empty lists of token ids of any lengths; yields (B,) ids a step.

    temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole. A row that has
    met stop_token repeats it, and generation ends when all rows have.
    """
    c, device = model.config, model.embed.weight.device
    P = max(map(len, prompts))
    pad = torch.tensor([P - len(p) for p in prompts], device=device)        # (B,), on the left
    idx = torch.tensor([[0] * (P - len(p)) + list(p) for p in prompts], device=device)  # (B, P)
    cache = [KVCache(len(prompts), c, P + max_new_tokens) for _ in model.blocks]
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for total in range(P, P + max_new_tokens):
        keys = torch.arange(total, device=device)                           # cache's columns
        queries = keys[-idx.size(1):, None]                                 # (Tq, 1)
        positions = (queries[:, 0] - pad[:, None]).clamp(min=0)             # (B, Tq)
        cos, sin = rope_angles(positions, c.hd, c.rope_theta)               # (B, Tq, 1, hd/2)
        start = pad[:, None, None]              # padding sees padding: no key at all gives NaN
        mask = (keys <= queries) & ((keys >= start) | (queries < start))    # (B, Tq, total)
        x = model.hidden(idx, cos, sin, cache, mask[:, None])               # (B, Tq, C)
        logits = model.logits(x[:, -1]).float()                             # (B, vocab_size)
        token = sample_token(logits, temperature, top_k, top_p, generator)  # (B,)
        if stop_token is not None:
            token = token.masked_fill(done, stop_token)
            done |= token == stop_token
        yield token
        if done.all():
            return
        idx = token[:, None]                                                # (B, 1)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (B, vocab_size) -> ids (B,), of the top_k likeliest and those making up mass top_p."""
    if min(temperature, top_p) < 1e-6:                # in fp32 a division by it would overflow
        return logits.argmax(-1)
    logits, ids = (logits / temperature).sort(descending=True)     # (B, vocab_size) each
    if top_k:
        logits[:, top_k:] = -math.inf
    p = logits.softmax(-1)
    p[p.cumsum(-1) - p >= top_p] = 0                               # the likeliest always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


# --------------------------------------------------------------------------------------------------
# The script

def stream(model, tokenizer, ids, eos_id, generator):
    """Print a continuation of the token ids while it grows; returns its length in tokens."""
    written, a, b, n = list(ids), 0, len(ids), 0      # told so far: [:b]; [a:b] is read for context
    for n, token in enumerate(generate(model, [ids], max_new_tokens, temperature, top_k, top_p,
                                       eos_id, generator), 1):
        if token.item() not in (eos_id, *range(tokenizer.n_vocab, model.config.vocab_size)):
            written.append(token.item())
            text = tokenizer.decode(written[a:])
            if not text.endswith('\ufffd'):                      # a token may end mid-character
                print(text[len(tokenizer.decode(written[a:b])):], end='', flush=True)
                a, b = b, len(written)
    print(tokenizer.decode(written[a:])[len(tokenizer.decode(written[a:b])):], flush=True)
    return n


def main():
    text = sys.stdin.read() if prompt == '-' else prompt
    if not text:
        fail('the prompt is empty; give some text to continue')
    check_range(globals(), 1, math.inf, 'num_samples', 'max_new_tokens')
    check_range(globals(), 0, math.inf, 'temperature', 'top_k')
    check_range(globals(), 0, 2**63, 'seed')
    if not 0 < top_p <= 1:
        fail(f'top_p={top_p} should be above 0 and at most 1')
    try:
        generator = torch.Generator(device).manual_seed(seed)
        model, about = load_model(checkpoint, torch.device(device))
        tokenizer = tokenizer_of(about)
    except ValueError as e:
        fail(e)
    except (RuntimeError, AssertionError) as e:
        fail(f'device={device!r} cannot be used here: {str(e).splitlines()[0][:120]}')
    ids = tokenizer.encode_ordinary(text)
    for i in range(num_samples):
        if i:
            print('-' * 80)
        print(text, end='', flush=True)
        start = time.time()
        n = stream(model, tokenizer, ids, about['eos_id'], generator)
        print(f'{n} tokens, {n / (time.time() - start):.1f} tok/s', file=sys.stderr)


if __name__ == '__main__':
    configure(globals(), positional=['checkpoint'])
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
