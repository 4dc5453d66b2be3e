"""Text in, token shards out; loader.py reads them back.

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
import errno
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
from functools import partial
from itertools import chain
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokenizer import EOS_ID, SHA256, chat_prompt, get_tokenizer

SUFFIXES = ('.txt', '.md', '.rst', '.py', '.jsonl')
SPLITS = ('train', 'val')


# --------------------------------------------------------------------------------------------------
# Documents: (key whose hash decides the split, prompt or None, text)

def is_hidden_or_installed(path):
    """Whether a path leads through a hidden folder or one of installed packages."""
    return any(part.startswith('.') or part in ('site-packages', 'dist-packages')
               for part in path.parts)


def find_files(source):
    """The files of a source, sorted by path; hidden ones and installed packages are left out."""
    root = Path(sysconfig.get_path('stdlib') if source == 'stdlib' else source)
    if root.is_file() and root.suffix in SUFFIXES:
        return [root]
    if not root.is_dir():
        raise ValueError(f"{source}: should be 'stdlib', 'arith', a folder, or a file ending in "
                         + ' '.join(SUFFIXES))
    files = [path for path in sorted(root.rglob('*')) if path.suffix in SUFFIXES]
    return [path for path in files
            if path.is_file() and not is_hidden_or_installed(path.relative_to(root))]


def parse(content, is_json):
    """(prompt or None, text) of the bytes of a file or .jsonl line; ValueError says why not."""
    try:
        text = content.decode('utf-8-sig')
        document = json.loads(text) if is_json else {'text': text}
        prompt = None
        match document:
            case {'text': str(text)}:
                pass
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

        Question: Ben has 3 bags of 4 coins. He loses 5. How many coins does he have now?
        Answer:
        3 * 4 = 12
        12 - 5 = 7
        #### 7

    Small enough for a 20M model to learn from ten thousand: the second operand is at most 9, all
    totals lie in 0 to 30, and spaces make every number one token. The key is the worked steps, so
    that val holds no problem of train in other words.
    """
    rng = random.Random(f'arith {seed}')
    for _ in range(num_docs):
        name, he = rng.choice(PEOPLE)
        things = rng.choice(THINGS)
        n_steps = rng.choice((1, 1, 1, 2, 2, 3))
        steps = []
        if rng.random() < 0.2:
            bags, each = rng.randint(2, 5), rng.randint(2, 6)
            total = bags * each
            story = f'{name} has {bags} bags of {each} {things}.'
            steps.append(f'{bags} * {each} = {total}')
        else:
            total = rng.randint(2, 15)
            story = f'{name} has {total} {things}.'
        while len(steps) < n_steps:
            n, gains = rng.randint(1, 9), rng.random() < 0.5
            after = total + n if gains else total - n
            if not 0 <= after <= 30:
                continue
            if gains:
                story += f' {he} gets {n} more.'
                steps.append(f'{total} + {n} = {after}')
            else:
                story += f' {he} loses {n}.'
                steps.append(f'{total} - {n} = {after}')
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

    head = []                                                  # up to the first that is different
    for document in documents:
        head.append(document)
        if document[0] != head[0][0]:
            break
    if not head:
        raise ValueError(f'{source}: no documents; looked for {" ".join(SUFFIXES)}')
    low, high = sorted((head[0][0], head[-1][0]), key=number)
    fixed = {low: 'val', high: 'train'}
    if low == high:
        head = cut_in_two(head[0], val_fraction, source)
        fixed = {'train': 'train', 'val': 'val'}

    def split_of(key):
        if key in fixed:
            return fixed[key]
        return 'val' if number(key) < val_fraction else 'train'

    return chain(head, documents), split_of


def cut_in_two(document, val_fraction, source):
    """A single document as two, whose keys are 'train' and 'val', cut at the end of a line."""
    _, prompt, text = document
    lines = text.splitlines(keepends=True)
    if prompt is not None or len(lines) < 2:
        raise ValueError(f'{source}: one SFT document, or one line, cannot be divided into '
                         'train and val')
    cut = round(len(lines) * (1 - val_fraction))
    cut = min(max(1, cut), len(lines) - 1)                     # a line for either side
    return [('train', None, ''.join(lines[:cut])), ('val', None, ''.join(lines[cut:]))]


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
    _, prompt, text = document
    tokenizer, dtype = get_tokenizer(vocab_size), token_dtype(vocab_size)

    def ids_of(s):
        return [np.array(tokenizer.encode_ordinary(part), dtype) for part in PART.findall(s)]

    prompt_ids, text_ids = ids_of(prompt or ''), ids_of(text)
    eos = np.array([EOS_ID], dtype)
    return np.concatenate([*prompt_ids, *text_ids, eos]), sum(map(len, prompt_ids))


def start_worker():
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()


def encode_all(documents, vocab_size):
    """Yield (document, *encode(document)) in order, on all cores, 16 MB of text at a time."""
    encode_one = partial(encode, vocab_size)
    with ProcessPoolExecutor(initializer=start_worker) as pool:
        for group, size in groups_of_documents(documents, 16e6):
            if size < 1e6:                                     # not worth starting processes for
                encoded = map(encode_one, group)
            else:
                encoded = pool.map(encode_one, group, chunksize=1 + len(group) // 64)
            for document, (ids, n_prompt) in zip(group, encoded):
                yield document, ids, n_prompt


def groups_of_documents(documents, limit):
    """Yield (documents, characters of text) for groups of just over `limit` characters."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document[2])
        if size > limit:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


# --------------------------------------------------------------------------------------------------
# Shards

def move_into_place(temporary, out, overwrite):
    """Make the finished folder `temporary` the data set `out`; ValueError if one is there."""
    old = temporary.with_suffix('.old')
    if overwrite and out.exists():
        out.rename(old)
    try:
        temporary.rename(out)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise ValueError(f'{out} exists by now, another process has made it: this one is '
                         'dropped') from None
    shutil.rmtree(old, ignore_errors=True)


def prepare(source, out_dir, vocab_size=16_384, val_fraction=0.05, on_error='raise', max_mb=0,
            seed=1337, site_packages=False, num_docs=40_000, overwrite=False):
    """Write the data set out_dir from a source and return its meta. See --help for the arguments.

    ValueError, in one line, names the argument, file or line that is wrong.
    """
    get_tokenizer(vocab_size)                                  # refuses a wrong vocab_size
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} should lie between 0 and 1')
    if not 0 <= max_mb < math.inf:
        raise ValueError(f'max_mb={max_mb} should be 0 or more')
    out, skipped = Path(out_dir), Counter()
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

    if source == 'arith':
        documents, size = arith(num_docs, seed), None
    else:
        files = find_files(source)
        if site_packages:
            files += find_files(sysconfig.get_path('purelib'))
        documents = read_documents(files, unusable)
        size = sum(file.stat().st_size for file in files) or None             # for the bar
    if max_mb:
        size = max_mb * 1e6
        documents = first_bytes(documents, size)
    documents, split_of = split_by_hash(documents, val_fraction, seed, source)
    meta = {'tokenizer': 'deepseek-v3', 'tokenizer_sha256': SHA256, 'vocab_size': vocab_size,
            'dtype': token_dtype(vocab_size).__name__, 'sft': False, 'sources': [str(source)],
            'python': sys.version.split()[0], 'val_fraction': val_fraction, 'max_mb': max_mb,
            'seed': seed, 'skipped': skipped}
    temporary = out.parent / f'.{out.name}.{os.getpid()}.tmp'
    try:
        temporary.mkdir(parents=True)
        with tqdm(total=size, unit='B', unit_scale=True, disable=None) as bar:
            write_shards(temporary, meta, encode_all(documents, vocab_size), split_of, bar)
        (temporary / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
        move_into_place(temporary, out, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def write_shards(folder, meta, encoded, split_of, bar):
    """Write the .bin files of encoded documents, and what they hold into meta."""
    for split in SPLITS:
        meta[split] = {'tokens': 0, 'documents': 0, 'bytes': 0, 'sha256': hashlib.sha256()}
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f'{name}.bin', 'wb'))
                 for name in ('train', 'val', 'train_mask', 'val_mask')}
        for (key, prompt, text), ids, n_prompt in encoded:
            split = split_of(key)
            n_bytes = len(((prompt or '') + text).encode())
            files[split].write(ids.tobytes())
            files[f'{split}_mask'].write(bytes(n_prompt) + b'\1' * (len(ids) - n_prompt))
            meta['sft'] |= prompt is not None
            meta[split]['sha256'].update(ids.tobytes())
            meta[split]['tokens'] += len(ids)
            meta[split]['documents'] += 1
            meta[split]['bytes'] += n_bytes
            bar.update(n_bytes)
    for split in SPLITS:
        meta[split]['sha256'] = meta[split]['sha256'].hexdigest()
        if not meta['sft']:
            (folder / f'{split}_mask.bin').unlink()


# --------------------------------------------------------------------------------------------------
# Data sets that a run asks for

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


def prepare_missing(data_dir, names, sources, vocab_size):
    """Make the data sets that are not in data_dir; sources: {name: arguments for data_prep.py}.

    A source whose path has spaces is quoted, as in a shell. ValueError, in one line, for a data set
    that sources does not name; SystemExit if making one fails.
    """
    def arguments(name):
        source = source_args(sources, name) or ['FOLDER']
        return [*source, f'--out_dir={Path(data_dir, name)}', f'--vocab_size={vocab_size}']

    missing = [name for name in names if not Path(data_dir, name).exists()]
    unnamed = [name for name in missing if not sources.get(name)]
    if unnamed:
        first, *others = unnamed
        more = f'; and so are {", ".join(others)}' if others else ''
        raise ValueError(f'{Path(data_dir, first)} is missing: python data_prep.py '
                         f'{shlex.join(arguments(first))}{more}')
    for name in missing:
        folder, args = Path(data_dir, name), arguments(name)
        print(f'{folder} is missing, so: python data_prep.py {shlex.join(args)}', flush=True)
        run = subprocess.run([sys.executable, __file__, *args], check=False)
        made_meanwhile = (folder / 'meta.json').exists()       # by another run
        if run.returncode and not made_meanwhile:
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
