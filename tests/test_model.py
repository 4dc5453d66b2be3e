"""model.py: network against transformers' Granite, loss, µP's table, loading."""
import json
import math
import pickle
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import configurator
import kernels
import model as network
import start
import train
from checkpoint import load_model
from kernels import RMSNorm, RMSNormOnCPU, causal_attention, chunked_cross_entropy
from model import (
    Block,
    Xmodel,
    XmodelConfig,
    apply_rope,
    mup_table,
    role_of,
    rope_angles,
)
from run import try_compile

TINY = XmodelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ffn=160, vocab_size=96,
                    block_size=64)                                           # m = 0.25
WIDE = replace(TINY, n_head=24, n_kv_head=8, n_embd=1536, n_ffn=256)         # m = 6


@pytest.fixture(autouse=True)
def one_thread():
    """Steps this small only wait for each other's threads: 200 x slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(c, seed=0, device='cpu'):
    torch.manual_seed(seed)
    with torch.device(device):
        return Xmodel(c)


def ids(c, *shape, seed=1):
    return torch.randint(c.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tol, what=''):
    """Largest difference below tol of the tensor's scale, its largest entry."""
    assert a.shape == b.shape, what
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
    assert error < tol, f'{what} differs by {error:.1e} of its scale'


# --- against transformers' GraniteForCausalLM, the same network written by others ---

def granite(model):
    """A GraniteForCausalLM with the model's weights, and {its name: name and rows of ours}."""
    transformers = pytest.importorskip('transformers')
    c = model.config
    theirs = transformers.GraniteForCausalLM(transformers.GraniteConfig(
        **shape_of(c), embedding_multiplier=12.0, attention_multiplier=c.n_head / c.n_embd,
        residual_multiplier=1.4 / c.n_layer**0.5,
        logits_scaling=c.n_embd / 256 / c.output_scale))
    return theirs, take_weights(theirs, model)


def shape_of(c):
    """A config's shape by transformers' names."""
    return {'vocab_size': c.vocab_size, 'hidden_size': c.n_embd, 'intermediate_size': c.n_ffn,
            'num_hidden_layers': c.n_layer, 'num_attention_heads': c.n_head,
            'num_key_value_heads': c.n_kv_head, 'rms_norm_eps': c.norm_eps,
            'tie_word_embeddings': True,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 500_000.0}}


def take_weights(theirs, model):
    """Give theirs, with Llama's names, the model's weights; {its name: name and rows of ours}."""
    c = model.config
    kv, all_rows = c.n_kv_head * c.n_embd // c.n_head, slice(None)
    names = {'model.embed_tokens.weight': ('embed.weight', all_rows),
             'model.norm.weight': ('norm.weight', all_rows)}
    for i in range(c.n_layer):
        for name, ours, rows in (
                ('input_layernorm', 'norm1', all_rows),
                ('post_attention_layernorm', 'norm2', all_rows),
                ('self_attn.q_proj', 'attn.qkv', slice(c.n_embd)),
                ('self_attn.k_proj', 'attn.qkv', slice(c.n_embd, c.n_embd + kv)),
                ('self_attn.v_proj', 'attn.qkv', slice(c.n_embd + kv, None)),
                ('self_attn.o_proj', 'attn.out', all_rows),
                ('mlp.gate_proj', 'ffn.gate_up', slice(c.n_ffn)),
                ('mlp.up_proj', 'ffn.gate_up', slice(c.n_ffn, None)),
                ('mlp.down_proj', 'ffn.down', all_rows)):
            names[f'model.layers.{i}.{name}.weight'] = f'blocks.{i}.{ours}.weight', rows
    weights = dict(model.named_parameters())
    theirs.load_state_dict({a: weights[b][rows] for a, (b, rows) in names.items()}, strict=False)
    return names


@pytest.mark.parametrize('c', [replace(TINY, output_scale=0.5), WIDE, replace(TINY, norm_eps=1.0)],
                         ids=['narrow', 'm=6', 'norm_eps'])
def test_equals_granite(c):
    model = build(c)
    for name, p in model.named_parameters():
        if role_of(name) == 'gain':                              # at init all 1: a lost one hides
            torch.nn.init.uniform_(p, 0.5, 1.5)
    theirs, names = granite(model)
    assert set(names) == {name for name, _ in theirs.named_parameters()}
    idx = ids(c, 2, 33)
    labels = idx.clone()
    labels[:, 5:9] = -100                                        # ignored; -1 with us
    targets = labels[:, 1:].where(labels[:, 1:] >= 0, -1)        # Granite shifts by itself
    out = theirs(idx, labels=labels)
    out.loss.backward()
    logits, none = model(idx)
    assert none is None
    assert_close(logits, out.logits, 1e-5, 'logits')
    none, loss = model(idx[:, :-1], targets)
    loss.backward()
    assert none is None
    assert_close(loss, out.loss, 1e-5, 'loss')
    with torch.no_grad():
        assert_close(model(idx[:, :-1], targets)[1], out.loss, 1e-5, 'loss without gradients')
    ours, theirs = dict(model.named_parameters()), dict(theirs.named_parameters())
    for name, (our, rows) in names.items():
        assert_close(ours[our].grad[rows], theirs[name].grad, 1e-5, name)


def test_standard_parametrisation_is_llama():
    transformers = pytest.importorskip('transformers')          # a network without any factor
    model = build(replace(TINY, mup_rules='sp'))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)                       # else each key weighs the same
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape_of(model.config)))
    take_weights(theirs, model)
    idx = ids(TINY, 2, 33)
    assert_close(model(idx)[0], theirs(idx).logits, 1e-5, 'logits')


# --- the loss in chunks ---

def test_chunked_cross_entropy_equals_float64_oracle():
    N, C, V, multiplier = 200, 64, 2**16, 0.37                   # chunks of 128 rows: 128 + 72
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=g, requires_grad=True)
    w = torch.randn(V, C, generator=g, requires_grad=True)
    targets = torch.randint(V, (N,), generator=g)
    targets[::7] = -1
    loss = chunked_cross_entropy(x, w, targets, multiplier)
    (3 * loss).backward()                                        # as accumulation scales it
    xd, wd = (t.detach().double().requires_grad_() for t in (x, w))
    oracle = F.cross_entropy(multiplier * xd @ wd.T, targets, ignore_index=-1)
    (3 * oracle).backward()
    assert_close(loss.double(), oracle, 1e-5, 'loss')
    assert_close(x.grad.double(), xd.grad, 1e-5, 'gradient of x')
    assert_close(w.grad.double(), wd.grad, 1e-5, 'gradient of the embedding')


@pytest.mark.parametrize('rows', [1024, 16])                    # of a chunk: 2 chunks, and 69
def test_bf16_loss_and_gradients_are_those_of_the_bf16_logits(monkeypatch, rows):
    N, C, V, multiplier = 1100, 32, 16_384, 0.25                # times which nothing is rounded
    monkeypatch.setattr('kernels.CHUNK', rows * V)
    monkeypatch.setattr('kernels.LEAST_ROWS', 1)
    g = torch.Generator().manual_seed(0)
    w = torch.randn(V, C, generator=g)
    targets = torch.randint(V, (N,), generator=g)
    x = torch.randn(N, C, generator=g)
    x[::2] = 1.75 * w[targets[::2]]                              # half of the rows are sure
    targets[::7] = -1
    # on a grid of eighths every order of summation gives the same logits, before they are rounded
    x, w = ((8 * t).round() / 8 for t in (x, w))
    xb, wb = x.bfloat16(), w.bfloat16()
    assert torch.equal(xb.float(), x) and torch.equal(wb.float(), w)
    for t in (x, w):
        t.requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        loss = chunked_cross_entropy(x, w, targets, multiplier)
    loss.backward()
    assert loss.dtype == x.grad.dtype == w.grad.dtype == torch.float32

    logits = (xb @ wb.T).float().requires_grad_()                # rounded to bf16: (N, V)
    right = F.cross_entropy(multiplier * logits, targets, ignore_index=-1)
    right.backward()
    assert abs(loss.item() - right.item()) < 1e-3
    grad_x, grad_w = logits.grad @ wb.float(), logits.grad.T @ xb.float()
    # each row by its own scale: those of sure rows, or of rare tokens, are small
    for ours, theirs in ((x.grad, grad_x), (w.grad, grad_w)):
        assert ((ours - theirs).norm(dim=1) <= 0.01 * theirs.norm(dim=1)).all()     # bf16: 8 bits
    assert (x.grad[::7] == 0).all()


def test_a_second_backward_pass_is_refused():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    loss = chunked_cross_entropy(x, w, torch.arange(4), 1.0)
    loss.backward(retain_graph=True)
    grad = w.grad.clone()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()
    assert torch.equal(w.grad, grad)


def test_no_gradient_is_made_where_none_is_wanted():
    seen = []

    def spy(x, w, targets, grad_w):
        seen.append(grad_w)
        return kernels.loss_of_chunk(x, w, targets, grad_w)
    x, w = torch.randn(4, 8), torch.randn(16, 8, requires_grad=True)
    with torch.no_grad():
        loss = chunked_cross_entropy(x, w, torch.arange(4), 1.0, spy)
    assert seen == [None] and loss.grad_fn is None


def test_all_targets_ignored():
    model = build(TINY)
    loss = model(ids(TINY, 2, 8), torch.full((2, 8), -1))[1]
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_autocast_loss_and_gradients_are_near_fp32():
    model, idx, out = build(TINY), ids(TINY, 2, 33), []
    for bf16 in (True, False):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        out.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, grad), (loss32, grad32) = out
    assert_close(loss, loss32, 0.01)
    assert (grad - grad32).norm() < 0.03 * grad32.norm()         # bf16 keeps 8 bits


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_training_never_holds_all_logits():
    N, V = 256, 2**15                                            # 2**23 logits, in chunks of 2**22
    model = build(replace(TINY, n_layer=1, n_head=1, n_kv_head=1, n_embd=4, n_ffn=4, vocab_size=V))
    idx = ids(model.config, 1, N)
    with LargestTensor() as largest:
        model(idx, idx)[1].backward()
    assert largest.numel == 2**22


# --- the trial of torch.compile ---

@pytest.mark.parametrize('right', [True, False])
def test_a_trial_compile_leaves_no_gradient_and_undoes_a_wrong_one(right, monkeypatch):
    def compile_block(self, **how):
        """A compiler that gives the block itself, or one with its features in another order."""
        def wrong(*args):
            return self._call_impl(*args).roll(1, -1)
        self._compiled_call_impl = self._call_impl if right else wrong

    monkeypatch.setattr(Block, 'compile', compile_block)
    monkeypatch.setattr(torch, 'compile', lambda function, **how: function)
    model, idx = build(TINY), ids(TINY, 2, 16)
    loss = model(idx, idx)[1].item()
    for _ in range(2):                                           # a run has more than one trial
        told = try_compile(model, idx, idx, nullcontext())
        assert ('going on in eager mode' in told) == (not right)
        assert not any(p.grad.any() for p in model.parameters())
        assert model(idx, idx)[1].item() == loss


# --- shape, init, µP ---

def config_of(file):
    """The XmodelConfig of a config file."""
    knobs = dict(vars(train))
    configurator.configure(knobs, [str(Path(train.__file__).parent / 'config' / file)])
    return start.model_config(knobs)


@pytest.mark.parametrize('file, total, embedding', [
    ('xmodel25.py', 1_350_059_520, 198_574_080), ('proxy20m.py', 19_935_488, 4_194_304)])
def test_parameters(file, total, embedding):
    model = build(config_of(file), device='meta')
    assert model.num_params() == total
    assert model.num_params(embedding=False) == total - embedding


def test_flops_of_a_token_are_those_that_torch_counts():
    model, (B, T) = build(TINY), (2, 64)
    idx = ids(TINY, B, T)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    # in attention two products forward, and twice as many backward; half of the keys are masked,
    # but in T keys of a block all count
    q = B, TINY.n_head, T, TINY.hd
    attention = TINY.n_layer * 3 * sdpa_flop_count(q, q, q)
    gains = 6 * B * T * sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert B * T * model.flops_per_token(T) == counter.get_total_flops() - attention / 2 + gains


@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@pytest.mark.parametrize('T', [1, 50, 256, 257, 700, 1024, 1030])
def test_attention_on_a_cpu_is_that_of_torch_in_float64(n_kv_head, T):
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, n, T, 16, generator=generator, requires_grad=True)
               for n in (4, n_kv_head, n_kv_head))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    y = causal_attention(q, k, v, 0.3)
    right = torch.nn.functional.scaled_dot_product_attention(
        *exact, is_causal=True, scale=0.3, enable_gqa=True)
    assert (y - right).abs().max() < 2e-6
    weights = torch.randn(y.shape, generator=generator)
    gradients = torch.autograd.grad((y * weights).sum(), (q, k, v))
    for mine, theirs in zip(gradients, torch.autograd.grad((right * weights).sum(), exact)):
        assert (mine - theirs).abs().max() < 2e-5


def test_a_seed_fixes_init_and_another_draws_every_matrix_anew():
    first, again, other = (dict(build(TINY, seed).named_parameters()) for seed in (0, 0, 1))
    for name, p in first.items():
        assert torch.equal(p, again[name]), name
        assert torch.equal(p, other[name]) == (role_of(name) == 'gain'), name
        if name.startswith('blocks.0.') and role_of(name) != 'gain':
            next_block = first[name.replace('blocks.0.', 'blocks.1.')]
            assert not torch.equal(p, next_block), name


def test_textbook_and_authors_are_the_same_at_base_width():
    c = replace(TINY, n_embd=256, n_ffn=640, mup_rules='textbook')
    a, b = build(c), build(replace(c, mup_rules='authors'))
    assert a.table == b.table
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)


def test_textbook_and_authors_differ_in_two_entries_at_m_6():
    a, b = (mup_table(replace(WIDE, mup_rules=rules)) for rules in ('textbook', 'authors'))
    differ = {(role, field) for role in a for field in a[role]._fields
              if getattr(a[role], field) != getattr(b[role], field)}
    assert differ == {('branch_out', 'init_std'), ('gain', 'lr_mult')}


@pytest.mark.parametrize('rules', ['textbook', 'authors', 'sp'])
@pytest.mark.parametrize('c', [TINY, replace(TINY, n_embd=256, n_ffn=640), WIDE],
                         ids=['m=0.25', 'm=1', 'm=6'])
def test_init_std(c, rules):
    # two layers: matrix 0.1 / sqrt(m); branch_out 0.1 / sqrt(4 m), or 0.1 / sqrt(4) for the authors
    by_width = {64: (0.2, 0.1), 256: (0.1, 0.05), 1536: (0.040825, 0.020412)}
    matrix, branch_out = by_width[c.n_embd]
    expected = {'textbook': {'embedding': 0.1, 'matrix': matrix, 'branch_out': branch_out},
                'authors': {'embedding': 0.1, 'matrix': matrix, 'branch_out': 0.05},
                'sp': {'embedding': 0.02, 'matrix': 0.02, 'branch_out': 0.01}}[rules]
    for name, p in build(replace(c, mup_rules=rules)).named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        role = 'embedding' if name == 'embed.weight' else 'branch_out' \
            if name.endswith(('attn.out.weight', 'ffn.down.weight')) else 'matrix'
        error = 4.5 / math.sqrt(2 * p.numel())                   # 4.5 sigma of a measured std
        assert p.numel() < 300_000 or error < 0.01
        assert p.std().item() == pytest.approx(expected[role], rel=error), name
        assert abs(p.mean().item()) < 4.5 * expected[role] / math.sqrt(p.numel()), name


# role: knob of its learning rate, factor on it, factor under Muon, decay, init std; two layers
GROUPS = {
    ('textbook', 128): {                                         # m = 0.5
        'embedding': ('embedding_lr', 1, None, 0.1, 0.1),
        'matrix': ('learning_rate', 2, 1.414214, 0.1, 0.141421),
        'branch_out': ('learning_rate', 2, 1.414214, 0.1, 0.070711),
        'gain': ('learning_rate', 1, None, 0, None)},
    ('textbook', 256): {                                         # m = 1
        'embedding': ('embedding_lr', 1, None, 0.1, 0.1),
        'matrix': ('learning_rate', 1, 1, 0.1, 0.1),
        'branch_out': ('learning_rate', 1, 1, 0.1, 0.05),
        'gain': ('learning_rate', 1, None, 0, None)},
    ('textbook', 1536): {                                        # m = 6
        'embedding': ('embedding_lr', 1, None, 0.1, 0.1),
        'matrix': ('learning_rate', 0.166667, 0.408248, 0.1, 0.040825),
        'branch_out': ('learning_rate', 0.166667, 0.408248, 0.1, 0.020412),
        'gain': ('learning_rate', 1, None, 0, None)},
    ('authors', 128): {
        'embedding': ('embedding_lr', 1, None, 0.1, 0.1),
        'matrix': ('learning_rate', 2, 1.414214, 0.1, 0.141421),
        'branch_out': ('learning_rate', 2, 1.414214, 0.1, 0.05),
        'gain': ('learning_rate', 2, None, 0, None)},
    ('authors', 1536): {
        'embedding': ('embedding_lr', 1, None, 0.1, 0.1),
        'matrix': ('learning_rate', 0.166667, 0.408248, 0.1, 0.040825),
        'branch_out': ('learning_rate', 0.166667, 0.408248, 0.1, 0.05),
        'gain': ('learning_rate', 0.166667, None, 0, None)},
    ('sp', 1536): {                                              # one learning rate for all
        'embedding': ('learning_rate', 1, None, 0.1, 0.02),
        'matrix': ('learning_rate', 1, 1, 0.1, 0.02),
        'branch_out': ('learning_rate', 1, 1, 0.1, 0.01),
        'gain': ('learning_rate', 1, None, 0, None)},
}


def wide(n_embd, **changes):
    return replace(TINY, n_embd=n_embd, n_head=n_embd // 64, n_kv_head=1, n_ffn=5 * n_embd // 2,
                   **changes)


@pytest.mark.parametrize('rules, n_embd', GROUPS)
def test_param_groups(rules, n_embd):
    model = build(wide(n_embd, mup_rules=rules), device='meta')
    groups, expected = model.param_groups(0.1), GROUPS[rules, n_embd]
    name_of = {id(p): name for name, p in model.named_parameters()}
    grouped = [id(p) for g in groups for p in g['params']]
    assert sorted(grouped) == sorted(name_of) and {g['role'] for g in groups} == set(expected)
    for g in groups:
        knob, lr_mult, muon_lr_mult, weight_decay, std = expected[g['role']]
        assert g['lr_knob'] == knob and g['weight_decay'] == weight_decay
        assert g['lr_mult'] == pytest.approx(lr_mult, rel=1e-5)
        assert g['muon_lr_mult'] == (muon_lr_mult and pytest.approx(muon_lr_mult, rel=1e-5))
        assert model.table[g['role']].init_std == (std and pytest.approx(std, rel=1e-4))
        for p in g['params']:
            assert (p.dim() == 1) == (g['role'] == 'gain')
            assert (name_of[id(p)] == 'embed.weight') == (g['role'] == 'embedding')
            assert (name_of[id(p)].split('.')[-2] in ('out', 'down')) == (g['role'] == 'branch_out')


@pytest.mark.parametrize('scaling, factor', [('1/m', 0.166667), ('1/sqrt(m)', 0.408248),
                                             ('const', 1)])
def test_muon_lr_scaling(scaling, factor):
    table = mup_table(wide(1536, muon_lr_scaling=scaling))
    for role in ('matrix', 'branch_out'):
        assert table[role].muon_lr_mult == pytest.approx(factor, rel=1e-5)
        assert table[role].lr_mult == pytest.approx(1 / 6)


@pytest.mark.parametrize('rule, changes', {                     # at m = 6, two layers, heads of 128
    'init_out': {('branch_out', 'init_std'): 0.05},
    'gain_lr': {('gain', 'lr_mult'): 0.166667},
    'lr_hidden': {('matrix', 'lr_mult'): 1, ('branch_out', 'lr_mult'): 1},
    'embedding_lr': {('embedding', 'lr_mult'): 0.166667},
    'logits': {('logits', 'multiplier'): 1},
    'attn_scale': {('attention', 'multiplier'): 0.0110485},      # 1 / sqrt(64 x 128)
    'attn_const': {('attention', 'multiplier'): 0.015625},       # 1 / 64
    'residual_depth': {('branch_out', 'multiplier'): 1.4},
}.items())
def test_a_broken_rule_is_broken_alone(rule, changes):
    c = replace(wide(1536), n_head=12)
    whole, broken = mup_table(c), mup_table(replace(c, mup_break=rule))
    differ = {(role, field): getattr(broken[role], field) for role in whole
              for field in whole[role]._fields
              if getattr(whole[role], field) != getattr(broken[role], field)}
    assert differ == pytest.approx(changes, rel=1e-5)


def test_a_rule_is_broken_beside_those_that_the_authors_broke():
    c = replace(wide(1536), n_head=12)
    whole = mup_table(c)

    def changed(**changes):
        table = mup_table(replace(c, **changes))
        return {(role, field): getattr(table[role], field) for role in whole
                for field in whole[role]._fields
                if getattr(whole[role], field) != getattr(table[role], field)}

    theirs = changed(mup_rules='authors')
    assert len(theirs) == 2
    for rule in ('lr_hidden', 'embedding_lr', 'logits', 'attn_scale', 'residual_depth'):
        both = changed(mup_rules='authors', mup_break=rule)
        assert both == theirs | changed(mup_break=rule) and len(both) > 2, rule


def test_attention_scales_agree_at_heads_of_64():
    assert [mup_table(wide(512, mup_break=rule))['attention'].multiplier
            for rule in ('', 'attn_scale', 'attn_const')] == pytest.approx([1 / 64] * 3)


def test_groups_and_init_are_those_of_microsofts_mup():
    """mup_oracle.json says how it was made, in mup_oracle.py."""
    oracle = json.loads((Path(__file__).parent / 'mup_oracle.json').read_text())
    for n_embd in (128, 256, 1536):
        table, theirs = mup_table(wide(n_embd)), oracle[str(n_embd)]
        assert table['logits'].multiplier == pytest.approx(1 / theirs['output_divisor'])
        assert len(theirs['parameters']) == 9
        for name, has in theirs['parameters'].items():
            role = 'embedding' if name == 'readout.weight' else role_of(f'blocks.0.attn.{name}')
            assert table[role].lr_mult == pytest.approx(has['lr']), name
            if has['std']:                                       # a measured one; mup has no depth
                depth = 2 if role == 'branch_out' else 1         # sqrt(2 L)
                assert table[role].init_std * depth == pytest.approx(has['std'], rel=0.02), name


@pytest.mark.parametrize('change', [
    {'n_head': 5}, {'n_head': 0}, {'n_kv_head': 3}, {'n_kv_head': 0}, {'n_embd': 65},
    {'n_head': 64, 'n_kv_head': 1}, {'mup_break': 'logit'}, {'muon_lr_scaling': 'm'},
    {'mup_rules': 'sp', 'mup_break': 'logits'}, {'mup_rules': 'Textbook'}])
def test_bad_shapes_are_refused(change):
    with pytest.raises(ValueError, match='=|odd'):
        replace(TINY, **change)


@pytest.mark.parametrize('key, value', [
    ('n_layer', 100_000), ('n_embd', 10**9), ('n_ffn', 10**9), ('vocab_size', 10**12),
    ('block_size', 10**8)])
def test_sizes_that_no_machine_can_hold_are_refused(key, value):
    with pytest.raises(ValueError, match=rf'^{key}={value} should be at most \d+$'):
        replace(TINY, **{key: value})


def test_the_largest_sizes_can_be_planned():
    c = replace(TINY, **network.LARGEST | {'n_layer': 2, 'n_head': 2**10, 'n_kv_head': 2**10})
    C, in_a_block = c.n_embd, 4 * c.n_embd**2 + 3 * c.n_embd * c.n_ffn + 2 * c.n_embd
    assert build(c, device='meta').num_params() == c.vocab_size * C + c.n_layer * in_a_block + C


@pytest.mark.parametrize('shape', [(5, 48), (2, 3, 48)])
def test_rms_norm_and_its_gradients_are_torchs(shape):
    g = torch.Generator().manual_seed(0)
    x, gain = torch.randn(*shape, generator=g), torch.randn(48, generator=g)
    norm = RMSNorm(48, eps=0.1)
    norm.weight.data = gain
    theirs = F.rms_norm(x.double(), (48,), gain.double(), 0.1)
    assert_close(norm(x), theirs, 1e-6)
    with torch.no_grad():
        assert_close(norm(x), theirs, 1e-6)
    x, gain = (t.double().requires_grad_() for t in (x, gain))
    torch.autograd.gradcheck(RMSNormOnCPU.apply, (x, gain, 0.1))


def test_the_worked_example_has_the_tables_numbers():
    narrow, wide = (mup_table(XmodelConfig(n_embd=C, n_head=C // 64, n_kv_head=1))
                    for C in (256, 1536))
    shown = {}                                                   # first words -> the last two
    for line in network.__doc__.splitlines():
        if line.startswith('    ') and len(line.split()) > 4:
            shown[line.split(':')[0].strip()] = line.split()[-2:]
    for words, role, field, factor in (
            ('init std of a hidden matrix', 'matrix', 'init_std', 1),
            ("AdamW's lr for it", 'matrix', 'lr_mult', 0.01),
            ('the logits are multiplied by', 'logits', 'multiplier', 1),
            ('q·k is multiplied by', 'attention', 'multiplier', 1)):
        numbers = [f'{getattr(table[role], field) * factor:.3g}' for table in (narrow, wide)]
        assert next(pair for key, pair in shown.items() if key.startswith(words)) == numbers, words


# --- positions and causality ---

def rotate(x, positions, theta=500_000.0):
    """Oracle: pairs (i, i + hd/2) as complex numbers times e^(i angle), in float64."""
    a, b = x.double().chunk(2, dim=-1)
    rates = torch.tensor([theta ** (-2 * i / x.size(-1)) for i in range(a.size(-1))]).double()
    turned = torch.complex(a, b) * torch.polar(torch.ones(()).double(), positions[:, None] * rates)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize('first, tol', [(0, 1e-5), (16_000, 2e-3)])     # fp32: 1e-3 rad at 16 000
def test_rope_equals_complex_rotation(first, tol):
    x = torch.randn(1, 50, 1, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(first, first + 50)
    ours = apply_rope(x, *rope_angles(positions, 32, 500_000.0))
    assert_close(ours[0, :, 0].double(), rotate(x[0, :, 0], positions), tol)


def test_rope_equals_rotate_half():
    granite = pytest.importorskip('transformers.models.granite.modeling_granite')
    x = torch.randn(2, 50, 4, 32, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_angles(torch.arange(50), 32, 500_000.0)
    full = (torch.cat((t, t), dim=-1)[None, :, 0] for t in (cos, sin))  # (1, T, hd)
    theirs = granite.apply_rotary_pos_emb(x, x, *full, unsqueeze_dim=2)[0]
    assert_close(apply_rope(x, cos, sin), theirs, 1e-6)


def test_rope_scores_depend_on_distance_only():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 64, generator=g), torch.randn(1, 1, 1, 64, generator=g)

    def score(i, j):
        return sum(apply_rope(t, *rope_angles(torch.tensor([at]), 64, 500_000.0))
                   for t, at in ((q, i), (k, j))).square().sum()     # |q|² + |k|² + 2 q·k
    near = score(7, 3)
    assert_close(score(1007, 1003), near, 1e-4)
    assert abs(score(8, 3) - near) > 1e-2 * near


def test_later_tokens_do_not_change_earlier_logits():
    model, idx = build(TINY), ids(TINY, 1, 40)
    changed = idx.clone()
    changed[0, 25] = (idx[0, 25] + 1) % TINY.vocab_size
    a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :25], b[:, :25])
    assert ((a - b)[0, 25:].abs().amax(-1) > 1e-3).all()         # all later ones see the change


# --- loading: a file from elsewhere is one line, and runs no code ---

class Payload:
    """Unpickling it creates the file `path`."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_load_model_gives_back_the_newest_checkpoint(tmp_path):
    idx = ids(TINY, 1, 8)
    for step in (90, 100):                                       # '90' > '100' as text
        model = build(TINY, seed=step)
        torch.save({'model': model.state_dict(), 'config': asdict(TINY), 'step': step},
                   tmp_path / f'step_{step}.pt')
    loaded, rest = load_model(tmp_path)
    assert rest['step'] == 100 and rest['config'] == TINY and not loaded.training
    assert torch.equal(loaded(idx)[0], model(idx)[0])


@pytest.mark.parametrize('kind, message', [
    ('missing', 'does not exist'), ('empty folder', 'holds no checkpoint'),
    *[(kind, 'is not a checkpoint') for kind in (
        'garbage', 'empty', 'pickle', 'payload in torch file', 'foreign', 'wrong config')]])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, kind, message):
    path, ran = tmp_path / 'step_1.pt', tmp_path / 'ran'
    if kind == 'empty folder':
        path = tmp_path
    elif kind == 'garbage':
        path.write_bytes(bytes(range(256)) * 9)
    elif kind == 'empty':
        path.touch()
    elif kind == 'pickle':
        path.write_bytes(pickle.dumps({'model': Payload(ran)}, protocol=2))
    elif kind == 'payload in torch file':
        torch.save({'model': Payload(ran)}, path)
    elif kind == 'foreign':
        torch.save({'weight': torch.ones(2)}, path)
    elif kind == 'wrong config':
        torch.save({'model': {}, 'config': {'hidden_size': 64}}, path)
    with pytest.raises(ValueError, match=message) as e:
        load_model(path)
    assert '\n' not in str(e.value) and path.name in str(e.value)
    assert not ran.exists()
