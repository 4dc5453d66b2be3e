"""lab/ablate.py: statistics, what arms share, and every experiment in its quick form."""
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused, run
from scipy import stats

from checkpoint import checkpoints, read_checkpoint
from lab import ablate, ablate_page, plot, probe, signatures, trials
from lab.ablate import interval
from lab.experiments import EXPERIMENTS, Arm, Comparison, cosine, phase_flags, phase_steps


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Quick knobs, results in tmp_path, and nothing remembered from another test."""
    for key, value in {'quick': True, 'seeds': 2, 'problems': 4, 'jobs': 1,
                       'folder': ablate.RESULTS,
                       'FILE': tmp_path / 'out/ablate/trials.jsonl'}.items():
        monkeypatch.setattr(ablate, key, value)
    for key in ('WINDOWS', 'PROBLEMS', 'ITERATIONS', 'N_STEPS'):  # --quick lowers them: set back
        monkeypatch.setattr(probe, key, getattr(probe, key))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, 'CONFIG', str(ROOT / 'config/ablation.py'))
    ablate.base_knobs.cache_clear()
    ablate.made_of.cache_clear()


@pytest.mark.parametrize('n', range(2, 11))
def test_the_interval_is_that_of_students_t(n):
    rng = random.Random(n)
    a, b = ([rng.gauss(mean, 1) for _ in range(n)] for mean in (3, 3.5))
    mean, error, half = interval([x - y for x, y in zip(a, b)])
    paired = stats.ttest_rel(a, b)
    low, high = paired.confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-4)
    assert mean / error == pytest.approx(paired.statistic)


def test_the_share_of_tokens_is_on_the_line_between_two_budgets():
    def runs(*losses):
        return [{'text': loss} for loss in losses]

    budgets = runs(3.0, 3.1), runs(3.2, 3.2), runs(3.6, 3.4), runs(4.0, 4.1)
    assert ablate.RECIPE_BUDGETS == (1, 0.8, 0.6, 0.4)
    share = ablate.share_of_tokens(runs(3.5, 3.1), *budgets)
    assert share == pytest.approx(interval([0.65, 1.0]))         # a quarter of the way to 80 %
    assert 'with 82.5% ± ' in ablate_page.markdown(
        {'name': 'recipe', 'question': '?', 'command': 'x', 'model': '5 parameters', 'seeds': 2,
         'runs': 2, 'hours': 1, 'quick': False, 'kind': 'ablation', 'comparisons': {},
         'share_of_tokens': share})
    for others in (runs(2.9, 3.1), runs(3.5, 4.2)):              # outside of the budgets
        assert ablate.share_of_tokens(others, *budgets) is None
    assert ablate.share_of_tokens([*runs(3.5), None], *budgets) is None
    assert ablate.share_of_tokens(runs(3.5, 3.2), *reversed(budgets)) is None


def test_every_arm_is_one_that_train_takes():
    for experiment in EXPERIMENTS.values():
        for comparison in experiment(ablate.base_knobs()):
            names = [arm.name for arm in comparison.arms]
            assert len(set(names)) == len(names) > 1
            for arm in comparison.arms:
                assert set(arm.also) <= set(names) - {arm.name}
                flags = ablate.without_variant(arm.flags)
                stable = trials.train_knobs(*ablate.base_flags(), *flags)['phases'][0]
                if isinstance(arm.start, tuple):
                    assert (stable['name'], stable['steps']) == ('stable', arm.start[-1])


def test_an_arm_does_what_its_name_says():
    def arms_of(name):
        knobs = ablate.base_knobs()
        return {arm.name: arm for comparison in EXPERIMENTS[name](knobs) for arm in comparison.arms}

    def phase_of(arm, name):
        phases = trials.train_knobs(*ablate.base_flags(), *arm.flags)['phases']
        return next(phase for phase in phases if phase['name'] == name)

    decays = arms_of('decay_optimizer')
    assert [arm.start for arm in decays.values()] == ['stable', 'fresh', 'stable', 'embedding kept']
    optimizers = [phase_of(arm, 'decay')['optimizer'] for arm in decays.values()]
    assert optimizers == ['adamw', 'adamw', 'muon', 'muon']
    for arm in decays.values():
        decay = phase_of(arm, 'decay')
        assert decay['decay'] == 'exponential' and decay['lr'][1] / decay['lr'][2] == 16
    longs = {name: phase_of(arm, 'long') for name, arm in arms_of('long_context').items()}
    assert longs['long, text alone']['data'] == {'recall': 0.0, 'stdlib': 1.0}
    assert longs['long, no warmup'] == longs['long'] | {'warmup': 0} != longs['long']
    before = arms_of('steps')['before the decay, no sums read yet']
    for phase in (longs['no more steps'], phase_of(before, 'decay')):
        assert (phase['steps'], phase['lr'], phase['embedding_lr']) == (1, (0, 0, 0), (0, 0, 0))


def tokens_of(arm):
    """{data set: tokens} that a run of an arm reads."""
    read = {}
    for phase in trials.train_knobs(*ablate.base_flags(), *arm.flags)['phases']:
        for name, weight in phase['data'].items():
            n = phase['steps'] * phase['batch'] * phase['block_size'] * weight
            read[name] = read.get(name, 0) + n
    return {name: n for name, n in read.items() if n}


@pytest.mark.parametrize('name', ['decay_optimizer', 'switch_timing', 'sft_timing', 'schedule'])
def test_arms_read_equally_much(name):
    for comparison in EXPERIMENTS[name](ablate.base_knobs()):
        first = tokens_of(comparison.arms[0])
        for arm in comparison.arms:
            assert tokens_of(arm) == pytest.approx(first), arm.name


def test_a_learning_rate_is_sought_until_both_neighbours_are_worse(monkeypatch):
    best = {'a': 3, 'b': -1, 'c': 0}
    asked = []

    def fake_run(points, solve):
        assert not solve
        asked.extend(points)
        return {(arm, seed, e): {'status': 'nan' if e > 4 else 'ok', 'name': arm.name, 'e': e}
                for arm, seed, e in points}

    def fake_measured(entry):
        if entry['status'] == 'nan':
            return None
        return {'both': 2 + abs(entry['e'] - best[entry['name']])}

    monkeypatch.setattr(ablate, 'quick', False)
    monkeypatch.setattr(ablate, 'run', fake_run)
    monkeypatch.setattr(ablate, 'measured', fake_measured)
    arms = [Arm(name) for name in best]
    found, tried = ablate.best_exponents(arms)
    assert {arm.name: e for arm, e in found.items()} == best
    assert sorted(tried[arms[0]]) == [-1, 0, 1, 2, 3, 4] and sorted(tried[arms[2]]) == [-1, 0, 1]
    assert {seed for _, seed, _ in asked} == {ablate.first_seed} and len(asked) == len(set(asked))


def test_the_result_has_other_seeds_than_the_search_and_each_rate_its_flag(monkeypatch):
    asked = []

    def fake_run(points, keep):
        asked.extend(points)
        return {point: {'status': 'nan' if point[0].name == 'a' else 'ok', 'seconds': 1,
                        'of': point} for point in points}

    def fake_measured(entry):
        arm, seed, _ = entry.get('of')
        return None if entry['status'] == 'nan' else {'text': float(arm.guess * seed)}

    monkeypatch.setattr(ablate, 'quick', False)
    monkeypatch.setattr(ablate, 'seeds', 3)
    monkeypatch.setattr(ablate, 'best_exponents',
                        lambda arms: ({arm: arm.guess + 1 for arm in arms},
                                      {arm: {} for arm in arms}))
    monkeypatch.setattr(ablate, 'run', fake_run)
    monkeypatch.setattr(ablate, 'measured', fake_measured)
    b, c = Arm('b', (), '', 1), Arm('c', (), '', 2)
    table = ablate.compare(Comparison('x', [b, c]))
    assert {(arm.name, exponent) for arm, _, exponent in asked} == {('b', 2), ('c', 3)}
    assert sorted({seed for _, seed, _ in asked}) == [ablate.first_seed + i for i in (1, 2, 3)]
    mean = sum(range(ablate.first_seed + 1, ablate.first_seed + 4)) / 3
    assert table['c']['difference']['text'][0] == pytest.approx(mean)
    assert [table['b']['exponent'], table['c']['exponent']] == [2, 3]
    d = c._replace(name='d', guess=4, also=('c',))
    table = ablate.compare(Comparison('x', [b, c, d]))
    assert table['d']['difference']['text'][0] == pytest.approx(3 * mean)
    assert table['d']['also']['c']['text'][0] == pytest.approx(2 * mean)
    diverged = ablate.compare(Comparison('x', [Arm('a'), b, c]))      # nothing to compare to
    assert not any(row.get('difference') for row in diverged.values())
    rates = [trials.train_knobs(*ablate.trial_flags(b, 1, i))['learning_rate'] for i in (-1, 0, 2)]
    assert rates == [0.005, 0.01, 0.04]


def test_a_checkpoint_is_not_compared_with_one_that_diverged(monkeypatch):
    probed = []

    def fake_measure(kind, point, first):
        probed.append((point[0].name, point[1], first[0].name, first[1]))
        return {'far': point[1]}

    def fake_measured(entry):
        return {'text': 1.0} if entry != ('a', ablate.first_seed + 1) else None

    monkeypatch.setattr(ablate, 'run', lambda points, keep: {p: (p[0].name, p[1]) for p in points})
    monkeypatch.setattr(ablate, 'measured', fake_measured)
    monkeypatch.setattr(ablate, 'measure_checkpoint', fake_measure)
    table = ablate.compare(Comparison('x', [Arm('a'), Arm('b')], 'length'))
    seed = ablate.first_seed + 2
    assert probed == [(name, seed, 'a', seed) for name in 'ab']
    assert list(table['b']['mean']) == ['text'] and 'mean' not in table['a']


def test_code_that_changes_in_between_ends_the_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trials, 'run_trials', lambda todo, *more: [(trial, {}) for trial in todo])
    monkeypatch.setattr(trials, 'CODE_AT_START', ['older'])
    file = tmp_path / 'out/ablate/trials.jsonl'
    with pytest.raises(SystemExit):
        trials.results_of([['--seed=1']], file, 'made of', 1, {})
    assert 'the code has changed since this program began' in capsys.readouterr().err
    assert file.read_text() == ''


def test_two_at_once_are_refused(monkeypatch, capsys):
    lock = ablate.take_folder(ablate.FILE.parent)
    monkeypatch.setattr(ablate, 'command', 'recipe')
    with pytest.raises(SystemExit):
        ablate.main()
    assert f'{ablate.FILE.parent} is in use by process {os.getpid()}' in capsys.readouterr().err
    lock.close()


def test_a_stable_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, 'run_script', run_here)
    knobs = ablate.base_knobs()
    trials.prepare_data_of(knobs)
    folder, trial = ablate.run_before('stable', 1)
    assert run('train.py', *trial, '--checkpoint_interval=2', '--keep=9',
               cwd=tmp_path).returncode == 0
    for file in Path(folder).glob('step_*.pt'):
        if file.name != 'step_2.pt':
            file.unlink()                                        # as if it had been stopped there
    trials.make_checkpoints({folder: trial}, 1)
    assert trials.is_complete(folder) and Path(folder, 'step_6.pt').exists()
    monkeypatch.setattr(trials, 'run_script', None)              # it is not run again
    trials.make_checkpoints({folder: trial}, 1)


def test_an_extended_stable_phase_goes_on_and_ends_as_one_made_at_once(monkeypatch):
    monkeypatch.setattr(trials, 'run_script', run_here)
    trials.prepare_data_of(ablate.base_knobs())
    ablate.make_starts([((200, 300), 1), ((300,), 1)])
    shorter, extended, at_once = (Path(ablate.start_folder(start, 1))
                                  for start in ((200,), (200, 300), (300,)))
    about = json.loads((extended / 'run.json').read_text())
    assert about['first_step'] == 4 and checkpoints(shorter) == [shorter / 'step_4.pt']
    weights = [read_checkpoint(folder)['model'] for folder in (extended, at_once)]
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())


def test_shares_of_the_decay_and_the_end_of_the_cosine():
    def phases(flags):
        return trials.train_knobs(*ablate.base_flags(), *flags)['phases']
    stable, decay = phases(phase_flags(*phase_steps(ablate.base_knobs(), 2, 0.2)))
    assert decay['steps'] / (stable['steps'] + decay['steps']) == 0.2
    assert stable['steps'] + decay['steps'] == 2 * sum(p['steps'] for p in phases(()))
    (whole,) = phases(cosine(ablate.base_knobs(), 2))
    assert whole['steps'] == stable['steps'] + decay['steps'] and whole['decay'] == 'cosine'
    for key in ('lr', 'embedding_lr'):
        assert whole[key][1] / whole[key][2] == 16


def run_here(words, running):
    """trials.run_script, in a process that has torch already."""
    done = run(str(Path(words[0]).relative_to(ROOT)), *words[1:], cwd=Path.cwd())
    return done.returncode, done.stderr, done.stdout


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_an_experiment_in_its_quick_form(name, monkeypatch, capsys):
    monkeypatch.setattr(trials, 'run_script', run_here)
    monkeypatch.setattr(ablate, 'command', name)
    ablate.main()
    result = json.loads(Path(ablate.folder, f'{name}.json').read_text())
    page = Path(ablate.folder, f'{name}.md').read_text()
    assert page in capsys.readouterr().out and result['question'] in page
    (table,) = result['comparisons'].values()
    for arm, row in table.items():
        texts = [found['text'] for found in row['runs']]
        assert len(set(texts)) == 2 and row['mean']['text'][0] == pytest.approx(sum(texts) / 2)
        assert f'| {arm} | ' in page
        first, *_ = table.values()
        apart = [a['text'] - b['text'] for a, b in zip(row['runs'], first['runs'])]
        assert row == first or row['difference']['text'] == pytest.approx(interval(apart))
    plot.main(['ablate'])
    assert Path(ablate.folder, f'{name}.png').stat().st_size > 10_000
    if name in ('long_context', 'why_muon', 'steps'):
        assert Path(ablate.folder, f'{name}.checkpoints.png').stat().st_size > 10_000
        assert '| on the checkpoints | ' in page

    monkeypatch.setattr(trials, 'run_script', None)              # nothing is run again
    ablate.main()
    assert json.loads(Path(ablate.folder, f'{name}.json').read_text()) == result


def test_signatures_in_their_quick_form(monkeypatch, capsys):
    monkeypatch.setattr(trials, 'run_script', run_here)
    monkeypatch.setattr(ablate, 'command', 'signatures')
    ablate.main()
    result = json.loads(Path(ablate.folder, 'signatures.json').read_text())
    page = Path(ablate.folder, 'signatures.md').read_text()
    assert page in capsys.readouterr().out
    for sign in result['signs']:
        assert sign['provoked_by'] in page and sign['seeds'] == 1


def test_a_run_that_fails_ends_the_signatures(monkeypatch, capsys):
    monkeypatch.setattr(trials, 'run_script', lambda words, running: (2, 'a\nno such knob\n', ''))
    Path('out/ablate').mkdir(parents=True)
    with pytest.raises(ValueError, match='--knob=1: no such'):   # no thread of Ctrl-C's says it
        signatures.warnings_of(['--knob=1'], [])
    with pytest.raises(SystemExit):
        signatures.provoke(['--knob=1'], 6, [1], 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert 'train.py --knob=1 ' in line and line.endswith(': no such knob')


def test_a_fault_is_in_the_provoked_run_alone(monkeypatch):
    ran = []
    Path('out/ablate').mkdir(parents=True)
    monkeypatch.setattr(signatures, 'warnings_of', lambda flags, running: ran.append(flags) or [])
    signatures.provoke([], 6, [1], 1)
    own = [tuple(flag for flag in flags if not flag.startswith('--out_dir=')) for flags in ran]
    for sign in signatures.signs():
        provoked = [flags for flags in own if flags[-len(sign.fault):] == sign.fault]
        assert any(flags[:-len(sign.fault)] in own for flags in provoked)


def test_warnings_are_found_in_a_log(monkeypatch):
    log = """step 0: phase stable
step 60: loss 4.100 is a spike, 1.000 above the mean of 50; --replay=60 looks at it again
step 310: loss 5.000 after the change of optimizer is above 4.100, 4 deviations over the 50 steps
step 99: loss is 0.300 above that of out/proxy: look at µP's attention scale, embedding lr
step 7 is skipped: it has loss nan, gradient norm nan; --replay=7 looks at it again
step 8 is skipped: none of its rows has a target
"""
    monkeypatch.setattr(trials, 'run_script', lambda words, running: (0, '', log))
    assert [step for step, _ in signatures.warnings_of([], [])] == [60, 310, 99, 7]


def test_a_sign_is_its_own_line_after_the_fault_began():
    sign = signatures.Sign('spike', 'lr', 'lr x 8', signatures.SWITCH, (), (), at_switch=True)
    before = (4, 'step 4: loss 9.000 after the change of optimizer is above 4.100')
    spike = (12, 'step 12: loss 9.000 is a spike, 1.000 above the mean of 50')
    after = (15, 'step 15: loss 5.000 after the change of optimizer is above 4.100')
    row = signatures.row(sign, 10, [[before, spike, after], [spike], []], [[], [spike], []])
    assert (row['seen'], row['steps_later'], row['says']) == (1, [5], after[1])
    assert row['calm'] == [spike[1]] and row['seeds'] == 3


def test_a_run_that_only_lacks_its_scores_is_not_trained_again(tmp_path, monkeypatch):
    ran = []

    def run_script(words, running):
        ran.append(Path(words[0]).name)
        return 2, 'stopped\n', ''

    monkeypatch.setattr(trials, 'run_script', run_script)
    for is_complete in (False, True):
        monkeypatch.setattr(trials, 'is_complete', lambda run, done=is_complete: done)
        trials.run_trial(['--out_dir=out/x'], tmp_path, [], ['--problems=4'])
    assert ran == ['train.py', 'eval.py']


def test_a_checkpoint_that_is_gone_is_made_again(monkeypatch):
    monkeypatch.setattr(trials, 'run_script', run_here)
    trials.prepare_data_of(ablate.base_knobs())
    point = Arm('AdamW', (), 'stable'), 1, 0
    before = ablate.run([point], keep=True)[point]
    (file,) = checkpoints(ablate.kept_run(*point)[0])
    weights = read_checkpoint(file)['model']
    for folder in (ablate.kept_run(*point)[0], ablate.start_folder('stable', 1)):
        shutil.rmtree(folder)
    assert ablate.run([point], keep=True)[point]['losses'] == before['losses']
    again = read_checkpoint(file)['model']
    assert all(torch.equal(w, again[name]) for name, w in weights.items())


def test_a_damaged_checkpoint_is_named(monkeypatch, capsys):
    knobs = ablate.base_knobs()
    trials.prepare_data_of(knobs)
    folder = Path(ablate.run_before('stable', 1)[0])
    folder.mkdir(parents=True)
    (folder / 'step_6.pt').write_bytes(b'cut off')
    monkeypatch.setattr(ablate, 'first_seed', 0)
    with pytest.raises(SystemExit):
        ablate.compare_all([Comparison('decay', [Arm('AdamW', (), 'stable')])])
    assert f'{folder}/step_6.pt' in capsys.readouterr().err


def test_starts_keep_and_drop_what_they_say(monkeypatch):
    monkeypatch.setattr(trials, 'run_script', run_here)
    knobs = ablate.base_knobs()
    trials.prepare_data_of(knobs)
    arms = {start: Arm(start, (), start) for start in ('stable', 'fresh', 'embedding kept')}
    ablate.run([(arm, 1, 0) for arm in arms.values()])
    kept, fresh, embedding = (read_checkpoint(ablate.start_folder(start, 1)) for start in arms)
    for name, weight in kept['model'].items():
        assert torch.equal(weight, fresh['model'][name])
        assert torch.equal(weight, embedding['model'][name])
        moments = kept['optimizer_state'][name]
        assert fresh['optimizer_state'][name] == {} and moments['exp_avg'].any()
        others = embedding['optimizer_state'][name]
        if weight.dim() == 2 and name != 'embed.weight':
            assert not others['momentum_buffer'].any()
        else:
            assert torch.equal(others['exp_avg'], moments['exp_avg'])
    assert (kept['optimizer'], fresh['optimizer'], embedding['optimizer']) == \
        ('adamw', 'adamw', 'muon')


def test_what_a_run_says_is_what_eval_wrote():
    scores = {'validation': {'stdlib': {'loss': 3.0}, 'arith': {'loss': 1.0}},
              'problems': {'arith': {'solved': 1, 'tried': 4, 'by_steps': {'2': [1, 4]}}}}
    found = ablate.measured({'status': 'ok', 'scores': scores})
    assert found.pop('both') == pytest.approx(0.67 * 1.0 + 0.33 * 3.0)
    assert found == {'text': 3.0, 'sums': 1.0, 'solved': 0.25, 'solved by steps': {'2': [1, 4]}}
    assert f'--block_size={ablate.base_knobs()["phases"][0]["block_size"]}' in ablate.scoring(True)


def test_a_run_that_diverged_has_no_mean():
    assert ablate.measured({'status': 'nan'}) is None
    last_steps = {'validation': {'stdlib': {'loss': None}}}
    assert ablate.measured({'status': 'ok', 'scores': last_steps}) is None
    ruined = 'eval.py: its logits are not finite: training ruined the weights'
    assert trials.describe_failure(ruined, 2)['status'] == 'nan'
    result = {'name': 'x', 'question': '?', 'command': 'x', 'model': '5 parameters', 'seeds': 2,
              'runs': 4, 'hours': 1, 'quick': False, 'kind': 'ablation',
              'comparisons': {'c': {'a': {'exponent': 1, 'mean': {'text': (1, 0, 0)}, 'runs': [{}]},
                                    'b': {'exponent': -1, 'runs': [None, {}],
                                          'also': {'a': {'text': (-0.5, 0, 0.25)}}}}}}
    page = ablate_page.markdown(result)
    assert '| b (1 of 2 runs diverged) | 0.5 |  |  |' in page
    assert '| the same, less a |  |  | -0.5000 ± 0.2500 |' in page


def test_a_difference_is_not_a_mean():
    first = {'exponent': 0, 'runs': [{}], 'mean': {'text': (3, 0, 0), 'far': (30, 0, 0)}}
    other = {'exponent': 0, 'runs': [{}], 'mean': {'text': (4, 0, 0), 'far': (50, 0, 0)},
             'difference': {'text': (1, 0, 0), 'far': (20, 0, 0)}}
    tables = {'a': first, 'b': other}
    *_, last = ablate_page.table_of_arms(tables)
    assert last == '| b | 1 | 4.0000 ± 0.0000 | +1.0000 ± 0.0000 |'
    *_, last, _ = ablate_page.table_of_probes(tables)
    assert last == '| far | 30.000 ± 0.000 | 50.000 ± 0.000 (+20.000 ± 0.000) |'


def test_a_share_is_in_per_cent_and_its_difference_in_points():
    assert ablate_page.show('sums solved', 0.104, 0, 0.022) == '10.4% ± 2.2'
    assert ablate_page.show_difference('solved', 0.058, 0, 0.01) == '+5.8 ± 1.0 points'
    assert ablate_page.show_difference('text', -0.08, 0, 0.01) == '-0.0800 ± 0.0100'


@pytest.mark.parametrize('arguments, says', [
    (['decay'], "'decay' should be one of decay_optimizer, switch_timing"),
    (['recipe', '--seeds=1'], 'seeds=1 should be at least 2'),
    (['recipe', '--seeds=11'], 'and below 11'), (['recipe', '--problems=0'], 'problems=0'),
    (['recipe', "--flags='"], 'flags="\'": No closing quotation'),
    (['recipe', '--flags=--out_dir=out/x'], '--out_dir is set for each trial'),
    (['recipe', '--flags=--seed=1'], '--seed is set for each trial'),
    (['recipe', '--flags=--phases.stable.steps=0'], 'should have steps, and no other'),
    (['recipe', '--flags=--learning_rate=-1'], 'learning_rate=-1'),
    (['recipe', '--flags=--n_head=3'], 'n_head=3 does not divide n_embd=64'),
    (['recipe', '--folder=file'], 'file')])
def test_a_mistake_gets_one_line(tmp_path, arguments, says):
    (tmp_path / 'file').write_text('')
    for name in ('config', 'data_prep.py'):
        (tmp_path / name).symlink_to(ROOT / name)
    assert says in refused(run('lab.ablate', *arguments, '--quick', cwd=tmp_path))
    assert sorted(os.listdir(tmp_path)) == ['config', 'data_prep.py', 'file']
