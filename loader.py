"""Batches out of token shards: in a phase, a batch is a pure function of the numbers of its rows.

The loader keeps no state. A batch depends on the numbers of its rows, the seed and the phase (its
data, mixture and length T, and what the phases before it have read), and on nothing else. So it is
the same however rows are dealt out to ranks and micro-batches, and a resumed run continues exactly.

A row's number becomes text in three steps. With the weights
{'text': 0.7, 'sums': 0.3}, seed 1337 and T = 128, the first ten rows of a phase are:

    row                        0     1     2     3     4     5     6     7     8     9
    data set                 text  sums  text  sums  text  text  text  text  text  text
    draw                       0     0     1     1     2     3     4     5     6     7
    window, of 500 and 60     31    23   125     0   211   491   114   244   340   151

1. Mixture (deal_1000_rows). Of every 1000 rows a data set has its weight's share, here 700 and
   300, in shuffled order. The share is one of rows, not of tokens, and exact to a row: 0.6687 has
   668 rows of one thousand and 669 of another. `draw` counts the rows that a data set has had.
2. Permutation (permute). A data set is cut into windows of T tokens. Draw number d is window number
   d of a permutation of them: no window comes twice within an epoch, and each epoch has another.
   Phases that came before have used up draws (windows_before).
3. Packing (Dataset.spans). Plain text is cut at every T tokens; in SFT data a window has as many
   whole documents as fit. x is a window's tokens, y the same one token later.
"""
import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from data_prep import making, source_args, token_dtype, what_changed
from documents import SPLITS
from tokenizer import EOS_ID, SHA256


def get_batch(data, weights, rows, T, seed, drawn_before=None, completion_only=False):
    """Inputs and targets, int64 (R, T) each, of the rows with these numbers, of the train split.

    data: {name: Dataset}; weights: {name: weight}, in an order that counts. drawn_before: {name:
    windows that it has had before row 0}, see windows_before.
    """
    key, drawn_before = tuple(weights.items()), drawn_before or {}
    dealt = [deal_1000_rows(key, seed, row // 1000) for row in rows]
    which = np.array([which[row % 1000] for (which, _), row in zip(dealt, rows)])         # (R,)
    draw = np.array([draw[row % 1000] for (_, draw), row in zip(dealt, rows)])            # (R,)
    x, y = np.empty((2, len(rows), T), np.int64)                                          # (R, T)
    for k, name in enumerate(weights):
        mine = np.flatnonzero(which == k)
        if not len(mine):
            continue
        n = data[name].n_windows('train', T)
        epoch, window = np.divmod(draw[mine] + drawn_before.get(name, 0), n)
        for e in set(epoch.tolist()):
            window[epoch == e] = permute(window[epoch == e], n, 'windows', seed, name, e, T)
        x[mine], y[mine] = get_windows(data[name], 'train', window, T, completion_only)
    return torch.from_numpy(x), torch.from_numpy(y)


# --------------------------------------------------------------------------------------------------
# 1. Mixture: which data set has a row

@lru_cache
def deal_1000_rows(weights, seed, b):
    """For rows 1000 b to 1000 b + 999: (number of the data set, its draw), int64 (1000,) each.

    weights: ((name, weight), ...). A data set's draw is how many rows it has had before this one.
    """
    before, after = rows_dealt(weights, b), rows_dealt(weights, b + 1)
    which = np.repeat(np.arange(len(weights)), after - before)                # (1000,), in order
    which = which[permute(np.arange(1000), 1000, 'rows', seed, b)]            # shuffled
    draw = np.empty(1000, np.int64)
    for k in range(len(weights)):
        draw[which == k] = np.arange(before[k], after[k])
    return which, draw


def rows_dealt(weights, b):
    """How many of the first 1000 b rows each data set has: exact, or off by less than one row."""
    return np.diff([0] + [int(1000 * b * share) for share in cumulative_shares(weights)])


@lru_cache
def cumulative_shares(weights):
    """Cumulative shares of the mixture, as exact fractions; the last is 1, whatever weights add up
    to (the paper's of the decay: 0.99999).

    weights: ((name, weight), ...). ValueError, in one line, for weights that are no mixture.
    """
    possible = all(type(weight) in (int, float) and 0 <= weight < math.inf for _, weight in weights)
    if not possible or not any(weight for _, weight in weights):
        raise ValueError(f'weights {dict(weights)} should be numbers from 0 up, not all 0')
    exact = [Fraction(str(weight)) for _, weight in weights]          # 0.1 is 1/10 here
    total = sum(exact)
    for (name, weight), w in zip(weights, exact):
        if 0 < w < total / 1000:
            raise ValueError(f'weight {weight} of {name} is under 1/1000 of the mixture')
    return [cumulative / total for cumulative in accumulate(exact)]


def count_draws(weights, n, seed):
    """{name: how many of the first n rows are drawn from it}; weights: {name: weight}."""
    key, (b, rest) = tuple(weights.items()), divmod(n, 1000)
    which, _ = deal_1000_rows(key, seed, b)
    counts = rows_dealt(key, b) + np.bincount(which[:rest], minlength=len(key))
    return dict(zip(weights, counts.tolist()))


def windows_before(phases, phase, seed):
    """{data set: windows of this phase's length that the phases before it have drawn}.

    So no text comes twice within an epoch as long as all earlier phases had the same T; another T
    cuts other windows, in an order of their own.
    """
    tokens = Counter()
    for earlier in phases[:phases.index(phase)]:
        rows = earlier['steps'] * earlier['batch']
        for name, n in count_draws(earlier['data'], rows, seed).items():
            tokens[name] += n * earlier['block_size']
    T = phase['block_size']
    return {name: (n + T - 1) // T for name, n in tokens.items()}             # rounded up


# --------------------------------------------------------------------------------------------------
# 2. Permutation: which of its windows a data set gives

def permute(i, n, *key):
    """Where the permutation of 0..n-1 that key names sends the numbers i; int64 array in and out.

    A Feistel network: the halves (l, r) of a number's bits become (r, l ^ F(r)), 8 times over. Each
    round can be undone whatever F is, so this permutes 0..4^half_bits - 1; what lands at n or above
    goes through again until it is below (cycle walking). It needs no memory, where a shuffled list
    of the full run's 10^8 windows would take most of a gigabyte in every process.
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half_bits)) - 1)
    rounds = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=64).digest(), '<u8')
    out = np.array(i, np.uint64)
    todo = np.full(out.shape, True)
    while todo.any():
        left, right = out[todo] >> half_bits, out[todo] & low
        for k in rounds:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)        # F: multiply and xor-shift
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        out[todo] = (left << half_bits) | right
        todo = out >= n
    return out.astype(np.int64)


# --------------------------------------------------------------------------------------------------
# 3. Packing: which tokens a window has

@dataclass
class Dataset:
    """A prepared data set; tokens and masks are memory-mapped files, one for each split."""
    name: str
    meta: dict
    tokens: dict                                               # split -> (n_tokens,) ids
    masks: dict                                                # split -> (n_tokens,) 0 or 1; or {}
    packs: dict = field(default_factory=dict)                  # (split, T) -> spans, once computed

    def spans(self, split, T):
        """(starts, stops) of the windows, of up to T + 1 tokens: T inputs, and targets one later.

        Plain text is cut at every T tokens. In SFT data a window takes as many whole documents as
        fit; one that is longer than a window has its own and loses its end. Attention is not masked
        between the documents of a window: that EOS parts them is for the model to learn.
        """
        if not self.masks:
            n = len(self.tokens[split])
            return range(0, n - T, T), range(T + 1, n + 1, T)
        if (split, T) not in self.packs:
            ends = np.flatnonzero(self.tokens[split] == EOS_ID) + 1           # of documents
            self.packs[split, T] = pack_documents(ends, T)
        return self.packs[split, T]

    def n_windows(self, split, T):
        """How many windows of T inputs a split has; ValueError if none."""
        n = len(self.spans(split, T)[0])
        if not n:
            raise ValueError(f'{self.name}: block_size={T} is too long for its {split} split of '
                             f'{len(self.tokens[split])} tokens')
        return n

    def coverage(self, split, T):
        """What windows of T tokens leave out of a split, as a dict of counts: of 'documents' how
        many are 'cut', of 'tokens' how many are 'never_seen', of 'windows' how many reach no
        completion, 'without_completion'. Of plain text, only tokens after its last window count.
        """
        starts, stops = self.spans(split, T)
        tokens = len(self.tokens[split])
        counts = {'documents': self.meta[split]['documents'], 'cut': 0, 'tokens': tokens,
                  'never_seen': tokens - int(stops[-1]), 'windows': len(starts),
                  'without_completion': 0}
        if self.masks:
            starts, stops = np.asarray(starts), np.asarray(stops)
            left_out = np.append(starts[1:], tokens) - stops           # tokens after each window
            edges = np.stack([starts + 1, stops], axis=1).flatten()     # of each window's targets
            edges = edges[edges < tokens]                              # the last may be the end
            reached = np.add.reduceat(self.masks[split], edges, dtype=np.int64)[::2]
            counts |= {'cut': int((left_out > 0).sum()), 'never_seen': int(left_out.sum()),
                       'without_completion': int((reached == 0).sum())}
        return counts

    def pairs(self, split):
        """[(prompt ids, completion ids with EOS)], two lists for each document of SFT data."""
        ids, mask = self.tokens[split], self.masks[split]
        ends = np.flatnonzero(ids == EOS_ID) + 1
        pairs, start = [], 0
        for end in ends:
            middle = start + mask[start:end].argmax()                         # the first 1
            pairs.append((ids[start:middle].tolist(), ids[middle:end].tolist()))
            start = end
        return pairs


def pack_documents(ends, T):
    """Windows of whole documents, which end at the tokens `ends`: (starts, stops), two lists."""
    starts, stops, done = [], [], 0                            # done: documents in a window so far
    while done < len(ends):
        start = int(ends[done - 1]) if done else 0
        fit = int(np.searchsorted(ends, start + T + 1, 'right'))              # end within T + 1
        done = max(done + 1, fit)                              # one too long has its own window
        starts.append(start)
        stops.append(min(int(ends[done - 1]), start + T + 1))
    return starts, stops


def get_windows(dataset, split, windows, T, completion_only=False):
    """Inputs x and targets y, int64 (R, T) each, of the windows with these numbers.

    y is -1 where there is no loss: after the last document that fits in an SFT window, whose x is
    filled with EOS; and, with completion_only, in the prompts of SFT data.
    """
    x = np.full((len(windows), T), EOS_ID)                     # (R, T)
    y = np.full((len(windows), T), -1)                         # (R, T)
    starts, stops = dataset.spans(split, T)
    for row, window in enumerate(windows):
        start, stop = starts[int(window)], stops[int(window)]
        n = stop - start - 1                                   # tokens that have a next one
        x[row, :n] = dataset.tokens[split][start:stop - 1]
        y[row, :n] = dataset.tokens[split][start + 1:stop]
        if completion_only and dataset.masks:
            in_prompt = dataset.masks[split][start + 1:stop] == 0
            y[row, :n][in_prompt] = -1
    return torch.from_numpy(x), torch.from_numpy(y)


# --------------------------------------------------------------------------------------------------
# Data sets on the disk, as data_prep.py has written them

def open_data(data_dir, names, vocab_size, sources=None):
    """{name: Dataset} of data_dir/name for each name; ValueError, in one line, if one is unfit.

    With sources, {name: arguments for data_prep.py}, so is one that was made from another source,
    with other arguments, or from files that have changed since.
    """
    return {name: open_dataset(Path(data_dir, name), name, vocab_size, sources or {})
            for name in names}


def open_dataset(folder, name, vocab_size, sources):
    """The Dataset in a folder, a Path. name: its key in sources, {name: arguments for
    data_prep.py}. ValueError, in one line, as of open_data."""
    wanted = source_args(sources, name)
    make = making(folder, vocab_size, wanted or ['SOURCE'])
    meta = read_meta(folder, make)
    if (meta['vocab_size'], meta['tokenizer_sha256']) != (vocab_size, SHA256):
        raise ValueError(f'{folder}/meta.json has vocab_size={meta["vocab_size"]}, the model '
                         f'{vocab_size} with tokenizer {SHA256[:8]}...: {make} --overwrite')
    change = what_changed(meta, wanted) if wanted else ''
    if change:
        raise ValueError(f'{folder} was made from {change}: {make} --overwrite makes it anew, '
                         'a run with --data_dir=NEW makes another')
    tokens, masks = {}, {}
    for split in SPLITS:
        n = meta[split]['tokens']
        tokens[split] = map_file(folder / f'{split}.bin', token_dtype(vocab_size), n, make)
        if meta['sft']:
            masks[split] = map_file(folder / f'{split}_mask.bin', np.uint8, n, make)
    return Dataset(name, meta, tokens, masks)


def read_meta(folder, make):
    """The dict of folder/meta.json; ValueError, in one line, if it lacks what is needed.

    make: the command that makes this data set, to be named then.
    """
    try:
        meta = json.loads((folder / 'meta.json').read_text())
        _ = meta['vocab_size'], meta['tokenizer_sha256'], meta['sft'], meta['sources'][0]
        _ = [meta[split]['tokens'] for split in SPLITS]
    except OSError:
        remedy = f'remove it, then {make}' if folder.exists() else make
        raise ValueError(f'{folder} has no meta.json that can be read: {remedy}') from None
    except (ValueError, LookupError, TypeError):
        raise ValueError(f'{folder}/meta.json is damaged: {make} --overwrite') from None
    return meta


def map_file(file, dtype, n, make):
    """The n numbers in a file, memory-mapped; ValueError, in one line, if it has another size."""
    size = file.stat().st_size if file.exists() else 0
    expected = n * np.dtype(dtype).itemsize
    if not size or size != expected:
        raise ValueError(f'{file} has {size} bytes, not the {expected} that meta.json tells of: '
                         f'{make} --overwrite')
    return np.asarray(np.memmap(file, dtype, 'r'))


def check_ids(data_dir, data):
    """ValueError, in one line, where ids of {name: Dataset} are not as written, or (in shards that
    others wrote) not below vocab_size.

    Splits of over 4 GB, the work of two seconds, are taken as they are.
    """
    for name, dataset in data.items():
        for split, ids in dataset.tokens.items():
            folder, V = Path(data_dir, name), dataset.meta['vocab_size']
            if ids.nbytes > 4e9:
                continue
            if hashlib.sha256(ids).hexdigest() != dataset.meta[split].get('sha256'):
                raise ValueError(f'{folder}/{split}.bin is not what was written, by the sha256 in '
                                 f'meta.json: {making(folder, V)} --overwrite')
            if ids.max() >= V:
                raise ValueError(f'{folder}/{split}.bin has the id {ids.max()}, which is not below '
                                 f'vocab_size={V}')
