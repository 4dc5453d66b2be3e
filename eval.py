"""Score a checkpoint: validation loss, perplexity, bits per byte; and arithmetic, solved or not.

    python eval.py out/proxy20m                          # newest checkpoint of the run
    python eval.py out/proxy20m/step_800.pt              # an earlier one: here, before decay

The arithmetic task takes the held-out problems of the data set `arith` (disjoint from the training
problems, see data_prep.py), decodes greedily and counts a problem as solved if the number after
`####` is the answer. The interval is Wilson's, at 95 %.
"""
import contextlib
import math
import re

import torch
from tqdm import tqdm

from checkpoint import load_model
from configurator import check_range, configure, fail
from data_prep import get_windows, open_data
from generate import generate
from tokenizer import EOS_ID, get_tokenizer

checkpoint = 'out/proxy20m'   # a step_N.pt, or a run's folder: its newest checkpoint
data_dir = ''                 # where the data sets are; '': where training had them
eval_tokens = 50_000          # of each validation set, at most
problems = 400                # held-out arithmetic problems, at most
block_size = 512              # length of the validation windows
batch_size = 8                # windows, or 8 times as many problems, at a time
device = 'cpu'                # or 'cuda', 'mps'


def validation_loss(model, dataset, T):
    """(loss in nats a token, bits a byte) over eval_tokens spread over the validation split."""
    there = dataset.n_windows('val', T)
    n = min(there, max(1, eval_tokens // T))
    windows = [i * there // n for i in range(n)]                  # spread over the split
    total = count = 0
    for i in tqdm(range(0, n, batch_size), desc=dataset.name, leave=False, disable=None):
        x, y = get_windows(dataset, 'val', windows[i:i + batch_size], T)
        targets = int((y >= 0).sum())
        total += model(x.to(device), y.to(device))[1].item() * targets
        count += targets
    val = dataset.meta['val']
    loss = total / count
    return loss, loss / math.log(2) * val['tokens'] / val['bytes']


def arithmetic(model, dataset, tokenizer):
    """(solved, tried): greedy answers to held-out problems against the written ones."""
    # each problem once, though the data tell some of them of other people and things, too
    pairs = {tuple(worked): (prompt, worked) for prompt, worked in dataset.pairs('val')}
    pairs = list(pairs.values())[:problems]
    solved, size = 0, 8 * batch_size
    for i in tqdm(range(0, len(pairs), size), desc='problems', leave=False, disable=None):
        batch = pairs[i:i + size]
        longest = max(len(completion) for _, completion in batch)
        columns = [ids for ids, _ in generate(model, [p for p, _ in batch], 2 * longest, 0.0,
                                              stop_ids=[EOS_ID])]
        for (_, completion), ids in zip(batch, torch.stack(columns, dim=1).tolist()):
            written, right = (answer(tokenizer.decode([t for t in text if t != EOS_ID]))
                              for text in (ids, completion))
            solved += written is not None and written == right
    return solved, len(pairs)


def answer(text):
    """What stands after the first #### of a worked solution, or None."""
    found = re.search(r'#### *(-?\d+)', text)
    return found and found[1]


def wilson(k, n, z=1.96):
    """95 % interval of a share of which k in n were seen (Wilson 1927)."""
    p, d = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def main():
    check_range(globals(), 1, math.inf, 'eval_tokens', 'block_size', 'batch_size')
    check_range(globals(), 0, math.inf, 'problems')
    try:
        model, about = load_model(checkpoint, torch.device(device))
        tokenizer = get_tokenizer(model.config.vocab_size)
        names = list(about['knobs'].get('data', ()))
        if not names:
            fail(f'{about["path"]} names no data sets, as a checkpoint of train.py does')
        data = open_data(data_dir or about['knobs']['data_dir'], names, model.config.vocab_size)
        print(f'{about["path"]}: step {about["step"]}, {about["tokens"]:,} tokens')
        print(f'{"data set":20} {"loss":>8} {"perplexity":>11} {"bits/byte":>10}')
        with torch.no_grad():
            for name in names:
                loss, bits = validation_loss(model, data[name], block_size)
                print(f'{name:20} {loss:8.4f} {math.exp(loss):11.2f} {bits:10.4f}')
    except ValueError as e:
        fail(e)
    except (RuntimeError, AssertionError) as e:
        fail(f'device={device!r} cannot be used here: {str(e).splitlines()[0][:120]}')
    if problems and data.get('arith') and data['arith'].masks:
        solved, tried = arithmetic(model, data['arith'], tokenizer)
        low, high = wilson(solved, tried)
        print(f'arithmetic: {solved} of {tried} solved, {solved / tried:.1%} '
              f'({low:.1%} to {high:.1%})')


if __name__ == '__main__':
    configure(globals(), positional=['checkpoint'])
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
