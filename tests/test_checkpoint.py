"""checkpoint.py: what is written is whole, or is not there; what is read is as it was written."""
import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

import checkpoint

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


def test_no_flipped_bit_is_more_than_damage(tmp_path):
    torch.save({'a': torch.arange(2)}, tmp_path / 'x.pt')
    seen, size = 0, (tmp_path / 'x.pt').stat().st_size
    with open(tmp_path / 'x.pt', 'r+b', buffering=0) as file:
        for bit in range(8 * size):
            for flipped in (True, False):                        # and back
                file.seek(bit // 8)
                byte = file.read(1)[0]
                file.seek(bit // 8)
                file.write(bytes([byte ^ 1 << bit % 8]))
                seen += flipped and checkpoint.damaged(tmp_path / 'x.pt')       # raises nothing
    assert seen > size                                           # names, dates, padding are free


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


@pytest.mark.parametrize('keep, left', [(0, [6, 9]), (1, [6, 9]), (2, [6, 7, 9])])
def test_prune_keeps_the_newest_and_those_at_the_ends(tmp_path, keep, left):
    for n in (3, 6, 7, 9):
        (tmp_path / f'step_{n}.pt').touch()
    checkpoint.prune(tmp_path, keep, ends=[6])
    assert [int(f.stem[5:]) for f in checkpoint.checkpoints(tmp_path)] == left
