"""lab/probe.py and lab/variants.py: what is measured on checkpoints; runs changed by no knob."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import muon
from documents import arith
from lab import probe, variants
from model import Xmodel, XmodelConfig

RIGHT = '3 * 4 = 12\n12 - 5 = 7\n#### 7'


@pytest.mark.parametrize('text, kind', [
    (RIGHT, None), ('3 * 4 = 12\n12 + 5 = 17\n#### 17', 'wrong operation'),
    ('3 * 4 = 12\n12 - 6 = 6\n#### 6', 'wrong copy'),
    ('3 * 4 = 12\n11 - 5 = 6\n#### 6', 'wrong copy'),
    ('3 * 4 = 13\n13 - 5 = 8\n#### 8', 'wrong result'),
    ('3 * 4 = 12\n#### 12', 'wrong stop'), ('3 * 4 = 12\n12 - 5 = 7\n7 + 1 = 8', 'wrong stop'),
    ('3 * 4 = 12\n12 - 5 = 7', 'wrong stop'), ('3 * 4 = 12\n12 - 5 = 7\n#### 8', 'wrong copy')])
def test_kinds_of_errors(text, kind):
    assert probe.kind_of_error(text, RIGHT) == kind


class Quadratic(nn.Module):
    """A model whose loss is w · H w / 2, whatever it reads."""

    def __init__(self, H):
        super().__init__()
        self.H, self.w = H, nn.Parameter(torch.ones(len(H)))

    def forward(self, x, y=None):
        return None, self.w @ self.H @ self.w / 2


@pytest.mark.parametrize('eigenvalues', [[5.0, 1.0, 0.5, -2.0], [1.0, 0.3, -6.0, 2.0]])
def test_the_largest_curvature_is_the_hessians(eigenvalues):
    Q, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    model = Quadratic(Q @ torch.diag(torch.tensor(eigenvalues)) @ Q.T)
    x = torch.zeros(16, 3, dtype=torch.long)
    expected = max(eigenvalues, key=abs)
    assert probe.largest_curvature(model, x, x) == pytest.approx(expected, rel=1e-2)
    assert torch.allclose(model.w.data, torch.ones(4))           # its weights are back


def test_the_curvature_of_a_model_is_that_of_autograd(monkeypatch):
    monkeypatch.setattr(probe, 'ITERATIONS', 60)
    torch.manual_seed(0)
    model = Xmodel(XmodelConfig(1, 2, 1, 8, 8, 24, 8, mup_base_width=8))
    x, y = torch.randint(24, (2, 8, 8))
    names = dict(model.named_parameters())

    def loss(*weights):
        logits = torch.func.functional_call(model, dict(zip(names, weights)), (x,))[0]
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.__class__ = nn.RMSNorm                        # which can be differentiated twice
    blocks = torch.autograd.functional.hessian(loss, tuple(p.detach() for p in names.values()))
    sizes = [p.numel() for p in names.values()]
    H = torch.cat([torch.cat([block.reshape(n, -1) for block in row], 1)
                   for n, row in zip(sizes, blocks)])
    expected = torch.linalg.eigvalsh(H.double()).abs().max().item()
    assert probe.largest_curvature(model, x, y) == pytest.approx(expected, rel=0.05)


def test_what_weight_decay_did_is_taken_out_of_an_update():
    W, step = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 1.0], [-2.0, 0.0]])
    assert torch.allclose(probe.without(step - 0.1 * W, W), step)


def test_stable_rank():
    assert probe.stable_rank([torch.diag(torch.tensor([2.0, 1.0, 1.0]))]) == pytest.approx(1.5)
    assert probe.stable_rank([torch.eye(5), torch.ones(4, 4)]) == pytest.approx(3)


def test_losses_of_tokens_average_to_the_models_own_and_the_line_ends_at_both():
    torch.manual_seed(0)
    c = XmodelConfig(1, 2, 1, 16, 16, 24, 8)
    one, other = Xmodel(c), Xmodel(c)
    x, y = torch.randint(24, (2, 6, 8))
    expected = [model(x, y)[1].item() for model in (one, other)]
    assert probe.token_losses(one, x, y, 4).mean().item() == pytest.approx(expected[0], rel=1e-5)
    line = probe.on_the_line(one, *({k: v.clone() for k, v in m.state_dict().items()}
                                    for m in (one, other)), x, y)
    assert [line[0], line[-1]] == pytest.approx(expected, rel=1e-5) and len(line) == 5


def test_a_key_is_told_once_and_early():
    records = list(probe.recall(50, 1))
    for record in records:
        key = record['completion'].removeprefix('#### ')
        first, *rest = record['prompt'].splitlines()
        assert first == f'Note: the key is {key}.' and rest[-2] == 'Question: What is the key?'
        assert 'key' not in rest[0] and rest[0].count('.') >= 14
    assert len({record['completion'] for record in records}) > 10
    assert records != list(probe.recall(50, 2)) and records == list(probe.recall(50, 1))


def test_a_majority_answers(monkeypatch):
    samples = iter(['#### 3', '#### 4', '#### 4', 'none', '#### 5', 'none'])

    def complete(model, tokenizer, prompts, tokens, temperature, **sampling):
        assert (temperature > 0) == (len(prompts) > 2)           # greedy alone is one sample each
        return [SimpleNamespace(text=next(samples)) for _ in prompts]

    monkeypatch.setattr(probe, 'complete', complete)
    results = probe.solved(None, None, [[1], [2]], ['#### 4', '#### 5'], 9, 3)
    assert [right for right, _ in results] == [True, False]      # the second has no answer, mostly
    samples = iter(['#### 4', '#### 4'])
    results = probe.solved(None, None, [[1], [2]], ['#### 4', '#### 5'], 9)
    assert [right for right, _ in results] == [True, False]


def test_sums_are_told_by_steps_and_way_of_answering(monkeypatch):
    monkeypatch.setattr(probe, 'PROBLEMS', 3)
    monkeypatch.setattr(probe, 'solved', lambda model, tokenizer, prompts, written, tokens, n=1:
                        [(n > 1, 'x')] * len(prompts))
    monkeypatch.setattr(probe, 'kind_of_error', lambda text, written:
                        'wrong copy' if written.count('\n') <= 3 else 'wrong result')
    data = SimpleNamespace(pairs=lambda split: [])
    found = probe.steps(SimpleNamespace(model=None, tokenizer=SimpleNamespace(encode=list),
                                        data=lambda name: data))
    for n in range(1, 7):
        assert found[f'{n} steps (3 sums), greedy, solved'] == 0
        assert found[f'{n} steps (3 sums), majority of 8, solved'] == 1
    errors = [key for key, value in found.items() if 'errors' in key and value == 1]
    assert errors == ['1 to 3 steps, wrong copy, share of errors',
                      '4 to 6 steps, wrong result, share of errors']


def test_keys_are_told_apart_by_their_distance(monkeypatch):
    asked = []
    monkeypatch.setattr(probe, 'PROBLEMS', 10)
    monkeypatch.setattr(probe, 'windows', lambda data, T, n: [torch.arange(2 * T).view(2, T)] * 2)
    monkeypatch.setattr(probe, 'token_losses', lambda model, x, y, rows: (x % 1024).float())
    monkeypatch.setattr(probe, 'solved', lambda model, tokenizer, prompts, *more:
                        asked.append([len(ids) for ids in prompts]) or [(True, '')])
    found = probe.length(SimpleNamespace(model=None, tokenizer=SimpleNamespace(encode=str.split),
                                         data=lambda name: None))
    near, far = asked
    assert len(near) == len(far) == 10 and max(near) < 256 <= min(far) and max(far) < 1024
    assert found['loss of text, positions 0 to 255 of 1024'] == 127.5
    assert found['loss of text, positions 512 to 1023 of 1024'] == 767.5


def test_frequent_and_rare_tokens():
    frequent, rare = probe.frequent_and_rare(np.array([5, 30, 1, 4, 15, 45]))
    assert frequent.tolist() == [False] * 5 + [True]
    assert rare.tolist() == [True, False, True, True, False, False]


def test_sums_have_their_number_of_steps_and_were_not_seen():
    tokenizer = SimpleNamespace(encode=str)
    seen = {document.text for document in arith(40 * probe.PROBLEMS, 'probe 2', (2,))
            if '+' in document.text}
    prompts, written = probe.sums_of(2, seen, tokenizer)
    assert len(prompts) == len(set(prompts)) == probe.PROBLEMS
    assert all(text.count('\n') == 2 and '+' not in text for text in written)
    assert {text.count('\n') for text in probe.sums_of(6, (), tokenizer)[1]} == {6}


@pytest.mark.parametrize('modules', [variants.ATTENTION, variants.FFN])
def test_muon_for_one_part_alone(modules, monkeypatch):
    monkeypatch.setattr(muon, 'make_optimizers', muon.make_optimizers)
    variants.muon_for(modules)
    model = Xmodel(XmodelConfig(2, 2, 1, 16, 16, 24, 8))
    optimizers = muon.make_optimizers('muon', model.param_groups(), (0.9, 0.95), 0.95, False)
    names = [{name for group in optimizer.param_groups for name in group['names']}
             for optimizer in optimizers]
    assert names[0] == {name for name, _ in model.named_parameters()
                        if name.split('.')[-2] in modules}
    rest = [group for group in optimizers[1].param_groups if group['role'] == 'not for Muon']
    assert {group['lr_mult'] for group in rest} == {16 / 2}                     # m = 1 / 16
    others = [group for group in optimizers[1].param_groups if group['muon_lr_mult'] is None]
    assert {group['lr_mult'] for group in others} == {1}
    assert not names[0] & names[1] and len(names[0] | names[1]) == len(list(model.parameters()))
    assert len(muon.make_optimizers('adamw', model.param_groups())) == 1


def test_weights_are_rounded_to_bf16_after_each_step(monkeypatch):
    monkeypatch.setattr(muon, 'step_all', muon.step_all)
    variants.bf16_weights()
    model = Xmodel(XmodelConfig(1, 2, 1, 16, 16, 24, 8))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers = muon.make_optimizers('adamw', model.param_groups())
    muon.step_all(optimizers, {'learning_rate': 0.01, 'embedding_lr': 0.01})
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
