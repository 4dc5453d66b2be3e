"""Documents in: the files of a source, the documents in them, and the split that each goes to.

    find_files       the files of a folder that can be read, and what is passed over
    read_documents   a document a file, a document a line of .jsonl, or many in one text (separator)
    arith            worked word problems, made up here
    divide           train or val: near val_fraction of the bytes, and no text in both

data_prep.py writes what comes out of here as tokens.
"""
import hashlib
import json
import os
import random
import sysconfig
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tokenizer import chat_prompt, parts_of, text_of_turn

SUFFIXES = ('.txt', '.md', '.rst', '.py', '.jsonl')
SPLITS = ('train', 'val')
LONG = 1_000_000                     # characters: a longer plain text is cut, its end goes to val
SHORT = 1000                         # characters: a shorter one is never cut, unless it is alone
LOOK_AHEAD = 16_000_000              # characters: a source that has less is known as a whole


class Document(NamedTuple):
    """A document, or a part of one that is long."""
    text: str                        # of SFT data, the completion
    prompt: str | None = None        # of SFT data; None: plain text
    key: str = ''                    # its hash decides the split, so equal keys go together
    split: str = ''                  # where that is decided: 'train' or 'val'
    is_end: bool = True              # whether it ends a document, so that EOS follows

    def whole(self):
        """All of its text, of SFT data with the prompt."""
        return (self.prompt or '') + self.text


# --------------------------------------------------------------------------------------------------
# Files

def is_left_out(name):
    """Whether a file or folder of this name is hidden, or holds installed packages."""
    return name.startswith('.') or name in ('site-packages', 'dist-packages')


def refuse_folder(error):
    """For os.walk, which else passes over a folder that may not be read."""
    raise error


def find_files(source):
    """(files of a source, sorted by path; files that are passed over for their suffix, and links
    to none).

    Hidden ones and installed packages are in neither. Links to folders are followed, once each.
    """
    if source == 'stdlib':
        source = sysconfig.get_path('stdlib')
    root = Path(os.path.expanduser(source))
    if root.is_file() and root.suffix.lower() in SUFFIXES:
        return [root], []
    if not root.is_dir():
        raise ValueError(f"{source}: should be 'stdlib', 'arith', a folder, or a file ending in "
                         + ' '.join(SUFFIXES))
    files, passed_over, seen = [], [], set()
    for folder, subfolders, names in os.walk(root, onerror=refuse_folder, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not is_left_out(name)]
        for name in names:
            path = Path(folder, name)
            if is_left_out(name) or not (path.is_file() or path.is_symlink()):
                continue
            if path.exists() and path.suffix.lower() in SUFFIXES:
                files.append(path)
            else:
                passed_over.append(path)
    return sorted(files), passed_over


def count_suffixes(files):
    """'3 .gz, 1 .bin': how many files there are of each suffix, or links to files that are gone."""
    counts = Counter()
    for path in files:
        kind = path.suffix.lower() or 'without a suffix'
        counts[kind if path.exists() else 'links to nothing'] += 1
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ', '.join(f'{n:,} {suffix}' for suffix, n in most_first)


def fingerprint(files):
    """What tells whether files have changed: {'files', 'bytes', 'hash'}.

    The hash is of their names, below the folder that all are in, and sizes; and, up to a gigabyte,
    of what they hold.
    """
    root = os.path.commonpath([file.parent for file in files]) if files else ''
    sizes = [file.stat().st_size for file in files]
    total = sum(sizes)
    digest = hashlib.blake2b(digest_size=16)
    for file, size in zip(files, sizes):
        name = os.path.relpath(file, root)
        digest.update(f'{name}\0{size}\0'.encode(errors='surrogateescape'))
        if total <= 1e9:
            with open(file, 'rb') as f:
                for block in iter(partial(f.read, 2**20), b''):
                    digest.update(block)
    return {'files': len(files), 'bytes': total, 'hash': digest.hexdigest()}


# --------------------------------------------------------------------------------------------------
# Formats

def parse_line(content):
    """The Document of a line of .jsonl, as bytes; ValueError says why there is none."""
    try:
        record = json.loads(content.decode('utf-8-sig'))
        prompt = None
        match record:
            case {'text': str(text)}:
                pass
            case {'prompt': str(prompt), 'completion': str(text)}:
                pass
            case {'messages': [*turns, {'role': 'assistant', 'content': str() | list() as answer}]}:
                prompt = chat_prompt(turns)
                text = ' ' + text_of_turn(answer)              # one token with the first word
            case _:
                raise TypeError
        document = Document(text, prompt)
        document.whole().encode()                              # JSON can escape a lone surrogate
    except UnicodeDecodeError:
        raise ValueError('not UTF-8') from None
    except UnicodeEncodeError:
        raise ValueError('has a lone surrogate, half a character') from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError('not JSON') from None
    except (TypeError, KeyError, AttributeError):
        raise ValueError('should be an object with "text", with "prompt" and "completion", or with '
                         '"messages" that end with the assistant, of text') from None
    if not text.strip():
        raise ValueError('empty')
    return document._replace(key=document.whole())


def open_text(file):
    """A text file, open for reading: UTF-8, its line ends as they are, no byte order mark."""
    return open(file, encoding='utf-8-sig', newline='')


def blocks(f, n_chars):
    """Yield the next n_chars characters of an open text file, up to a million at a time."""
    while n_chars > 0:
        block = f.read(min(n_chars, LONG))
        if not block:
            return
        n_chars -= len(block)
        yield block


def count_characters(file):
    """Characters of a text file; ValueError if it is not UTF-8, or has white space alone."""
    n, empty = 0, True
    try:
        with open_text(file) as f:
            for block in blocks(f, file.stat().st_size):
                n += len(block)
                empty = empty and not block.strip()
    except UnicodeError:
        raise ValueError('not UTF-8') from None
    if empty:
        raise ValueError('empty')
    return n


def read_text(file, separator, val_fraction, most_chars):
    """Yield the documents of a text file: one, or those between the separators. Return how many
    separators there were.

    A long one is never in memory as a whole, and comes in parts that have their split. Its first
    most_chars characters are all that is taken: the cut depends on how much that is.
    """
    n_chars = count_characters(file)
    with open_text(file) as f:
        if separator:
            n_separators = 0
            for n_separators, text in enumerate(split_at(separator, blocks(f, n_chars))):
                if text.strip():
                    yield from in_two_if_long(Document(text, key=text), val_fraction)
            return n_separators
        if n_chars <= LONG:
            text = f.read()
            yield Document(text, key=text)
        else:
            n_chars = int(min(n_chars, most_chars))
            cut = round(n_chars * (1 - val_fraction))
            for _ in blocks(f, cut):
                pass
            cut += rest_of_line(f.read(min(LONG, int(n_chars * val_fraction / 2))))
            f.seek(0)
            yield from in_parts(blocks(f, cut), 'train')
            yield from in_parts(blocks(f, n_chars - cut), 'val')
    return 0


def split_at(separator, texts):
    """Yield what stands between the separators of a text that comes in blocks."""
    rest = ''
    for block in texts:
        *whole, rest = (rest + block).split(separator)
        yield from whole
    yield rest


def read_documents(files, separator, val_fraction, most_chars, unusable):
    """Yield the documents of files; unusable(where, why) is told of what is none.

    Blank lines of .jsonl are passed over. ValueError where no file has the separator.
    """
    n_separators = 0
    for file in files:
        if file.suffix.lower() != '.jsonl':
            try:
                n_separators += yield from read_text(file, separator, val_fraction, most_chars)
            except ValueError as e:
                unusable(file, str(e))
            continue
        with open(file, 'rb') as f:
            for n, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    document = parse_line(line)
                except ValueError as e:
                    unusable(f'{file}:{n}', str(e))
                else:
                    yield from in_two_if_long(document, val_fraction)
    if separator and not n_separators:
        raise ValueError(f'separator={separator!r} occurs in no text file (lines may end in '
                         '\\r\\n)')


PEOPLE = (('Tom', 'He'), ('Ben', 'He'), ('Ann', 'She'))
THINGS = ('apples', 'books', 'coins', 'pens')


def arith(num_docs, seed, steps=(1, 1, 1, 2, 2, 3)):
    """Yield SFT documents: a story of steps, each worked on a line of its own, then #### N.

        Question: Ben has 3 bags of 4 coins. He loses 5. How many coins does he have now?
        Answer:
        3 * 4 = 12
        12 - 5 = 7
        #### 7

    Small enough for a 20M model to learn from ten thousand: the second operand is at most 9, all
    totals lie in 0 to 30, and spaces make every number one token. The key is the worked steps, so
    that val holds no problem of train in other words. steps: from these, the number of a story's
    steps is drawn.
    """
    rng = random.Random(f'arith {seed}')
    for _ in range(num_docs):
        name, he = rng.choice(PEOPLE)
        things = rng.choice(THINGS)
        n_steps = rng.choice(steps)
        worked = []
        if rng.random() < 0.2:
            bags, each = rng.randint(2, 5), rng.randint(2, 6)
            total = bags * each
            story = f'{name} has {bags} bags of {each} {things}.'
            worked.append(f'{bags} * {each} = {total}')
        else:
            total = rng.randint(2, 15)
            story = f'{name} has {total} {things}.'
        while len(worked) < n_steps:
            n, gains = rng.randint(1, 9), rng.random() < 0.5
            after = total + n if gains else total - n
            if not 0 <= after <= 30:
                continue
            if gains:
                story += f' {he} gets {n} more.'
                worked.append(f'{total} + {n} = {after}')
            else:
                story += f' {he} loses {n}.'
                worked.append(f'{total} - {n} = {after}')
            total = after
        prompt = f'Question: {story} How many {things} does {he.lower()} have now?\nAnswer:\n'
        text = '\n'.join([*worked, f'#### {total}'])
        yield Document(text, prompt, text)


def first_bytes(documents, limit):
    """Yield documents until they hold limit bytes, prompts included.

    A long one, which comes in parts, those for train first, is not left in its middle.
    """
    for document in documents:
        yield document
        limit -= len(document.whole().encode())
        if limit <= 0 and document.is_end and document.split != 'train':
            return


# --------------------------------------------------------------------------------------------------
# Which split

def rest_of_line(text):
    """Characters of text up to and with its first line end; its first space, where it has none; 0
    where it has neither."""
    for mark in ('\n', ' '):
        if mark in text:
            return text.index(mark) + 1
    return 0


def in_parts(texts, split):
    """Yield the parts of one long document, a text that comes in blocks, all for one split."""
    part = None
    for following in parts_of(texts):
        if part is not None:
            yield Document(part, split=split, is_end=False)
        part = following
    if part is not None:
        yield Document(part, split=split)


def in_two(document, val_fraction):
    """Yield a plain document as two, in parts: the last val_fraction of it goes to val.

    It is cut where a line ends, or else a word, so that val has at least half of its fraction.
    """
    text = document.text
    cut = min(round(len(text) * (1 - val_fraction)), len(text) - 1)
    cut += rest_of_line(text[cut:-1][:int(len(text) * val_fraction / 2)])
    yield from in_parts([text[:cut]], 'train')
    yield from in_parts([text[cut:]], 'val')


def in_two_if_long(document, val_fraction):
    """Yield a document as it is, or as two if it is plain and long."""
    if document.prompt is None and len(document.text) > LONG:
        yield from in_two(document, val_fraction)
    else:
        yield document


def hash_of(key, seed):
    """A number in [0, 1), uniform over keys."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, 'big') / 2**64


def divide(documents, val_fraction, seed, source):
    """An iterable of the documents with their split, which is by the hash of their key: equal ones
    go together, and a data set that grows keeps what it held out.

    The first two different ones go to different splits, so that neither is empty. Where documents
    are few, and the hash does not come near val_fraction of the text, divide_few decides. That is
    known, and ValueError raised if there are none, before this returns: it reads LOOK_AHEAD first.
    """
    by_hash = partial(hash_of, seed=seed)
    head, n_chars = [], 0
    for document in documents:
        head.append(document)
        n_chars += len(document.whole())
        if n_chars > LOOK_AHEAD:
            break
    if not head:
        raise ValueError(f'{source}: no documents; looked for {" ".join(SUFFIXES)}')
    keys = list(dict.fromkeys(document.key for document in head if not document.split))[:2]
    fixed = {}
    if len(keys) == 2:
        fixed = dict(zip(sorted(keys, key=by_hash), ('val', 'train')))

    def decided(document):
        split = document.split or fixed.get(document.key)
        if not split:
            split = 'val' if by_hash(document.key) < val_fraction else 'train'
        return document._replace(split=split)

    if n_chars <= LOOK_AHEAD:                                  # that is all
        divided = [decided(document) for document in head]
        if not is_near(divided, val_fraction):
            divided = divide_few(head, val_fraction, by_hash, source)
        return divided
    return map(decided, chain(head, documents))


def is_near(divided, val_fraction):
    """Whether val has half to twice its fraction of the text."""
    n_chars = Counter()
    for document in divided:
        n_chars[document.split] += len(document.whole())
    return val_fraction / 2 <= n_chars['val'] / n_chars.total() <= 2 * val_fraction


def divide_few(documents, val_fraction, by_hash, source):
    """[the documents with their split]: each plain one is cut in two. Those that cannot be, short
    or SFT ones, go to val in the order of their hash, as long as that comes nearer to val_fraction.
    """
    divided, whole = [], Counter()                             # whole: key -> characters
    for document in documents:
        if not document.split and document.prompt is None and len(document.text) >= SHORT:
            divided += in_two(document, val_fraction)
        else:
            divided.append(document)
            if not document.split:
                whole[document.key] += len(document.whole())
    held_out, missing = set(), val_fraction * sum(whole.values())
    for key in sorted(whole, key=by_hash):
        if missing > whole[key] / 2:
            held_out.add(key)
            missing -= whole[key]
    if len(whole) == 1 and not any(document.split for document in divided):
        return [part for document in divided                     # all have one text
                for part in cut_at_a_line(document, val_fraction, source)]
    if not held_out and not any(document.split == 'val' for document in divided):
        held_out.add(min(whole, key=by_hash))
    splits = {key: 'val' if key in held_out else 'train' for key in whole}
    return [document._replace(split=document.split or splits[document.key]) for document in divided]


def cut_at_a_line(document, val_fraction, source):
    """A single short document as two, of at least a line each."""
    lines = document.text.splitlines(keepends=True)
    if document.prompt is not None or len(lines) < 2:
        raise ValueError(f'{source}: one SFT document, or one line, cannot be divided into '
                         'train and val: give more of them')
    cut = round(len(lines) * (1 - val_fraction))
    cut = min(max(1, cut), len(lines) - 1)                     # a line for either side
    return [Document(''.join(lines[:cut]), split='train'),
            Document(''.join(lines[cut:]), split='val')]
