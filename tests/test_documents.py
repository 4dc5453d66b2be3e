"""documents.py: nothing is passed over in silence, and a split is what its name says."""
import gzip
import json
import os
import random
import tracemalloc

import numpy as np
import pytest
from test_data_prep import documents, run, text_of, write_jsonl

import data_prep
from data_prep import prepare
from documents import SPLITS, find_files
from tokenizer import EOS_ID

V = 512
RNG = random.Random(7)
WORDS = ['the', 'cat', 'sat', 'on', 'a', 'mat', 'and', 'looked', 'at', 'birds', 'in', 'blue sky']


def line(n_words=12):
    return ' '.join(RNG.choices(WORDS, k=n_words)) + '\n'


def all_text(folder):
    return {split: ''.join(map(text_of, documents(folder, split))) for split in SPLITS}


def share_held_out(meta):
    return meta['val']['bytes'] / (meta['train']['bytes'] + meta['val']['bytes'])


# --- which files ---

def test_suffixes_in_any_case_and_links_to_folders(tmp_path):
    source, elsewhere = tmp_path / 'in', tmp_path / 'elsewhere'
    for file in (source / 'A.TXT', source / 'b.Md', elsewhere / 'c.txt', elsewhere / 'in/d.JSONL'):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"text": "x"}')
    (source / 'link').symlink_to(elsewhere)
    (elsewhere / 'back').symlink_to(source)                      # a circle
    (source / 'gone.txt').symlink_to(tmp_path / 'nowhere')
    files, passed_over = find_files(source)
    assert [file.name for file in files] == ['A.TXT', 'b.Md', 'c.txt', 'd.JSONL']
    assert [file.name for file in passed_over] == ['gone.txt']


def test_what_is_passed_over_is_counted(tmp_path):
    source = tmp_path / 'in'
    (source / '.git').mkdir(parents=True)
    (source / 'text.txt').write_text(line() * 50)
    (source / '.git/objects.pack').write_bytes(bytes(10_000))    # hidden: counts for nothing
    for name in ('a.csv', 'b.CSV', 'c.html', 'LICENSE'):
        (source / name).write_text('x')
    done = run(source, f'--out_dir={tmp_path}/out', f'--vocab_size={V}')
    assert done.returncode == 0
    assert 'passed over, as they are not read: 2 .csv, 1 .html, 1 without a suffix\n' in done.stdout


@pytest.mark.parametrize('name', ['train-00000.jsonl.gz', 'train.parquet', 'x.csv'])
def test_a_folder_of_which_most_is_not_read_is_refused(tmp_path, name):
    source = tmp_path / 'hub'
    (source / 'data').mkdir(parents=True)
    (source / 'README.md').write_text('# My corpus\n\n2000 documents.\n')
    content = gzip.compress(''.join(json.dumps({'text': line()}) for _ in range(500)).encode())
    (source / 'data' / name).write_bytes(content)
    done = run(source, f'--out_dir={tmp_path}/out', f'--vocab_size={V}')
    suffix = name[name.rindex('.'):]
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and os.listdir(tmp_path) == ['hub']
    assert f'(1 {suffix}), only .txt .md .rst .py .jsonl are' in done.stderr
    meta = prepare(source, tmp_path / 'out', V, on_error='skip')
    assert meta['passed_over'] == f'1 {suffix}'


def test_blank_lines_are_no_documents(tmp_path):
    for name, text in (('a', '{"text": "one"}\n\n  \n{"text": "two"}\n\n'),
                       ('b', '{"text": "one"}\r\n\r\n{"text": "two"}\r\n')):
        (tmp_path / f'{name}.jsonl').write_text(text, newline='')
        meta = prepare(tmp_path / f'{name}.jsonl', tmp_path / name, V)
        assert sum(meta[split]['documents'] for split in SPLITS) == 2 and not meta['skipped']


# --- one text of many documents, and long ones ---

def test_a_separator_parts_documents(tmp_path):
    stories = [f'Once there was a cat called Tom {i}.\nHe ate a fish.' for i in range(400)]
    for name, mark in (('a', '<|endoftext|>'), ('b', '\n\n\n'), ('c', '=')):
        (tmp_path / f'{name}.txt').write_text(mark.join(stories) + mark, newline='')
        done = run(tmp_path / f'{name}.txt', f'--out_dir={tmp_path / name}', f'--vocab_size={V}',
                   '--separator=' + mark.replace('\n', '\\n'))
        assert done.returncode == 0, done.stderr
        found = [text_of(text) for split in SPLITS for text in documents(tmp_path / name, split)]
        assert sorted(found) == sorted(stories)
        assert 'times <|endoftext|>' not in done.stdout
    done = run(tmp_path / 'a.txt', f'--out_dir={tmp_path}/whole', f'--vocab_size={V}')
    assert "the text has 400 times <|endoftext|>: --separator='<|endoftext|>'" in done.stdout


@pytest.mark.parametrize('size', [1, 2, 5, 13, 1000])
def test_a_separator_may_come_in_pieces(size):
    from documents import split_at
    text = 'one<|endoftext|>two<|endoftext|><|endoftext|>th<|end'
    blocks = [text[i:i + size] for i in range(0, len(text), size)]
    assert list(split_at('<|endoftext|>', blocks)) == ['one', 'two', '', 'th<|end']


def test_a_long_text_is_one_document_on_either_side_and_all_of_it(tmp_path):
    text = '\ufeff' + ''.join(line() for _ in range(40_000)) + 'ä€😀 end'
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    meta = prepare(tmp_path / 'x.txt', tmp_path / 'out', V)
    found = all_text(tmp_path / 'out')
    assert found['train'] + found['val'] == text[1:] and found['train'].endswith('\n')
    assert meta['train']['documents'] == meta['val']['documents'] == 1
    assert 0.045 < share_held_out(meta) <= 0.05
    for split in SPLITS:
        ids = np.fromfile(tmp_path / 'out' / f'{split}.bin', np.uint16)
        assert (ids == EOS_ID).sum() == 1 and ids[-1] == EOS_ID


def test_of_a_long_text_as_much_is_taken_as_is_wanted(tmp_path):
    (tmp_path / 'x.txt').write_text(''.join(line() for _ in range(60_000)))
    meta = prepare(tmp_path / 'x.txt', tmp_path / 'out', V, max_mb=0.5)
    assert 480_000 < meta['train']['bytes'] + meta['val']['bytes'] < 520_000
    assert 0.04 < share_held_out(meta) < 0.06


def test_a_long_text_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr('documents.LOOK_AHEAD', 10**6)           # 16 MB else
    def peak(n_lines):
        (tmp_path / 'x.txt').write_text(line() * n_lines)
        tracemalloc.start()
        prepare(tmp_path / 'x.txt', tmp_path / 'out', V, overwrite=True)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    peak(20_000)                                                 # loads what libraries load
    small, large = peak(300_000), peak(900_000)                  # some 18 and 54 MB
    assert large - small < 12e6, (small, large)     # of 36 MB more; threads make it vary by 3


@pytest.mark.parametrize('content', [b'word ' * 300_000 + b'caf\xe9', b' \n' * 600_000])
def test_a_long_text_that_is_none_leaves_nothing(tmp_path, content):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/x.txt').write_bytes(content)
    (tmp_path / 'in/y.txt').write_text(line() * 100)
    with pytest.raises(ValueError, match='x.txt: (not UTF-8|empty)'):
        prepare(tmp_path / 'in', tmp_path / 'out', V)
    meta = prepare(tmp_path / 'in', tmp_path / 'out', V, on_error='skip')
    assert sum(meta['skipped'].values()) == 1
    assert meta['train']['bytes'] + meta['val']['bytes'] == (tmp_path / 'in/y.txt').stat().st_size


# --- which split ---

def is_near(meta, wanted=0.05):
    return wanted / 2 <= share_held_out(meta) <= 2 * wanted


@pytest.mark.parametrize('n', range(6))
def test_a_corpus_and_its_readme_are_both_mostly_trained_on(tmp_path, n):
    source = tmp_path / 'in'
    source.mkdir()
    texts = {'input.txt': ''.join(line() for _ in range(20_000)),
             'readme.md': f'# corpus {n}\n' + ''.join(line() for _ in range(600))}
    for name, text in texts.items():
        (source / name).write_text(text)
    done = run(source, f'--out_dir={tmp_path}/out', f'--vocab_size={V}')
    meta = json.loads((tmp_path / 'out/meta.json').read_text())
    assert is_near(meta) and 'holds out' not in done.stdout
    found = all_text(tmp_path / 'out')
    assert sorted(found['train'] + found['val']) == sorted(''.join(texts.values()))
    text = texts['input.txt']
    assert text[:len(text) * 9 // 10] in found['train']


@pytest.mark.parametrize('val_fraction', [0.02, 0.05, 0.2])
@pytest.mark.parametrize('sizes', [
    [300_000], [5_000] * 3, [400_000, 90, 80, 20], [20_000, 18_000, 3_000_000], [2_000_000] * 10])
def test_val_is_near_its_fraction_however_few_and_unequal_documents_are(tmp_path, sizes,
                                                                        val_fraction):
    texts = [line() * (size // 60 + 1) for size in sizes]
    source = write_jsonl(tmp_path / 'x.jsonl', *({'text': text} for text in texts))
    meta = prepare(source, tmp_path / 'out', V, val_fraction=val_fraction)
    assert is_near(meta, val_fraction)
    assert meta['train']['bytes'] + meta['val']['bytes'] == sum(map(len, texts))


@pytest.mark.parametrize('text', ['word ' * 200_000, 'x' * 500_000, 'word ' * 2_000],
                         ids=['text8', 'no space', 'short'])
def test_one_long_line_is_cut_between_words_if_there_are_any(tmp_path, text):
    (tmp_path / 'x.txt').write_text(text)
    meta = prepare(tmp_path / 'x.txt', tmp_path / 'out', V)
    found = all_text(tmp_path / 'out')
    assert found['train'] + found['val'] == text and is_near(meta)
    assert text[0] == 'x' or found['train'].endswith(' ')


def test_sft_documents_are_whole_and_near_the_fraction_where_they_can_be(tmp_path):
    records = [{'prompt': f'What is {i}? ', 'completion': line(3 * i)} for i in range(1, 41)]
    meta = prepare(write_jsonl(tmp_path / 'x.jsonl', *records), tmp_path / 'out', V)
    assert is_near(meta)
    found = [text_of(d) for split in SPLITS for d in documents(tmp_path / 'out', split)]
    assert sorted(found) == sorted(record['prompt'] + record['completion'] for record in records)


def test_where_it_cannot_be_done_a_line_says_so(tmp_path):
    source = write_jsonl(tmp_path / 'x.jsonl', *({'prompt': f'{i}? ', 'completion': 'no'}
                                                 for i in range(3)))
    done = run(source, f'--out_dir={tmp_path}/out', f'--vocab_size={V}')
    assert done.returncode == 0
    assert 'holds out 33.3% of the text, not val_fraction=5.0%: of 3 documents' in done.stdout


def test_equal_documents_stay_together(tmp_path):
    texts = [f'{i} ' + line(200) for i in range(3)] * 4 + ['short one', 'short two'] * 4
    prepare(write_jsonl(tmp_path / 'x.jsonl', *({'text': t} for t in texts)), tmp_path / 'out', V)
    train, val = (set(documents(tmp_path / 'out', split)) for split in SPLITS)
    assert train and val and not train & val


def test_a_source_of_one_repeated_document_has_both_splits(tmp_path):
    texts = [{'text': 'line one\nline two\n'}] * 5
    prepare(write_jsonl(tmp_path / 'x.jsonl', *texts), tmp_path / 'out', V)
    assert all(documents(tmp_path / 'out', split) for split in SPLITS)


# --- stale data ---

ARGS = ['x.jsonl', '--seed=3', '--val_fraction=0.1']


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The meta.json of a data set of two files, made by ARGS; in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / 'x.jsonl', *({'text': line()} for _ in range(300)))
    return prepare('x.jsonl', 'out', V, seed=3, val_fraction=0.1)


@pytest.mark.parametrize('args, message', [
    (ARGS, ''), ([*ARGS, '--on_error=skip'], ''), (['y.jsonl', *ARGS[1:]], "'x.jsonl', not 'y."),
    (ARGS[:2], 'val_fraction=0.1, not 0.05'), ([*ARGS[:1], *ARGS[2:]], 'seed=3, not 1337'),
    ([*ARGS, '--max_mb=1'], 'max_mb=0, not 1.0'), ([*ARGS, '--separator=x'], "separator='', not"),
    ([*ARGS, '--site_packages'], 'site_packages=False, not True')])
def test_other_arguments_make_other_data(prepared, args, message):
    change = data_prep.what_changed(prepared, args)
    assert message in change and bool(message) == bool(change)


@pytest.mark.parametrize('change', ['grown', 'edited', 'renamed', 'one more', 'gone', 'touched'])
def test_files_that_have_changed_are_noticed(tmp_path, change):
    source = tmp_path / 'in'
    source.mkdir()
    for name in ('a.txt', 'b.txt'):
        (source / name).write_text(name + line() * 100)
    meta = prepare(source, tmp_path / 'out', V)
    if change == 'grown':
        (source / 'a.txt').write_text((source / 'a.txt').read_text() + 'more')
    elif change == 'edited':
        (source / 'a.txt').write_text((source / 'a.txt').read_text().replace('a.txt', 'A.txt'))
    elif change == 'renamed':
        (source / 'a.txt').rename(source / 'c.txt')
    elif change == 'one more':
        (source / 'c.txt').write_text('new')
    elif change == 'touched':
        os.utime(source / 'a.txt', (1, 1))
    elif change == 'gone':                                       # as where data alone were copied
        source.rename(tmp_path / 'elsewhere')
    told = data_prep.what_changed(meta, [str(source)])
    assert bool(told) == (change not in ('touched', 'gone'))
    assert not told or f'{source} when it had 2 files of' in told


def test_a_meta_json_of_before_is_compared_by_what_it_has(prepared):
    old = {key: value for key, value in prepared.items()
           if key not in ('files', 'separator', 'site_packages')}
    assert data_prep.what_changed(old, [*ARGS, '--separator=x']) == ''
    assert data_prep.what_changed(old, ARGS[:2]) != ''


def test_num_docs_and_the_python_of_the_library_count(tmp_path):
    meta = prepare('arith', tmp_path / 'out', V, num_docs=100)
    assert data_prep.what_changed(meta, ['arith', '--num_docs=100']) == ''
    assert 'num_docs=100, not 40000' in data_prep.what_changed(meta, ['arith'])
    meta = prepare('stdlib', tmp_path / 'lib', V, max_mb=0.2)
    args = ['stdlib', '--max_mb=0.2']
    assert data_prep.what_changed(meta, args) == ''
    assert "3.0's library" in data_prep.what_changed(meta | {'python': '3.0'}, args)


def test_turns_without_content_or_in_parts_are_read(tmp_path):
    parts = [{'type': 'text', 'text': 'one '}, {'type': 'image'}, {'type': 'text', 'text': 'two'}]
    records = [{'messages': [{'role': 'user', 'content': content},
                             {'role': 'assistant', 'content': answer}]}
               for content, answer in ((parts, 'yes'), (None, 'no'), ('x', parts))]
    prepare(write_jsonl(tmp_path / 'x.jsonl', *records), tmp_path / 'out', V)
    found = [text_of(d) for split in SPLITS for d in documents(tmp_path / 'out', split)]
    assert sorted(found) == ['User: \n\nAssistant: no', 'User: one two\n\nAssistant: yes',
                             'User: x\n\nAssistant: one two']


@pytest.mark.parametrize('link', ['.link', 'link', 'zlink'])
def test_a_link_hides_no_file(tmp_path, link):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/a.txt').write_text('a')
    (tmp_path / link).symlink_to('data')
    files, passed_over = find_files(tmp_path)
    assert [file.name for file in files] == ['a.txt'] and passed_over == []


@pytest.mark.parametrize('suffix', ['.txt', '.jsonl'])
def test_a_separator_that_occurs_nowhere_is_refused(tmp_path, suffix):
    text = 'one line\r\n\r\nand another\r\n\r\n' * 100
    if suffix == '.jsonl':
        text = json.dumps({'text': text})
    (tmp_path / f'a{suffix}').write_text(text, newline='')
    for separator in ('\n\n', '<|endoftxt|>'):
        with pytest.raises(ValueError, match='occurs in no text file'):
            prepare(tmp_path / f'a{suffix}', tmp_path / 'out', V, separator=separator)
    assert os.listdir(tmp_path) == [f'a{suffix}']


def test_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, 'Permission denied', path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(PermissionError):
        find_files(tmp_path)


def test_the_same_folder_may_be_spelled_otherwise(tmp_path, monkeypatch):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/a.txt').write_text('one line of text\n' * 100)
    meta = prepare(tmp_path / 'a', tmp_path / 'out', V)
    monkeypatch.chdir(tmp_path)
    for same in ('a', 'a/', './a', f'{tmp_path}/a/'):
        assert data_prep.what_changed(meta, [same]) == ''
    assert data_prep.what_changed(meta, ['b'])


def test_a_link_to_nothing_is_counted(tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/README.md').write_text('one line of text\n' * 100)
    (tmp_path / 'in/data.jsonl').symlink_to(tmp_path / 'gone')
    meta = prepare(tmp_path / 'in', tmp_path / 'out', V)
    assert meta['passed_over'] == '1 links to nothing'


def test_copies_of_one_short_text_are_all_kept(tmp_path):
    texts = [{'text': 'line one\nline two'}] * 500
    meta = prepare(write_jsonl(tmp_path / 'x.jsonl', *texts), tmp_path / 'out', V)
    assert meta['train']['documents'] == meta['val']['documents'] == 500


def test_data_made_with_what_was_skipped_are_told_from_others(tmp_path):
    file = write_jsonl(tmp_path / 'x.jsonl', *({'text': f'{i} line'} for i in range(100)))
    whole = prepare(file, tmp_path / 'whole', V)
    assert data_prep.what_changed(whole, [str(file), '--on_error=skip']) == ''
    with open(file, 'a') as f:
        f.write('no JSON\n')
    meta = prepare(file, tmp_path / 'out', V, on_error='skip')
    assert data_prep.what_changed(meta, [str(file), '--on_error=skip']) == ''
    assert "on_error='skip', not 'raise'" in data_prep.what_changed(meta, [str(file)])
