r"""Write text with a trained model, token by token; or talk with it.

    python sample.py out/proxy20m --prompt="def fib(n):"       # newest checkpoint of the run
    python sample.py out/proxy20m/step_1060.pt --num_samples=3 --temperature=0.7 --stop='["\n\n"]'
    cat question.txt | python sample.py out/proxy20m --prompt=-
    python sample.py out/proxy20m --chat --system="Be brief."  # Ctrl-D ends it
    python sample.py out/proxy20m --batch=FILE.jsonl --format=json > answers.jsonl

The text streams to stdout as it is made; with --batch or --format=json it comes when a sample is
whole. The speed goes to stderr. A KV cache keeps each token's keys and values, so a new token costs
one pass over one position, not over the whole text.

A line of FILE.jsonl is {"prompt": ...}, or {"messages": [{"role": "user", "content": ...}, ...]}.
With --format=json each sample is a line of output. It has what the prompt's line had (an "id",
say), and

    "prompt", "text"     what was continued, and how
    "ids", "logprobs"    the tokens as they were drawn, and the natural logarithms of the model's
                         own probabilities, before temperature, top_k and top_p
    "finish"             why it ended: 'eos' (the model ended its document), 'stop' (a stop string)
                         or 'length'
"""
import json
import math
import os
import sys
import time

import torch
from tqdm import tqdm

from checkpoint import load_model
from configurator import check_range, configure, fail
from distributed import usable_device
from generate import Decoder, common_prefix, complete, weights_dtype
from processes import STOPPED
from tokenizer import OtherTokenizer, chat_prompt, tokenizer_of

checkpoint = 'out/proxy20m'   # a step_N.pt, or a run's folder: its newest checkpoint
prompt = 'def '               # text to continue; - reads it from standard input
batch = ''                    # a .jsonl file of prompts in place of one; - is standard input
chat = False                  # a conversation: lines of standard input, and an answer to each
system = ''                   # what the model is told before a chat
num_samples = 1               # of each prompt
max_new_tokens = 200          # a sample ends earlier where the model ends the document
stop = []                     # strings that end a sample, and are left out: '["\n\n", "Question:"]'
temperature = 0.8             # 0.0 always takes the likeliest token
top_k = 0                     # sample from the top_k likeliest tokens; 0: from all
top_p = 0.95                  # sample from the likeliest tokens that make up this mass
batch_size = 8                # samples at a time
format = 'text'               # 'text' | 'json'
seed = 1337
compile = False               # compile a step: a minute at first, and then twice as fast
dtype = 'float32'             # 'auto' | 'bfloat16' | 'float32': of weights; auto: see generate.py
device = 'cpu'                # or 'cuda', 'mps'; at batch 1 a small model is fast enough on a CPU


# --------------------------------------------------------------------------------------------------
# The script

def parse_prompt(line):
    """(prompt, the line's object) of a line of a .jsonl file; any of several errors if wrong."""
    entry = json.loads(line)
    json.dumps(entry, ensure_ascii=False).encode()         # JSON may escape half a character
    match entry:
        case {'prompt': str(text)} if text:
            return text, entry
        case {'messages': [*turns, {'role': 'assistant'}]} if turns:
            return chat_prompt(turns), entry               # the answer to it is the model's
        case {'messages': [*turns]} if turns:
            return chat_prompt(turns), entry
        case _:
            raise ValueError('no prompt')


def read_batch(file):
    """[(prompt, the line's object)] of a .jsonl file; ValueError names a line that has none."""
    prompts = []
    try:
        with open(0 if file == '-' else file, encoding='utf-8-sig') as f:
            for n, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    prompts.append(parse_prompt(line))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise ValueError(f'{file}: line {n} should be {{"prompt": TEXT}} or '
                                     '{"messages": [{"role": ..., "content": ...}, ...]}') from None
    except OSError as e:
        raise ValueError(f'{file}: {e.strerror}') from None
    except UnicodeDecodeError:
        raise ValueError(f'{file} is not UTF-8') from None
    if not prompts:
        raise ValueError(f'{file} holds no prompt')
    return prompts


def as_json(prompt, row, entry=None):
    """A sample as a line of JSON; entry: what its prompt's line had, or None."""
    return json.dumps((entry or {}) | {
        'prompt': prompt, 'text': row.text, 'ids': row.ids, 'logprobs': row.logprobs,
        'finish': row.finish}, ensure_ascii=False)


def rule_before(i):
    """The line of dashes before sample number i, which the first has not."""
    return '-' * 80 + '\n' if i > 0 else ''


def print_now(text):
    print(text, end='', flush=True)


def encode_prompts(model, tokenizer, prompts):
    """[(prompt, the line's object, ids)]; warns if a text may become too long for the model."""
    encoded = [(text, entry, tokenizer.encode_ordinary(text)) for text, entry in prompts]
    for text, _, ids in encoded:
        if not ids:
            raise ValueError(f'its tokenizer has no token for {text!r}')
    longest = max(len(ids) for _, _, ids in encoded) + max_new_tokens
    if longest > model.config.block_size:
        print(f'sample.py: up to {longest} tokens, and the model is meant for texts of '
              f'{model.config.block_size}', file=sys.stderr)
    return encoded


def stream_samples(model, tokenizer, samples, sampling):
    """Print the samples (prompt, entry, ids) one by one, while they are made -> tokens made."""
    n_tokens = 0
    for i, (text, _, ids) in enumerate(samples):
        print_now(rule_before(i) + text)
        row, = complete(model, tokenizer, [ids], on_text=print_now, **sampling)
        print(flush=True)
        n_tokens += len(row.ids)
    return n_tokens


def print_samples(model, tokenizer, samples, sampling):
    """Print the samples (prompt, entry, ids) batch by batch, each whole -> tokens made."""
    n_tokens = 0
    show_bar = batch and not sys.stdout.isatty()
    for i in tqdm(range(0, len(samples), batch_size), unit='batch', leave=False,
                  disable=None if show_bar else True):
        some = samples[i:i + batch_size]
        rows = complete(model, tokenizer, [ids for _, _, ids in some], **sampling)
        n_tokens += sum(len(row.ids) for row in rows)
        for j, ((text, entry, _), row) in enumerate(zip(some, rows), i):
            if format == 'json':
                print(as_json(text, row, entry), flush=True)
            else:
                print(rule_before(j) + text + row.text, flush=True)
    return n_tokens


def write(model, tokenizer, prompts, sampling):
    """Print num_samples continuations of each of the prompts (text, the line's object)."""
    encoded = encode_prompts(model, tokenizer, prompts)
    samples = [prompt for prompt in encoded for _ in range(num_samples)]
    began = time.time()
    if format == 'text' and not batch:
        n_tokens = stream_samples(model, tokenizer, samples, sampling)
    else:
        n_tokens = print_samples(model, tokenizer, samples, sampling)
    print(f'{n_tokens} tokens, {n_tokens / (time.time() - began):.1f} tok/s', file=sys.stderr)


def fit_chat(tokenizer, before, turns, block_size):
    """(the prompt, its ids) of a chat; deletes the oldest turns where it would be too long."""
    while True:
        text = chat_prompt(before + turns)
        ids = tokenizer.encode_ordinary(text)
        n_tokens = len(ids) + max_new_tokens
        if n_tokens <= block_size:
            return text, ids
        if len(turns) == 1:
            print(f'(with its answer this turn may have {n_tokens} tokens, and the model is meant '
                  f'for {block_size})', file=sys.stderr)
            return text, ids
        del turns[:2]                                     # the oldest turn and its answer
        print('(the oldest turn is forgotten)', file=sys.stderr)


def converse(model, tokenizer, sampling):
    """Answer each line of standard input, with what was said before."""
    pad = torch.zeros(1, dtype=torch.long, device=model.embed.weight.device)
    decoder = Decoder(model, pad, compile)
    before = [{'role': 'system', 'content': system}] if system else []
    turns, ids_read = [], []                              # ids_read: what the decoder has read
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print_now('User: ')
        line = sys.stdin.readline()
        if not line:
            print_now('\n' if interactive else '')
            return
        if not line.strip():
            continue
        turns.append({'role': 'user', 'content': line.strip()})
        text, ids = fit_chat(tokenizer, before, turns, model.config.block_size)
        # Encoded anew, the last answer may have other tokens than were drawn: read again from the
        # first that differs.
        decoder.end = common_prefix(ids[:-1], ids_read)
        if format == 'text' and interactive:
            print_now('Assistant:')
        row, = complete(model, tokenizer, [ids[decoder.end:]], decoder=decoder,
                        on_text=print_now if format == 'text' else None, **sampling)
        print(as_json(text, row) if format == 'json' else '', flush=True)
        turns.append({'role': 'assistant', 'content': row.text.strip()})
        ids_read = (ids + row.ids)[:decoder.end]


def check_knobs():
    """End the program in one line if a knob's value cannot be used."""
    check_range(globals(), 1, 2**20, 'num_samples', 'max_new_tokens', 'batch_size')
    check_range(globals(), 0, math.inf, 'temperature', 'top_k')
    check_range(globals(), 0, 2**63, 'seed')
    if not 0 < top_p <= 1:
        fail(f'top_p={top_p} should be above 0 and at most 1')
    if not all(isinstance(s, str) and s for s in stop):
        fail(f'stop={stop} should be a list of strings, such as ["\\n\\n"]')
    if chat and (batch or num_samples > 1):
        fail('--chat is a conversation: without --batch and --num_samples')
    if system and not chat:
        fail('--system is for --chat; a line of --batch may have it among its messages')


def read_prompt():
    """The text of the knob `prompt`, or of standard input; ends the program if it is unusable."""
    text = prompt
    if prompt == '-' and not batch and not chat:
        text = sys.stdin.read()
    if not text:
        fail('the prompt is empty; give some text to continue')
    if any('\ud800' <= c <= '\udfff' for c in text):              # bytes that are no character
        fail('the prompt is not UTF-8')
    return text


def main():
    if sys.stdout is None:
        fail('standard output is closed')
    if sys.stdin is None and (chat or '-' in (prompt, batch)):
        fail('standard input is closed')
    text = read_prompt()
    check_knobs()
    try:
        prompts = read_batch(batch) if batch else [(text, None)]
        generator = torch.Generator(usable_device(device)).manual_seed(seed)
        model, about = load_model(checkpoint, device)
        model.to(weights_dtype(dtype, device))
        tokenizer = tokenizer_of(about)
    except ValueError as e:
        fail(e)
    except RuntimeError as e:                                      # too large for it, say
        fail(f'device={device!r} cannot be used here: {str(e).splitlines()[0][:120]}')
    if chat and isinstance(tokenizer, OtherTokenizer):
        fail(f'{about["path"]} has a tokenizer of its own, with a chat template that is not read')
    sampling = {'max_new_tokens': max_new_tokens, 'temperature': temperature, 'top_k': top_k,
                'top_p': top_p, 'stop_ids': about['eos_ids'], 'generator': generator}
    try:
        if chat:                                 # a weak model goes on, and plays the user as well
            sampling['stop'] = [*stop, '\n\nUser:']
            converse(model, tokenizer, sampling)
        else:
            sampling |= {'stop': stop, 'compiled': compile}
            write(model, tokenizer, prompts, sampling)
    except UnicodeError:
        raise                                                      # a ValueError as well; see below
    except (FloatingPointError, ValueError) as e:
        fail(f'{about["path"]}: {e}')


if __name__ == '__main__':
    configure(globals(), positional=['checkpoint'])
    try:
        main()
    except BrokenPipeError:
        pass
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except UnicodeDecodeError as e:
        fail(f'standard input is not {e.encoding}')
    except UnicodeEncodeError as e:
        fail(f'standard output takes {e.encoding} alone; with PYTHONUTF8=1 it takes all text')
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)             # what is still to be flushed
        fail(f'standard output: {e.strerror}')
