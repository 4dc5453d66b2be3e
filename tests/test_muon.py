"""muon.py against torch.optim.Muon, the SVD and itself on parts."""
import copy

import pytest
import torch

import hardware
from model import Xmodel, XmodelConfig
from muon import Muon, make_optimizers, zeropower_via_newtonschulz5

# bf16 keeps 8 bits (0.4 %); Newton-Schulz multiplies a rounding by up to 3.4445 a step. Two ways to
# order the same five steps are 1.2 to 1.3 % of the movement apart (measured), while 5 % more
# learning rate makes 5 %, 10 % more decay 6 %, and momentum 0.9 for 0.95 makes 8 %.
BF16 = 0.03
SMALL = XmodelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ffn=160, vocab_size=96)


def weights(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(*shape, generator=g)) for shape in shapes]


def train(ps, optimizer, steps=10):
    """Steps along gradients that a seed fixes -> each weight's whole movement."""
    start = [p.detach().clone() for p in ps]
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return [p.detach() - p0 for p, p0 in zip(ps, start)]


def assert_near(a, b, tol=BF16):
    error = ((a - b).norm() / b.norm()).item()
    assert error < tol, f'{error:.1%} apart'


@pytest.mark.parametrize('shape', [(64, 64), (160, 64), (64, 160)])
def test_equals_torch_muon(shape):
    # its buffer is a mean, (1 - momentum) times ours; Newton-Schulz normalises that factor away
    knobs = {'lr': 1e-3, 'momentum': 0.95, 'weight_decay': 0.1}
    ours, theirs = weights(shape), weights(shape)
    a = train(ours, Muon(ours, **knobs))
    b = train(theirs, torch.optim.Muon(theirs, adjust_lr_fn='match_rms_adamw', **knobs))
    assert_near(a[0], b[0])


def test_weights_of_one_shape_together_equal_one_by_one():
    shapes = [(64, 32), (32, 64), *[(64, 32)] * 9]               # more than one stack
    together, alone = weights(*shapes), weights(*shapes)
    one_by_one = Muon([{'params': [p]} for p in alone])          # groups are stepped singly
    for a, b in zip(train(together, Muon(together)), train(alone, one_by_one)):
        assert_near(a, b)


@pytest.mark.parametrize('split', [True, False])
def test_split_orthogonalises_the_parts(split):
    rows = (64, 32, 32)
    fused, parts = weights((128, 64)), weights((128, 64))[0].detach().split(rows)
    parts = [torch.nn.Parameter(part.clone()) for part in parts]
    fused[0].grad = weights((128, 64), seed=2)[0].detach()
    for part, grad in zip(parts, fused[0].grad.split(rows)):
        part.grad = grad.clone()
    start = fused[0].detach().clone()
    Muon([{'params': fused, 'parts': rows}], split=split).step()
    Muon(parts).step()
    error = (fused[0] - torch.cat(parts)).norm() / (torch.cat(parts) - start).norm()
    assert error < BF16 if split else error > 3 * BF16


def test_xmodel_declares_the_parts_of_its_fused_weights():
    model = copy.deepcopy(Xmodel(SMALL))
    parts_of = {p: group['parts'] for group in model.param_groups() for p in group['params']}
    for name, p in model.named_parameters():
        right = {'qkv': (64, 32, 32), 'gate_up': (160, 160)}.get(name.split('.')[-2])
        assert parts_of[p] == right


@pytest.mark.parametrize('shape', [(48, 48), (96, 48), (48, 96), (3, 48, 96)])
def test_newton_schulz_against_svd(shape):
    # well conditioned: singular values 0.3...1 times anything
    U, _, Vh = torch.linalg.svd(weights(shape)[0].detach(), full_matrices=False)
    s = torch.linspace(0.3, 1, 48)
    X = zeropower_via_newtonschulz5(1000 * (U * s) @ Vh).float()
    assert X.shape == shape
    assert 0.6 < torch.linalg.svdvals(X).min() and torch.linalg.svdvals(X).max() < 1.3
    sigma = (U.mT @ X @ Vh.mT).diagonal(dim1=-2, dim2=-1)        # in G's own singular vectors,
    assert_near((U * sigma[..., None, :]) @ Vh, X, 0.05)         # X is diagonal, to 3.8 %


@pytest.mark.parametrize('units', [True, False])
def test_newton_schulz_is_in_bf16_only_where_there_are_units_for_it(units, monkeypatch):
    G = weights((32, 64))[0].detach()
    monkeypatch.setattr(hardware, 'has_bf16', lambda device: units)
    X = zeropower_via_newtonschulz5(G)
    assert X.dtype == (torch.bfloat16 if units else torch.float32)
    monkeypatch.setattr(hardware, 'has_bf16', lambda device: not units)
    assert_near(X.float(), zeropower_via_newtonschulz5(G).float(), 0.06)     # 3.9 %


def test_zero_gradient_leaves_decay_alone():
    p, = weights((32, 16))
    start = p.detach().clone()
    p.grad = torch.zeros_like(p)
    Muon([p], lr=0.01, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), start * (1 - 0.001))


def test_update_has_rms_of_a_fifth_of_the_learning_rate():
    for shape in ((64, 64), (256, 64), (64, 256)):
        ps = weights(shape)
        movement, = train(ps, Muon(ps, lr=0.01, weight_decay=0.0), steps=1)
        assert movement.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_make_optimizers(kind):
    model = Xmodel(SMALL)
    optimizers = make_optimizers(kind, model.param_groups(0.1), betas=(0.8, 0.9), momentum=0.7,
                                 split=True)
    # what the paper prescribes, by name: Muon for the blocks' matrices only
    by_muon = {name for name, p in model.named_parameters()
               if kind == 'muon' and name.startswith('blocks.') and p.dim() == 2}
    assert [type(o).__name__ for o in optimizers] == (['Muon', 'AdamW'] if by_muon else ['AdamW'])
    name_of = {p: name for name, p in model.named_parameters()}
    seen = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            names = [name_of[p] for p in group.get('whole', group['params'])]
            assert names == group['names']
            seen += names
            assert all((name in by_muon) == isinstance(optimizer, Muon) for name in names)
            assert group['weight_decay'] == (0.0 if 'norm' in names[0] else 0.1)
            if isinstance(optimizer, Muon):
                assert group['momentum'] == 0.7 and group['split']
                assert group['lr_mult'] == 2 and group['lr_knob'] == 'learning_rate'    # m = 1/4
            else:
                assert group['betas'] == (0.8, 0.9) and group['eps'] == 1e-8
    assert sorted(seen) == sorted(name_of.values())
