"""plot.py: the picture has what the log has, and one line for every log that cannot be drawn."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run

import train
from checkpoint import read_log
from configurator import knob_values
from lab import plot

STEP = {'step': 0, 'phase': 'stable', 'tokens': 100, 'loss': 5.0, 'lr': 0.01}


def write_run(folder, n=200, val=0.0, **more):
    folder.mkdir()
    phases = ['stable' if i < n // 2 else 'decay' for i in range(n)]
    lines = [{**STEP, 'phase': phases[i], 'tokens': 100 * (i + 1), 'loss': 9 - 0.04 * i, **more}
             for i in range(n)]
    for i, line in enumerate(lines[::20]):
        line['val_losses'], line['val_loss'] = {'a': 9 - 0.8 * i, 'b': 3.0}, 6 - 0.4 * i + val
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


def test_picture_shows_the_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *args, **kwargs: (
        figures.append(figure), save(figure, *args, **kwargs)))
    one, two = write_run(tmp_path / 'one'), write_run(tmp_path / 'two')
    plot.plot_loss([one], '', one / 'loss.png')
    plot.plot_loss([one, two], tmp_path / 'both.png', '')
    assert capsys.readouterr().out == f'{one}/loss.png\n{tmp_path}/both.png\n'
    for png in (one / 'loss.png', tmp_path / 'both.png'):
        assert png.read_bytes()[:4] == b'\x89PNG' and png.stat().st_size > 20_000
    top = figures[0].axes[0]
    labels = ['training', 'validation, a', 'validation, b']
    assert top.get_legend_handles_labels()[1] == labels
    assert [t.get_text() for t in top.texts] == ['stable', 'decay']
    # each over the middle of its phase, of 100 steps of 100 tokens
    assert [t.get_position()[0] for t in top.texts] == [5000, 15_000]
    for axes in figures[0].axes:
        assert [(band.get_x(), band.get_width()) for band in axes.patches] == [
            (0, 10_000), (10_000, 10_000)]
    smooth, a = top.get_legend_handles_labels()[0][:2]
    # the mean of a straight line is the line, but at the ends, where the window is cut
    assert smooth.get_ydata()[5:-5] == pytest.approx([9 - 0.04 * i for i in range(5, 195)])
    assert list(a.get_xdata()) == [100 * (20 * i + 1) for i in range(10)]
    assert figures[1].axes[0].get_legend_handles_labels()[1] == [
        f'{run}: {label}' for run in ('one', 'two') for label in labels]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    pytest.importorskip('matplotlib')
    from matplotlib.figure import Figure
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *args, **kwargs: (
        kept.append(figure), save(figure, *args, **kwargs)))
    return kept


def test_validations_of_several_runs_less_those_of_the_first(tmp_path, figures):
    runs = [write_run(tmp_path / 'one'), write_run(tmp_path / 'worse', val=0.25),
            write_run(tmp_path / 'shorter', n=100)]
    plot.plot_loss(runs, '', tmp_path / 'loss.png')
    axes = figures[0].axes[1]
    assert axes.get_ylabel() == 'validation\nless one'
    one, worse, shorter = (line.get_ydata() for line in axes.get_lines())
    assert list(one) == [0] * 10 and list(worse) == pytest.approx([0.25] * 10)
    assert list(shorter[:5]) == [0] * 5 and np.isnan(shorter[5:]).all()


def test_the_first_steps_do_not_flatten_the_rest(tmp_path, figures):
    run = write_run(tmp_path / 'run')
    lines = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    for line in lines[:8]:                                       # a twenty-fifth of 200
        line['loss'] = 20.0
    (run / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    plot.plot_loss([run], '', tmp_path / 'loss.png')
    assert figures[0].axes[0].get_ylim()[1] == lines[8]['loss']


def result(folder, name, told):
    folder.mkdir(exist_ok=True)
    (folder / f'{name}.json').write_text(json.dumps(told))
    return folder


def test_transfer_curves(tmp_path, figures, capsys):
    row = {'best': -7, 'losses': {'-8': [3.2, 3.0], '-7': [3.0, 3.0], '-6': [4.0, None]},
           'price': [0.1, 0.3], 'curve': [5.0, 4.0, 3.5]}
    told = {'kind': 'transfer', 'grid': 'lr', 'axis': 'width', 'rules': {
        rule: {'carried': -7, 'sizes': {'64': row, '128': row}} for rule in ('textbook', 'sp')}}
    plot.main([result(tmp_path / 'transfer', 'transfer', told)])
    assert capsys.readouterr().out == f'{tmp_path}/transfer/transfer.png\n'
    top, _, bottom, _ = figures[0].axes
    assert top.get_title() == 'textbook: $2^{-7}$ at width 128 costs 0.200'
    assert top.get_legend_handles_labels()[1] == ['width 64', 'width 128', 'best of all seeds',
                                                  'best at width 64']
    line, star = top.lines[0], next(x for x in top.lines if x.get_marker() == '*')
    assert list(line.get_xdata()) == [-8, -7, -6] and list(line.get_ydata()) == [3.2, 3.0, 4.0]
    others = [*top.lines[1].get_ydata(), *top.lines[2].get_ydata()]     # those of the second seed
    assert others == [3.0, 3.0]
    assert list(star.get_xdata()) == [-7] and list(star.get_ydata()) == [3.0]
    assert list(bottom.lines[0].get_ydata()) == [5.0, 4.0, 3.5]


def test_a_sweep_that_diverged_can_be_drawn(tmp_path, figures):
    row = {'best': -7, 'losses': {'-7': [None], '-6': [None]}, 'price': [None], 'curve': []}
    told = {'kind': 'transfer', 'grid': 'lr', 'axis': 'width', 'rules': {
        'sp': {'carried': -7, 'sizes': {'64': row}}}}
    plot.main([result(tmp_path / 'transfer', 'transfer', told)])
    assert 'diverges' in figures[0].axes[0].get_title()


def test_coordinate_check_panels(tmp_path, figures, capsys):
    rows = {quantity: {'size': [[[2, 2, 2]], [[2, 2, 2]]], 'change': [[[0, 1, 2]], [[0, 4, 8]]],
                       'size_slopes': [0, 0, 0], 'change_slopes': [1, -2], 'holds': holds}
            for quantity, holds in (('logits', False), ('norm gain', True))}
    told = {'kind': 'coord_check', 'sizes': [64, 128], 'vary': 'heads', 'rows': rows,
            'rules': 'lr_hidden broken'}
    folder = result(tmp_path / 'check', 'lr_hidden', told)
    plot.main([folder, result(folder, 'other', told) / 'other.json'])
    assert capsys.readouterr().out == f'{folder}/heads.png\n'
    assert len(figures[0].axes) == 3                             # a row each, and no norm gain
    panel = figures[0].axes[0]
    assert panel.get_title() == 'logits\n+0.00, -2.00 ✗'
    assert panel.get_ylabel() == 'lr_hidden broken\nsize, change'
    assert [list(line.get_ydata()) for line in panel.lines] == [[2, 2], [1, 4], [2, 8]]


def test_tables_of_a_coordinate_check_share_the_y_axis_and_not_the_sizes(tmp_path, figures):
    for name, sizes, size in (('narrow', [64, 128], 2), ('wide', [256, 1024], 200)):
        row = {'size': [[[size] * 2]] * 2, 'change': [[[0, size]]] * 2, 'size_slopes': [0, 0],
               'change_slopes': [0], 'holds': True}
        told = {'kind': 'coord_check', 'sizes': sizes, 'vary': 'heads', 'rules': name,
                'rows': {'logits': row}}
        folder = result(tmp_path / 'check', name, told)
    plot.main([folder])
    narrow, wide = figures[0].axes
    low, high = narrow.get_ylim()
    assert (low, high) == wide.get_ylim() and low < 2 and high > 200
    assert narrow.get_xlim()[1] < 256 < wide.get_xlim()[1]


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"kind": 3}', '{"kind": "transfer"}',
                                  '{"kind": "coord_check"}', '{"kind": "search"}',
                                  '{"kind": "coord_check", "vary": "heads", "rows": {}}',
                                  '{"kind": "transfer", "rules": {}, "grid": "", "axis": ""}'])
def test_results_that_cannot_be_drawn(tmp_path, capsys, text):
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(SystemExit) as e:
        plot.main([tmp_path])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and str(tmp_path) in err


def test_a_loss_that_is_not_finite_is_left_out(tmp_path):
    run = write_run(tmp_path / 'run', n=2)
    with open(run / 'log.jsonl', 'a') as f:
        f.write(json.dumps({**STEP, 'loss': float('nan')}) + '\n')
    assert len(read_log(run)) == 2


@pytest.mark.parametrize('log, line', {
    None: 'No such file or directory',
    '': 'holds no step yet',
    json.dumps(STEP) + '\n{"step": 1, "pha': 'line 2 is no line of a training log',
    json.dumps({**STEP, 'lr': None}): 'line 1 is no line of a training log',
    '[]': 'line 1 is no line of a training log',
    '{}': 'line 1 is no line of a training log',
}.items())
def test_logs_that_cannot_be_drawn(tmp_path, capsys, log, line):
    if log is not None:
        (tmp_path / 'log.jsonl').write_text(log)
    with pytest.raises(SystemExit) as e:
        read_log(tmp_path)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1
    assert f'{tmp_path}/log.jsonl' in err and line in err


def test_as_a_program(tmp_path):
    pytest.importorskip('matplotlib')

    def go(*argv):
        return subprocess.run([sys.executable, '-m', 'lab.plot', *argv], cwd=tmp_path, check=False,
                              capture_output=True, text=True)
    done = go()
    assert done.returncode == 2 and done.stderr.startswith('plot.py: there is no run under out/')
    (tmp_path / 'out').mkdir()
    for i, name in enumerate(('new', 'old')):
        os.utime(write_run(tmp_path / 'out' / name) / 'log.jsonl', (9e8 - i, 9e8 - i))
    assert go().stdout == 'out/new/loss.png\n'
    for ending in ('nowhere/a.png', 'a.xyz'):
        done = go('out/old', f'--png={ending}')
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and ending in done.stderr


# --- the recipe ---

@pytest.fixture
def train_knobs(monkeypatch):
    """train.py's own knobs; what a test sets there is as before once it is over."""
    knobs = knob_values(vars(train))
    for key, value in knobs.items():
        monkeypatch.setattr(train, key, value)
    monkeypatch.setattr(plot, 'png', '')
    return knobs


@pytest.fixture
def schedule(train_knobs, tmp_path, figures):
    """schedule(*flags): the axes of the picture of a config, config/xmodel25.py without one."""
    def schedule(*flags):
        vars(train).update(train_knobs)
        plot.main_schedule([*flags, f'--png={tmp_path / "schedule.png"}'])
        assert (tmp_path / 'schedule.png').read_bytes()[:4] == b'\x89PNG'
        return figures[-1].axes
    return schedule


def drawn(panel, step):
    """What a panel of learning rates shows at a step: {line: lr}."""
    return {line.get_label(): np.interp(step, *line.get_data()) for line in panel.lines
            if line.get_label()[0] != '_'}


def texts(panel):
    return [text.get_text() for text in panel.texts]


def test_the_schedule_is_that_of_the_recipe(schedule):
    top = schedule()[0]
    for step, matrices, embedding in (                           # as the released scripts have it
            (1_000, 8.3333e-4, 0.005), (2_000, 1.6667e-3, 0.01), (100_000, 1.6667e-3, 0.01),
            (400_000, 1.6667e-3, 0.01), (530_000, 1.6667e-3, 0.01),
            (540_000, 7.5138e-4, 4.5083e-3), (549_999, 1.0417e-4, 6.25e-4), (550_000, 1e-6, 1e-6),
            (550_500, 1.0417e-4, 6.25e-4), (555_250, 5.7083e-5, 3.175e-4), (559_999, 1e-5, 1e-5)):
        assert drawn(top, step)['matrices'] == pytest.approx(matrices, rel=0.01), step
        assert drawn(top, step)['embedding'] == pytest.approx(embedding, rel=0.01), step


def test_the_schedule_names_phases_optimizers_batches_and_data(schedule):
    top, batches, mixtures = schedule()
    first = [0, 270_000, 530_000, 550_000, 560_000]
    assert [text for text in texts(top) if 'tokens' in text] == [
        'stable1\n270k steps, 481B tokens', 'stable2\n260k steps, 927B tokens',
        'decay\n20k steps, 72.5B tokens', 'long\n10k steps, 39.3B tokens']
    assert {'warmup:\n2k steps', 'warmup:\n500 steps', 'embedding: 0.01', 'matrices: 0.00167',
            '0.000625', '0.000104', 'AdamW'} < set(texts(top))
    assert sorted(band.get_x() for band in top.patches) == [0, 530_000]      # AdamW, then Muon
    assert [text.split('\n')[0] for text in texts(batches)] == [
        '480 x 3712', '960 x 3712', '960 x 3776', '240 x 16384']
    assert list(mixtures.get_xticks()) == first and mixtures.get_xlim() == (0, 560_000)

    names = mixtures.get_legend_handles_labels()[1]
    assert names == ['ultrafineweb-en', 'ultrafineweb-zh', 'starcoder', 'reddit', 'pes2o',
                     'sft-mixed', 'others, below 2%']
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in mixtures.patches]
    by_phase = {x: dict(zip(names, [height for left, _, height in bars if left == x]))
                for x in first[:-1]}
    assert {(x, width) for x, width, _ in bars} == set(zip(first, np.diff(first)))
    small = .01 + .005 + .005 + .01 + .0133 + .009 + .0023 + .0078
    for x in first[:2]:
        assert list(by_phase[x].values()) == pytest.approx([.41, .2, .26, .0391, .0285, 0, small])
    small = .00287 + .01722 + .01722 + .01147 + .009 + .009 + .01801
    for x in first[2:4]:
        assert list(by_phase[x].values()) == pytest.approx(
            [.18725, .03716, .02209, 0, 0, .6687, small], rel=2e-4)          # of 0.99999


def test_phases_are_drawn_equally_wide_and_warmup_can_be_seen(schedule):
    top = schedule()[0]
    steps = [0, 2_000, 270_000, 530_000, 550_000, 550_500, 560_000]
    scale = top.get_xaxis().get_transform()
    assert scale.transform(steps) == pytest.approx([0, 0.1, 1, 2, 3, 3.1, 4])
    assert scale.inverted().transform([0.5, 2.5, 4]) == pytest.approx([121_111.1, 540_000, 560_000])


def test_matrices_are_drawn_with_the_factor_of_their_optimizer(schedule):
    rates = schedule('--muon_lr_scaling=1/sqrt(m)')[0]
    assert drawn(rates, 529_999)['matrices'] == pytest.approx(0.01 / 6, rel=1e-3)       # AdamW
    assert drawn(rates, 530_000)['matrices'] == pytest.approx(0.01 / 6**0.5, rel=1e-3)  # Muon


def test_the_schedule_of_another_config_and_of_standard_parametrisation(schedule):
    top, _, mixtures = schedule(str(ROOT / 'config/proxy20m.py'), '--mup_rules=sp',
                                '--learning_rate=0.001')
    assert drawn(top, 500) == pytest.approx({'matrices': 0.0003, 'embedding': 0.0003})
    assert 'matrices and embedding: 0.0003' in texts(top)         # not one over the other
    assert mixtures.get_legend_handles_labels()[1] == ['stdlib', 'arith']
    assert texts(mixtures) == ['100%', '100%', '33%', '67%', '33%', '67%']


def test_no_text_of_the_schedule_lies_over_another(schedule):
    for config in ('xmodel25', 'nano', 'proxy20m', 'stability'):
        axes = schedule(str(ROOT / f'config/{config}.py'))
        figure = axes[0].figure
        figure.canvas.draw()
        boxes = [text.get_window_extent() for panel in axes
                 for text in (*panel.texts, *panel.get_xticklabels(), panel.yaxis.label)
                 if text.get_text()]
        overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert not overlapping, config


@pytest.mark.parametrize('flags, says', [
    (['config/nothing.py'], 'there is no such file'),
    (['--phases.decay.decay=cubic'], "decay='cubic' should be one of"),
    (['--phases.decay.lr=3'], 'should be'), (['--phases=[]'], 'is empty'),
    (['--mup_break=logit'], "mup_break='logit' should be a rule"),
    (['--learning_rate=-1'], 'learning_rate=-1'), (['--pgn=a.png'], "unknown key 'pgn'"),
    (['nano'], 'nano: should be --key=value or a config file'),
    (['--png=nowhere/a.png'], 'nowhere/a.png'), (['--png=a.xyz'], 'a.xyz'),
    ([], 'results/schedule.png')])                               # where there is no such folder
def test_a_schedule_that_cannot_be_drawn_gets_one_line(train_knobs, tmp_path, monkeypatch, capsys,
                                                       flags, says):
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        plot.main_schedule(flags)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and says in err


def test_the_schedule_as_a_program(tmp_path):
    pytest.importorskip('matplotlib')
    done = run('lab.plot', 'schedule', ROOT / 'config/nano.py', '--png=nano.png', cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'nano.png\n', '')
    assert (tmp_path / 'nano.png').read_bytes()[:4] == b'\x89PNG'


def test_without_matplotlib_it_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(SystemExit):
        plot.pyplot()
    assert capsys.readouterr().err.endswith(': pip install matplotlib\n')


def test_one_file_holds_one_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, 'png', 'a.png')
    results = [(tmp_path / f'{i}.json', {'kind': 'transfer'}) for i in range(2)]
    monkeypatch.setattr(plot, 'read_results', lambda path: results)
    with pytest.raises(SystemExit):
        plot.main([tmp_path])
    assert "png='a.png' is one file, and these are 2 pictures" in capsys.readouterr().err
