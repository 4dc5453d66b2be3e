"""tracker.py: the numbers of the log arrive once each, and a tracker that fails ends no run."""
import json
import sqlite3
import struct
import sys

import pytest
from conftest import log, refused, run, run_ranks

import tracker

# of a resumed run, wandb keeps its offline records apart until they are synced
CONFIG = """
import os
os.environ['WANDB_MODE'] = 'offline'
"""


def test_all_numbers_of_an_entry_have_a_name():
    report = {'gradient': {'saturated': (0.25, 0.5), 'jump': 2}}
    entry = {'step': 3, 'phase': 'decay', 'loss': 2.5, 'tokens': 512, 'skipped': True,
             'rows': [0, 4], 'val_losses': {'stdlib': 3.5}, 'note': 'optimizer', 'fp8': report}
    assert tracker.numbers_of(entry) == {
        'loss': 2.5, 'tokens': 512, 'val_losses/stdlib': 3.5, 'fp8/gradient/saturated/mean': 0.25,
        'fp8/gradient/saturated/largest': 0.5, 'fp8/gradient/jump': 2}


# --- each package, read back by another program's reader ---

def tensorboard_record(folder):
    """([(step, loss)], [(step, tokens/s)], {data set: [step]}, text of the knobs)"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()

    def values(name):
        return [(event.step, event.value) for event in events.Scalars(name)]
    text = events.Tensors('knobs/text_summary')[-1].tensor_proto.string_val[0].decode()
    return values('loss'), values('tok_per_s'), values('val_losses/stdlib'), text


def trackio_record(folder):
    with sqlite3.connect(folder / 'trackio/nano-xmodel.db') as db:
        rows = db.execute('select step, metrics, run_id, run_name from metrics order by id')
        rows = [(step, json.loads(text), *run) for step, text, *run in rows]
        (config,), = db.execute('select config from configs').fetchall()
    assert len({tuple(run) for _, _, *run in rows}) == 1 and rows[0][-1] == folder.name

    def values(name):
        return [(step, numbers[name]) for step, numbers, *_ in rows if name in numbers]
    return values('loss'), values('tok_per_s'), values('val_losses/stdlib'), str(json.loads(config))


def wandb_records(file):
    """The records of a .wandb file: protocol buffers in the blocks of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, message = file.read_bytes(), 7, b''                # after wandb's own header
    while at + 7 <= len(data):
        if at % 2**15 > 2**15 - 7:                               # a block's end holds no header
            at += -at % 2**15
        _, size, kind = struct.unpack_from('<IHB', data, at)
        message += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):                                       # whole, or the last part
            yield Record.FromString(message)
            message = b''


def wandb_record(folder):
    rows, runs = [], []
    for file in sorted(folder.glob('wandb/offline-run-*/run-*.wandb')):
        for record in wandb_records(file):
            if record.HasField('run'):
                runs.append(record.run)
            if record.HasField('history'):
                rows.append((record.history.step.num, {
                    item.key or '/'.join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item}))
    assert {run.run_id for run in runs} == {
        json.loads((folder / 'run.json').read_text())['wandb_id']}
    assert {(run.display_name, run.project) for run in runs} == {(folder.name, 'nano-xmodel')}

    def values(name):
        return [(step, numbers[name]) for step, numbers in rows if name in numbers]
    config = {item.key: item.value_json for item in runs[0].config.update}
    return values('loss'), values('tok_per_s'), values('val_losses/stdlib'), str(config)


READ = {'tensorboard': tensorboard_record, 'wandb': wandb_record, 'trackio': trackio_record}


@pytest.mark.parametrize('name', READ)
def test_a_record_goes_on_where_its_run_does(name, tiny, tiny_run, tmp_path):
    pytest.importorskip(name)
    folder, config = tmp_path / 'run', tmp_path / 'offline.py'
    config.write_text(CONFIG)
    args = [*tiny, config, f'--out_dir={folder}', f'--tracker={name}']
    done = run('train.py', *args)
    assert done.returncode == 0, done.stderr
    first = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    for n in (18, 20):                                           # to go on from step 16
        (folder / f'step_{n}.pt').unlink()
    done = run('train.py', *args, '--resume')
    assert done.returncode == 0 and 'fails' not in done.stdout, done.stdout + done.stderr
    assert log(folder) == log(tiny_run)                          # no number is another's
    second = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    losses, speeds, validations, knobs = READ[name](folder)
    assert 'n_embd' in knobs and 'exponential' in knobs
    right = second
    if name == 'trackio':                                        # keeps what it has
        right = first
    if name == 'wandb':                                          # two records of one id
        right = first + second[16:]
    assert [step for step, _ in losses] == [entry['step'] for entry in right]
    assert [loss for _, loss in losses] == pytest.approx([entry['loss'] for entry in right])
    assert [speed for _, speed in speeds] == pytest.approx([entry['tok_per_s'] for entry in right])
    assert [step for step, _ in validations] == [entry['step'] for entry in right
                                                 if 'val_loss' in entry]


def test_a_new_run_in_a_folder_has_a_new_record(tiny, tmp_path):
    pytest.importorskip('tensorboard')
    args = [*tiny, f'--out_dir={tmp_path}', '--tracker=tensorboard']
    run('train.py', *args)
    for file in (*tmp_path.glob('*.pt'), tmp_path / 'log.jsonl'):
        file.unlink()
    done = run('train.py', *args, '--steps_scale=0.3')
    assert done.returncode == 0, done.stderr
    steps = [entry['step'] for entry in log(tmp_path)]
    assert [step for step, _ in tensorboard_record(tmp_path)[0]] == steps and len(steps) < 10


# --- what goes wrong ---

@pytest.mark.parametrize('name', READ)
def test_a_package_that_is_missing_is_named(name, monkeypatch, capsys, tmp_path):
    def told():
        with pytest.raises(SystemExit) as e:
            tracker.check_tracker(name)
        assert e.value.code == 2
        return capsys.readouterr().err
    monkeypatch.setitem(sys.modules, name, None)
    line = told()
    assert f"tracker='{name}': the package is missing: pip install {name}" in line
    monkeypatch.delitem(sys.modules, name)
    (tmp_path / name).mkdir()                                    # as wandb leaves its own
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    assert told() == line


def test_nothing_is_begun_without_the_package(tiny, tmp_path):
    config = tmp_path / 'missing.py'
    config.write_text("import sys\nsys.modules['wandb'] = None\n")
    args = [*tiny, config, f'--out_dir={tmp_path / "run"}', '--tracker=wandb']
    assert 'pip install wandb' in refused(run('train.py', *args))
    assert not (tmp_path / 'run').exists()
    done = run_ranks(2, 'train.py', *args)
    assert [process.returncode for process in done] == [2, 2]
    assert [process.stderr.count('\n') for process in done] == [1, 0]


@pytest.mark.parametrize('when', ['opened', 'sent', 'closed'])
def test_a_tracker_that_fails_is_left_out(when, tiny, tiny_run, tmp_path):
    config = tmp_path / 'fails.py'                               # of packages that are not there
    config.write_text(f"""
import os, sys
sys.modules['start'].check_tracker = lambda name: None
def _fail(when, step):
    if when == {when!r} and step >= 5:
        raise ConnectionError('the network is down')
    print('tracker:', when, step)
def _open(folder, config, step):
    _fail('opened', 5)
    return lambda numbers, step: _fail('sent', step), lambda: _fail('closed', 20)
sys.modules['tracker'].OPEN['wandb'] = _open
""")
    first, second = run_ranks(2, 'train.py', *tiny, config, f'--out_dir={tmp_path / "run"}',
                              '--tracker=wandb')
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    lines = first.stdout.splitlines()
    failed = [line for line in lines if line.startswith('tracker=')]
    error = "ConnectionError: 'the network is down'"
    assert failed == [f'tracker=wandb fails ({error}): going on without it']
    sent = [line for line in lines if line.startswith('tracker: sent')]
    assert len(sent) == {'opened': 0, 'sent': 5, 'closed': 20}[when]
    assert 'tracker' not in second.stdout                        # it is rank 0's
    assert len(log(tmp_path / 'run')) == 20
