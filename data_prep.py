"""Text in, token shards out; loader.py reads them back.

    python data_prep.py                        # Python's standard library into data/stdlib
    python data_prep.py arith                  # worked word problems (SFT) into data/arith
    python data_prep.py SOURCE --out_dir=data/NAME --vocab_size=16384          # a file or folder
    python data_prep.py --help                 # every option

SOURCE holds .txt .md .rst .py, a document each, or many with --separator='<|endoftext|>' between
them; or .jsonl, a document a line: {"text"}; or for supervised fine-tuning (SFT) {"prompt",
"completion"}, taken as they are, or {"messages"}: the last one, the assistant's, is the completion
of "User: ...\\n\\nAssistant:". One SFT document makes the whole data set SFT: its windows hold
whole documents, and a mask marks the completions.

out_dir gets train.bin and val.bin, uint16 or uint32 ids with EOS after each document; for SFT also
train_mask.bin and val_mask.bin, a byte a token, 1 in completions; and meta.json. documents.py says
which split a document goes to: equal texts never stand in both. out_dir appears whole or not at
all.
"""
import argparse
import difflib
import errno
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from documents import (
    SPLITS,
    SUFFIXES,
    arith,
    count_suffixes,
    divide,
    find_files,
    fingerprint,
    first_bytes,
    read_documents,
)
from processes import STOPPED, signals_as_ctrl_c, temporary_folder
from tokenizer import EOS_ID, SHA256, get_tokenizer

# --------------------------------------------------------------------------------------------------
# Tokens

def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode(vocab_size, document):
    """(ids of prompt, text and EOS; how many of them are the prompt's): each is encoded alone."""
    tokenizer, dtype = get_tokenizer(vocab_size), token_dtype(vocab_size)
    prompt_ids = tokenizer.ids_of(document.prompt or '')
    eos = [EOS_ID] if document.is_end else []
    ids = np.concatenate([prompt_ids, tokenizer.ids_of(document.text), eos])
    return ids.astype(dtype), len(prompt_ids)


def encode_all(documents, vocab_size):
    """Yield (document, *encode(document)) in order, on all cores: tiktoken needs no Python lock."""
    def encode_group(group):
        return [(document, *encode(vocab_size, document)) for document in group]

    pool, waiting = ThreadPoolExecutor(os.cpu_count()), deque()
    try:
        for group in groups_of_documents(documents, 250_000):
            waiting.append(pool.submit(encode_group, group))
            if len(waiting) > 4 * os.cpu_count():
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()
    finally:
        pool.shutdown(cancel_futures=True)                     # also when it is given up


def groups_of_documents(documents, limit):
    """Yield lists of documents of just over `limit` characters."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.whole())
        if size > limit:
            yield group
            group, size = [], 0
    if group:
        yield group


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
        if old.exists() and not out.exists():
            old.rename(out)
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(old, ignore_errors=True)
        raise ValueError(f'{out} exists by now, another process has made it: this one is '
                         'dropped') from None
    shutil.rmtree(old, ignore_errors=True)


def files_of(source, site_packages):
    """(files of a source and, if wanted, of the installed packages; files that are passed over)."""
    files, passed_over = find_files(source)
    if site_packages:
        files += find_files(sysconfig.get_path('purelib'))[0]
    return files, passed_over


def refuse_what_is_mostly_not_read(source, files, passed_over):
    """ValueError where most bytes of a source are in files that are passed over."""
    read = sum(file.stat().st_size for file in files)
    not_read = sum(file.stat().st_size for file in passed_over if file.exists())
    if not_read > read:
        raise ValueError(f'{source}: {not_read / (read + not_read):.0%} of its bytes are in files '
                         f'that are not read ({count_suffixes(passed_over)}), only '
                         f'{" ".join(SUFFIXES)} are: unpack or rename them; '
                         '--on_error=skip goes on without')


def prepare(source, out_dir, vocab_size=16_384, val_fraction=0.05, on_error='raise', max_mb=0,
            seed=1337, site_packages=False, num_docs=40_000, separator='', overwrite=False):
    """Write the data set out_dir from a source and return its meta. See --help for the arguments.

    ValueError, in one line, names the argument, file or line that is wrong.
    """
    get_tokenizer(vocab_size)                                  # refuses a wrong vocab_size
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} should lie between 0 and 1')
    if not 0 <= max_mb < math.inf:
        raise ValueError(f'max_mb={max_mb} should be 0 or more')
    if source == 'arith' and num_docs < 1:
        raise ValueError(f'num_docs={num_docs} should be at least 1')
    source, out, skipped = str(source), Path(os.path.expanduser(out_dir)), Counter()
    if out.exists() and not overwrite:
        raise ValueError(f'{out} exists already: --overwrite replaces it')
    if out.exists() and not (out / 'meta.json').exists():
        raise ValueError(f'{out} is no data set (it has no meta.json): remove it, or name another')

    def unusable(where, why):
        if source != 'stdlib' and on_error == 'raise':         # stdlib has odd files on purpose
            raise ValueError(f'{where}: {why}; --on_error=skip goes on without')
        skipped[why] += 1
        if source != 'stdlib' and skipped[why] <= 10:
            tqdm.write(f'data_prep.py: skipped {where}: {why}', file=sys.stderr)

    meta = {'tokenizer': 'deepseek-v3', 'tokenizer_sha256': SHA256, 'vocab_size': vocab_size,
            'dtype': token_dtype(vocab_size).__name__, 'sft': False, 'sources': [source],
            'python': sys.version.split()[0], 'val_fraction': val_fraction, 'max_mb': max_mb,
            'seed': seed, 'on_error': on_error, 'skipped': skipped}
    if source == 'arith':
        meta['num_docs'] = num_docs
        documents, size = arith(num_docs, seed), None
    else:
        files, passed_over = files_of(source, site_packages)
        if source != 'stdlib':
            meta['passed_over'] = count_suffixes(passed_over)
            if on_error == 'raise':
                refuse_what_is_mostly_not_read(source, files, passed_over)
        meta |= {'site_packages': site_packages, 'separator': separator,
                 'files': fingerprint(files)}
        documents = read_documents(files, separator, val_fraction, (max_mb or math.inf) * 1e6,
                                   unusable)
        size = meta['files']['bytes'] or None                  # for the bar
    if max_mb:
        size = max_mb * 1e6
        documents = first_bytes(documents, size)
    documents = divide(documents, val_fraction, seed, source)
    with temporary_folder(out.parent, out.name) as temporary:
        # closing: after an error one of its threads might throw it away, and cannot wait for itself
        with tqdm(total=size, unit='B', unit_scale=True, disable=None) as bar, \
                closing(encode_all(documents, vocab_size)) as encoded:
            write_shards(temporary, meta, encoded, bar)
        (temporary / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
        move_into_place(temporary, out, overwrite)
    return meta


def write_shards(folder, meta, encoded, bar):
    """Write the .bin files of encoded documents, and what they hold into meta."""
    for split in SPLITS:
        meta[split] = {'tokens': 0, 'documents': 0, 'bytes': 0, 'sha256': hashlib.sha256()}
    meta['endoftext'] = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f'{name}.bin', 'wb'))
                 for name in ('train', 'val', 'train_mask', 'val_mask')}
        for document, ids, n_prompt in encoded:
            split, n_bytes = document.split, len(document.whole().encode())
            files[split].write(ids.tobytes())
            files[f'{split}_mask'].write(bytes(n_prompt) + b'\1' * (len(ids) - n_prompt))
            meta['sft'] |= document.prompt is not None
            meta['endoftext'] += document.text.count('<|endoftext|>')
            meta[split]['sha256'].update(ids.tobytes())
            meta[split]['tokens'] += len(ids)
            meta[split]['documents'] += document.is_end
            meta[split]['bytes'] += n_bytes
            bar.update(n_bytes)
    for split in SPLITS:
        if not meta[split]['tokens']:
            raise ValueError(f'val_fraction={meta["val_fraction"]} leaves nothing for {split}')
        meta[split]['sha256'] = meta[split]['sha256'].hexdigest()
        if not meta['sft']:
            (folder / f'{split}_mask.bin').unlink()


# --------------------------------------------------------------------------------------------------
# Data sets that a run asks for

def source_args(sources, name):
    """sources[name], arguments for data_prep.py in a shell's quoting, as a list; [] without it.

    A path with spaces or quotes that exists needs no quoting.
    """
    source = sources.get(name, '')
    if isinstance(source, str):
        for path, dashes, flags in ((source, '', ''), source.partition(' --')):
            if path and os.path.exists(os.path.expanduser(path)):
                source = shlex.quote(path) + dashes + flags
                break
        with suppress(ValueError):                             # a quote that does not close
            return shlex.split(source)
    raise ValueError(f'sources.{name}={source!r} should be what follows data_prep.py, in a '
                     "shell's quoting, like 'stdlib --max_mb=2'")


def making(folder, vocab_size, args=('SOURCE',)):
    """The command that makes the data set in `folder`, for a message."""
    return (f'python data_prep.py {shlex.join(args)} --out_dir={shlex.quote(str(folder))} '
            f'--vocab_size={vocab_size}')


def real_path(path):
    """The one way to write a path: without ~, links and dots."""
    return os.path.realpath(os.path.expanduser(path))


def what_changed(meta, args):
    """The first thing in which a data set differs from what data_prep.py would make of the list
    args now, as text to follow 'was made from'; '' if there is none.

    What cannot be compared counts as the same: a key that an older meta.json does not have, the
    files of a source that is gone.
    """
    wanted = vars(make_parser().parse_args(args))
    source, made_from = wanted['source'], meta['sources'][0]
    if real_path(source) != real_path(made_from):
        return f'{made_from!r}, not {source!r}'
    for key in ('val_fraction', 'max_mb', 'seed', 'num_docs', 'site_packages', 'separator'):
        if key in meta and meta[key] != wanted[key]:
            return f'{source} with {key}={meta[key]!r}, not {wanted[key]!r}'
    if 'files' not in meta:
        return ''
    passed_over = meta.get('skipped') or meta.get('passed_over')
    if passed_over and meta.get('on_error', 'raise') != wanted['on_error']:
        return f'{source} with on_error={meta["on_error"]!r}, not {wanted["on_error"]!r}'
    if source == 'stdlib':
        now = sys.version.split()[0]
        if now != meta['python']:
            return f"Python {meta['python']}'s library, not that of {now}"
    elif os.path.exists(os.path.expanduser(source)):           # else it cannot be compared
        now = fingerprint(files_of(source, wanted['site_packages'])[0])
        if now != meta['files']:
            then = meta['files']
            return (f'{source} when it had {then["files"]:,} files of {then["bytes"]:,} bytes; now '
                    f'it has {now["files"]:,} of {now["bytes"]:,}, or others')
    return ''


def prepare_missing(data_dir, names, sources, vocab_size):
    """Make the data sets that are not in data_dir; sources: {name: arguments for data_prep.py}.

    ValueError, in one line, for a data set that sources does not name; SystemExit if making one
    fails.
    """
    missing = [name for name in names if not Path(data_dir, name).exists()]
    unnamed = [name for name in missing if not sources.get(name)]
    if unnamed:
        first, *others = unnamed
        more = f'; and so are {", ".join(others)}' if others else ''
        folder = Path(data_dir, first)
        raise ValueError(f'{folder} is missing: {making(folder, vocab_size, ["FOLDER"])}{more}')
    for name in missing:
        folder, args = Path(data_dir, name), source_args(sources, name)
        print(f'{folder} is missing, so: {making(folder, vocab_size, args)}', flush=True)
        try:
            main([*args, f'--out_dir={folder}', f'--vocab_size={vocab_size}'])
        except SystemExit:
            if not (folder / 'meta.json').exists():            # else another run has made it
                raise


# --------------------------------------------------------------------------------------------------
# The script

def error(message, exit_code=2):
    """configurator.fail, but in the name of this script where train.py runs it, too."""
    print(f'data_prep.py: {message}', file=sys.stderr)
    sys.exit(exit_code)


def nearest_option(message, parser):
    """What to add to argparse's message of an unknown --option: the one most like it."""
    unknown = re.search(r'unrecognized arguments: (--\w+)', message)
    if not unknown:
        return ''
    options = [f'--{name}' for name in vars(parser.parse_args([])) if name != 'source']
    near = difflib.get_close_matches(unknown[1], options, 1, 0)
    return f', the nearest is {near[0]}'


def make_parser():
    """The argparse parser of the arguments of prepare."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage='python data_prep.py [SOURCE] [--OPTION=VALUE ...]',
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: error(message + nearest_option(message, parser))
    add = parser.add_argument
    add('source', nargs='?', default='stdlib', help="file, folder, 'stdlib' (default) or 'arith'")
    add('--out_dir', help='folder to write; default data/ and the name of the source')
    add('--vocab_size', type=int, default=16_384,
        help="keep the tokenizer's first ids; %(default)s")
    add('--val_fraction', type=float, default=0.05, help='share of the text held out; %(default)s')
    add('--on_error', choices=('raise', 'skip'), default='raise',
        help="at an unusable file or line: 'raise' stops (default), 'skip' goes on and counts")
    add('--max_mb', type=float, default=0, help='stop after so many megabytes of text; 0: never')
    add('--seed', type=int, default=1337,
        help='fixes the split, and the problems of arith; %(default)s')
    add('--site_packages', action='store_true', help='with the installed Python packages')
    add('--num_docs', type=int, default=40_000, help='arith: number of problems; %(default)s')
    add('--separator', type=lambda text: text.replace('\\n', '\n'), default='',
        help="what parts the documents of a text file, such as '<|endoftext|>' or '\\n\\n'")
    add('--overwrite', action='store_true', help='replace the data set out_dir if there is one')
    return parser


def report(meta, out_dir):
    """Print what a data set holds, and what a user may not expect of it."""
    for split in SPLITS:
        print(f'{out_dir}/{split}.bin: {meta[split]["tokens"]:,} tokens, '
              f'{meta[split]["documents"]:,} documents, {meta[split]["bytes"]:,} bytes of text')
    for why, n in meta['skipped'].items():
        print(f'skipped {n:,}: {why}')
    if meta.get('passed_over'):
        print(f'passed over, as they are not read: {meta["passed_over"]}')
    if meta['endoftext'] >= 10 and not meta.get('separator'):
        print(f'the text has {meta["endoftext"]:,} times <|endoftext|>: --separator='
              "'<|endoftext|>' takes what stands between them as documents")
    wanted = meta['val_fraction']
    share = meta['val']['bytes'] / (meta['train']['bytes'] + meta['val']['bytes'])
    if not wanted / 2 <= share <= 2 * wanted:
        n = meta['train']['documents'] + meta['val']['documents']
        print(f'{out_dir} holds out {share:.1%} of the text, not val_fraction={wanted:.1%}: of '
              f'{n:,} documents, chance decides which; another --seed, or more and shorter ones, '
              'can come nearer')


def main(argv=None):
    args = vars(make_parser().parse_args(argv))
    if not args['out_dir']:
        source = Path(real_path(args['source']))
        args['out_dir'] = Path('data', source.name if source.is_dir() else source.stem)
    try:
        with signals_as_ctrl_c():
            meta = prepare(**args)
    except ValueError as e:
        error(e)
    except OSError as e:
        error(f'{e.filename or args["out_dir"]}: {e.strerror or e}; nothing was written')
    except KeyboardInterrupt:
        error('stopped; nothing was written', STOPPED)
    report(meta, args['out_dir'])


if __name__ == '__main__':
    main()
