"""Write text with a trained model, token by token.

    python sample.py out/proxy20m --prompt="def fib(n):"       # newest checkpoint of the run
    python sample.py out/proxy20m/step_800.pt --num_samples=3 --temperature=0.7
    cat question.txt | python sample.py out/proxy20m --prompt=-

The text streams to stdout as it is made, the speed goes to stderr. A KV cache keeps each token's
keys and values, so a new token costs one pass over one position, not over the whole text.
"""
import codecs
import contextlib
import math
import sys
import time

import torch

from checkpoint import load_model
from configurator import check_range, configure, fail
from tokenizer import EOS_ID, get_tokenizer

checkpoint = 'out/proxy20m'   # a step_N.pt, or a run's folder: its newest checkpoint
prompt = 'def '               # text to continue; - reads it from standard input
num_samples = 1
max_new_tokens = 200          # a sample ends earlier where the model ends the document
temperature = 0.8             # 0.0 always takes the likeliest token
top_k = 0                     # sample from the top_k likeliest tokens; 0: from all
top_p = 0.95                  # sample from the likeliest tokens that make up this mass
seed = 1337
device = 'cpu'                # or 'cuda', 'mps'; at batch 1 a small model is fast enough on a CPU


def stream(model, tokenizer, ids, generator):
    """Print a continuation of the token ids while it grows; returns its length in tokens."""
    utf8 = codecs.getincrementaldecoder('utf-8')('replace')         # a token may end mid-character
    n = 0
    for n, token in enumerate(model.generate([ids], max_new_tokens, temperature, top_k, top_p,
                                             EOS_ID, generator), 1):
        if token.item() not in (EOS_ID, *range(tokenizer.n_vocab, model.config.vocab_size)):
            text = tokenizer.decode_single_token_bytes(token.item())
            print(utf8.decode(text), end='', flush=True)
    print(utf8.decode(b'', final=True), flush=True)
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
        model, _ = load_model(checkpoint, torch.device(device))
        tokenizer = get_tokenizer(model.config.vocab_size)
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
        n = stream(model, tokenizer, ids, generator)
        print(f'{n} tokens, {n / (time.time() - start):.1f} tok/s', file=sys.stderr)


if __name__ == '__main__':
    configure(globals(), positional='checkpoint')
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
