"""train.py as its users run it: whole, resumed, branched, looked at again, and used wrongly."""
import json
import math
import os
import re
import runpy
import shlex
import shutil
import statistics
import sys

import pytest
import torch
from conftest import log, refused, run, same

import train
from checkpoint import checkpoints, load_model, read_checkpoint
from data_prep import source_args
from loader import get_batch, open_data
from model import Xmodel
from run import reference_gap, try_compile


def test_the_log_and_the_checkpoints_of_a_run(tiny_run):
    lines = log(tiny_run)
    assert [line['step'] for line in lines] == list(range(20))
    assert [line['phase'] for line in lines] == ['stable'] * 8 + ['decay'] * 8 + ['long'] * 4
    assert lines[-1]['tokens'] == 8 * 4 * 64 + 8 * 8 * 64 + 4 * 4 * 128
    assert [line['step'] for line in lines if 'val_loss' in line] == [5, 7, 11, 15, 17, 19]
    assert lines[8]['note'] == 'optimizer adamw -> muon, with fresh state'
    assert lines[0]['lr'] == 0 and lines[3]['lr'] == 0.01 and lines[12]['lr'] < 0.01
    assert lines[7]['loss'] < lines[0]['loss'] - 1
    # phase ends 8, 16, 20 and, of the others, the last two
    assert [f.name for f in checkpoints(tiny_run)] == [f'step_{n}.pt' for n in (8, 15, 16, 18, 20)]
    about = json.loads((tiny_run / 'run.json').read_text())
    assert about['knobs']['n_embd'] == 32 and about['knobs']['phases'][1]['optimizer'] == 'muon'
    assert about['torch'] == torch.__version__ and about['threads'] >= 1


def test_a_seed_fixes_the_run(tiny_run, tiny, tmp_path):
    for seed, equal in ((1337, True), (1, False)):
        run('train.py', *tiny, f'--out_dir={tmp_path / str(seed)}', f'--seed={seed}')
        assert (log(tmp_path / str(seed)) == log(tiny_run)) == equal


def test_resume_tells_of_other_code(tiny_run, tiny, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / 'run')
    (folder / 'step_20.pt').unlink()
    state = torch.load(folder / 'step_18.pt')
    code = state['made_by']['code']
    state['made_by'] |= {'code': 'abc', 'torch': '2.0'}
    torch.save(state, folder / 'step_18.pt')
    told = run('train.py', *tiny, f'--out_dir={folder}', '--resume').stdout
    assert f"resume: code: 'abc' -> '{code}'" in told and "resume: torch: '2.0' -> " in told


def test_a_step_is_looked_at_again(tiny_run, tiny, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / 'run')
    before = sorted((f.name, f.read_bytes()) for f in folder.iterdir())
    for step, rows in ((17, '4 to 7'), (2, '8 to 11')):           # step 2 from the beginning
        told = run('train.py', *tiny, f'--out_dir={folder}', f'--replay={step}').stdout
        right = log(tiny_run)[step]
        assert f'step {step}: rows {rows} of phase {right["phase"]}\n' in told
        figures = f'{right["loss"]!r}, {{}}{right["grad_norm"]!r}'
        assert f'step {step}: loss {figures.format("gradient norm ")}; ' \
            f'the log has {figures.format("")}' in told
        assert re.search(r'gradients: [a-z.]+\d?\S* \d', told)
    assert sorted((f.name, f.read_bytes()) for f in folder.iterdir()) == before
    state = torch.load(folder / 'step_18.pt')
    state['model']['blocks.1.ffn.down.weight'][0, 0] = math.nan
    torch.save(state, folder / 'step_18.pt')
    done = run('train.py', *tiny, f'--out_dir={folder}', '--replay=18')
    assert done.returncode == 2 and 'step 18: rows 8 to 11 of phase long' in done.stdout
    last = done.stderr.splitlines()[-1]                          # after torch's own trace
    assert re.match("train.py: micro-batch 1 of 1 has loss nan; Function '.*' returned nan", last)
    later = [*tiny, f'--init_from={folder / "step_16.pt"}', f'--out_dir={tmp_path / "later"}']
    assert run('train.py', *later, '--checkpoint_interval=99').returncode == 0
    line = refused(run('train.py', *later, '--replay=3'))
    assert 'began at step 16: there is no step 3' in line
    for file in folder.glob('*.pt'):
        file.unlink()
    line = refused(run('train.py', *tiny, f'--out_dir={folder}', '--replay=2', '--seed=7'))
    assert 'has no checkpoint at or before step 2, and it began otherwise' in line
    line = refused(run('train.py', *tiny, f'--out_dir={folder}', '--replay=20'))
    assert 'replay=20' in line


def test_a_spike_is_recorded_with_its_rows(tiny, tiny_run, tmp_path):
    args = [*tiny, f'--out_dir={tmp_path / "run"}', '--phases.stable.steps=60',
            '--phases.decay.steps=0', '--phases.long.steps=0', '--eval_interval=1000',
            f'--init_from={tiny_run}', '--init_step=0', '--learning_rate=0', '--embedding_lr=0']
    config = tmp_path / 'spike.py'                                # one batch of noise
    config.write_text("""
import sys
_main = sys.modules['__main__']
_get_batch = _main.get_batch
def _other(data, weights, rows, *rest):
    x, y = _get_batch(data, weights, rows, *rest)
    return (x, y * 0 + 500) if rows[0] == 55 * 4 else (x, y)
_main.get_batch = _other
""")
    told = run('train.py', *args, config).stdout
    entry = log(tmp_path / 'run')[55]
    assert entry['rows'] == [220, 224] and entry['spike'] > 0
    assert 'step 55: loss' in told and '--replay=55' in told and told.count('is a spike') == 1


def test_resume_refuses_another_run_and_tells_of_harmless_changes(tiny_run, tiny, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / 'run')
    (folder / 'step_20.pt').unlink()
    before = (folder / 'log.jsonl').read_text()
    for flag, told in (('--learning_rate=0.02', 'learning_rate: 0.01 -> 0.02'),
                       ('--phases.decay.data.stdlib=0.5', 'phases.decay.data.stdlib: 0.4 -> 0.5'),
                       ('--phases.decay.data={"stdlib": 0.4, "arith": 0.6}', 'decay.data: ['),
                       ('--seed=1', 'seed: 1337 -> 1'), ('--n_embd=64', 'n_embd: 32 -> 64')):
        line = refused(run('train.py', *tiny, f'--out_dir={folder}', '--resume', flag))
        assert told in line
    assert (folder / 'log.jsonl').read_text() == before
    done = run('train.py', *tiny, f'--out_dir={folder}', '--resume=True', '--keep=1')
    assert done.returncode == 0 and 'resume: keep: 2 -> 1' in done.stdout
    assert log(folder) == log(tiny_run)


@pytest.mark.parametrize('change', [
    'weight_decay=0.2', 'beta1=0.8', 'beta2=0.9', 'momentum=0.9', 'muon_split', 'grad_clip=2.0',
    'embedding_lr=0.02', 'completion_only', 'init_std=0.2', 'input_scale=10.0', 'output_scale=2.0',
    'residual_scale=2.0', 'attention_scale=2.0', 'rope_theta=1e4', 'norm_eps=1e-6',
    'mup_base_width=64', 'mup_rules=authors', 'mup_break=logits', 'muon_lr_scaling=1/m',
    'steps_scale=2.0', 'phases.decay.optimizer=adamw', 'phases.decay.lr=(0, 1, 0.2)',
    'phases.long.batch=8', 'phases.long.block_size=64', 'fp8', 'fp8_amax_history_len=64',
    'fp8_margin=1', 'fp8_format=e4m3'])
def test_resume_refuses_whatever_decides_what_is_learned(change, tiny_run, tiny, monkeypatch,
                                                         capsys):
    argv = ['train.py', *tiny, f'--out_dir={tiny_run}', '--resume', f'--{change}']
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit, match='2'):
        runpy.run_path(train.__file__, run_name='__main__')      # here: a second less for each
    line, name = capsys.readouterr().err, change.partition('=')[0]
    assert line.count('\n') == 1 and f' {name}: ' in line, line


def test_a_checkpoint_of_before_a_knob_resumes_with_the_knobs_default(tiny_run, tiny, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / 'run')
    (folder / 'step_20.pt').unlink()
    state = torch.load(folder / 'step_18.pt', weights_only=True)
    del state['knobs']['muon_split'], state['knobs']['grad_clip']
    torch.save(state, folder / 'step_18.pt')
    line = refused(run('train.py', *tiny, f'--out_dir={folder}', '--resume', '--grad_clip=2'))
    assert 'grad_clip: 1.0 -> 2.0' in line
    assert run('train.py', *tiny, f'--out_dir={folder}', '--resume').returncode == 0
    assert log(folder) == log(tiny_run)


def test_the_decay_alone_with_another_optimizer_and_the_stable_phase_extended(
        tiny_run, tiny, tmp_path):
    start = f'--init_from={tiny_run / "step_8.pt"}'
    # the same decay again: equal to the run that it branches from
    run('train.py', *tiny, start, f'--out_dir={tmp_path / "same"}')
    assert log(tmp_path / 'same') == log(tiny_run)[8:]
    # AdamW goes on with its state, on the same text and rows
    done = run('train.py', *tiny, start, f'--out_dir={tmp_path / "adamw"}',
               '--phases.decay.optimizer=adamw')
    assert done.returncode == 0, done.stderr
    ours, theirs = log(tmp_path / 'adamw')[0], log(tiny_run)[8]
    assert ours['loss'] == theirs['loss'] and 'note' not in ours
    state = read_checkpoint(tmp_path / 'adamw' / 'step_16.pt')['optimizer_state']
    assert {(len(s), s['step'].item()) for s in state.values()} == {(3, 16.0)}
    # a longer stable phase
    run('train.py', *tiny, start, f'--out_dir={tmp_path / "longer"}', '--phases.stable.steps=12',
        '--phases.decay.steps=0', '--phases.long.steps=0')
    assert [line['step'] for line in log(tmp_path / 'longer')] == [8, 9, 10, 11]
    unbroken = tmp_path / 'unbroken'
    run('train.py', *tiny, f'--out_dir={unbroken}', '--phases.stable.steps=12',
        '--phases.decay.steps=0', '--phases.long.steps=0')
    assert log(tmp_path / 'longer')[-1]['loss'] == log(unbroken)[-1]['loss']
    # another step than its own: the weights alone, although AdamW goes on
    done = run('train.py', *tiny, start, '--init_step=4', f'--out_dir={tmp_path / "again"}',
               '--phases.decay.steps=0', '--phases.long.steps=0')
    assert re.search(r"begins with .*step_8.pt: weights\n", done.stdout)
    assert [line['tokens'] for line in log(tmp_path / 'again')] == [256, 512, 768, 1024]
    state = read_checkpoint(tmp_path / 'again')['optimizer_state']
    assert {s['step'].item() for s in state.values()} == {4.0}
    # or a curriculum of one's own from its weights
    run('train.py', *tiny, start, '--init_step=0', f'--out_dir={tmp_path / "new"}')
    first = log(tmp_path / 'new')[0]
    assert first['step'] == 0 and first['loss'] < log(tiny_run)[0]['loss'] - 1


def agree(ours, theirs):
    """Two runs in fp32 differ by the order of their sums, everywhere: one part in a million here.

    A loss is logged before the step that follows from it, and AdamW's steps are blind to a factor
    on all gradients: so the weights, their moments and the norms of the gradients are compared too.
    """
    lines, right = log(ours), log(theirs)
    for key in ('step', 'phase', 'tokens', 'lr', 'embedding_lr'):
        assert [line[key] for line in lines] == [line[key] for line in right]
    for key, tolerance in (('loss', 1e-5), ('grad_norm', 1e-4)):
        assert [line[key] for line in lines] == \
            pytest.approx([line[key] for line in right], rel=tolerance), key
    files, right_files = checkpoints(ours), checkpoints(theirs)
    assert [file.name for file in files] == [file.name for file in right_files]
    assert {'step_8.pt', 'step_16.pt', 'step_20.pt'} <= {file.name for file in files}
    for file, right_file in zip(files, right_files):
        a, b = read_checkpoint(file), read_checkpoint(right_file)
        for part, tolerance in (('model', 1e-4), ('optimizer_state', 1e-3)):
            found, wanted = (flat(state[part]) for state in (a, b))
            assert found.keys() == wanted.keys()
            for name, t in wanted.items():
                assert (found[name] - t).norm() <= tolerance * t.norm(), (file.name, name)


def flat(state):
    """{name: tensor} of a dict of tensors, or of dicts of them."""
    tensors = {}
    for name, value in state.items():
        if isinstance(value, dict):
            tensors |= {f'{name} {key}': t for key, t in value.items()}
        else:
            tensors[name] = value
    return tensors


@pytest.mark.parametrize('flags', [[], ['--completion_only']], ids=['all tokens', 'completions'])
def test_accumulation_changes_nothing_but_rounding(tiny, data_dir, tmp_path, flags):
    counting = tmp_path / 'counting.py'                           # the rows of each micro-batch
    counting.write_text("""
import os, sys
_main = sys.modules['__main__']
_get_batch = _main.get_batch
def _counting(data, weights, rows, *rest):
    if isinstance(rows, range):                                  # the loop's, not the check before
        with open(_main.out_dir + '.rows', 'a') as f:
            f.write(f'{len(rows)} ')
    return _get_batch(data, weights, rows, *rest)
_main.get_batch = _counting
""")
    rows = {}
    for name, size in (('whole', 4096), ('parts', 64)):
        done = run('train.py', *tiny, counting, '--dtype=float32', *flags,
                   f'--micro_batch_tokens={size}', f'--out_dir={tmp_path / name}')
        assert done.returncode == 0, done.stderr
        rows[name] = [int(n) for n in (tmp_path / f'{name}.rows').read_text().split()]
    assert rows['whole'] == [4] * 8 + [8] * 8 + [4] * 4           # a batch at once
    assert rows['parts'] == [1] * sum(rows['whole'])              # or row by row
    agree(tmp_path / 'parts', tmp_path / 'whole')
    # and the first step's gradient is that of the mean loss of its 4 rows, in float64
    torch.manual_seed(1337)
    model = Xmodel(read_checkpoint(tmp_path / 'whole')['config']).double()
    x, y = get_batch(open_data(data_dir, ['stdlib'], 512), {'stdlib': 1.0}, range(4), 64, 1337)
    loss = torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    first = log(tmp_path / 'parts')[0]
    assert first['loss'] == pytest.approx(loss.item(), rel=1e-5)
    assert first['grad_norm'] == pytest.approx(norm.item(), rel=1e-4)


def test_a_clip_of_0_leaves_gradients_alone(tiny, tmp_path):
    for name, clip in (('none', 0.0), ('far away', 1e9)):
        done = run('train.py', *tiny, f'--out_dir={tmp_path / name}', f'--grad_clip={clip}',
                   '--phases.decay.steps=0', '--phases.long.steps=0', '--checkpoint_interval=99')
        assert done.returncode == 0, done.stderr
    none, far_away = log(tmp_path / 'none'), log(tmp_path / 'far away')
    assert none == far_away and none[-1]['loss'] < none[0]['loss'] - 1
    assert max(line['grad_norm'] for line in none) > 1           # there was something to clip


def test_a_spike_after_the_change_of_optimizer_is_reported(tiny, tmp_path):
    done = run('train.py', *tiny, f'--out_dir={tmp_path / "run"}',
               '--phases.decay.lr=(0, 400, 400)')
    assert re.search(r'step \d+: loss .* 4 deviations over the 50 steps before', done.stdout)


def test_other_data_and_a_harmless_change_of_optimizer_are_no_spikes(tiny, tiny_run, tmp_path):
    done = run('train.py', *tiny, f'--out_dir={tmp_path / "run"}', f'--init_from={tiny_run}',
               '--init_step=0', '--learning_rate=0', '--embedding_lr=0', '--eval_interval=1000',
               '--phases.stable.steps=55', '--phases.stable.data={"arith": 1.0}',
               '--phases.decay.steps=50', '--phases.decay.data={"arith": 1.0}',
               '--phases.long.steps=5', '--phases.long.data={"stdlib": 1.0}')
    assert done.returncode == 0, done.stderr
    lines = log(tmp_path / 'run')
    losses = [line['loss'] for line in lines]
    before = losses[55:105]
    assert min(losses[105:]) > statistics.fmean(before) + 6 * statistics.pstdev(before)
    assert lines[55]['note'].startswith('optimizer adamw -> muon')
    assert 'spike' not in done.stdout and 'deviations' not in done.stdout
    assert not any('spike' in line for line in lines)


def test_a_checkpoint_holds_its_own_step_though_it_is_written_later(tiny, tmp_path):
    config = tmp_path / 'late.py'        # step 8's is written while step 10 has begun
    config.write_text("""
import sys, threading, torch
_main, _on, _save = sys.modules['__main__'], threading.Event(), torch.save
_get_batch = _main.get_batch
def _telling(data, weights, rows, *rest):
    if len(weights) == 2 and rows[0] == 16:
        _on.set()
    return _get_batch(data, weights, rows, *rest)
def _late(state, f):
    if state['step'] == 8:
        assert _on.wait(60)
    _save(state, f)
_main.get_batch, torch.save = _telling, _late
""")
    flags = ['--fp8=True', '--compile=False', '--checkpoint_interval=100']
    done = run('train.py', *tiny, config, *flags, f'--out_dir={tmp_path / "late"}')
    assert done.returncode == 0, done.stderr
    run('train.py', *tiny, *flags, f'--out_dir={tmp_path / "ends"}', '--phases.decay.steps=0',
        '--phases.long.steps=0')                                 # this one ends with step 8
    late, right = (read_checkpoint(tmp_path / name / 'step_8.pt') for name in ('late', 'ends'))
    for key in ('model', 'optimizer_state', 'fp8', 'recent', 'watch', 'tokens', 'step'):
        assert same(late[key], right[key]), key


def test_compiled_blocks_give_the_eager_loss_and_what_fails_stays_eager(tiny_run, monkeypatch):
    from contextlib import nullcontext
    model, _ = load_model(tiny_run)
    x = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))
    assert try_compile(model, x, x, nullcontext()).startswith('compiled for 2 x 64')
    assert model.blocks[0]._compiled_call_impl is not None
    for wrong in (lambda *args: torch.tensor(0.0, requires_grad=True), lambda *args: 1 / 0):
        def set_wrong(on, wrong=wrong):
            type(model).set_compiled(model, False)
            if on:
                model.cross_entropy = wrong
        monkeypatch.setattr(model, 'set_compiled', set_wrong)
        assert 'going on in eager mode' in try_compile(model, x, x, nullcontext())
        assert model.cross_entropy is not wrong


def test_missing_data_are_made_where_the_config_says_how(tmp_path):
    done = run('train.py', 'config/nano.py', '--steps_scale=0.02', f'--out_dir={tmp_path / "run"}',
               f'--data_dir={tmp_path / "data"}', '--sources.arith=arith --num_docs=300')
    assert done.returncode == 0, done.stderr
    assert 'data/arith is missing, so: python data_prep.py arith --num_docs=300' in done.stdout
    phases = [line['phase'] for line in log(tmp_path / 'run')]
    assert phases == ['stable1', 'stable2', 'decay', 'long']


def test_sample_and_eval_of_a_run(tiny_run):
    first, second = (run('sample.py', tiny_run, '--prompt=def f', '--max_new_tokens=20',
                         '--num_samples=2') for _ in range(2))
    assert first.stdout == second.stdout and first.stdout.startswith('def f')
    assert first.stdout.count('def f') >= 2 and first.stderr.count('tok/s') == 1
    piped = run('sample.py', tiny_run, '--prompt=-', '--temperature=0.0', stdin='import os')
    assert piped.stdout.startswith('import os')
    done = run('eval.py', tiny_run, '--problems=20', '--block_size=64', '--eval_tokens=2000')
    assert done.returncode == 0, done.stderr
    assert re.search(r'\| stdlib \| \d', done.stdout) and 'of 20 solved' in done.stdout


def test_weights_that_tell_of_no_data_are_scored_on_all_in_a_folder(tiny_run, data_dir, tmp_path):
    args = ('--problems=20', '--block_size=64', '--eval_tokens=2000', f'--data_dir={data_dir}')
    bare_weights(tiny_run, tmp_path / 'step_0.pt')
    shutil.copy(tiny_run / 'step_20.pt', tmp_path)
    told = [run('eval.py', tmp_path / f'step_{n}.pt', *args).stdout.split('\n', 2)[2]
            for n in (0, 20)]
    assert sorted(told[0].splitlines()) == sorted(told[1].splitlines()) and '| arith |' in told[0]


def wrong_checkpoint(path):
    path.write_bytes(b'not a checkpoint')
    return path


def exiting_config(path):
    path.write_text('import sys\nsys.exit(3)\n')
    return path


def bare_weights(tiny_run, path, **changed):
    """A checkpoint that says nothing of the data."""
    torch.save(torch.load(tiny_run / 'step_20.pt') | {'knobs': {}} | changed, path)
    return path


def ruined(tiny_run, path):
    checkpoint = torch.load(tiny_run / 'step_20.pt', weights_only=True)
    checkpoint['model']['blocks.0.attn.qkv.weight'][0, 0] = math.nan
    torch.save(checkpoint, path)
    return path


def with_config_json(folder):
    folder.mkdir()
    (folder / 'config.json').write_text('{}')
    return folder


def other_meta(data_dir, path, text=None, **changes):
    """A copy of the data whose arith/meta.json is changed."""
    shutil.copytree(data_dir, path)
    file = path / 'arith' / 'meta.json'
    file.write_text(text or json.dumps(json.loads(file.read_text()) | changes))
    return path


def other_moments(run, path):
    """A checkpoint whose moments of the embedding have other rows."""
    state = torch.load(run / 'step_18.pt')
    own = state['optimizer_state']['embed.weight']
    own['exp_avg'] = own['exp_avg'][:3]
    torch.save(state, path)
    return path


WRONG = {   # name: (script, arguments from (tmp_path, tiny_run, data_dir), what the line tells)
    'no such config': ('train.py', lambda t, r, d: ['config/nan.py'], 'config/nano.py'),
    'unknown key': ('train.py', lambda t, r, d: ['--learning_rat=1.0'], "'learning_rate'"),
    'wrong type': ('train.py', lambda t, r, d: ['--n_layer=2.5'], 'n_layer'),
    'wrong choice': ('train.py', lambda t, r, d: ['--mup_rules=spp'], "'sp'"),
    'no value': ('train.py', lambda t, r, d: ['--n_layer'], 'n_layer'),
    'unknown phase': ('train.py', lambda t, r, d: ['--phases.decai.steps=1'], "'decay'"),
    'wrong phase': ('train.py', lambda t, r, d: ['--phases.decay.optimizer=sgd'], 'adamw, muon'),
    'wrong lr': ('train.py', lambda t, r, d: ['--phases.decay.lr=(1, 2)'], '(start, peak, end)'),
    'a phase that is none': ('train.py', lambda t, r, d: ['--phases=[1]'], 'should be a dict'),
    'weight as text': ('train.py', lambda t, r, d:
                       ['--phases.decay.data={"stdlib": "much"}', f'--data_dir={d}'], "'much'"),
    'a config that exits': ('train.py', lambda t, r, d: [exiting_config(t / 'c.py')], 'SystemExit'),
    'norm_eps': ('train.py', lambda t, r, d: ['--norm_eps=-1.0'], 'norm_eps=-1.0'),
    'keep': ('train.py', lambda t, r, d: ['--keep=-3'], 'keep=-3'),
    'beta1': ('train.py', lambda t, r, d: ['--beta1=2.0'], 'beta1=2.0'),
    'nan': ('train.py', lambda t, r, d: ['--learning_rate=float("nan")'], 'learning_rate'),
    'seed': ('train.py', lambda t, r, d: [f'--seed={2**70}'], 'seed='),
    'empty curriculum': ('train.py', lambda t, r, d: ['--phases=[]'], 'phases'),
    'missing data': ('train.py', lambda t, r, d: [f'--data_dir={t}'], 'python data_prep.py'),
    'data of another source': ('train.py', lambda t, r, d:
                               ['--sources.arith=stdlib', f'--data_dir={d}'], '--data_dir=NEW'),
    'source no text': ('train.py', lambda t, r, d:
                       ['--sources.arith=3', f'--data_dir={d}'], 'sources.arith=3'),
    'source half quoted': ('train.py', lambda t, r, d:
                           ['--sources.arith="a b', f'--data_dir={d}'], 'quoting'),
    'other V': ('train.py', lambda t, r, d: ['--vocab_size=1024'], 'vocab_size'),
    'block_size over data': ('train.py', lambda t, r, d: ['--phases.long.block_size=9999999'],
                             'block_size=9999999'),
    'heads': ('train.py', lambda t, r, d: ['--n_head=3'], 'n_head=3 does not divide n_embd=32'),
    'kv heads': ('train.py', lambda t, r, d: ['--n_kv_head=3'], 'n_kv_head=3'),
    'device': ('train.py', lambda t, r, d: ['--device=abacus'], 'abacus'),
    'device without data': ('train.py', lambda t, r, d: ['--device=meta'], "device='meta'"),
    'no such device': ('train.py', lambda t, r, d: ['--device=cuda:99'], 'cuda:99'),
    'a run is there': ('train.py', lambda t, r, d: [f'--out_dir={r}'], '--resume'),
    'foreign checkpoint': ('train.py', lambda t, r, d:
                           [f'--init_from={wrong_checkpoint(t / "x.pt")}'], 'x.pt'),
    'no checkpoint': ('train.py', lambda t, r, d: ['--init_from=nowhere.pt'], 'nowhere.pt'),
    'other shape': ('train.py', lambda t, r, d: [f'--init_from={r}', '--n_layer=3'],
                    'n_layer: 2 -> 3'),
    'past the end': ('train.py', lambda t, r, d: [f'--init_from={r}'], '--init_step=0'),
    'damaged meta.json': ('train.py', lambda t, r, d:
                          [f'--data_dir={other_meta(d, t / "d", text="{")}'], 'meta.json'),
    'truncated data': ('train.py', lambda t, r, d:
                       [f'--data_dir={other_meta(d, t / "d", val={"tokens": 7})}'], '.bin'),
    'empty prompt': ('sample.py', lambda t, r, d: [r, '--prompt='], 'prompt'),
    'top_p': ('sample.py', lambda t, r, d: [r, '--top_p=0.0'], 'top_p'),
    'sample device': ('sample.py', lambda t, r, d: [r, '--device=meta'], 'meta'),
    'sample seed': ('sample.py', lambda t, r, d: [r, '--seed=-1'], 'seed=-1'),
    'long name': ('sample.py', lambda t, r, d: ['x' * 300], 'does not exist'),
    'no run to sample': ('sample.py', lambda t, r, d: [t / 'none'], 'none'),
    'no run to score': ('eval.py', lambda t, r, d: [t], 'no checkpoint'),
    "Hugging Face's folder": ('eval.py', lambda t, r, d: [with_config_json(t / 'hf')],
                              f'--from_hf {os.sep}'),
    'odd step': ('eval.py', lambda t, r, d: [bare_weights(r, t / 'w.pt', step='a')], 'w.pt'),
    'no such step': ('sample.py', lambda t, r, d: [r / 'step_7.pt'], 'there: 8, '),
    'ruined weights': ('sample.py', lambda t, r, d: [ruined(r, t / 'w.pt'), '--max_new_tokens=20'],
                       'are not finite'),
    'system without chat': ('sample.py', lambda t, r, d: [r, '--system=S'], '--chat'),
    'weights alone': ('eval.py', lambda t, r, d: [bare_weights(r, t / 'w.pt')], 'no data sets'),
    'data in a file': ('eval.py', lambda t, r, d: [r, f'--data_dir={wrong_checkpoint(t / "f")}'],
                       'meta.json'),
    'data gone': ('eval.py', lambda t, r, d: [r, f'--data_dir={t}'], 'meta.json'),
    'no source': ('data_prep.py', lambda t, r, d: [t / 'none'], 'none'),
    'V too small': ('data_prep.py', lambda t, r, d: ['arith', '--vocab_size=100',
                                                     f'--out_dir={t / "x"}'], 'vocab_size=100'),
    'a name that is none': ('train.py', lambda t, r, d: ['--phases.decay.data={1: 1.0}'],
                            '{data set: weight}'),
    'huge batch': ('train.py', lambda t, r, d: ['--phases.decay.batch=10000000000'], 'below'),
    'huge lr': ('train.py', lambda t, r, d: [f'--phases.decay.lr=(0, 1{"0" * 400}, 1)'],
                'in units of the learning rate'),
    'too large a model': ('train.py', lambda t, r, d: ['--n_embd=1000000', '--n_ffn=1000000'],
                          'cannot hold this model'),
    'a device as checkpoint': ('train.py', lambda t, r, d: ['--init_from=/dev/zero'], 'not exist'),
    'moments of another shape': ('train.py', lambda t, r, d: [
        f'--init_from={other_moments(r, t / "w.pt")}'], 'is not a checkpoint of train.py'),
    'warmup longer than steps': ('train.py', lambda t, r, d: ['--phases.long.warmup=9'],
                                 "'long': its warmup is longer than its steps=4"),
    'a source of no phase': ('train.py', lambda t, r, d: ['--sources.arit=x'],
                             "unknown key 'arit', the nearest is 'arith'; a phase takes another"),
    'no out_dir': ('train.py', lambda t, r, d: ['--out_dir='], 'out_dir is empty'),
    'no data_dir': ('train.py', lambda t, r, d: ['--data_dir='], 'data_dir is empty'),
    'no run to look at': ('train.py', lambda t, r, d: ['--replay=3'], 'holds no run whose step'),
    'no GPU': ('lab.plan', lambda t, r, d: ['--gpus=0'], 'gpus=0 should be at least 1'),
    'a space for =': ('train.py', lambda t, r, d: ['--keep', '3'], 'without a space: --keep=3'),
    'GPUs after a space': ('lab.plan', lambda t, r, d: ['--gpus', '8'], '--gpus=8'),
    'GPUs as text': ('lab.plan', lambda t, r, d: ['--gpus=many'], 'gpus=many'),
    'no such GPU': ('lab.plan', lambda t, r, d: ['--gpu=h300'], "'a100', 'h100'"),
    'a GPU without FP8': ('lab.plan', lambda t, r, d: ['--gpu=a100'], '--fp8=False'),
    'unknown key of a plan': ('lab.plan', lambda t, r, d: ['--gpsu=8'], "unknown key 'gpsu'"),
    'heads of a plan': ('lab.plan', lambda t, r, d: ['--n_head=7'], 'does not divide n_embd=1536'),
    'sizes for FP8': ('lab.plan', lambda t, r, d: ['--n_ffn=3841'], 'multiples of 16'),
    'no tokens': ('lab.plan', lambda t, r, d: ['--micro_batch_tokens=0'], 'micro_batch_tokens=0'),
    'steps_scale': ('lab.plan', lambda t, r, d: ['--steps_scale=-1'], 'steps_scale=-1'),
    'no config of a plan': ('lab.plan', lambda t, r, d: ['config/nothing.py'], 'no such file'),
    'a plan of a model alone': ('lab.bench', lambda t, r, d: ['--plan', '--rounds=2'], "'rounds'"),
    'unknown variant': ('lab.bench', lambda t, r, d: ['--variants=ours'], "'ours' should be one"),
    'unknown rule': ('lab.coord_check', lambda t, r, d: ['--break=lr'], "mup_break='lr'"),
    'no grid': ('lab.sweep', lambda t, r, d: ['transfer', '--widths=wide'], "widths='wide'"),
    'no run to draw': ('lab.plot', lambda t, r, d: [t / 'none'], 'none'),
    'nothing to export': ('export.py', lambda t, r, d: [t / 'none', t / 'hf'], 'none'),
    'no checkpoint to show': ('checkpoint.py', lambda t, r, d: [t / 'none'], 'does not exist'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_use_is_refused_in_one_line(name, tiny, tiny_run, data_dir, tmp_path):
    script, arguments, told = WRONG[name]
    work = tmp_path / 'work'
    work.mkdir()
    args = arguments(work, tiny_run, data_dir)
    there = sorted(work.rglob('*'))
    if script == 'train.py':
        args = [*([] if name == 'no such config' else tiny), f'--out_dir={tmp_path / "run"}', *args]
    line = refused(run(script, *args))
    name = script if script.endswith('.py') else script.removeprefix('lab.') + '.py'
    assert line.startswith(f'{name}: ') and told in line
    assert sorted(work.rglob('*')) == there and not (tmp_path / 'run').exists()


def test_the_full_run_says_how_to_make_its_data(tmp_path):
    line = refused(run('train.py', 'config/xmodel25.py', f'--data_dir={tmp_path}',
                       f'--out_dir={tmp_path / "run"}'))
    assert 'ultrafineweb-en is missing' in line and '--vocab_size=129280' in line


# --- beside the proxy's curve ---

def test_a_run_above_its_reference_says_so(tiny, tmp_path):
    short = [*tiny, '--phases.stable.steps=60', '--phases.decay.steps=0', '--phases.long.steps=0',
             '--eval_interval=50']
    proxy, stuck, same = tmp_path / 'proxy', tmp_path / 'stuck', tmp_path / 'same'
    assert run('train.py', *short, f'--out_dir={proxy}').returncode == 0
    follow = [f'--reference={proxy}', '--reference_margin=0.1']
    told = run('train.py', *short, '--learning_rate=0', '--embedding_lr=0', f'--out_dir={stuck}',
               *follow).stdout
    gaps = {line['step'] + 1: line['reference_gap'] for line in log(stuck)
            if 'reference_gap' in line}
    means = [[statistics.fmean(line['loss'] for line in log(folder)[steps])
              for steps in (slice(0, 50), slice(10, 60))] for folder in (stuck, proxy)]
    assert gaps == pytest.approx({50: means[0][0] - means[1][0], 60: means[0][1] - means[1][1]})
    for step, gap in gaps.items():
        assert f"step {step}: loss is {gap:.3f} above that of {proxy}: look at µP's" in told
    told = run('train.py', *short, f'--out_dir={same}', *follow).stdout
    assert 'above that of' not in told and log(same)[-1]['reference_gap'] == 0


def test_a_reference_of_other_steps_is_compared_over_the_same_tokens():
    proxy = [{'tokens': 100 * i, 'loss': 10 - 0.01 * i} for i in range(1, 1201)]
    # 50 steps of 400 tokens that end at token 100 000: the proxy's steps 801 to 1000
    assert reference_gap(proxy, [5.0] * 50, 100_000, 400) == pytest.approx(5 - 0.995)
    assert reference_gap(proxy, [5.0] * 50, 120_000, 400) is not None
    assert reference_gap(proxy, [5.0] * 50, 120_400, 400) is None      # it ends before that
    assert reference_gap([], [5.0] * 50, 200_000, 400) is None


def sft_config(folder, tiny, prompts):
    """Arguments of train.py for two steps of plain text and 12 of SFT documents alone."""
    records = [{'prompt': 'x ' * n, 'completion': f' {i}'} for i, n in enumerate(prompts)]
    (folder / 'sft.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    (folder / 'sft.py').write_text(f"""
sources = {{'sft': '{folder}/sft.jsonl', 'stdlib': 'stdlib --max_mb=0.2'}}
data_dir = '{folder}/data'
completion_only = True
phases = [
    {{'name': 'text', 'steps': 2, 'batch': 2, 'block_size': 32, 'data': {{'stdlib': 1}},
     'optimizer': 'adamw', 'decay': 'constant', 'lr': (0, 1, 1)}},
    {{'name': 'sft', 'steps': 12, 'batch': 1, 'block_size': 32, 'data': {{'sft': 1}},
     'optimizer': 'adamw', 'decay': 'constant', 'lr': (0, 1, 1)}}]
""")
    return [*tiny, str(folder / 'sft.py'), f'--out_dir={folder}/run', '--eval_interval=1000',
            '--log_interval=1']


def test_a_loss_of_no_target_is_none_and_never_0(tiny, tmp_path):
    # of a window of 32 tokens a prompt of 40 leaves nothing, one of 5 a completion
    prompts = [40 if i % 3 else 5 for i in range(300)]
    done = run('train.py', *sft_config(tmp_path, tiny, prompts))
    assert done.returncode == 0, done.stderr
    table = re.search(r'\nsft +sft +32 +([\d,]+) of ([\d,]+) +([\d.]+)% +([\d,]+) of ([\d,]+)\n',
                      done.stdout)
    cut, documents, never_seen, without, windows = (float(n.replace(',', ''))
                                                    for n in table.groups())
    assert cut == pytest.approx(documents * 2 / 3, rel=0.1) and 5 < never_seen < 80
    assert cut == without < windows
    entries = log(tmp_path / 'run')
    losses = [entry['loss'] for entry in entries]
    assert None in losses[2:] and any(losses[2:]) and all(loss != 0 for loss in losses)
    for entry in entries:
        assert entry.get('skipped', False) == (entry['loss'] is None)
    assert f'step {losses.index(None)} is skipped: none of its rows has a target' in done.stdout
    assert 'NaN' not in (tmp_path / 'run/log.jsonl').read_text()
    assert 'loss 0.0' not in done.stdout
    assert entries[-1]['val_losses']['sft'] > 1


def test_data_of_which_no_window_has_a_target_are_refused(tiny, tmp_path):
    done = run('train.py', *sft_config(tmp_path, tiny, [40] * 200))
    told = refused(done)
    assert "phase 'sft': no window of 32 tokens of sft's train split reaches a completion" in told
    assert not (tmp_path / 'run').exists()
    done = run('train.py', *sft_config(tmp_path, tiny, [40] * 200), '--completion_only=False')
    assert done.returncode == 0, done.stderr                   # it learns prompts alone
    assert "no window of 32 tokens of sft's train split reaches a completion" in done.stdout
    shutil.rmtree(tmp_path / 'run')
    flag, = re.findall(r'--phases.sft.block_size=\d+', told)
    done = run('train.py', *sft_config(tmp_path, tiny, [40] * 200), flag)
    assert done.returncode == 0, done.stderr                   # so the advice is right


def test_changed_sources_are_refused_but_a_run_goes_on(tiny, tmp_path):
    args = sft_config(tmp_path, tiny, [5] * 200)
    assert run('train.py', *args, '--phases.sft.steps=2').returncode == 0
    with open(tmp_path / 'sft.jsonl', 'a') as f:
        f.write('{"prompt": "new?", "completion": "yes"}\n')
    told = refused(run('train.py', *args, f'--out_dir={tmp_path}/other'))
    assert f'data/sft was made from {tmp_path}/sft.jsonl when it had 1 files' in told
    command = re.search(r'python (data_prep.py .* --overwrite)', told)[1]
    resumed = run('train.py', *args, '--phases.sft.steps=4', '--resume')
    assert 'data/sft was made' not in resumed.stderr             # its sha256 is what counts
    script, *flags = shlex.split(command)
    assert run(script, *flags).returncode == 0
    assert run('train.py', *args, f'--out_dir={tmp_path}/other').returncode == 0


@pytest.mark.parametrize('name', ['My Drive', "o'brien", 'a --b', 'x"y', ' '])
def test_a_path_that_exists_needs_no_quotes(tmp_path, name):
    (tmp_path / name).mkdir()
    for source in (f'{tmp_path}/{name}', shlex.quote(f'{tmp_path}/{name}')):
        assert source_args({'x': source}, 'x') == [f'{tmp_path}/{name}']
    if '--' not in name and name != ' ':
        assert source_args({'x': f'{tmp_path}/{name} --max_mb=1 --seed=2'}, 'x') == \
            [f'{tmp_path}/{name}', '--max_mb=1', '--seed=2']
