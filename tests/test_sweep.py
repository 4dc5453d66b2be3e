"""sweep.py: trials in processes of their own, resumed after a kill, and what their losses say."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, modules_of_a_run, refused, run

from lab import sweep, trials

CONFIG = """
n_layer, n_head, n_kv_head, n_embd, n_ffn, vocab_size = 1, 1, 1, 32, 80, 512
phases = [
    {'name': 'stable', 'steps': 12, 'batch': 2, 'block_size': 32, 'data': {'stdlib': 1.0},
     'optimizer': 'adamw', 'warmup': 3, 'decay': 'constant', 'lr': (0, 1, 1)},
    {'name': 'decay', 'steps': 6, 'batch': 2, 'block_size': 32, 'data': {'stdlib': 1.0},
     'optimizer': 'muon', 'decay': 'exponential', 'lr': (0, 1, 0.1)},
]
compile = False
"""


@pytest.fixture
def config(tmp_path, data_dir):
    (tmp_path / 'small.py').write_text(CONFIG + f'data_dir = {os.fspath(data_dir)!r}\n')
    return '--config=small.py'


def told(tmp_path, name='transfer'):
    """The result file of a sweep, without what a clock decides."""
    found = json.loads((tmp_path / f'results/{name}/{name}.json').read_text())
    return {k: v for k, v in found.items() if k not in ('hours_of_a_core', 'command')}


def lines(tmp_path, name='transfer'):
    file = tmp_path / 'out/sweep' / name / 'trials.jsonl'
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


TRANSFER = ['transfer', '--widths=32,64', '--exponents=-7,-6', '--seeds=1', '--rules=sp']


def test_a_killed_sweep_goes_on_and_ends_in_the_same_table(tmp_path, config):
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    for folder in (whole, broken):
        folder.mkdir()
        (folder / 'small.py').write_text((tmp_path / 'small.py').read_text())
    unbroken = run('lab.sweep', *TRANSFER, config, cwd=whole)
    assert (unbroken.returncode, unbroken.stderr) == (0, '')
    assert len(lines(whole)) == 4 and {line['status'] for line in lines(whole)} == {'ok'}
    for sign, at_least in ((signal.SIGTERM, 1), (signal.SIGKILL, 2)):
        process = subprocess.Popen(
            [sys.executable, '-m', 'lab.sweep', *TRANSFER, config], cwd=broken, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while len(lines(broken)) < at_least and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(sign)
        _, error = process.communicate()
        if sign == signal.SIGTERM:
            assert error.startswith('sweep.py: stopped') and error.count('\n') == 1
            assert process.returncode == 130
    stood = lines(broken)
    with open(broken / 'out/sweep/transfer/trials.jsonl', 'a') as f:
        f.write('{"flags": ["small.py", "--n_em')                 # as a kill may leave it
    resumed = run('lab.sweep', *TRANSFER, config, cwd=broken)
    assert resumed.returncode == 0 and 2 <= len(stood) < 4
    assert lines(broken)[:len(stood)] == stood and len(lines(broken)) == 4
    assert told(broken) == told(whole)
    tables = [done.stdout.rpartition('\n\n')[0] for done in (unbroken, resumed)]
    assert tables[0] == tables[1] and 'sp: loss of seed 1337 by log2 of lr' in tables[0]


def test_failures_and_nans_are_recorded_and_only_failures_tried_again(tmp_path, config):
    command = ['transfer', '--widths=32', '--exponents=60,60', '--seeds=1', '--rules=sp']
    nan = run('lab.sweep', *command, config, cwd=tmp_path)
    line, = lines(tmp_path)
    assert nan.returncode == 0 and (line['status'], line['loss']) == ('nan', None)
    assert ' has loss ' in line['error'] and 'nan: train.py' in nan.stdout
    run('lab.sweep', *command, config, cwd=tmp_path)
    assert lines(tmp_path) == [line]
    failed = run('lab.sweep', *command, '--name=failing', '--flags=--device=nowhere', config,
                 cwd=tmp_path)
    assert failed.returncode == 2 and "device='nowhere' cannot be used" in failed.stderr
    assert lines(tmp_path, 'failing')[0]['status'] == 'failed'
    file = tmp_path / 'out/sweep/transfer/trials.jsonl'            # had a disk been full, say
    file.write_text(json.dumps({**line, 'status': 'failed', 'error': ''}) + '\n')
    run('lab.sweep', *command, config, cwd=tmp_path)
    assert [x['status'] for x in lines(tmp_path)] == ['nan']


def test_muon_goes_on_from_one_stable_run_a_width(tmp_path, config):
    command = ['transfer', '--optimizer=muon', '--widths=32,64', '--exponents=-6,-6', '--seeds=1',
               '--name=muon', '--rules=1/m,const']
    done = run('lab.sweep', *command, config, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    stable = (tmp_path / 'out/sweep/muon').glob('*/*.pt')
    assert [file.name for file in stable] == ['step_12.pt'] * 2
    assert [len(line['losses']) for line in lines(tmp_path, 'muon')] == [6] * 4
    first = {line['losses'][0] for line in lines(tmp_path, 'muon')}
    assert len(first) == 2                                       # one a width, whatever the scaling
    assert len({line['loss'] for line in lines(tmp_path, 'muon')}) == 4


def test_search_is_the_same_resumed_and_shows_what_its_best_becomes(tmp_path, config):
    command = ['search', '--trials=3', '--steps=6', '--jobs=2', config]
    for sampler in ('tpe', 'sobol'):
        if sampler == 'tpe':
            pytest.importorskip('optuna')
        name = f'--name={sampler}'
        whole = run('lab.sweep', *command, f'--sampler={sampler}', name, cwd=tmp_path)
        assert (whole.returncode, whole.stderr) == (0, '')
        file = tmp_path / 'out/sweep' / sampler / 'trials.jsonl'
        stood = file.read_text()
        file.write_text(''.join(stood.splitlines(True)[:2]))
        again = run('lab.sweep', *command, f'--sampler={sampler}', name,
                    f'--apply={ROOT / "config/xmodel25.py"}', cwd=tmp_path)
        assert again.stdout.startswith(whole.stdout) and len(lines(tmp_path, sampler)) == 3
        losses = sorted(line['loss'] for line in lines(tmp_path, sampler))
        best = json.loads((tmp_path / f'results/{sampler}/search.json').read_text())
        assert best['loss'] == losses[0] and set(best['best']) == set(sweep.RANGES)
        fragment = '\n'.join(f'{k} = {v!r}' for k, v in best['best'].items())
        assert fragment in whole.stdout
        # at m = 6 by the authors' rules, 48 layers
        assert '\n-learning_rate = 0.01\n' in again.stdout
        for sign, has in (('-', {'learning_rate': 0.01, 'init_std': 0.1}), ('+', best['best'])):
            lr, std = has['learning_rate'] / 6, has['init_std'] / math.sqrt(6)
            assert f"\n{sign}# matrix     init std {std:.4g}, lr {lr:.4g}, Muon's lr {lr:.4g}\n" \
                in again.stdout


def test_a_trial_of_other_code_or_text_is_run_again(tmp_path, config, monkeypatch):
    command = ['transfer', '--widths=32', '--exponents=-6,-6', '--seeds=1', '--rules=sp', config]
    run('lab.sweep', *command, cwd=tmp_path)
    (tmp_path / 'small.py').write_text((tmp_path / 'small.py').read_text() + 'momentum = 0.9\n')
    run('lab.sweep', *command, cwd=tmp_path)
    first, second = lines(tmp_path)
    assert first['flags'] == second['flags'] and first['made_of'] != second['made_of']


def test_the_hash_of_a_trial_is_of_all_that_decides_its_loss(tmp_path, data_dir, monkeypatch):
    names = modules_of_a_run()
    files = [tmp_path / f'{name}.py' for name in names] + [tmp_path / 'data/stdlib/meta.json']
    for file in files[:-1]:
        shutil.copy(ROOT / file.name, file)
    files[-1].parent.mkdir(parents=True)
    shutil.copy(data_dir / 'stdlib/meta.json', files[-1])
    monkeypatch.setattr(trials, 'ROOT', tmp_path)
    knobs = {'data_dir': str(tmp_path / 'data'), 'phases': [{'data': {'stdlib': 1.0}}]}
    monkeypatch.setattr(sweep, 'base_knobs', lambda: knobs)
    whole = sweep.made_of.__wrapped__()
    for file in files:
        # not read by a trial, or in meta.json
        if file.stem in ('checkpoint', 'configurator', 'processes', 'tracker'):
            continue
        text = file.read_text(encoding='utf-8')
        file.write_text(text + '\n', encoding='utf-8')
        assert sweep.made_of.__wrapped__() != whole, file.name
        file.write_text(text, encoding='utf-8')
    assert sweep.made_of.__wrapped__() == whole and len(names) > 6
    knobs['seed'] = 1
    assert sweep.made_of.__wrapped__() != whole


def test_a_config_among_the_flags_counts_as_well(tmp_path, config):
    command = ['transfer', '--widths=32', '--exponents=-6,-6', '--seeds=1', '--rules=sp', config,
               '--flags=more.py']
    for text in ('momentum = 0.9', 'norm_eps = 0.1'):
        (tmp_path / 'more.py').write_text(text)
        assert run('lab.sweep', *command, cwd=tmp_path).returncode == 0
    first, second = lines(tmp_path)
    assert first['flags'] == second['flags'] and first['loss'] != second['loss']


def test_each_trial_is_run_once_and_has_its_result_where_it_was_asked_for(tmp_path, monkeypatch):
    ran = []

    def run_trials(todo, jobs, scoring=()):
        for trial in reversed(todo):                             # as one may end before another
            ran.append(*trial)
            yield trial, {'status': 'ok', 'loss': float(trial[0]), 'losses': [], 'seconds': 1}

    monkeypatch.setattr(trials, 'run_trials', run_trials)
    wanted, file = [['3'], ['1'], ['3'], ['2']], tmp_path / 'mine/trials.jsonl'
    for made_of, times in (('code', 1), ('code', 1), ('other code', 2)):     # kept, and run anew
        found = trials.results_of(wanted, file, made_of, 1, {})
        assert [entry['loss'] for entry in found] == [3, 1, 3, 2]
        assert sorted(ran) == sorted(['1', '2', '3'] * times)
    # another sweep takes what this one has run, and no more
    ran.clear()
    file = tmp_path / 'theirs/trials.jsonl'
    assert [entry['loss'] for entry in trials.results_of([['2'], ['4']], file, 'code', 1, {})] == \
        [2, 4]
    assert ran == ['4'] and file.read_text().count('\n') == 2


@pytest.mark.parametrize('n, last', [(47, 4), (7, 1)])
def test_the_loss_of_a_trial_is_the_mean_of_its_last_tenth(tmp_path, monkeypatch, n, last):
    losses = [10 / (i + 1) for i in range(n)]
    script = tmp_path / 'train.py'                               # which writes a log, and no more
    script.write_text(f"""
import json, os, sys
folder, = [a.removeprefix('--out_dir=') for a in sys.argv if a.startswith('--out_dir=')]
os.makedirs(folder)
with open(folder + '/log.jsonl', 'w') as f:
    for i, loss in enumerate({losses}):
        print(json.dumps({{'step': i, 'phase': 'a', 'tokens': i, 'loss': loss, 'lr': 1}}), file=f)
""")
    monkeypatch.setattr(trials, 'TRAIN', script)
    entry = trials.run_trial(['--seed=1'], tmp_path, [])
    assert (entry['status'], len(entry['losses'])) == ('ok', n)
    assert entry['loss'] == pytest.approx(sum(losses[-last:]) / last, abs=1e-5)


def test_a_search_has_ten_tokens_a_parameter_outside_the_embedding(tmp_path, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = []

    def results(wanted, stable_runs):
        tried.extend(wanted)
        return [{'loss': 3.0} for _ in wanted]

    monkeypatch.setattr(sweep, 'prepare_data', lambda: None)
    monkeypatch.setattr(sweep, 'results', results)
    for key, value in {'config': 'small.py', 'command': 'search', 'sampler': 'sobol', 'trials': 2,
                       'jobs': 2, 'name': 'budget'}.items():
        monkeypatch.setattr(sweep, key, value)
    sweep.search(tmp_path / 'results')
    # qkv, output, gate and up, down, three gains; 64 tokens a step
    N = 32 * 96 + 32 * 32 + 32 * 160 + 80 * 32 + 3 * 32
    assert len(tried) == 2
    assert all(f'--phases.stable.steps={math.ceil(10 * N / 64)}' in trial for trial in tried)
    assert all('--phases.decay.steps=0' in trial for trial in tried)


def entries(losses):
    return {key: {'loss': loss, 'losses': [9.0] * 30, 'seconds': 1} for key, loss in losses.items()}


def test_the_price_of_transfer_is_by_seed_and_at_the_best_of_all_seeds():
    losses = {('r', 64, e, s): loss for e, pair in ((-8, (3, 3.2)), (-7, (2.9, 3.4)), (-6, (4, 4)))
              for s, loss in enumerate(pair)}
    losses |= {('r', 128, e, s): loss for e, pair in ((-8, (2.5, 2.6)), (-7, (2.3, 2.5)),
                                                      (-6, (None, 2)))
               for s, loss in enumerate(pair)}
    losses['r', 128, -9, 0] = 0                                  # a single seed decides nothing
    summary = sweep.summarise(entries(losses), ['r'], [64, 128])['r']
    assert summary['carried'] == -8                              # 3.1 against 3.15
    assert summary['sizes'][64]['price'] == [0, 0]
    assert summary['sizes'][128]['best'] == -7                   # a NaN is no good mean
    assert summary['sizes'][128]['price'] == pytest.approx([0.2, 0.1])
    assert len(summary['sizes'][128]['curve']) == 11


@pytest.mark.parametrize('grid, knobs', [
    ('lr', {'learning_rate': 0.125, 'embedding_lr': 0.125}),
    ('embedding_lr', {'embedding_lr': 0.125}), ('init_std', {'init_std': 0.125}),
    ('output_scale', {'output_scale': 0.125})])
def test_a_grid_sets_its_knobs_and_no_others(tmp_path, config, monkeypatch, grid, knobs):
    monkeypatch.setattr(sweep, 'config', os.fspath(tmp_path / 'small.py'))
    monkeypatch.setattr(sweep, 'grid', grid)
    trial = sweep.train_knobs(*sweep.trial_flags('textbook', 128, -3, 7))
    wide = {'n_embd': 128, 'n_head': 2, 'n_ffn': 320, 'seed': 7}
    assert {k: v for k, v in trial.items() if v != sweep.base_knobs()[k] and k != 'phases'} == \
        wide | knobs
    assert {phase['optimizer'] for phase in trial['phases']} == {'adamw'}


def test_values_at_the_edge_of_their_range():
    middle = {key: math.sqrt(low * high) if log else (low + high) / 2
              for key, (low, high, log) in sweep.RANGES.items()}
    assert list(sweep.at_the_edge(middle)) == []
    # a twentieth of the twelve powers of two is 0.6 of one
    odd = middle | {'learning_rate': 2**-14.5, 'embedding_lr': 2**-3.7, 'init_std': 0.195}
    assert list(sweep.at_the_edge(odd)) == ['learning_rate', 'init_std']


@pytest.mark.parametrize('argv, says', [
    ([], "'' should be search or transfer"), (['serach'], "'serach' should be search or transfer"),
    (['transfer', '--widths=64,x'], "widths='64,x' should be"),
    (['transfer', '--depths=0'], "depths='0' should be"),
    (['transfer', '--exponents=-4,-9'], "exponents='-4,-9' should be"),
    (['transfer', '--exponents=3'], "exponents='3' should be"),
    (['transfer', '--rules=textbook,logit'], "mup_break='logit' should be a rule of µP"),
    (['transfer', '--optimizer=muon', '--rules=textbook'], 'muon_lr_scaling=textbook'),
    (['transfer', '--optimizer=muon', '--grid=init_std'], "needs grid='lr'"),
    (['transfer', '--depths=1,2', '--grow=head_size'], 'depths and grow'),
    (['transfer', '--grid=embedding_lr'], "'sp' has no embedding_lr"),
    (['transfer', '--exponents=0,1024'], 'exponents'), (['transfer', '--widths=96'], 'width 96'),
    (['transfer', '--grid=lrs'], "--grid=lrs: 'lrs' should be one of"),
    (['transfer', '--flags=--n_lyer=3'], 'unknown key'), (['transfer', '--config=no.py'], 'no.py'),
    (['transfer', "--flags='"], 'flags'), (['search', '--trials=0'], 'trials=0 should be'),
    (['search', '--apply=no.py'], 'no.py'), (['transfer', '--name=a/../../b'], 'name'),
    (['transfer', '--name=..'], 'name'), (['transfer', '--rules=sp,'], "rules='sp,' should be"),
    (['search', '--seed=4294967296'], 'seed=4294967296 should be'),
    (['search', '--flags=--phases.stable.batch=0'], 'batch=0 should be'),
])
def test_a_mistake_gets_one_line_and_leaves_nothing(tmp_path, config, argv, says):
    before = set(os.listdir(tmp_path))
    flags = [] if any(a.startswith('--config') for a in argv) else [config]
    assert says in refused(run('lab.sweep', *argv, *flags, cwd=tmp_path))
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize('line', [
    b'{"flags": 3}', b'\xff\xfe', b'[]',
    b'{"flags": [], "made_of": "", "status": "ok", "loss": 1.0, "seconds": 1}'])
def test_lines_that_are_no_trials_are_refused(tmp_path, config, line):
    (tmp_path / 'out/sweep/transfer').mkdir(parents=True)
    (tmp_path / 'out/sweep/transfer/trials.jsonl').write_bytes(line + b'\n')
    assert 'trials.jsonl: not the line of a trial' in refused(
        run('lab.sweep', *TRANSFER, config, cwd=tmp_path))


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path, config):
    (tmp_path / 'out').write_text('')
    line = refused(run('lab.sweep', 'transfer', config, cwd=tmp_path))
    assert 'out' in line and 'goes on from the trials that have finished' in line


@pytest.mark.usefixtures('config')
def test_a_search_of_which_all_trials_diverge_has_no_best(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, 'config', str(tmp_path / 'small.py'))
    monkeypatch.setattr(sweep, 'prepare_data', lambda: None)
    monkeypatch.setattr(sweep, 'run_search', lambda n_steps: [(None, {})] * sweep.trials)
    with pytest.raises(SystemExit):
        sweep.search(None)
    assert f'all {sweep.trials} trials diverged' in capsys.readouterr().err


def test_a_sampler_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    assert sweep.make_study() is None                            # auto: Sobol points
    monkeypatch.setattr(sweep, 'sampler', 'tpe')
    with pytest.raises(SystemExit):
        sweep.make_study()
    assert 'pip install optuna, or --sampler=sobol' in capsys.readouterr().err


def test_a_stable_run_that_fails_ends_the_sweep(tmp_path, monkeypatch, capsys):
    failed = [(['--steps=5'], {'status': 'failed', 'error': 'no memory'})]
    monkeypatch.setattr(trials, 'run_trials', lambda missing, jobs, scoring=(): iter(failed))
    with pytest.raises(SystemExit):
        trials.make_checkpoints({tmp_path: ['--steps=5']}, 1)
    assert '--steps=5: no memory' in capsys.readouterr().err
