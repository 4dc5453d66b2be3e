"""checkpoint.py: what is written is whole, or is not there; what is read is as it was written."""
import collections
import contextlib
import errno
import itertools
import json
import math
import os
import random
import shutil
import struct
import zipfile
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, modules_of_a_run, same

import checkpoint
from model import Xmodel, XmodelConfig

STATE = {'model': {'w': torch.arange(1000.0)}, 'optimizer_state': {'w': {'m': torch.ones(1000)}}}


def test_no_room_is_noticed_before_a_byte_is_written(tmp_path, monkeypatch):
    (tmp_path / 'step_1.pt').write_bytes(b'the one before')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=7999))
    with pytest.raises(OSError, match='No space left') as e:
        checkpoint.write_checkpoint(tmp_path / 'step_1.pt', STATE)
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(tmp_path / 'step_1.pt')
    assert [f.name for f in tmp_path.iterdir()] == ['step_1.pt']
    assert (tmp_path / 'step_1.pt').read_bytes() == b'the one before'


def test_what_does_not_read_back_takes_no_ones_place(tmp_path, monkeypatch):
    checkpoint.write_checkpoint(tmp_path / 'step_1.pt', STATE)
    before, real = (tmp_path / 'step_1.pt').read_bytes(), torch.save

    def bad_disk(state, f):
        real(state, f)
        f.seek(before.index(STATE['model']['w'].numpy().tobytes()) + 100)
        f.write(b'\xff')

    monkeypatch.setattr(torch, 'save', bad_disk)
    with pytest.raises(OSError, match='does not read back'):
        checkpoint.write_checkpoint(tmp_path / 'step_1.pt', STATE)
    assert [f.name for f in tmp_path.iterdir()] == ['step_1.pt']
    assert (tmp_path / 'step_1.pt').read_bytes() == before
    assert torch.equal(torch.load(tmp_path / 'step_1.pt')['model']['w'], STATE['model']['w'])


@pytest.mark.parametrize('harm', ['none', 'flip', 'cut', 'empty', 'text'])
def test_damage_is_seen(tmp_path, harm):
    checkpoint.write_checkpoint(tmp_path / 'a.pt', STATE)
    content = bytearray((tmp_path / 'a.pt').read_bytes())
    content[content.index(STATE['model']['w'].numpy().tobytes()) + 5] ^= harm == 'flip'
    (tmp_path / 'a.pt').write_bytes({'cut': content[:-50], 'empty': b'', 'text': b'no zip'}
                                    .get(harm, content))
    assert checkpoint.damaged(tmp_path / 'a.pt') == (harm != 'none')


def regions(path):
    """{part of a zip file as torch writes it: [where its bytes are]}; each byte is in one of them.

    By APPNOTE.TXT, the format's definition: a local header of 30 bytes, name, padding, the content
    and a descriptor of 16 bytes for each record, then the directory and its end.
    """
    content, found, at = path.read_bytes(), {}, 0

    def take(kind, size):
        nonlocal at
        found.setdefault(kind, []).extend(range(at, at + size))
        at += size

    with zipfile.ZipFile(path) as file:
        records = file.infolist()
    for record in records:
        assert at == record.header_offset
        name, extra = struct.unpack_from('<HH', content, at + 26)
        take('local header', 30)
        take('name', name)
        take('padding', extra)
        kind = 'tensor' if '/data/' in record.filename else 'other content'
        take('pickle' if record.filename.endswith('/data.pkl') else kind, record.file_size)
        assert content[at:at + 4] == b'PK\7\10'
        take('descriptor', 16)
        at += content[at:].index(b'PK')                          # of the next one
    take('directory', content.index(b'PK\6\6') - at)
    take('end of the directory', len(content) - at)
    return found


@contextlib.contextmanager
def flipped(path, at, bit):
    """The file with one bit the other way."""
    with open(path, 'r+b', buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
        yield
        os.pwrite(file.fileno(), bytes([byte]), at)


def test_no_flipped_bit_is_more_than_damage(tmp_path):
    torch.save({'a': torch.arange(2)}, tmp_path / 'x.pt')
    before, seen = (tmp_path / 'x.pt').read_bytes(), set()
    for at, bit in itertools.product(range(len(before)), range(8)):
        with flipped(tmp_path / 'x.pt', at, bit):
            if checkpoint.damaged(tmp_path / 'x.pt'):            # raises nothing
                seen.add((at, bit))
    assert (tmp_path / 'x.pt').read_bytes() == before and not checkpoint.damaged(tmp_path / 'x.pt')
    assert len(seen) > len(before)                               # names, dates, padding are free
    # and of what there is to read no bit is
    parts = regions(tmp_path / 'x.pt')
    assert len(parts['tensor']) == 16 and len(parts['pickle']) > 50
    for kind in ('tensor', 'pickle', 'other content'):
        assert {(at, bit) for at in parts[kind] for bit in range(8)} <= seen, kind


def test_a_flipped_bit_is_seen_at_either_end_of_any_tensor_large_or_small(tmp_path):
    path, sizes = tmp_path / 'x.pt', (3, 1_000_000, 1023, 1025, 300_000, 20_000, 1)
    generator = torch.Generator().manual_seed(0)
    state = {f'{i}': torch.randn(n, generator=generator) for i, n in enumerate(sizes)}
    torch.save(state, path)
    content = path.read_bytes()
    for t in state.values():
        begin = content.index(t.numpy().tobytes())
        for at in {begin, begin + t.nbytes // 2, begin + t.nbytes - 1}:
            with flipped(path, at, at % 8):
                assert checkpoint.damaged(path), (t.shape, at - begin)
    assert path.read_bytes() == content and not checkpoint.damaged(path)


def test_a_flipped_bit_is_refused_or_changes_nothing_that_is_read(tmp_path):
    path = tmp_path / 'step_3.pt'
    model = Xmodel(XmodelConfig(n_layer=1, n_head=1, n_kv_head=1, n_embd=2, n_ffn=2, vocab_size=4,
                                block_size=4))
    state = {name: {'m': torch.randn_like(w)} for name, w in model.state_dict().items()}
    torch.save({'config': asdict(model.config), 'model': model.state_dict(), 'step': 3,
                'tokens': 40, 'knobs': {'seed': 1}, 'optimizer': 'muon', 'optimizer_state': state},
               path)
    right, parts, rng = checkpoint.read_checkpoint(path), regions(path), random.Random(0)
    assert len(parts) == 9 and sum(map(len, parts.values())) <= path.stat().st_size
    ended = collections.Counter()
    for kind, places in parts.items():
        for at, bit in itertools.product(rng.sample(places, 8), range(8)):
            with flipped(path, at, bit):
                try:
                    found = checkpoint.read_checkpoint(path)
                except ValueError as e:
                    assert str(e).startswith(f'{path} is not a checkpoint of train.py, or is dam')
                    ended[kind, 'refused'] += 1
                else:
                    assert same(found, right), (kind, at, bit)
                    ended[kind, 'read'] += 1
    assert same(checkpoint.read_checkpoint(path), right)         # each bit was put back
    for kind in ('tensor', 'pickle', 'other content'):
        assert ended[kind, 'refused'] == 8 * 8
    assert ended['directory', 'refused'] > 8                     # so they did reach the file
    assert ended['padding', 'read'] == 8 * 8


def test_what_a_killed_process_left_is_swept_up_and_nothing_else(tmp_path):
    for name in ('step_3.pt', 'step_6.pt.tmp', 'log.jsonl', 'run.json.tmp'):
        (tmp_path / name).write_text('x')
    with checkpoint.take_folder(tmp_path):
        assert sorted(os.listdir(tmp_path)) == ['lock', 'log.jsonl', 'step_3.pt']
        assert f'process {os.getpid()} on ' in (tmp_path / 'lock').read_text()


def test_a_damaged_log_keeps_what_is_right_in_it(tmp_path):
    good = [f'{{"step": {n}, "loss": 1.0}}' for n in range(8)]
    text = '\n'.join([*good[:3], '{"step": 3}{"step": 4}', *good[5:], '{"step": 8, "lo']).encode()
    log = tmp_path / 'log.jsonl'
    for old, step, kept in ((text, 7, [0, 1, 2, 5, 6]), (b'\xff\x00' + text, 7, [1, 2, 5, 6]),
                            ('\n'.join(good).encode(), 4, [0, 1, 2, 3]), (b'', 4, [])):
        log.write_bytes(old)
        checkpoint.begin_folder(tmp_path, step, {})
        lines = log.read_text().splitlines()
        assert [checkpoint.step_of(line) for line in lines] == kept and set(lines) <= set(good)
        damaged = bool(old) and len(kept) != step
        assert (tmp_path / 'log.old').exists() == damaged
        if damaged:
            assert (tmp_path / 'log.old').read_bytes() == old
            (tmp_path / 'log.old').unlink()


@pytest.mark.parametrize('keep, left', [(0, [6, 9]), (1, [6, 9]), (2, [6, 7, 9]),
                                        (5, [3, 6, 7, 9])])
def test_prune_keeps_the_newest_and_those_at_the_ends(tmp_path, keep, left):
    for n in (3, 6, 7, 9):
        (tmp_path / f'step_{n}.pt').touch()
    checkpoint.prune(tmp_path, keep, ends=[6])
    assert [int(f.stem[5:]) for f in checkpoint.checkpoints(tmp_path)] == left


@pytest.mark.parametrize('key, change, named', [
    ('recent', lambda losses: 'losses', 'recent'),
    ('recent', lambda losses: [*losses[1:], float('nan')], 'recent'),
    ('recent', lambda losses: losses * 50, 'recent'),
    ('watch', lambda watch: (3,), 'watch'),
    ('watch', lambda watch: ('3', 1.0), 'watch'),
    ('tokens', lambda tokens: -1, 'tokens=-1'),
    ('optimizer', lambda kind: 'sgd', "optimizer='sgd'"),
    ('model', lambda weights: {k: w.half() for k, w in weights.items()}, 'is torch.float16'),
    ('optimizer_state', lambda state: {name: {key: t.double() for key, t in moments.items()}
                                       for name, moments in state.items()}, 'optimizer_state')])
def test_a_field_that_is_not_as_it_was_written_is_named(tiny_run, tmp_path, key, change, named):
    state = torch.load(tiny_run / 'step_20.pt', weights_only=True)
    torch.save(state, tmp_path / 'step_20.pt')
    checkpoint.read_checkpoint(tmp_path)                         # nothing is wrong with it yet
    torch.save(state | {key: change(state[key])}, tmp_path / 'step_20.pt')
    with pytest.raises(ValueError, match=named) as e:
        checkpoint.read_checkpoint(tmp_path)
    assert '\n' not in str(e.value) and 'step_20.pt' in str(e.value)


def test_run_json_keeps_the_first_start(tmp_path):
    def starts():
        first = json.loads((tmp_path / 'run.json').read_text())
        return [first['n'], *(later['n'] for later in first.get('resumed', []))]
    checkpoint.begin_folder(tmp_path, 0, {'n': 1})
    checkpoint.begin_folder(tmp_path, 5, {'n': 2})
    checkpoint.begin_folder(tmp_path, 9, {'n': 3})
    assert starts() == [1, 2, 3]
    checkpoint.begin_folder(tmp_path, 0, {'n': 4})               # another run in its place
    assert starts() == [4]
    (tmp_path / 'run.json').write_text('{"n": ')                 # cut off
    checkpoint.begin_folder(tmp_path, 5, {'n': 5})
    assert starts() == [5]


def test_a_run_that_begins_has_no_heartbeats_of_ranks_before_it(tmp_path):
    for step in (0, 5):                                          # anew, and resumed
        for rank in range(3):
            (tmp_path / f'heartbeat_{rank}').write_text('step 4, then')
        checkpoint.begin_folder(tmp_path, step, {})
        assert sorted(os.listdir(tmp_path)) == ['log.jsonl', 'run.json']


def test_the_hash_of_the_code_is_of_all_that_decides_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, '__file__', os.fspath(tmp_path / 'checkpoint.py'))
    names = modules_of_a_run()
    for name in names:
        shutil.copy(ROOT / f'{name}.py', tmp_path)
    whole = checkpoint.code_and_packages.__wrapped__()['code']
    # these read, write, measure and clean up
    for name in set(names) - {'checkpoint', 'configurator', 'hardware', 'processes', 'tracker'}:
        file = tmp_path / f'{name}.py'
        text = file.read_text(encoding='utf-8')
        file.write_text(text + 'x = 1\n', encoding='utf-8')
        assert checkpoint.code_and_packages.__wrapped__()['code'] != whole, name
        file.write_text(text, encoding='utf-8')
    assert checkpoint.code_and_packages.__wrapped__()['code'] == whole and len(names) > 6


def test_json_has_null_for_what_is_no_number():
    nan, inf = math.nan, math.inf
    values = {'a': [nan, -inf, 1.5], 'b': {'c': (np.float32(nan), np.float64(inf))},
              'd': np.int64(3), 'e': np.float32(0.5)}
    assert json.loads(checkpoint.to_json(values)) == {
        'a': [None, None, 1.5], 'b': {'c': [None, None]}, 'd': 3, 'e': 0.5}


def test_a_checkpoint_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / 'step_5.pt').write_text('')

    def damaged(path):
        raise PermissionError(errno.EACCES, 'Permission denied')
    monkeypatch.setattr(checkpoint, 'damaged', damaged)
    with pytest.raises(ValueError, match=r'step_5\.pt: Permission denied$'):
        checkpoint.read_checkpoint(tmp_path)
