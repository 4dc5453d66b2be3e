"""speed.py: each figure is measured on equal work, and the page says what the figures say."""
import importlib.util
import json
import re
import statistics

import numpy as np
import pytest
import torch
from conftest import refused, run

from lab import speed, speed_page

QUICK = 'work,muon,loading,tokens,ranks'           # without what takes longest to load or compile


def cells_of(page):
    """{first cell: the others} of all tables of a page."""
    rows = [line.strip('| ').split(' | ') for line in page.splitlines() if line[:1] == '|']
    return {first: others for first, *others in rows}


def test_a_quick_run(tmp_path):
    pytest.importorskip('transformers')
    pytest.importorskip('matplotlib')
    done = run('lab.speed', '--quick', f'--parts={QUICK}', f'--out={tmp_path}/new')
    assert (done.returncode, done.stderr) == (0, '')
    folder = tmp_path / 'new'
    assert sorted(file.name for file in folder.iterdir()) == ['speed.json', 'speed.md', 'speed.png']
    assert (folder / 'speed.png').read_bytes()[:4] == b'\x89PNG'
    figures = json.loads((folder / 'speed.json').read_text())
    page = (folder / 'speed.md').read_text()
    assert set(QUICK.split(',')) < figures.keys() and figures['command'] in page
    cells = cells_of(page)

    speeds = [figures['work']['variants'][name]['tok_per_s'][0]
              for name in ('ours-eager', 'granite-eager')]
    assert cells['eager step: times as fast as Granite eager'] == [f'{speeds[0] / speeds[1]:.2f}']
    batch = statistics.median(figures['loading']['long']['seconds']) / 4 / 3712
    (what,) = [what for what in cells if what.startswith('getting 400,000')]
    assert float(cells[what][0].split('%')[0]) == pytest.approx(100 * 4e5 * batch, abs=0.06)
    for point in figures['tokens']:
        assert point['tokens'] == point['x'] == 32 * point['rows']
        assert cells[f'{point["x"]:,}'][2] == f'{point["tokens"] / point["seconds"][0]:,.0f}'
    assert {'1 x 1', '2 x 1'} < cells.keys()


def test_the_page_is_made_of_the_figures():
    variants = {name: {'tok_per_s': speeds, 'peak_mb': {'129280': [900, beyond]}}
                for name, speeds, beyond in (
                    ('ours-compiled', [200, 330, 250], 120), ('ours-eager', [90, 110, 100], 300),
                    ('granite-eager', [100, 110, 100], 500),
                    ('granite-compiled', [250, 440, 500], 400))}
    figures = {
        'command': 'python -m lab.speed', 'date': '2030-01-01', 'threads': 2, 'cpu': 'x86_64',
        'dtype': 'bfloat16', 'torch': '2.13.0',
        'work': {'variants': variants, 'flops_per_token': 1e9, 'gemm_flops': [1e12, 1e12, 1e12],
                 'knobs': {'full_vocab_size': 129_280}},
        'muon': {'flops': 2e10, 'threads': {'1': {
            'ours': [0.1, 0.1], 'torch': [0.15, 0.25], 'gemm_flops': [5e11, 5e11]}}},
        'decoding': {'knobs': {'rounds': 2}, '8 x 128 tokens': {
            'transformers': [6.0, 4.0], 'compiled': [2.0, 1.0], 'eager': [3.0, 5.0]},
            'a question': {'lm-eval, hf': [1.0], 'ours': [1.0]}},
        'loading': {'proxy': {'block_size': 512, 'tokens': 2048, 'seconds': [0.1, 0.2, 0.3]},
                    'long': {'block_size': 3712, 'tokens': 14_848, 'seconds': [0.001] * 3}},
    }
    page = speed_page.page(figures, False)
    cells = cells_of(page)
    assert {what: cell for what, (cell,) in cells.items()} == {
        'what': 'median of rounds (least..most)', '---': '---',
        'compiled step: times as fast as Granite eager': '2.50 (2.00..3.00)',
        'compiled step: times as fast as Granite compiled': '0.75 (0.50..0.80)',
        'eager step: times as fast as Granite eager': '1.00 (0.90..1.00)',
        'compiled step: share of the GEMM peak': '25.0% (20.0%..33.0%)',
        'eager step: share of the GEMM peak': '10.0% (9.0%..11.0%)',
        ('compiled step, V = 129,280: peak memory beyond weights, gradients and moments, over '
         "Granite compiled's"): '0.30',
        "Muon's step, threads: 1: times as fast as torch.optim.Muon's": '2.00 (1.50..2.50)',
        "Muon's step, threads: 1: seconds over those of Newton-Schulz's FLOPs at the GEMM peak":
            '2.50',
        "decoding 8 x 128 tokens, compiled: times as fast as transformers' generate":
            '3.50 (3.00..4.00)',
        "decoding 8 x 128 tokens, eager: times as fast as transformers' generate":
            '1.40 (0.80..2.00)',
        'getting a batch: share of the compiled step': '2.4% (1.2%..3.7%)',
        'getting a batch: share of the eager step': '0.977% (0.488%..1.465%)',
        ('getting 400,000 tokens a second in the training process, in rows of 3,712: share of its '
         'time'): '2.7%'}
    assert ('Of 7 comparisons with others, ours is ahead in every round of 4, behind in every '
            'round of 1, and 2 go either way.') in page
    assert ('2030-01-01: 2 threads (x86_64), matmuls in bfloat16, torch 2.13.0. GEMM peak: 1 '
            'TFLOP/s') in page
    assert 'speed.png' not in page and 'As sizes grow' not in page
    del figures['work'], figures['muon'], figures['decoding']
    assert 'None of these compares with others.' in speed_page.page(figures, False)


def point(x, seconds, flops=1e9, beyond=100.0):
    return {'x': x, 'rows': 1, 'tokens': x, 'flops': flops, 'seconds': seconds,
            'gemm_flops': [1e11] * len(seconds), 'peak_mb': 200.0, 'beyond_mb': beyond}


def test_the_sentences_follow_the_figures():
    points = [point(100, [0.1, 0.3, 0.1]), point(200, [0.8, 0.8, 0.1], 8e9, 50.0)]
    assert speed_page.describe_curve('tokens', points) == (
        'From 100 to 200 tokens a step: FLOPs a token change by a factor of 4, tokens/s change by '
        'a factor of 0.25, MB beyond states change by a factor of 0.5; the share of the GEMM peak '
        'goes from 10.0% to 10.0%.')
    assert speed_page.describe_curve('tokens', points[::-1]).startswith(
        'From 200 to 100 tokens a step: FLOPs a token change by a factor of 0.25, tokens/s change '
        'by a factor of 4')
    assert 'tokens/s stay within 5 %' in speed_page.describe_curve('width', points[:1] * 2)
    line = [point(x, [y]) for x, y in ((1000, 0.3), (2000, 0.5), (3000, 0.7), (4000, 1.0))]
    assert speed_page.describe_line(line) == (
        'The least-squares line: 50.0 ms + 230.00 us a token; no point is further from it than '
        '40.0 ms, 4.0% of the longest step.')
    ranks = [point(10, [1.0, 2.0]) | {'processes': 1, 'threads': 1},
             point(10, [0.5, 0.8]) | {'processes': 2, 'threads': 1}]
    assert speed_page.describe_ranks(ranks) == \
        'Times as fast as 1 x 1, in a round: 2 x 1 2.25 (2.00..2.50).'


def test_the_line_is_the_least_squares_line():
    rng = np.random.default_rng(0)
    x = [512, 1024, 2048, 4096, 8192]
    y = [0.01 + 3e-4 * tokens + rng.normal(0, 0.02) for tokens in x]
    slope, intercept = np.polyfit(x, y, 1)
    distance = np.abs(np.polyval((slope, intercept), x) - y).max()
    assert speed_page.fit_line(x, y) == pytest.approx((intercept, slope, distance))


def test_both_muons_do_the_same_work():
    shapes = [(64, 64), (160, 64), (64, 96)]
    ours, theirs = speed.make_muons(shapes)
    before = [p.detach().clone() for p in ours.param_groups[0]['params']]
    for _ in range(3):
        ours.step()
        theirs.step()
    pairs = zip(before, ours.param_groups[0]['params'], theirs.param_groups[0]['params'])
    for (old, new, other), shape in zip(pairs, shapes, strict=True):
        change, difference = new.detach() - old, (new - other).detach()
        assert new.shape == shape and change.norm() > 0
        assert difference.norm() < 0.03 * change.norm()          # bf16, twelve products in a row


def test_of_each_curve_one_size_grows():
    sizes = {curve: speed.models_of(curve) for curve in speed.GROWTH}
    for x, (c, B) in sizes['width'].items():
        assert (c.n_embd, c.hd, c.n_ffn, c.block_size * B) == (x, 64, 2.5 * x, 2048)
    assert [(c.block_size, c.block_size * B) for c, B in sizes['length'].values()] == \
        [(x, 4096) for x in (128, 256, 512, 1024, 2048, 4096)]
    assert [c.vocab_size for c, _ in sizes['vocabulary'].values()] == list(sizes['vocabulary'])
    assert {(x, c.block_size * B) for x, (c, B) in sizes['tokens'].items()} == \
        {(512 * rows, 512 * rows) for rows in (1, 2, 4, 8, 16)}
    models = [c for points in sizes.values() for c, _ in points.values()]
    assert {(c.n_layer, c.n_kv_head) for c in models} == {(4, 1)}


def test_threads_are_as_before(monkeypatch):
    monkeypatch.setattr(speed, 'quick', True)
    monkeypatch.setattr(speed, 'rounds', 2)
    monkeypatch.setattr(speed, 'gemm_flops', lambda *args: torch.get_num_threads())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        figures = speed.measure_muon(None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {n: seconds['gemm_flops'] for n, seconds in figures['threads'].items()} == \
        {1: [1, 1], 2: [2, 2]}
    # of 64 features, two heads and one of key and value: X Xt, A A and B X in each of five steps
    assert figures['flops'] == 5 * sum(2 * (64 * 64 * m + 64**3 + 64 * 64 * m)
                                       for m in (128, 64, 192, 96))


def test_without_matplotlib_there_is_a_page_and_a_hint(tmp_path, monkeypatch, capsys):
    figures = {'command': '', 'date': '', 'threads': 1, 'cpu': '', 'dtype': '', 'torch': '',
               'tokens': [point(1, [1.0]), point(2, [2.0])]}
    (tmp_path / 'speed.json').write_text(json.dumps(figures))
    monkeypatch.setattr(speed, 'out', str(tmp_path))
    monkeypatch.setattr(speed, 'redraw', True)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    speed.main()
    assert 'pip install matplotlib' in capsys.readouterr().err
    page = (tmp_path / 'speed.md').read_text()
    assert re.search(r'By tokens a step', page) and 'speed.png' not in page
    del figures['tokens']                                        # nothing to draw: no hint
    (tmp_path / 'speed.json').write_text(json.dumps(figures))
    speed.main()
    assert capsys.readouterr().err == '' and not (tmp_path / 'speed.png').exists()


@pytest.mark.parametrize('flag, says', [
    ('--parts=work,fun', "speed.py: parts: 'fun' should be one of work, decoding, muon"),
    ('--rounds=0', 'speed.py: rounds=0 should be at least 1'),
    ('--redraw', 'speed.py: {}/speed.json: No such file or directory'),
])
def test_a_mistake_gets_one_line(tmp_path, flag, says):
    assert refused(run('lab.speed', flag, f'--out={tmp_path}')).startswith(says.format(tmp_path))


def test_a_child_that_fails_ends_the_run(capfd):
    with pytest.raises(SystemExit):
        speed.run_child(speed.ROOT / 'lab/bench.py', '--rounds=0')
    assert 'bench.py ended with exit code 2' in capfd.readouterr().err
