"""Text in, token shards out; and the one loader that reads them back.

    python data_prep.py                        # Python's standard library into data/stdlib
    python data_prep.py arith                  # worked word problems (SFT) into data/arith
    python data_prep.py SOURCE --out_dir=data/NAME --vocab_size=16384          # a file or folder
    python data_prep.py --help                 # every option

SOURCE holds .txt .md .rst .py, a document each, or .jsonl, a document a line: {"text"}; or for
supervised fine-tuning (SFT) {"prompt", "completion"}, taken as they are, or {"messages"}: the last
one, the assistant's, is the completion of "User: ...\\n\\nAssistant:". One SFT document makes the
whole data set SFT: its windows hold whole documents, and a mask marks the completions.

out_dir gets train.bin and val.bin, uint16 or uint32 ids with EOS after each document; for SFT also
train_mask.bin and val_mask.bin, a byte a token, 1 in completions; and meta.json. A document's hash
decides its split, so equal texts never stand in both. out_dir appears whole or not at all.
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate, chain
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenizer import EOS_ID, SHA256, chat_prompt, get_tokenizer

SUFFIXES = ('.txt', '.md', '.rst', '.py', '.jsonl')
SPLITS = ('train', 'val')


# --------------------------------------------------------------------------------------------------
# Documents: (key whose hash decides the split, prompt or None, text)

def find_files(source):
    """The files of a source, sorted by path; hidden ones and installed packages are left out."""
    root = Path(sysconfig.get_path('stdlib') if source == 'stdlib' else source)
    if root.is_file() and root.suffix in SUFFIXES:
        return [root]
    if not root.is_dir():
        raise ValueError(f"{source}: should be 'stdlib', 'arith', a folder, or a file ending in "
                         + ' '.join(SUFFIXES))
    return [path for path in sorted(root.rglob('*')) if path.suffix in SUFFIXES and path.is_file()
            and not any(part.startswith('.') or part in ('site-packages', 'dist-packages')
                        for part in path.relative_to(root).parts)]


def parse(content, is_json):
    """(prompt or None, text) of the bytes of a file or .jsonl line; ValueError says why not."""
    try:
        text = content.decode('utf-8-sig')
        match json.loads(text) if is_json else {'text': text}:
            case {'text': str(text)}:
                prompt = None
            case {'prompt': str(prompt), 'completion': str(text)}:
                pass
            case {'messages': [*turns, {'role': 'assistant', 'content': str(text)}]}:
                prompt = chat_prompt(turns)
                text = ' ' + text                              # one token with the first word
            case _:
                raise TypeError
        ((prompt or '') + text).encode()                       # JSON can escape half a character
    except UnicodeError:
        raise ValueError('not UTF-8') from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError('not JSON') from None
    except (TypeError, KeyError, AttributeError):
        raise ValueError('should be an object with "text", with "prompt" and "completion", or with '
                         '"messages" that end with the assistant; all strings') from None
    if not text.strip():
        raise ValueError('empty')
    return prompt, text


def read_documents(files, unusable):
    """Yield the documents of files; unusable(where, why) is told of what is none."""
    for file in files:
        is_json = file.suffix == '.jsonl'
        with open(file, 'rb') as f:
            for n, content in enumerate(f if is_json else [f.read()], 1):
                try:
                    prompt, text = parse(content, is_json)
                except ValueError as e:
                    unusable(f'{file}:{n}' if is_json else file, str(e))
                else:
                    yield (prompt or '') + text, prompt, text


PEOPLE = (('Tom', 'He'), ('Ben', 'He'), ('Ann', 'She'))
THINGS = ('apples', 'books', 'coins', 'pens')


def arith(num_docs, seed):
    """Yield SFT documents: a story of 1 to 3 steps, each worked on a line of its own, then #### N.

    Small enough for a 20M model to learn from ten thousand: the second operand is at most 9, all
    totals lie in 0 to 30, and spaces make every number one token. The key is the worked steps, so
    that val holds no problem of train in other words.
    """
    rng = random.Random(f'arith {seed}')
    for _ in range(num_docs):
        (name, he), things = rng.choice(PEOPLE), rng.choice(THINGS)
        n_steps, steps = rng.choice((1, 1, 1, 2, 2, 3)), []
        if rng.random() < 0.2:
            bags, each = rng.randint(2, 5), rng.randint(2, 6)
            total = bags * each
            story = f'{name} has {bags} bags of {each} {things}.'
            steps.append(f'{bags} * {each} = {total}')
        else:
            total = rng.randint(2, 15)
            story = f'{name} has {total} {things}.'
        while len(steps) < n_steps:
            n, gain = rng.randint(1, 9), rng.random() < 0.5
            after = total + n if gain else total - n
            if 0 <= after <= 30:
                story += f' {he} {"gets" if gain else "loses"} {n}{" more" * gain}.'
                steps.append(f'{total} {"+" if gain else "-"} {n} = {after}')
                total = after
        prompt = f'Question: {story} How many {things} does {he.lower()} have now?\nAnswer:\n'
        text = '\n'.join([*steps, f'#### {total}'])
        yield text, prompt, text


def first_bytes(documents, limit):
    """Yield documents until they hold limit bytes of text."""
    for document in documents:
        yield document
        limit -= len(document[2].encode())
        if limit <= 0:
            return


def split_by_hash(documents, val_fraction, seed, source):
    """(documents, function: key -> 'train' or 'val'), with at least one document on either side.

    The first two different documents go to different sides. A single one is cut in two at the end
    of a line, its last val_fraction going to val.
    """
    def number(key):                                           # uniform in [0, 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8, key=str(seed).encode()).digest()
        return int.from_bytes(digest, 'big') / 2**64

    head = []
    for document in documents:
        head.append(document)
        if document[0] != head[0][0]:
            break
    if not head:
        raise ValueError(f'{source}: no documents; looked for {" ".join(SUFFIXES)}')
    low, high = sorted((head[0][0], head[-1][0]), key=number)
    fixed = {low: 'val', high: 'train'}
    if low == high:
        lines = head[0][2].splitlines(keepends=True)
        if head[0][1] is not None or len(lines) < 2:
            raise ValueError(f'{source}: one SFT document, or one line, cannot be divided into '
                             'train and val')
        cut = min(max(1, round(len(lines) * (1 - val_fraction))), len(lines) - 1)
        head = [('train', None, ''.join(lines[:cut])), ('val', None, ''.join(lines[cut:]))]
        fixed = {'train': 'train', 'val': 'val'}
    return (chain(head, documents),
            lambda key: fixed.get(key) or ('val' if number(key) < val_fraction else 'train'))


# --------------------------------------------------------------------------------------------------
# Tokens

def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 2**16 else np.uint32


# tiktoken panics at a million white-space characters in a row, so a long text is encoded in parts.
# A part ends with a line, and the next begins with a visible character: no piece of the tokenizer's
# pattern is cut there. Only where no line ends in 400 000 characters is the text cut anywhere.
PART = re.compile(r'.{1,400000}(?:\Z|\n(?=\S))|.{400000}', re.DOTALL)


def encode(vocab_size, document):
    """(ids of prompt, text and EOS; how many of them are the prompt's): each is encoded alone."""
    tokenizer, dtype = get_tokenizer(vocab_size), token_dtype(vocab_size)
    prompt, text = ([np.array(tokenizer.encode_ordinary(part), dtype) for part in PART.findall(s)]
                    for s in (document[1] or '', document[2]))
    return np.concatenate([*prompt, *text, np.array([EOS_ID], dtype)]), sum(map(len, prompt))


def start_worker():
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()


def encode_all(documents, vocab_size):
    """Yield (document, *encode(document)) in order, on all cores, 16 MB of text at a time."""
    with ProcessPoolExecutor(initializer=start_worker) as pool:
        group, size = [], 0
        for document in chain(documents, [None]):              # None: the end
            if document:
                group.append(document)
                size += len(document[2])
            if size > 16e6 or not document:
                # a little text is not worth starting processes for
                run = map if size < 1e6 else partial(pool.map, chunksize=1 + len(group) // 64)
                for done, (ids, n_prompt) in zip(group, run(partial(encode, vocab_size), group)):
                    yield done, ids, n_prompt
                group, size = [], 0


def prepare(source, out_dir, vocab_size=16_384, val_fraction=0.05, on_error='raise', max_mb=0,
            seed=1337, site_packages=False, num_docs=40_000, overwrite=False):
    """Write the data set out_dir from a source and return its meta. See --help for the arguments.

    ValueError, in one line, names the argument, file or line that is wrong.
    """
    get_tokenizer(vocab_size)                                  # refuses a wrong vocab_size
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} should lie between 0 and 1')
    out, files, skipped = Path(out_dir), [], Counter()
    if out.exists() and not overwrite:
        raise ValueError(f'{out} exists already: --overwrite replaces it')
    if out.exists() and not (out / 'meta.json').exists():
        raise ValueError(f'{out} holds something else (it has no meta.json): name another folder')

    def unusable(where, why):
        if source != 'stdlib' and on_error == 'raise':         # stdlib has odd files on purpose
            raise ValueError(f'{where}: {why}; --on_error=skip goes on without')
        skipped[why] += 1
        if source != 'stdlib' and skipped[why] <= 10:
            tqdm.write(f'data_prep.py: skipped {where}: {why}', file=sys.stderr)

    if source != 'arith':
        files = find_files(source)
        if site_packages:
            files += find_files(sysconfig.get_path('purelib'))
    documents = arith(num_docs, seed) if source == 'arith' else read_documents(files, unusable)
    size = sum(f.stat().st_size for f in files) or None        # of files; for the progress bar
    if max_mb:
        size, documents = max_mb * 1e6, first_bytes(documents, max_mb * 1e6)
    documents, split_of = split_by_hash(documents, val_fraction, seed, source)
    meta = {'tokenizer': 'deepseek-v3', 'tokenizer_sha256': SHA256, 'vocab_size': vocab_size,
            'dtype': token_dtype(vocab_size).__name__, 'sft': False, 'sources': [str(source)],
            'python': sys.version.split()[0], 'val_fraction': val_fraction, 'max_mb': max_mb,
            'seed': seed, 'skipped': skipped}
    for split in SPLITS:
        meta[split] = {'tokens': 0, 'documents': 0, 'bytes': 0, 'sha256': hashlib.sha256()}
    temporary = out.parent / f'.{out.name}.{os.getpid()}.tmp'
    try:
        temporary.mkdir(parents=True)
        with ExitStack() as stack:
            bins = {name: stack.enter_context(open(temporary / f'{name}.bin', 'wb'))
                    for name in ('train', 'val', 'train_mask', 'val_mask')}
            bar = stack.enter_context(tqdm(total=size, unit='B', unit_scale=True, disable=None))
            for (key, prompt, text), ids, n_prompt in encode_all(documents, vocab_size):
                split, n_bytes = split_of(key), len(((prompt or '') + text).encode())
                bins[split].write(ids.tobytes())
                bins[f'{split}_mask'].write(bytes(n_prompt) + b'\1' * (len(ids) - n_prompt))
                meta['sft'] |= prompt is not None
                meta[split]['sha256'].update(ids.tobytes())
                for name, n in (('tokens', len(ids)), ('documents', 1), ('bytes', n_bytes)):
                    meta[split][name] += n
                bar.update(n_bytes)
        for split in SPLITS:
            meta[split]['sha256'] = meta[split]['sha256'].hexdigest()
            if not meta['sft']:
                (temporary / f'{split}_mask.bin').unlink()
        (temporary / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
        old = temporary.with_suffix('.old')
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


# --------------------------------------------------------------------------------------------------
# The loader. No state: a batch is a function of the data, the weights, the seed and the numbers of
# its rows, so it is the same however rows are dealt out to ranks and micro-batches, and a resumed
# run goes on exactly.

@dataclass
class Dataset:
    """A prepared data set; tokens and masks are memory-mapped files, one for each split."""
    name: str
    meta: dict
    tokens: dict                                               # split -> (n_tokens,) ids
    masks: dict                                                # split -> (n_tokens,) 0 or 1; or {}
    packs: dict = field(default_factory=dict)                  # (split, T) -> spans, once computed

    def spans(self, split, T):
        """Starts and stops of the windows, of up to T + 1 tokens: T inputs, and targets one later.

        Plain text is cut at every T tokens. In SFT data a window takes as many whole documents as
        fit; one that is longer than a window has its own and loses its end. Attention is not masked
        between the documents of a window: that EOS parts them is for the model to learn.
        """
        if not self.masks:
            starts = range(0, len(self.tokens[split]) - T, T)
            return starts, range(T + 1, len(self.tokens[split]) + 1, T)
        if (split, T) not in self.packs:
            ends = np.flatnonzero(self.tokens[split] == EOS_ID) + 1     # of documents
            starts, stops, done = [], [], 0
            while done < len(ends):
                starts.append(int(ends[done - 1]) if done else 0)
                fits = int(np.searchsorted(ends, starts[-1] + T + 1, 'right'))
                done = max(done + 1, fits)
                stops.append(min(int(ends[done - 1]), starts[-1] + T + 1))
            self.packs[split, T] = starts, stops
        return self.packs[split, T]

    def n_windows(self, split, T):
        """How many windows of T inputs a split has; ValueError if none."""
        if n := len(self.spans(split, T)[0]):
            return n
        raise ValueError(f'{self.name}: block_size={T} is too long for its {split} split of '
                         f'{len(self.tokens[split])} tokens')

    def pairs(self, split):
        """[(prompt ids, completion ids with EOS)], two lists for each document of SFT data."""
        ids, mask = self.tokens[split], self.masks[split]
        stops = np.flatnonzero(ids == EOS_ID) + 1
        starts = [0, *stops[:-1]]
        middles = [start + mask[start:stop].argmax() for start, stop in zip(starts, stops)]
        return [(ids[a:b].tolist(), ids[b:c].tolist()) for a, b, c in zip(starts, middles, stops)]


def source_args(sources, name):
    """sources[name], arguments for data_prep.py in a shell's quoting, as a list; [] without it."""
    source = sources.get(name, '')
    try:
        if isinstance(source, str):
            return shlex.split(source)
    except ValueError:           # a quote that does not close
        pass
    raise ValueError(f'sources.{name}={source!r} should be what follows data_prep.py, in a '
                     "shell's quoting, like 'stdlib --max_mb=2'")


def making(folder, vocab_size):
    """The command that makes the data set in `folder`, for a message."""
    return f'python data_prep.py SOURCE --out_dir={folder} --vocab_size={vocab_size}'


def open_data(data_dir, names, vocab_size, sources=None):
    """{name: Dataset} of data_dir/name for each name; ValueError, in one line, if one is unfit.

    With sources, {name: arguments for data_prep.py}, so is one that was made from another source.
    """
    data = {}
    for name in names:
        folder, maps = Path(data_dir, name), {}
        make = making(folder, vocab_size)
        try:
            meta = json.loads((folder / 'meta.json').read_text())
            found, sft = (meta['vocab_size'], meta['tokenizer_sha256']), meta['sft']
            n_tokens = {split: meta[split]['tokens'] for split in SPLITS}
            made_of = meta['sources'][0]
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f'{folder}/meta.json is missing: {make}') from None
        except OSError as e:
            raise ValueError(f'{folder}/meta.json: {e.strerror}') from None
        except (ValueError, LookupError, TypeError):
            raise ValueError(f'{folder}/meta.json is damaged: {make} --overwrite') from None
        if found != (vocab_size, SHA256):
            raise ValueError(f'{folder}/meta.json has vocab_size={found[0]}, the model {vocab_size}'
                             f' with tokenizer {SHA256[:8]}...: {make} --overwrite')
        wanted = source_args(sources or {}, name)
        if wanted and made_of not in wanted:
            raise ValueError(f'{folder} was made from {made_of!r}, not by {shlex.join(wanted)!r}: '
                             'with --data_dir=NEW it is made beside this one')
        for split in SPLITS:
            for part, dtype in (('', token_dtype(vocab_size)), ('_mask', np.uint8))[:1 + sft]:
                file = folder / f'{split}{part}.bin'
                size = file.stat().st_size if file.exists() else 0
                right = n_tokens[split] * np.dtype(dtype).itemsize
                if not size or size != right:
                    raise ValueError(f'{file} has {size} bytes, not the {right} that meta.json '
                                     f'tells of: {make} --overwrite')
                maps[split + part] = np.asarray(np.memmap(file, dtype, 'r'))
        data[name] = Dataset(name, meta, {split: maps[split] for split in SPLITS},
                             {split: maps[f'{split}_mask'] for split in SPLITS if sft})
    return data


def check_ids(data_dir, data):
    """ValueError, in one line, where ids of {name: Dataset} are not as written, or are none.

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
        x[row, :stop - start - 1] = dataset.tokens[split][start:stop - 1]
        y[row, :stop - start - 1] = dataset.tokens[split][start + 1:stop]
        if completion_only and dataset.masks:
            y[row, :stop - start - 1][dataset.masks[split][start + 1:stop] == 0] = -1
    return torch.from_numpy(x), torch.from_numpy(y)


def permute(i, n, *key):
    """Where the permutation of 0..n-1 that key names sends the numbers i; int64 array in and out.

    A Feistel network: the halves (l, r) of a number's bits become (r, l ^ F(r)), 8 times over. Each
    round can be undone whatever F is, so this permutes 0..4^h - 1; what lands at n or above goes
    through again until it is below (cycle walking). It needs no memory, where a shuffled list of
    the full run's 10^8 windows would take most of a gigabyte in every process.
    """
    half = np.uint64(max(1, (n - 1).bit_length() + 1 >> 1))
    low = np.uint64((1 << int(half)) - 1)
    rounds = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=64).digest(), '<u8')
    out = np.array(i, np.uint64)
    todo = np.full(out.shape, True)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & low
        for k in rounds:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)        # F: xor-shift and multiply
            mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ (mixed >> np.uint64(32) & low)
        out[todo] = left << half | right
        todo = out >= n
    return out.astype(np.int64)


@lru_cache
def shares(weights):
    """Cumulative shares of the mixture, exact: 0 < ... = 1. weights: ((name, weight), ...)."""
    numbers = all(type(w) in (int, float) and 0 <= w < math.inf for _, w in weights)
    exact = [Fraction(str(w)) for _, w in weights] if numbers else []
    if not sum(exact):
        raise ValueError(f'weights {dict(weights)} should be numbers from 0 up, not all 0')
    for (name, weight), w in zip(weights, exact):
        if 0 < w < sum(exact) / 1000:
            raise ValueError(f'weight {weight} of {name} is under 1/1000 of the mixture')
    return [total / sum(exact) for total in accumulate(exact)]


def rows_in(weights, b):
    """How many of the first 1000 b rows each data set has: exact, or off by less than one row."""
    return np.diff([0] + [int(1000 * b * share) for share in shares(weights)])


@lru_cache
def thousand(weights, seed, b):
    """For rows 1000 b to 1000 b + 999: number of the data set, and how many rows it had before."""
    before = rows_in(weights, b)
    which = np.repeat(np.arange(len(weights)), rows_in(weights, b + 1) - before)
    which = which[permute(np.arange(1000), 1000, 'rows', seed, b)]
    draw = np.empty(1000, np.int64)
    for k, n in enumerate(before):
        draw[which == k] = n + np.arange((which == k).sum())
    return which, draw


def count_draws(weights, n, seed):
    """{name: how many of the first n rows are drawn from it}; weights: {name: weight}."""
    key, (b, rest) = tuple(weights.items()), divmod(n, 1000)
    partial_thousand = np.bincount(thousand(key, seed, b)[0][:rest], minlength=len(key))
    return dict(zip(weights, (rows_in(key, b) + partial_thousand).tolist()))


def get_batch(data, weights, rows, T, seed, start=None, completion_only=False):
    """Inputs and targets, int64 (R, T) each, of the rows with these numbers, of the train split.

    Of every 1000 rows each data set has its weight's share, in shuffled order. Each goes through
    its windows in an order of its own, another in every epoch, after the windows that it has had
    before row 0: start, {name: count}.
    """
    key = tuple(weights.items())
    taken = [(thousand(key, seed, n // 1000), n % 1000) for n in rows]
    which = np.array([which[r] for (which, _), r in taken])
    draw = np.array([draw[r] for (_, draw), r in taken])
    x, y = np.empty((2, len(taken), T), np.int64)              # (R, T) each
    for k, name in enumerate(weights):
        at = np.flatnonzero(which == k)
        if len(at):
            n = data[name].n_windows('train', T)
            epoch, window = np.divmod(draw[at] + (start or {}).get(name, 0), n)
            for e in set(epoch.tolist()):
                window[epoch == e] = permute(window[epoch == e], n, 'windows', seed, name, e, T)
            x[at], y[at] = get_windows(data[name], 'train', window, T, completion_only)
    return torch.from_numpy(x), torch.from_numpy(y)


def windows_before(phases, phase, seed):
    """{data set: windows of this phase's length that the phases before it have drawn}: its `start`.

    So no text comes twice within an epoch as long as all earlier phases had the same T; another T
    cuts other windows, in an order of their own.
    """
    tokens = Counter()
    for earlier in phases[:phases.index(phase)]:
        rows = earlier['steps'] * earlier['batch']
        for name, n in count_draws(earlier['data'], rows, seed).items():
            tokens[name] += n * earlier['block_size']
    return {name: -(-n // phase['block_size']) for name, n in tokens.items()}


def prepare_missing(data_dir, names, sources, vocab_size):
    """Make the data sets that are not in data_dir; sources: {name: arguments for data_prep.py}.

    A source whose path has spaces is quoted, as in a shell. ValueError, in one line, for a data set
    that sources does not name; SystemExit if making one fails.
    """
    def arguments(name):
        return [*(source_args(sources, name) or ['FOLDER']), f'--out_dir={Path(data_dir, name)}',
                f'--vocab_size={vocab_size}']

    missing = [name for name in names if not Path(data_dir, name).exists()]
    if unknown := [name for name in missing if not sources.get(name)]:
        raise ValueError(f'{Path(data_dir, unknown[0])} is missing: python data_prep.py '
                         + shlex.join(arguments(unknown[0]))
                         + (f'; and so are {", ".join(unknown[1:])}' if unknown[1:] else ''))
    for name in missing:
        folder, args = Path(data_dir, name), arguments(name)
        print(f'{folder} is missing, so: python data_prep.py {shlex.join(args)}', flush=True)
        run = subprocess.run([sys.executable, __file__, *args], check=False)
        if run.returncode and not (folder / 'meta.json').exists():         # nor made meanwhile
            sys.exit(run.returncode)


def error(message):
    print(f'data_prep.py: {message}', file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage='python data_prep.py [SOURCE] [--OPTION=VALUE ...]',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = error
    add = parser.add_argument
    add('source', nargs='?', default='stdlib', help="file, folder, 'stdlib' (default) or 'arith'")
    add('--out_dir', help='folder to write; default data/ and the name of the source')
    add('--vocab_size', type=int, default=16_384, help="keep the tokenizer's first ids; 16384")
    add('--val_fraction', type=float, default=0.05, help='share of documents held out; 0.05')
    add('--on_error', choices=('raise', 'skip'), default='raise',
        help="at an unusable file or line: 'raise' stops (default), 'skip' goes on and counts")
    add('--max_mb', type=float, default=0, help='stop after so many megabytes of text; 0: never')
    add('--seed', type=int, default=1337, help='fixes the split, and the problems of arith; 1337')
    add('--site_packages', action='store_true', help='with the installed Python packages')
    add('--num_docs', type=int, default=40_000, help='arith: number of problems; 40000')
    add('--overwrite', action='store_true', help='replace the data set out_dir if there is one')
    args = vars(parser.parse_args())
    args['out_dir'] = args['out_dir'] or Path('data', Path(args['source']).resolve().stem)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both remove what is half-written
    try:
        meta = prepare(**args)
    except ValueError as e:
        error(e)
    except OSError as e:
        error(f'{e.filename or args["out_dir"]}: {e.strerror or e}; nothing was written')
    except KeyboardInterrupt:
        error('stopped; nothing was written')
    for split in SPLITS:
        print(f'{args["out_dir"]}/{split}.bin: {meta[split]["tokens"]:,} tokens, '
              f'{meta[split]["documents"]:,} documents, {meta[split]["bytes"]:,} bytes of text')
    for why, n in meta['skipped'].items():
        print(f'skipped {n:,}: {why}')


if __name__ == '__main__':
    main()
