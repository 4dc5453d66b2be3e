"""train.py against its recipe, which `recipe` below writes out once more in plain torch.

No knob has its default. The reference takes each batch whole, in float64, with torch's own loss,
clipping, AdamW and Muon; of the project's code it uses the network, its init and the batches, which
tests of their own hold. train.py runs in fp32, in micro-batches, on one process and on two.
"""
import math
from functools import cache
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import log, run, run_ranks, same
from torch.nn.utils import clip_grad_norm_

from checkpoint import read_checkpoint
from loader import get_batch, open_data, windows_before
from model import Xmodel, XmodelConfig

M, L, STD = 2, 2, 0.08               # µP's width multiplier 32 / 16, layers, init's std where m = 1
MODEL = {'n_layer': L, 'n_head': 2, 'n_kv_head': 1, 'n_embd': 32, 'n_ffn': 80, 'vocab_size': 512,
         'mup_base_width': 16, 'init_std': STD, 'input_scale': 10.0, 'output_scale': 1.5,
         'residual_scale': 1.2, 'attention_scale': 2.0, 'rope_theta': 10_000.0, 'norm_eps': 1e-3}
PARTS = {'qkv': (32, 16, 16), 'gate_up': (80, 80)}               # rows of q, k, v; of gate, up
MIXTURE = {'arith': 0.6, 'stdlib': 0.4}                          # arith is SFT data
PHASES = [
    {'name': 'stable', 'steps': 8, 'batch': 4, 'block_size': 64, 'data': {'stdlib': 1.0},
     'optimizer': 'adamw', 'warmup': 3, 'decay': 'constant', 'lr': (0, 1, 1)},
    {'name': 'decay', 'steps': 8, 'batch': 8, 'block_size': 64, 'data': MIXTURE,
     'optimizer': 'muon', 'decay': 'exponential', 'lr': (0, 1, 0.1)},
    {'name': 'long', 'steps': 4, 'batch': 4, 'block_size': 128, 'data': MIXTURE,
     'optimizer': 'muon', 'warmup': 2, 'decay': 'linear', 'lr': (0.02, 0.1, 0.01),
     'embedding_lr': (0.04, 0.2, 0.03)},
]
CASES = {
    'textbook': {
        'seed': 1, 'learning_rate': 0.02, 'embedding_lr': 0.006, 'weight_decay': 0.3, 'beta1': 0.8,
        'beta2': 0.9, 'momentum': 0.7, 'grad_clip': 0.56, 'muon_split': True,
        'completion_only': True, 'mup_rules': 'textbook', 'muon_lr_scaling': '1/sqrt(m)'},
    'authors': {
        'seed': 2, 'learning_rate': 0.007, 'embedding_lr': 0.03, 'weight_decay': 0.5, 'beta1': 0.7,
        'beta2': 0.97, 'momentum': 0.85, 'grad_clip': 0.51, 'muon_split': False,
        'completion_only': False, 'mup_rules': 'authors', 'muon_lr_scaling': '1/m'},
}
LR_FACTORS = {    # µP: (matrices under AdamW, matrices under Muon, gains, embedding)
    'textbook': (1 / M, 1 / math.sqrt(M), 1, 1),
    'authors': (1 / M, 1 / M, 1 / M, 1),
}
INIT_STD = {      # µP, by module; out and down end a branch
    'textbook': {'embed': STD, 'qkv': STD / math.sqrt(M), 'gate_up': STD / math.sqrt(M),
                 'out': STD / math.sqrt(2 * L * M), 'down': STD / math.sqrt(2 * L * M)},
    'authors': {'embed': STD, 'qkv': STD / math.sqrt(M), 'gate_up': STD / math.sqrt(M),
                'out': STD / math.sqrt(2 * L), 'down': STD / math.sqrt(2 * L)},
}


# --------------------------------------------------------------------------------------------------
# The recipe

def schedule(step):
    """(phase, step within it, share of learning_rate, share of embedding_lr): WSD by hand."""
    if step < 8:                                                 # warmup to 1, then stable
        share = min(1, step / 3)
        return PHASES[0], step, share, share
    if step < 16:                                                # from 1 to 0.1 in Megatron's shape
        share = 0.1 + (2 * 0.5 ** ((step - 8) / 8) - 1) * (1 - 0.1)
        return PHASES[1], step - 8, share, share
    shares = [(0.02, 0.04), (0.06, 0.12),                        # warmup to 0.1 and 0.2
              (0.1, 0.2), (0.055, 0.115)]                        # half of the way to 0.01 and 0.03
    return PHASES[2], step - 16, *shares[step - 16]


def parts(name, matrix, split):
    """Views of what Muon orthogonalises singly: the matrix, or each one that is fused in it."""
    module = name.split('.')[-2]
    if split and module in PARTS:
        return matrix.split(PARTS[module])
    return [matrix]


def adamw(roles, case):
    """torch's AdamW for {role: parameters}; gains have no weight decay."""
    decay = case['weight_decay']
    return torch.optim.AdamW(
        [{'role': role, 'params': params, 'weight_decay': 0 if role == 'gain' else decay}
         for role, params in roles.items()],
        betas=(case['beta1'], case['beta2']), eps=1e-8)


def muon(pieces, case):
    """torch's Muon; each update has RMS 0.2 times the learning rate, about AdamW's."""
    return torch.optim.Muon([{'role': 'muon', 'params': pieces}], momentum=case['momentum'],
                            weight_decay=case['weight_decay'], adjust_lr_fn='match_rms_adamw')


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def recipe(case, data):
    """Train; what each step logs, and the weights after 0, 1, ... 20 steps."""
    torch.manual_seed(case['seed'])
    config = XmodelConfig(**MODEL, block_size=128, mup_rules=case['mup_rules'])
    model = Xmodel(config).double()                              # drawn in fp32, as train.py's
    embedding = model.embed.weight
    gains = [p for p in model.parameters() if p.dim() == 1]
    matrices = {name: p for name, p in model.named_parameters()
                if p.dim() == 2 and p is not embedding}
    split, pieces = case['muon_split'], {}                       # what Muon steps, in place
    for name, p in matrices.items():
        pieces[name] = [torch.nn.Parameter(part) for part in parts(name, p.detach(), split)]
    matrix_factor, muon_factor, gain_factor, embedding_factor = LR_FACTORS[case['mup_rules']]
    history, weights = [], [weights_of(model)]

    for step in range(20):
        phase, i, share, embedding_share = schedule(step)
        if step == 0:
            optimizers = [adamw({'matrix': list(matrices.values()), 'gain': gains,
                                 'embedding': [embedding]}, case)]
        elif step == 8:                                          # AdamW -> Muon, all state fresh
            optimizers = [muon([piece for own in pieces.values() for piece in own], case),
                          adamw({'gain': gains, 'embedding': [embedding]}, case)]

        # the batch: the next rows of the phase, of windows that no phase before it has drawn
        rows = range(i * phase['batch'], (i + 1) * phase['batch'])
        start = windows_before(PHASES, phase, case['seed'])
        x, y = get_batch(data, phase['data'], rows, phase['block_size'], case['seed'], start,
                         case['completion_only'])

        # the loss: the mean over all targets of the batch
        logits, _ = model(x)                                     # (batch, T, vocab_size)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
        model.zero_grad()
        loss.backward()
        grad_norm = clip_grad_norm_(model.parameters(), case['grad_clip'])

        # the step: each role at its own learning rate
        lr, embedding_lr = share * case['learning_rate'], embedding_share * case['embedding_lr']
        lrs = {'matrix': lr * matrix_factor, 'muon': lr * muon_factor, 'gain': lr * gain_factor,
               'embedding': embedding_lr * embedding_factor}
        for name, p in matrices.items():
            for piece, grad in zip(pieces[name], parts(name, p.grad, split)):
                piece.grad = grad
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lrs[group['role']]
            # torch's Muon casts to bf16 to orthogonalise; here it goes on in float64
            with mock.patch.object(torch.Tensor, 'bfloat16', torch.Tensor.double):
                optimizer.step()
        history.append((loss.item(), grad_norm.item(), lr, embedding_lr))
        weights.append(weights_of(model))
    return history, weights


# --------------------------------------------------------------------------------------------------
# train.py against it

@pytest.fixture(scope='module')
def reference(data_dir):
    """reference(name) -> what `recipe` gives for this case."""
    data = open_data(data_dir, ['stdlib', 'arith'], MODEL['vocab_size'])
    return cache(lambda name: recipe(CASES[name], data))


@pytest.fixture(scope='module')
def trained(data_dir, tmp_path_factory):
    """trained(name, world) -> train.py's (lines of the log, [weights after 1, 2, ... 20 steps])."""
    @cache
    def train(name, world, micro_batch_tokens=64):
        folder = tmp_path_factory.mktemp('loop')
        knobs = MODEL | CASES[name] | {
            'phases': PHASES, 'data_dir': str(data_dir), 'out_dir': str(folder / 'run'),
            'dtype': 'float32', 'micro_batch_tokens': micro_batch_tokens,
            'checkpoint_interval': 1, 'keep': 20, 'eval_rows': 1}
        (folder / 'config.py').write_text(''.join(f'{k} = {v!r}\n' for k, v in knobs.items()))
        if world == 1:
            processes = [run('train.py', folder / 'config.py')]
        else:
            processes = run_ranks(world, 'train.py', folder / 'config.py')
        assert not any(process.returncode for process in processes), processes[0].stderr
        weights = [read_checkpoint(folder / 'run' / f'step_{n}.pt')['model'] for n in range(1, 21)]
        return log(folder / 'run'), [{name: p.double() for name, p in w.items()} for w in weights]
    return train


def apart(a, b, start):
    """How far weights a are from b, as a share of b's movement from start: of the worst tensor."""
    errors = [(a[name] - b[name]).norm() / (b[name] - start[name]).norm() for name in b]
    return torch.stack(errors).max().item()                      # nan if one is


@pytest.mark.parametrize('world', [1, 2])
@pytest.mark.parametrize('name', CASES)
def test_train_follows_the_recipe(name, world, reference, trained):
    (history, right), (lines, weights) = reference(name), trained(name, world)
    norms = [grad_norm for _, grad_norm, _, _ in history]
    clipped = sum(norm > CASES[name]['grad_clip'] for norm in norms)
    assert 12 <= clipped < 20                                    # in most steps, and not in all
    for line, (loss, grad_norm, lr, embedding_lr) in zip(lines, history, strict=True):
        where = f'step {line["step"]}'
        # measured, fp32 against float64: 1.8e-7 of the loss, 7.8e-7 of the norm
        assert line['loss'] == pytest.approx(loss, rel=1e-6), where
        assert line['grad_norm'] == pytest.approx(grad_norm, rel=1e-5), where
        assert line['lr'] == pytest.approx(lr, rel=1e-12), where
        assert line['embedding_lr'] == pytest.approx(embedding_lr, rel=1e-12), where
    assert same(weights[0], right[0])                            # warmup's first rate is 0
    for n in range(2, 21):                                       # measured: up to 3.4e-5
        assert apart(weights[n - 1], right[n], right[0]) < 2e-4, f'after {n} steps'


@pytest.mark.parametrize('world', [1, 2])
def test_weights_do_not_depend_on_micro_batches(world, trained):
    start, one_by_one = trained('textbook', world)[1][0], trained('textbook', world)[1][-1]
    for tokens in (128, 4096):                                   # in twos, and all in one
        others = trained('textbook', world, tokens)[1][-1]
        assert apart(others, one_by_one, start) < 3e-5           # measured: 2.1e-6
        assert not same(others, one_by_one)                      # sums in another order


def test_a_seed_fixes_the_initialisation(trained):
    first, again = trained('textbook', 1)[1][0], trained('textbook', 2)[1][0]
    other = trained('authors', 1)[1][0]
    assert same(first, again)                                    # on two ranks
    for name, p in first.items():
        if p.dim() == 2:                                         # whatever their std
            pair = torch.stack((p.flatten(), other[name].flatten()))
            assert abs(pair.corrcoef()[0, 1]) < 5 / math.sqrt(p.numel()), name


@pytest.mark.parametrize('name', CASES)
def test_initialisation_by_role(name, trained):
    for parameter, p in trained(name, 1)[1][0].items():
        std = INIT_STD[name].get(parameter.split('.')[-2])
        if std is None:
            assert torch.equal(p, torch.ones_like(p)), parameter
        else:                                                    # 5 standard errors
            n = p.numel()
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), parameter
            assert abs(p.mean().item()) < 5 * std / math.sqrt(n), parameter
