"""coord_check.py: every broken rule fails the row that it should, the unbroken hold, in small."""
import json
import math
from itertools import combinations

import pytest
import torch
from conftest import refused, run

from lab import coord_check
from loader import open_data
from model import Xmodel, apply_rope, rope_angles

SMALL = {'widths': '64,128,256', 'n_layer': 2, 'steps': 2, 'seeds': 2,
         'block_size': 32, 'vocab_size': 512}


@pytest.fixture
def table(monkeypatch, data_dir, tmp_path, capsys):
    """table(**knobs) runs main: (exit code, [result file's contents], what it printed)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                 # models this small only wait for each other's threads

    def table(**knobs):
        knobs = {**SMALL, 'data_dir': str(data_dir), 'out': str(tmp_path), **knobs}
        for key, value in knobs.items():
            monkeypatch.setattr(coord_check, key, value)
        with pytest.raises(SystemExit) as e:
            coord_check.main()
        files = {f.stem: json.loads(f.read_text()) for f in sorted(tmp_path.glob('*.json'))}
        return e.value.code, files, capsys.readouterr().out
    yield table
    torch.set_num_threads(threads)


def fails(told):
    return {quantity for quantity, row in told['rows'].items() if row['holds'] is False}


@pytest.mark.parametrize('vary', ['heads', 'head_size', 'depth'])
def test_the_textbook_holds(table, vary):
    code, files, out = table(vary=vary, depths='2,8,32' if vary == 'depth' else '')
    told, = files.values()
    assert (code, fails(told)) == (0, set()) and 'FAILS' not in out
    if vary != 'depth':
        assert told['rows']['logits']['size_slopes'][0] == pytest.approx(-0.5, abs=0.05)
        assert 'Logits start at -0.5' in out and out.count('holds') == 7


@pytest.mark.parametrize('knobs, quantity, kind, slope', [
    ({'break_': 'lr_hidden'}, 'residual stream', 'change', (0.5, 1)),
    ({'break_': 'init_out'}, 'FFN output', 'size', (0.4, 0.6)),
    ({'break_': 'gain_lr'}, 'norm gain', 'change', (-1.1, -0.9)),
    ({'break_': 'logits'}, 'logits', 'size', (0.4, 0.6)),
    ({'break_': 'embedding_lr'}, 'embedding', 'change', (-1.1, -0.9)),
    ({'break_': 'attn_scale'}, 'attention logits', 'size', (-0.1, 0.1)),
    ({'break_': 'attn_const'}, 'attention logits', 'size', (0.4, 0.6)),
    ({'break_': 'residual_depth', 'depths': '2,8,32'}, 'residual stream', 'change', (0.6, 1.2)),
    ({'mup_rules': 'authors'}, 'FFN output', 'size', (0.4, 0.6)),
    ({'mup_rules': 'sp'}, 'logits', 'size', (0.4, 0.6)),
], ids=lambda value: value.get('break_', value.get('mup_rules')) if isinstance(value, dict) else '')
def test_a_broken_rule_fails(table, knobs, quantity, kind, slope):
    code, files, out = table(**knobs)
    assert code == 1 and 'FAILS' in out
    broken, = files.values()
    assert quantity in fails(broken)
    assert slope[0] < broken['rows'][quantity][f'{kind}_slopes'][0] < slope[1]


def test_heads_of_one_size_cannot_tell_one_attention_scale_from_another(table):
    assert table(break_='attn_scale', vary='heads')[0] == 0


def test_muon_wants_one_over_the_root_of_m(table):
    code, files, out = table(optimizer='muon')
    change = {name: told['rows']['residual stream']['change_slopes'][0]
              for name, told in files.items()}
    assert code == 1 and abs(change['textbook-muon-1_sqrt_m']) < 0.2
    assert not fails(files['textbook-muon-1_sqrt_m'])
    assert change['textbook-muon-1_m'] < -0.25 and change['textbook-muon-const'] > 0.25
    assert fails(files['textbook-muon-const']) and 'spectral norm' in out


def test_what_is_recorded_is_what_the_network_computes(monkeypatch):
    for key, value in SMALL.items():
        monkeypatch.setattr(coord_check, key, value)
    torch.manual_seed(0)
    model = Xmodel(coord_check.config_of(128, 'heads', 'const')).double()
    idx = torch.randint(512, (2, 9))
    seen = coord_check.activations(model, idx)
    x = model.embed(idx) * 12                                      # (B, T, C)
    assert torch.equal(seen['embedding'][0], x) and torch.equal(seen['logits'][0], model(idx)[0])
    assert torch.equal(model.logits(model.norm(seen['residual stream'][0])), seen['logits'][0])
    q, k, _ = model.blocks[0].attn.qkv(model.blocks[0].norm1(x)).split((128, 64, 64), -1)
    angles = rope_angles(torch.arange(9), 64, 500_000.0)
    q, k = (apply_rope(t.unflatten(-1, (-1, 64)), *angles) for t in (q, k))     # (B, T, heads, 64)
    logits = torch.einsum('bihd,bjd->bhij', q, k[:, :, 0]) / 64
    causal = torch.ones(9, 9).tril().bool()
    assert torch.allclose(seen['attention logits'][0], logits[..., causal].float().double(),
                          atol=1e-5)
    branches = seen['attention output'].sum(0) + seen['FFN output'].sum(0)
    assert torch.allclose(x + 1.4 / math.sqrt(2) * branches, seen['residual stream'][0])


def test_each_seed_has_an_init_of_its_own():
    c = coord_check.config_of(64, 'heads', '1/sqrt(m)')
    idx = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
    lrs = {'learning_rate': 0.01, 'embedding_lr': 0.01}
    a, b, again = (coord_check.coordinates(c, [(idx, idx)], 'adamw', lrs, seed)
                   for seed in (1, 2, 1))
    assert a == again
    for quantity in ('embedding', 'residual stream', 'logits'):
        assert a[0][quantity][0] != b[0][quantity][0]            # the size at init


def test_each_seed_and_each_step_has_a_text_of_its_own(monkeypatch, data_dir):
    for key, value in SMALL.items():
        monkeypatch.setattr(coord_check, key, value)
    data = open_data(data_dir, ['stdlib'], SMALL['vocab_size'])
    texts = [x for seed in (0, 1) for x, _ in coord_check.make_batches(data, seed)]
    assert len(texts) == 4                                       # of two steps
    assert not any(torch.equal(a, b) for a, b in combinations(texts, 2))
    assert torch.equal(coord_check.make_batches(data, 1)[0][0], texts[2])


def test_slope():
    assert coord_check.slope([64, 128, 512], [3 * n**-0.7 for n in (64, 128, 512)]) == \
        pytest.approx(-0.7)


def test_as_a_program(tmp_path, data_dir):
    knobs = [f'--{key}={value}' for key, value in SMALL.items()]
    done = run('lab.coord_check', '--break=logits', *knobs, f'--data_dir={data_dir}', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, '')
    assert (tmp_path / 'results/coord_check/logits.json').exists()


@pytest.mark.parametrize('flag, says', [
    ('--break=logit', "mup_break='logit' should be a rule of µP, one of init_out, "),
    ('--widths=64,x', 'widths'), ('--widths=64', 'widths'), ('--widths=0,64', 'widths'),
    ('--depths=3', 'depths'), ('--steps=0', 'steps=0'), ('--seeds=0', 'seeds=0'),
    ('--widths=64,96,320', 'width 96 is not made of heads of 64'),
    ('--widths=64,128', 'should span a factor of 4'), ('--widths=16,64', 'should begin at 64'),
    ('--vary=heads --depths=2,4', 'is for vary=depth'),
    ('--block_size=5000', 'block_size=5000'),
    ('--mup_rules=sp --optimizer=muon', "Muon's lr, and sp has none"),
    ('--vary=heigth', "--vary=heigth: 'heigth'"), ('--learning_rate=nan', 'learning_rate=nan'),
    ('--out=/dev/null/x', '/dev/null/x: Not a directory')])
def test_a_mistake_gets_one_line(tmp_path, data_dir, flag, says):
    assert says in refused(run('lab.coord_check', *flag.split(), f'--data_dir={data_dir}',
                               '--vocab_size=512', cwd=tmp_path))
    assert not list(tmp_path.iterdir())
