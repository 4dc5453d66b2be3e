"""data_prep.py: shards hold the text, whole or not at all; batches depend on row numbers alone."""
import errno
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data_prep
import loader
from data_prep import prepare
from documents import Document, arith
from loader import (
    check_ids,
    count_draws,
    get_batch,
    get_windows,
    open_data,
    permute,
    windows_before,
)
from tokenizer import EOS_ID, get_tokenizer, parts_of

V = 512
ROOT = Path(__file__).parents[1]
XMODEL = dict(zip('abcdefghijklm', (.41, .20, .26, .01, .005, .005, .01, .0133, .009, .0391, .0285,
                                    .0023, .0078)))


def run(*args, **kwargs):
    return subprocess.run([sys.executable, ROOT / 'data_prep.py', *map(str, args)], text=True,
                          capture_output=True, check=False, **kwargs)


def documents(folder, split, part=''):
    """The decoded documents of a split, read back from its bytes alone."""
    meta = json.loads((folder / 'meta.json').read_text())
    ids = np.fromfile(folder / f'{split}.bin', meta['dtype'])
    assert ids[-1] == EOS_ID and len(ids) == meta[split]['tokens']
    decode = get_tokenizer(meta['vocab_size']).decode
    return [decode(doc.tolist()) for doc in np.split(ids, np.flatnonzero(ids == EOS_ID) + 1)[:-1]]


def text_of(document):
    return document.removesuffix('<｜end▁of▁sentence｜>')


def write_jsonl(path, *records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """Three data sets: two of plain text of different sizes, and arith."""
    root = tmp_path_factory.mktemp('data')
    for name, n in (('big', 3000), ('small', 400)):
        rng = np.random.default_rng(n)
        texts = [{'text': ' '.join(map(str, rng.integers(0, 999, rng.integers(1, 30))))}
                 for _ in range(n)]
        prepare(write_jsonl(root / f'{name}.jsonl', *texts), root / name, V, val_fraction=0.1)
    prepare('arith', root / 'arith', V, num_docs=1000)
    return open_data(root, ['big', 'small', 'arith'], V)


# --- shards ---

@pytest.mark.parametrize('vocab_size, dtype', [(V, '<u2'), (65_536, '<u2'), (65_537, '<u4')])
def test_a_folder_becomes_shards_and_meta(tmp_path, vocab_size, dtype):
    texts = {'a.txt': 'Hello, 世界 😀\r\n', 'b.md': '# B\n', 'c/d.py': 'x = 1\n', 'c/e.rst': 'E\n',
             '.git/f.txt': 'hidden', 'g.bin': 'no text', 'h.txt': '<｜end▁of▁sentence｜>'}
    for name, text in texts.items():
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).write_bytes(text.encode())
    (tmp_path / 'in' / 'i.jsonl').write_text('{"text": "one"}\n\n{"text": "two"}')
    meta = prepare(tmp_path / 'in', tmp_path / 'out', vocab_size, val_fraction=0.3, on_error='skip')
    expected = [texts[k] for k in ('a.txt', 'b.md', 'c/d.py', 'c/e.rst', 'h.txt')] + ['one', 'two']
    found = [text_of(d) for split in ('train', 'val') for d in documents(tmp_path / 'out', split)]
    assert sorted(found) == sorted(expected)
    assert meta == json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert sorted(os.listdir(tmp_path / 'out')) == ['meta.json', 'train.bin', 'val.bin']
    assert meta['vocab_size'] == vocab_size and not meta['sft']
    for split in ('train', 'val'):
        content = (tmp_path / 'out' / f'{split}.bin').read_bytes()
        ids = np.frombuffer(content, dtype)
        assert meta[split]['sha256'] == hashlib.sha256(content).hexdigest()
        assert meta[split]['tokens'] == len(ids) and ids.max() < vocab_size
        assert meta[split]['documents'] == (ids == EOS_ID).sum() > 0
    assert meta['train']['bytes'] + meta['val']['bytes'] == sum(len(t.encode()) for t in expected)


def test_the_split_is_by_hash_and_about_val_fraction(tmp_path):
    texts = [{'text': f'document {i % 2000}'} for i in range(4000)]         # each comes twice
    source = write_jsonl(tmp_path / 'x.jsonl', *texts)
    for out in ('one', 'again'):
        prepare(source, tmp_path / out, V, val_fraction=0.2)
    prepare(source, tmp_path / 'other', V, val_fraction=0.2, seed=2)
    train, val = (documents(tmp_path / 'one', split) for split in ('train', 'val'))
    assert not set(train) & set(val) and set(Counter(train + val).values()) == {2}
    assert 0.17 < len(val) / 4000 < 0.23
    assert (tmp_path / 'one/val.bin').read_bytes() == (tmp_path / 'again/val.bin').read_bytes()
    assert documents(tmp_path / 'other', 'val') != val


def test_the_split_of_an_sft_document_is_by_its_prompt_as_well(tmp_path):
    records = [{'prompt': f'Is {i} even? ', 'completion': 'no' if i % 2 else 'yes'}
               for i in range(600)]
    prepare(write_jsonl(tmp_path / 'x.jsonl', *records), tmp_path / 'out', V, val_fraction=0.2)
    val = documents(tmp_path / 'out', 'val')
    for answer in ('yes', 'no'):                                # 60 of each, give or take
        assert 30 < sum(text_of(document).endswith(f'? {answer}') for document in val) < 90


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, text in (('in/a.txt', 'one'), ('in/b.jsonl', '{"text": "two"}')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding='utf-8-sig')
    prepare(tmp_path / 'in', tmp_path / 'out', V)
    found = [text_of(d) for split in ('train', 'val') for d in documents(tmp_path / 'out', split)]
    assert sorted(found) == ['one', 'two']


def test_hidden_files_and_packages_are_left_out_below_the_source_and_not_above_it(tmp_path):
    source = tmp_path / '.cache/site-packages/in'
    for name in ('a.txt', 'b/c.txt', '.git/hidden.txt', 'b/.hidden.txt', 'lib/site-packages/d.txt'):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    prepare(source, tmp_path / 'out', V)
    found = [text_of(d) for split in ('train', 'val') for d in documents(tmp_path / 'out', split)]
    assert sorted(found) == ['a.txt', 'b/c.txt']


@pytest.mark.parametrize('wanted', [True, False])
def test_installed_packages_are_read_where_they_are_wanted(tmp_path, monkeypatch, wanted):
    packages = tmp_path / 'venv/site-packages'
    for file in (tmp_path / 'in/mine.py', tmp_path / 'in/too.py', packages / 'theirs/theirs.py'):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    if not wanted:                                               # then it may be missing, too
        packages.rename(packages.with_name('dist-packages'))
    monkeypatch.setattr(data_prep.sysconfig, 'get_path', {'purelib': packages}.get)
    prepare(tmp_path / 'in', tmp_path / 'out', V, site_packages=wanted)
    found = [text_of(d) for split in ('train', 'val') for d in documents(tmp_path / 'out', split)]
    assert sorted(found) == ['mine.py', *['theirs.py'] * wanted, 'too.py']


@pytest.mark.parametrize('n', [1, 2, 3])
def test_few_documents_still_give_both_splits(tmp_path, n):
    texts = [f'{i}\nline two\nline three\n' for i in range(n)]
    source = write_jsonl(tmp_path / 'x.jsonl', *({'text': t} for t in texts))
    prepare(source, tmp_path / 'out', V, val_fraction=1e-6)
    train, val = (documents(tmp_path / 'out', split) for split in ('train', 'val'))
    assert len(val) == 1 and len(train) == max(1, n - 1)
    if n == 1:
        assert [text_of(d) for d in train + val] == ['0\nline two\n', 'line three\n']
    else:
        assert sorted(map(text_of, train + val)) == texts


def test_sft_documents_and_their_masks(tmp_path):
    turns = [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'U'}]
    answers = [{'role': 'assistant', 'content': 'A'}]
    source = write_jsonl(
        tmp_path / 'x.jsonl', {'text': 'plain'}, {'prompt': 'two? ', 'completion': '2\n'},
        {'messages': turns + answers}, {'messages': answers + turns + answers})
    meta = prepare(source, tmp_path / 'out', V, val_fraction=0.3)
    data = open_data(tmp_path, ['out'], V)['out']
    decode = get_tokenizer(V).decode
    found = {(decode(prompt), text_of(decode(text)))
             for split in ('train', 'val') for prompt, text in data.pairs(split)}
    assert meta['sft'] and found == {
        ('', 'plain'), ('two? ', '2\n'), ('System: S\n\nUser: U\n\nAssistant:', ' A'),
        ('Assistant: A\n\nSystem: S\n\nUser: U\n\nAssistant:', ' A')}
    for split in ('train', 'val'):                                  # EOS belongs to the completion
        assert (data.masks[split][data.tokens[split] == EOS_ID] == 1).all()


def test_prompt_and_completion_are_encoded_each_alone(tmp_path):
    # as in generation, where a prompt is encoded before there is an answer
    encode, pairs = get_tokenizer(V).encode_ordinary, [('Spell: t', 'he end'), ('I am o', 'n it')]
    assert all(encode(prompt + text) != encode(prompt) + encode(text) for prompt, text in pairs)
    source = write_jsonl(tmp_path / 'x.jsonl', *({'prompt': prompt, 'completion': text}
                                                 for prompt, text in pairs))
    meta = prepare(source, tmp_path / 'out', V)
    data = open_data(tmp_path, ['out'], V)['out']
    found = data.pairs('train') + data.pairs('val')
    assert sorted(found) == sorted((encode(prompt), [*encode(text), EOS_ID])
                                   for prompt, text in pairs)
    n_bytes = sum(len(prompt + text) for prompt, text in pairs)
    assert meta['train']['bytes'] + meta['val']['bytes'] == n_bytes


def test_max_mb_stops_and_counts_what_it_read(tmp_path):
    source = write_jsonl(tmp_path / 'x.jsonl', *({'text': f'{i:0999}\n'} for i in range(50)), 'bad')
    meta = prepare(source, tmp_path / 'out', V, max_mb=0.02)
    assert meta['train']['documents'] + meta['val']['documents'] == 20 and not meta['skipped']


@pytest.mark.parametrize('text', [' ' * 2_000_000, '\x00' * 2_000_000 + 'a', 'a' * 1_000_000,
                                  'word \n' * 300_000, ' \t' * 600_000 + 'x'])
def test_very_long_runs_are_encoded(text):
    ids, n_prompt = data_prep.encode(V, Document(text))
    assert get_tokenizer(V).decode(ids[:-1].tolist()) == text and n_prompt == 0


def test_a_long_text_is_encoded_in_parts_as_if_whole():
    source = ''.join(Path(f).read_text() for f in sorted(ROOT.glob('*.py')))
    for text in (source, 'xy' + '\n' * 700):                              # cut between runs
        text = (text * (1_200_000 // len(text) + 1))[:1_200_000]
        ids, _ = data_prep.encode(16_384, Document(text))
        parts = list(parts_of([text]))
        assert len(parts) >= 3 and ''.join(parts) == text
        for size in (1000, 399_999, 10**6):                   # in whatever blocks it comes
            assert list(parts_of(text[i:i + size] for i in range(0, len(text), size))) == parts
        whole = tiktoken.Encoding.encode_ordinary(get_tokenizer(16_384), text)
        assert ids[:-1].tolist() == whole


def test_all_cores_give_what_one_gives(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / 'x.jsonl', *({'text': f'{i} ' * 3000} for i in range(150)))
    prepare(source, tmp_path / 'many', V)
    monkeypatch.setattr(data_prep.os, 'cpu_count', lambda: 1)
    prepare(source, tmp_path / 'one', V)
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'many' / name).read_bytes() == (tmp_path / 'one' / name).read_bytes()


def test_stdlib_by_default(tmp_path):
    done = run('--max_mb=0.3', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert any('import' in d for d in documents(tmp_path / 'data/stdlib', 'train'))


# --- arith ---

def test_arith_is_right_small_and_split_by_problem(tmp_path):
    prepare('arith', tmp_path / 'arith', 16_384, num_docs=6000)
    problems, lengths = {}, []
    for split in ('train', 'val'):
        problems[split] = set()
        for document in documents(tmp_path / 'arith', split):
            story, worked = text_of(document).split('\nAnswer:\n')
            assert re.fullmatch(r'Question: .* How many \w+ does s?he have now\?', story)
            *steps, last = worked.split('\n')
            total = None
            for step in steps:
                a, sign, b, result = re.fullmatch(r'(\d+) ([-+*]) (\d+) = (\d+)', step).groups()
                total = total if total is not None else int(a)
                assert int(a) == total, document                    # goes on from the step before
                total = {'+': total + int(b), '-': total - int(b), '*': total * int(b)}[sign]
                assert total == int(result) and 0 <= total <= 30
                assert b in story
            assert last == f'#### {total}' and 1 <= len(steps) <= 3
            numbers = re.findall(r'\d+', story)                     # told in the order of the steps
            assert numbers == [steps[0].split()[0]] + [step.split()[2] for step in steps]
            problems[split].add(tuple(step.split(' = ')[0] for step in steps))
            lengths.append(1 + len(get_tokenizer(16_384).encode_ordinary(text_of(document))))
    assert not problems['train'] & problems['val'] and len(problems['val']) > 50
    assert 40 < np.mean(lengths) < 60 and max(lengths) < 100


def test_arith_is_a_function_of_the_seed():
    assert list(arith(50, 1)) == list(arith(50, 1)) != list(arith(50, 2))
    assert list(arith(50, 1)) == list(arith(80, 1))[:50]


# --- mistakes: one line, exit code 2, nothing left behind ---

BAD = {
    'latin1.txt': (b'caf\xe9', 'latin1.txt: not UTF-8'), 'empty.txt': (b'', 'empty.txt: empty'),
    'blank.md': (b' \n', 'blank.md: empty'),
    'a.jsonl': (b'{"text": "x"}\n{"te', 'a.jsonl:2: not JSON'),
    'b.jsonl': (b'[1]', 'b.jsonl:1: should be an object with "text"'),
    'c.jsonl': (b'{"content": "x"}', 'c.jsonl:1: should be an object with "text"'),
    'd.jsonl': (b'{"text": 3}', 'd.jsonl:1: should be'), 'e.jsonl': (b'{"text": ""}', ':1: empty'),
    'f.jsonl': (b'{"prompt": "x"}', ':1: should be'), 'g.jsonl': (b'"\xff"', ':1: not UTF-8'),
    'h.jsonl': (b'{"text": "\\ud800"}', ':1: has a lone'),
    'i.jsonl': (b'[' * 99999, ':1: not JSON'),
    'j.jsonl': (b'{"messages": [{"role": "user", "content": "x"}]}', ':1: should be'),
    'k.jsonl': (b'{"messages": ["x", {"role": "assistant", "content": "x"}]}', ':1: should be'),
    'l.jsonl': (b'{"messages": [{"role": 1}, {"role": "assistant", "content": ""}]}', 'should be'),
}


@pytest.mark.parametrize('name', BAD)
def test_unusable_documents_are_named_or_skipped_and_counted(tmp_path, capsys, name):
    source, (content, message) = tmp_path / 'in', BAD[name]
    source.mkdir()
    (source / 'z.jsonl').write_text('{"text": "one"}\n{"text": "two"}\n')
    (source / name).write_bytes(content)
    with pytest.raises(ValueError) as e:
        prepare(source, tmp_path / 'out', V)
    assert message in str(e.value) and '\n' not in str(e.value) and 'on_error=skip' in str(e.value)
    assert os.listdir(tmp_path) == ['in']
    meta = prepare(source, tmp_path / 'out', V, on_error='skip')
    assert sum(meta['skipped'].values()) == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize('args, message', [
    (['nowhere'], "nowhere: should be 'stdlib', 'arith', a folder, or a file ending in .txt"),
    (['x.bin'], 'x.bin: should be'), (['hollow'], 'hollow: no documents'),
    (['one.txt'], 'one.txt: one SFT document, or one line'),
    (['arith', '--num_docs=0'], 'num_docs=0 should be at least 1'),
    (['arith', '--num_docs=1'], 'one SFT document'), (['arith', '--vocab_size=9'], 'vocab_size=9'),
    (['arith', '--val_fraction=1'], 'val_fraction=1.0 should lie between 0 and 1'),
    (['long.txt', '--val_fraction=0.99999999'], 'leaves nothing for train'),
    (['arith', '--max_mb=-1'], 'max_mb=-1.0 should be'), (['arith', '--max_mb=nan'], 'max_mb=nan'),
    (['arith', '--on_error=no'], '--on_error'), (['arith', '--seed=x'], '--seed'),
    (['arith', '--colour=red'], '--colour'),
    (['arith', '--val_fracton=0.1'], 'the nearest is --val_fraction'),
    (['arith', '--file=x'], 'the nearest is --'), (['arith', 'x'], ': x'),
    (['arith', '--num=9'], 'the nearest is --num_docs'),
    (['arith', '--out_dir=x.bin/out'], 'x.bin'),
    (['arith', '--out_dir=hollow'], 'hollow exists already: --overwrite replaces it'),
    (['arith', '--out_dir=hollow', '--overwrite'], 'hollow is no data set'),
])
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, capsys, args, message):
    (tmp_path / 'hollow').mkdir()
    (tmp_path / 'x.bin').write_text('x')
    (tmp_path / 'one.txt').write_text('one line')
    (tmp_path / 'long.txt').write_text('x' * 2000)
    before = sorted(tmp_path.rglob('*'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['data_prep.py', *args])
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    with pytest.raises(SystemExit) as e:
        data_prep.main()
    out, err = capsys.readouterr()
    assert e.value.code == 2 and message in err and out == ''
    assert err.startswith('data_prep.py: ') and err.count('\n') == 1
    assert [p for p in sorted(tmp_path.rglob('*')) if p.name != 'data'] == before


def test_an_existing_data_set_stays_unless_overwritten(tmp_path):
    prepare('arith', tmp_path / 'x', V, num_docs=10)
    before = (tmp_path / 'x/train.bin').read_bytes()
    with pytest.raises(ValueError, match='x exists already'):
        prepare('arith', tmp_path / 'x', V, num_docs=20)
    assert (tmp_path / 'x/train.bin').read_bytes() == before
    prepare('arith', tmp_path / 'x', V, num_docs=20, overwrite=True)
    assert (tmp_path / 'x/train.bin').read_bytes() != before and os.listdir(tmp_path) == ['x']


@pytest.mark.parametrize('overwrite', [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path, overwrite):
    args = ['arith', '--out_dir=x', '--vocab_size=512']
    if overwrite:
        assert run(*args, '--num_docs=10', cwd=tmp_path).returncode == 0
        args.append('--overwrite')
    before = {p: p.read_bytes() for p in (tmp_path / 'x').glob('*')}
    done = run(*args, '--num_docs=4000', cwd=tmp_path,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert done.stderr.startswith('data_prep.py: x: ')
    assert {p: p.read_bytes() for p in (tmp_path / 'x').glob('*')} == before
    assert os.listdir(tmp_path) == ['x'] * overwrite


@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_data_set(tmp_path, sign):
    code = ('import os, signal, sys, data_prep as d; write = d.encode_all\n'
            'signal.signal(signal.SIGINT, signal.default_int_handler)\n'    # not in background
            'def encode_all(*args):\n'
            '    for i, document in enumerate(write(*args)):\n'
            f'        if i == 100: os.kill(os.getpid(), {int(sign)})\n'
            '        yield document\n'
            'd.encode_all = encode_all; d.main()')
    done = subprocess.run([sys.executable, '-c', code, 'arith', f'--out_dir={tmp_path}/x'],
                          cwd=ROOT, text=True,
                          capture_output=True, check=False, timeout=60)     # none is orphaned
    assert not (tmp_path / 'x').exists()
    if sign != signal.SIGKILL:
        told = 'data_prep.py: stopped; nothing was written\n'
        assert (done.returncode, done.stderr) == (130, told)
        assert os.listdir(tmp_path) == []


def test_open_data_refuses_in_one_line(tmp_path):
    def refused(message, vocab_size=V):
        with pytest.raises(ValueError, match=message) as e:
            open_data(tmp_path, ['x'], vocab_size)
        assert '\n' not in str(e.value) and str(tmp_path / 'x') in str(e.value)
    make = 'python data_prep.py SOURCE --out_dir=.* --vocab_size=512'
    refused(f'no meta.json that can be read: {make}')
    (tmp_path / 'x').mkdir()
    refused(f'no meta.json that can be read: remove it, then {make}')
    (tmp_path / 'x').rmdir()
    meta = prepare('arith', tmp_path / 'x', V, num_docs=100)
    refused('has vocab_size=512, the model 600', vocab_size=600)
    (tmp_path / 'x/val_mask.bin').write_bytes(b'')
    refused('val_mask.bin has 0 bytes, not the')
    with open(tmp_path / 'x/train.bin', 'ab') as f:
        f.write(b'xx')
    refused('train.bin has')
    for wrong in ('{', '[]', '{}', json.dumps({**meta, 'val': 3})):
        (tmp_path / 'x/meta.json').write_text(wrong)
        refused('meta.json is damaged')
    (tmp_path / 'x/meta.json').write_text(json.dumps({**meta, 'tokenizer_sha256': 'f' * 64}))
    refused('with tokenizer')


@pytest.mark.parametrize('largest', [V - 1, V])
def test_an_id_for_which_a_model_has_no_row_is_refused(tmp_path, largest):
    meta = prepare('arith', tmp_path / 'x', V, num_docs=100)
    ids = np.fromfile(tmp_path / 'x/val.bin', np.uint16)
    ids[3] = largest
    ids.tofile(tmp_path / 'x/val.bin')
    meta['val']['sha256'] = hashlib.sha256(ids.tobytes()).hexdigest()
    (tmp_path / 'x/meta.json').write_text(json.dumps(meta))
    data = open_data(tmp_path, ['x'], V)
    if largest < V:
        check_ids(tmp_path, data)
        return
    with pytest.raises(ValueError, match=f'val.bin has the id {V}, which is not below'):
        check_ids(tmp_path, data)


# --- the loader ---

@pytest.mark.parametrize('n', [1, 2, 3, 5, 17, 100, 1000, 4097])
def test_permute_is_a_permutation_and_keyed(n):
    i = np.arange(n)
    assert sorted(permute(i, n, 'x', 1)) == list(i)
    assert permute(i[:1], n, 'x', 1) == permute(i, n, 'x', 1)[:1]            # each on its own
    if n >= 17:
        assert (permute(i, n, 'x', 1) != permute(i, n, 'x', 2)).mean() > 0.7
        assert (permute(i, n, 'x', 1) != i).mean() > 0.7


def test_permute_looks_random_and_takes_large_ranges():
    n = 1000                                                                # over 2000 keys
    first = np.array([permute(np.arange(2), n, key) for key in range(2000)])
    counts = np.bincount(first[:, 0] // 100, minlength=10)
    assert (abs(counts - 200) < 70).all()                                   # 5 deviations
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.1
    big = permute(np.arange(10_000), 10**9, 'x')
    assert len(set(big.tolist())) == 10_000 and 0 <= big.min() and big.max() < 10**9
    assert (np.diff(np.sort(big)) > 0).all() and abs(big.mean() / 10**9 - 0.5) < 0.02


def test_the_global_batch_does_not_depend_on_ranks_or_accumulation(sets):
    weights, batch, T = {'big': 0.5, 'small': 0.3, 'arith': 0.2}, 16, 64
    for step in (0, 60, 61, 63):                                            # 62.5 is 1000 rows
        whole = get_batch(sets, weights, range(step * batch, (step + 1) * batch), T, 7)
        for ranks in (1, 2, 4):
            for accumulation in (1, 2, 4):
                n = batch // ranks // accumulation
                parts = [get_batch(sets, weights, range(r, r + n), T, 7)
                         for r in range(step * batch, (step + 1) * batch, n)]
                for both, part in zip(whole, zip(*parts)):
                    assert torch.equal(both, torch.cat(part))
    assert whole[0].shape == whole[1].shape == (batch, T)
    assert whole[0].dtype == whole[1].dtype == torch.int64


@pytest.mark.parametrize('name, T', [('big', 64), ('small', 33), ('arith', 400)])
def test_an_epoch_has_every_window_once_in_another_order(sets, name, T):
    n = sets[name].n_windows('train', T)
    in_order = [tuple(x) for x in get_windows(sets[name], 'train', range(n), T)[0].tolist()]
    assert len(set(in_order)) == n > 20
    rows = get_batch(sets, {name: 1}, range(2 * n), T, 3)[0].tolist()
    epochs = [[tuple(x) for x in rows[:n]], [tuple(x) for x in rows[n:]]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(in_order)
    assert epochs[0] != in_order and epochs[0] != epochs[1]
    other_seed = get_batch(sets, {name: 1}, range(n), T, 4)[0].tolist()
    assert [tuple(x) for x in other_seed] != epochs[0]
    started = get_batch(sets, {name: 1}, range(n - 5), T, 3, drawn_before={name: 5})[0].tolist()
    assert [tuple(x) for x in started] == epochs[0][5:]


def test_plain_windows_are_the_text(sets):
    ids, T = sets['small'].tokens['train'], 33
    n = sets['small'].n_windows('train', T)
    x, y = get_windows(sets['small'], 'train', range(n), T)
    assert n * T + 1 <= len(ids) < (n + 1) * T + 1
    assert torch.equal(x.flatten(), torch.from_numpy(ids[:n * T].astype(np.int64)))
    assert torch.equal(y.flatten(), torch.from_numpy(ids[1:n * T + 1].astype(np.int64)))


@pytest.mark.parametrize('weights', [
    {'big': 0.5, 'small': 0.3, 'arith': 0.2}, {'big': 3, 'small': 1},
    {'arith': 0.001, 'big': 0.999}, {'small': 1, 'big': 0}])
def test_weights_are_exact_in_every_thousand(sets, weights):
    in_thousand = {name: Fraction(str(w)) * 1000 / sum(Fraction(str(v)) for v in weights.values())
                   for name, w in weights.items()}
    for b in (0, 1, 999, 123_456):
        after, before = (count_draws(weights, n, 5) for n in (1000 * b + 1000, 1000 * b))
        assert {name: after[name] - before[name] for name in weights} == in_thousand


def test_no_drift_over_a_hundred_thousand_thousands():
    exact = {name: Fraction(str(w)) for name, w in XMODEL.items()}
    for b in (*range(300), *range(99_900, 100_001)):
        for name, n in count_draws(XMODEL, 1000 * b, 5).items():
            assert abs(n - 1000 * b * exact[name]) < 1


def test_the_counted_draws_are_the_drawn(sets):
    """Rows of data sets of one repeated id each: the id tells whose row it is."""
    class Fake:
        def __init__(self, k):
            self.k, self.masks, self.tokens = k, {}, {'train': np.full(10**6, k)}
            self.n_windows, self.spans = loader.Dataset.n_windows.__get__(self), \
                loader.Dataset.spans.__get__(self)
    data = {name: Fake(k) for k, name in enumerate(XMODEL)}
    drawn = get_batch(data, XMODEL, range(2500), 4, 5)[0][:, 0].tolist()
    for n in (0, 1, 999, 1000, 1001, 1777, 2500):
        assert list(count_draws(XMODEL, n, 5).values()) == [drawn[:n].count(k) for k in range(13)]
    halves = get_batch(data, {'a': 1, 'b': 1}, range(2000), 4, 5)[0][:, 0].tolist()
    assert halves[:1000] != halves[1000:] and drawn != sorted(drawn)         # shuffled anew


@pytest.mark.parametrize('weights', [
    {'big': -1, 'small': 2}, {'big': 0}, {}, {'big': 1, 'small': 1e-4}])
def test_unfit_weights_are_refused(weights):
    with pytest.raises(ValueError, match='weight'):
        count_draws(weights, 1, 5)


def test_phases_go_on_where_those_before_stopped(sets):
    first = {'steps': 7, 'batch': 9, 'block_size': 32, 'data': {'big': 0.7, 'small': 0.3}}
    second = {'steps': 9, 'batch': 5, 'block_size': 32, 'data': {'small': 0.5, 'big': 0.5}}
    start = windows_before([first, second], second, 11)
    assert sum(start.values()) == 63 and windows_before([first], first, 11) == {}
    rows = [get_batch(sets, phase['data'], range(phase['steps'] * phase['batch']), 32, 11, start)[0]
            for phase, start in ((first, None), (second, start))]
    assert len({tuple(x) for x in torch.cat(rows).tolist()}) == 63 + 45


def test_what_phases_of_other_lengths_drew_is_counted_in_windows_of_this_ones():
    phases = [{'steps': steps, 'batch': 10, 'block_size': T, 'data': weights}
              for steps, T, weights in ((7, 32, {'a': 1}), (100, 16, {'a': 1, 'b': 3}),
                                        (5, 64, {'b': 1, 'a': 1}))]
    assert windows_before(phases, phases[1], 11) == {'a': 140}              # 70 x 32 tokens
    # 70 x 32 + 250 x 16 = 6240 tokens of a, and 750 x 16 = 12 000 of b, in windows begun
    assert windows_before(phases, phases[2], 11) == {'a': 98, 'b': 188}


def phase_of(name, rows, **weights):
    return {'name': name, 'steps': rows // 4, 'batch': 4, 'block_size': 32, 'data': weights}


@pytest.mark.parametrize('phases', [
    [phase_of('a', 200, small=1), phase_of('b', 220, small=1), phase_of('c', 500, small=1)],
    # small is left out of b
    [phase_of('a', 1000, small=0.4, big=0.6), phase_of('b', 3600, big=1),
     phase_of('c', 1600, big=0.7, small=0.3)]], ids=['one data set', 'a mixture'])
def test_a_run_of_three_phases_reads_each_window_once_an_epoch(sets, phases):
    T, seed, whose, drawn = 32, 11, {}, {name: [] for name in phases[0]['data']}
    for name in drawn:
        n = sets[name].n_windows('train', T)
        for window, x in enumerate(get_windows(sets[name], 'train', range(n), T)[0].tolist()):
            whose[tuple(x)] = name, window
    assert len(whose) == sum(sets[name].n_windows('train', T) for name in drawn)
    for phase in phases:
        start = windows_before(phases, phase, seed)
        had = {name: len(windows) for name, windows in drawn.items() if windows}
        assert start == had                                                 # in all phases before
        rows = range(phase['steps'] * phase['batch'])
        for x in get_batch(sets, phase['data'], rows, T, seed, start)[0].tolist():
            name, window = whose[tuple(x)]
            drawn[name].append(window)
    for name, windows in drawn.items():
        n = sets[name].n_windows('train', T)
        before_c = windows_before(phases, phases[2], seed)[name]
        assert before_c < n < len(windows) < 2 * n                          # c crosses an epoch
        assert sorted(windows[:n]) == list(range(n))
        assert len(set(windows[n:])) == len(windows) - n
        assert windows[n:] != windows[:len(windows) - n]                    # nor in the same order


def test_another_seed_orders_rows_and_windows_anew(sets):
    weights, T = {'big': 0.5, 'small': 0.5}, 32
    whose = {}
    for name in weights:
        windows = range(sets[name].n_windows('train', T))
        for x in get_windows(sets[name], 'train', windows, T)[0].tolist():
            whose[tuple(x)] = name

    def drawn(seed):
        return [tuple(x) for x in get_batch(sets, weights, range(500), T, seed)[0].tolist()]

    first, other = drawn(1), drawn(2)
    assert first == drawn(1)
    differ = sum(whose[a] != whose[b] for a, b in zip(first, other))
    assert 150 < differ < 350                                               # half, by chance
    for name in weights:
        ours, theirs = ([x for x in rows if whose[x] == name] for rows in (first, other))
        assert sum(a == b for a, b in zip(ours, theirs)) < 10


def test_a_block_longer_than_the_data_is_refused(sets):
    with pytest.raises(ValueError, match='small: block_size=100000 is too long for its val split'):
        sets['small'].n_windows('val', 100_000)


@pytest.mark.parametrize('T', [127, 128, 512])
def test_sft_windows_hold_whole_documents(sets, T):
    x, y = get_windows(sets['arith'], 'train', range(sets['arith'].n_windows('train', T)), T)
    whole, sizes = [], []
    for inputs, targets in zip(x.tolist(), y.tolist()):
        n = sum(t >= 0 for t in targets)
        assert targets[n:] == [-1] * (T - n) and inputs[n:] == [EOS_ID] * (T - n)
        assert inputs[1:n] == targets[:n - 1]
        ids = inputs[:1] + targets[:n]
        assert ids[-1] == EOS_ID
        ends = [i + 1 for i, t in enumerate(ids) if t == EOS_ID]
        whole += [ids[a:b] for a, b in zip([0, *ends], ends)]
        sizes.append((len(ids), ends[0]))
    pairs = sets['arith'].pairs('train')
    assert whole == [prompt + text for prompt, text in pairs]
    for (size, _), (_, next_document) in pairwise(sizes):                   # greedy: no more fits
        assert size + next_document > T + 1


def test_an_sft_document_longer_than_a_window_has_its_own(sets):
    T = 60                                                                  # about half are longer
    n = sets['arith'].n_windows('train', T)
    x, y = get_windows(sets['arith'], 'train', range(n), T)
    first = [prompt + text for prompt, text in sets['arith'].pairs('train')]
    cut = [document[:T + 1] for document in first if len(document) > T + 1]
    windows = [a[:1] + [t for t in b if t >= 0] for a, b in zip(x.tolist(), y.tolist())]
    assert len(cut) > 100 and [w for w in windows if w[-1] != EOS_ID] == cut


def test_completion_only_has_loss_on_completions_alone(sets):
    T = 512
    n = sets['arith'].n_windows('val', T)
    _, y = get_windows(sets['arith'], 'val', range(n), T, completion_only=True)
    every = get_windows(sets['arith'], 'val', range(n), T)[1]
    assert y[y >= 0].tolist() == [t for _, text in sets['arith'].pairs('val') for t in text]
    assert torch.equal(y[y >= 0], every[y >= 0]) and (every >= 0).sum() > (y >= 0).sum()
    plain = (get_windows(sets['big'], 'val', [0], T, only)[1] for only in (False, True))
    assert torch.equal(*plain)
    batch = get_batch(sets, {'arith': 1}, range(8), T, 1, completion_only=True)[1]
    assert 0 < (batch >= 0).sum() < (get_batch(sets, {'arith': 1}, range(8), T, 1)[1] >= 0).sum()


def test_two_runs_that_make_the_same_data_set_do_not_collide(tmp_path, monkeypatch):
    prepare('arith', tmp_path / 'x', vocab_size=512, num_docs=50)
    first = {file.name: file.read_bytes() for file in (tmp_path / 'x').iterdir()}
    real = os.path.exists
    # as if the other had finished after this one had looked
    monkeypatch.setattr(data_prep.Path, 'exists', lambda self: self.name != 'x' and real(self))
    with pytest.raises(ValueError, match='x exists by now, another process has made it'):
        prepare('arith', tmp_path / 'x', vocab_size=512, num_docs=60)
    assert os.listdir(tmp_path) == ['x']
    assert {file.name: file.read_bytes() for file in (tmp_path / 'x').iterdir()} == first


def test_plain_text_after_sft_documents_is_a_completion_throughout(tmp_path):
    encode, T = get_tokenizer(V).encode_ordinary, 64
    records = [{'prompt': f'What is {i} + 1? ', 'completion': f'It is {i + 1}.'} for i in range(60)]
    # the file ends with plain text, some of it longer than a window
    records += [{'text': f'A line of plain text, number {i}.' * (i % 7 + 1)} for i in range(60)]
    prompt_of = {}                                             # ids of a document: of its prompt
    for record in records:
        prompt = encode(record.get('prompt', ''))
        text = encode(record.get('completion', record.get('text')))
        prompt_of[(*prompt, *text, EOS_ID)] = prompt
    source = write_jsonl(tmp_path / 'x.jsonl', *records)
    assert prepare(source, tmp_path / 'out', V, val_fraction=0.3)['sft']
    data, read = open_data(tmp_path, ['out'], V)['out'], []
    for split in ('train', 'val'):
        ends = np.flatnonzero(data.tokens[split] == EOS_ID) + 1
        documents = [tuple(ids.tolist()) for ids in np.split(data.tokens[split], ends)[:-1]]
        read += documents
        pairs, mask = [], []
        for ids in documents:
            n = len(prompt_of[ids])
            pairs.append((list(ids[:n]), list(ids[n:])))
            mask += [0] * n + [1] * (len(ids) - n)
        assert pairs[0][0] and not pairs[-1][0]                # SFT comes first, plain text last
        assert data.pairs(split) == pairs
        assert data.masks[split].tolist() == mask

        # as many whole documents as fit in T + 1 tokens; what is longer stands alone and is cut
        windows, filled = [], T + 1
        for ids in documents:
            n = len(prompt_of[ids])
            targets = [-1] * n + list(ids[n:])
            if filled + len(ids) > T + 1:
                windows.append([])
                filled = 0
            windows[-1] += targets
            filled += len(ids)
        expected = [(window[1:T + 1] + [-1] * T)[:T] for window in windows]     # the first is input
        assert any(len(window) > T + 1 for window in windows)
        numbers = range(data.n_windows(split, T))
        assert get_windows(data, split, numbers, T, completion_only=True)[1].tolist() == expected
    assert sorted(read) == sorted(prompt_of)


@pytest.mark.parametrize('T', [16, 40, 64, 512])
def test_what_windows_leave_out_is_counted(tmp_path, T):
    records = [{'prompt': 'x' * (3 * (i % 40)), 'completion': 'y' * (i % 7 + 1)}
               for i in range(400)] + [{'text': 'plain ' * 30}] * 3
    prepare(write_jsonl(tmp_path / 'x.jsonl', *records), tmp_path / 'out', V)
    data = open_data(tmp_path, ['out'], V)['out']
    for split in ('train', 'val'):
        n = data.n_windows(split, T)
        _, y = get_windows(data, split, range(n), T, completion_only=True)
        counts = data.coverage(split, T)
        sizes = [len(prompt) + len(text) for prompt, text in data.pairs(split)]
        # by what comes out: of a window with n targets its T inputs and the last target are seen
        all_y = get_windows(data, split, range(n), T)[1]
        assert counts['never_seen'] == sum(sizes) - int((all_y >= 0).sum()) - n
        assert counts['cut'] == sum(size > T + 1 for size in sizes)
        assert (counts['documents'], counts['tokens']) == (len(sizes), sum(sizes))
        assert counts['windows'] == n
        assert counts['without_completion'] == int((y < 0).all(dim=1).sum())
        assert counts['without_completion'] or T > 40


def test_plain_text_loses_its_last_window_alone(sets):
    counts = sets['small'].coverage('train', 33)
    ids, n = sets['small'].tokens['train'], sets['small'].n_windows('train', 33)
    assert counts['never_seen'] == len(ids) - 33 * n - 1 and counts['tokens'] == len(ids)
    assert counts['cut'] == counts['without_completion'] == 0


def test_prompts_count_for_max_mb(tmp_path):
    records = [{'prompt': f'{i} ' * 200, 'completion': 'y'} for i in range(1000, 3000)]
    meta = prepare(write_jsonl(tmp_path / 'x.jsonl', *records), tmp_path / 'out', V, max_mb=0.5)
    assert 500_000 <= meta['train']['bytes'] + meta['val']['bytes'] < 502_000


def test_an_overwrite_that_fails_leaves_the_data_set_in_its_place(tmp_path, monkeypatch):
    meta = prepare('arith', tmp_path / 'x', V, num_docs=100)
    rename = Path.rename

    def fails(path, target):
        if path.suffix == '.tmp':
            raise OSError(errno.EIO, 'Input/output error')
        return rename(path, target)
    monkeypatch.setattr(Path, 'rename', fails)
    with pytest.raises(OSError, match='Input/output error'):
        prepare('arith', tmp_path / 'x', V, num_docs=200, overwrite=True)
    assert os.listdir(tmp_path) == ['x']
    assert json.loads((tmp_path / 'x/meta.json').read_text()) == meta


def test_the_default_folder_has_the_name_of_the_source(tmp_path, monkeypatch, capsys):
    (tmp_path / 'my.corpus').mkdir()
    (tmp_path / 'my.corpus/a.txt').write_text('one line of text\n' * 100)
    monkeypatch.chdir(tmp_path)
    for source, name in (('my.corpus', 'my.corpus'), ('my.corpus/a.txt', 'a')):
        data_prep.main([source, '--vocab_size=512'])
        assert (tmp_path / 'data' / name / 'meta.json').exists()
