"""The Xmodel-2.5 network (arXiv 2511.19496, sec. 2) and µP, which carries settings across widths.

The network is a decoder-only transformer: pre-norm blocks, RMSNorm, rotary positions (RoPE),
grouped-query attention, SwiGLU, and one matrix for the input embedding and the output.

µP (maximal update parametrisation, Tensor Programs V, arXiv 2203.03466) answers one question: how
must init, multipliers and Adam's learning rates change with width, so that one step moves every
activation by the same amount at any width? If they do, a learning rate tuned on a proxy 256 wide is
also right at width 1536. With init_std 0.1, learning_rate 0.01 and heads of 64:

    width C                                                 256       1536
    width multiplier m = C / 256                              1          6
    init std of a hidden matrix: 0.1 / sqrt(m)              0.1     0.0408
        its output starts at a size of std · sqrt(C) =      1.6        1.6
    AdamW's lr for it: 0.01 / m                            0.01    0.00167
        a step moves its output by up to lr · C =          2.56       2.56
    the logits are multiplied by 1 / m                        1      0.167
    q·k is multiplied by 1 / head size                   0.0156     0.0156

(for inputs of size 1, which RMSNorm sees to; the wider model has more heads, not larger ones).
Init, forward pass and optimizer groups read all rules in `mup_table`, which is `textbook` below
unless the config says otherwise.

    python model.py        # all rules at both widths, and the parameters of the 1.3B model
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import RMSNorm, causal_attention, chunked_cross_entropy, compiled_cross_entropy

# A larger model is a typing error: it is refused before anything is allocated.
LARGEST = {'n_layer': 2**10, 'n_embd': 2**20, 'n_ffn': 2**22, 'vocab_size': 2**24,
           'block_size': 2**24}


@dataclass(frozen=True)
class XmodelConfig:
    n_layer: int = 48
    n_head: int = 24             # query heads
    n_kv_head: int = 8           # key-value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 1536           # width, C
    n_ffn: int = 3840            # hidden width of the SwiGLU, 2.5 C
    vocab_size: int = 129_280
    block_size: int = 131_072    # longest text the model is meant for; the code itself has no limit
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    mup_base_width: int = 256    # width at which µP and the proxy's hyperparameters agree
    input_scale: float = 12.0
    output_scale: float = 1.0
    residual_scale: float = 1.4
    attention_scale: float = 1.0  # q·k times attention_scale / hd; others' models need not have 1
    init_std: float = 0.1
    mup_rules: str = 'textbook'  # 'textbook' | 'authors' | 'sp', see mup_table
    mup_break: str = ''          # one rule of µP to break, to see what it is for: see broken_rules
    muon_lr_scaling: str = '1/sqrt(m)'  # '1/m' | '1/sqrt(m)' | 'const': Muon's lr across widths

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str):
                continue
            if not 0 < value < math.inf:
                raise ValueError(f'{name}={value} should be above 0, and finite')
            if name in LARGEST and value > LARGEST[name]:
                raise ValueError(f'{name}={value} should be at most {LARGEST[name]}')
        for part, whole in (('n_head', 'n_embd'), ('n_kv_head', 'n_head')):
            a, b = getattr(self, part), getattr(self, whole)
            if b % a:
                raise ValueError(f'{part}={a} does not divide {whole}={b}')
        if self.hd % 2:
            raise ValueError(f'head size n_embd / n_head = {self.hd} is odd; RoPE rotates pairs')
        if self.mup_rules not in ('textbook', 'authors', 'sp'):
            raise ValueError(f"mup_rules={self.mup_rules!r} is not 'textbook', 'authors' or 'sp'")
        mup_table(self)                                    # checks mup_break and muon_lr_scaling

    @property
    def hd(self):
        """Size of a head."""
        return self.n_embd // self.n_head


# --------------------------------------------------------------------------------------------------
# µP by the textbook

class Rule(NamedTuple):
    """What µP prescribes for one role in the network; None where the role has no such thing."""
    init_std: float | None = None      # std of the normal init (a gain starts at exactly 1)
    multiplier: float | None = None    # factor in the forward pass
    lr_knob: str | None = None         # the learning rate it has: 'learning_rate', 'embedding_lr'
    lr_mult: float | None = None       # factor on that learning rate, under AdamW
    muon_lr_mult: float | None = None  # the same for a matrix that Muon trains
    weight_decay: bool | None = None


def textbook(c):
    """role -> Rule by Tensor Programs V, table 8 (Adam), with the embedding tied to the output.

    All matrices have one width multiplier, m: n_ffn and n_kv_head should grow with n_embd. The
    optimizer multiplies weight decay by the learning rate, so on matrices it falls with m as that
    does.
    """
    m = c.n_embd / c.mup_base_width                # 6 for the 1.3B model
    L = c.n_layer
    std = c.init_std
    return {
        # One row of the embedding is looked up. Nothing is summed over the width: nothing scales.
        'embedding': Rule(init_std=std, multiplier=c.input_scale,
                          lr_knob='embedding_lr', lr_mult=1, weight_decay=True),
        # q, k, v, gate and up sum over the width. At init the terms are independent and their sum
        # grows as sqrt(m): so std 1/sqrt(m). Adam moves each weight by about lr, with the sign of
        # its gradient; then the terms have one sign and their sum grows as m: so lr 1/m.
        'matrix': Rule(init_std=std / math.sqrt(m),
                       lr_knob='learning_rate', lr_mult=1 / m, muon_lr_mult=muon_factor(c),
                       weight_decay=True),
        # Attention's out and the FFN's down are such matrices, and end a residual branch. Branches
        # add up with depth: 1/sqrt(L) on each is depth-µP (Tensor Programs VI, arXiv 2310.02244,
        # without its 1/sqrt(L) on the learning rate), 1/sqrt(2 L) in the init is GPT-2's.
        'branch_out': Rule(init_std=std / math.sqrt(2 * L * m),
                           multiplier=c.residual_scale / math.sqrt(L),
                           lr_knob='learning_rate', lr_mult=1 / m, muon_lr_mult=muon_factor(c),
                           weight_decay=True),
        # A norm's gain multiplies features one by one: no sum, nothing scales.
        'gain': Rule(lr_knob='learning_rate', lr_mult=1, weight_decay=False),
        # Where training aligns q with k, their sum grows as hd: so 1/hd, no square root. (In heads
        # of 16 to 64 no alignment was seen: results/README.md.)
        'attention': Rule(multiplier=c.attention_scale / c.hd),
        # Training aligns the last activations with the rows of the embedding, too: so 1/m.
        'logits': Rule(multiplier=c.output_scale / m),
    }


def muon_factor(c):
    """Factor on Muon's learning rate, by muon_lr_scaling.

    Muon's update has a spectral norm of 0.2 lr sqrt(max(rows, cols)), so activations move by
    lr sqrt(m), which 1/sqrt(m) undoes (`python -m lab.coord_check --optimizer=muon`).
    """
    m = c.n_embd / c.mup_base_width
    factors = {'1/m': 1 / m, '1/sqrt(m)': 1 / math.sqrt(m), 'const': 1}
    if c.muon_lr_scaling not in factors:
        raise ValueError(f"muon_lr_scaling={c.muon_lr_scaling!r} is not '1/m', '1/sqrt(m)' or "
                         "'const'")
    return factors[c.muon_lr_scaling]


# --------------------------------------------------------------------------------------------------
# µP broken or replaced

def broken_rules(c):
    """Name of a rule -> the entries of the textbook's table without that rule: {role: {field: x}}.

    `python -m lab.coord_check --break=NAME` shows what each rule is for.
    """
    m = c.n_embd / c.mup_base_width
    std = c.init_std
    return {
        'init_out':       {'branch_out': {'init_std': std / math.sqrt(2 * c.n_layer)}},
        'gain_lr':        {'gain': {'lr_mult': 1 / m}},
        'lr_hidden':      {'matrix': {'lr_mult': 1}, 'branch_out': {'lr_mult': 1}},
        'embedding_lr':   {'embedding': {'lr_mult': 1 / m}},
        'logits':         {'logits': {'multiplier': c.output_scale}},
        # a square root, and a constant: both are the textbook's 1/hd at heads of 64
        'attn_scale':     {'attention': {'multiplier': 1 / math.sqrt(64 * c.hd)}},
        'attn_const':     {'attention': {'multiplier': 1 / 64}},
        'residual_depth': {'branch_out': {'multiplier': c.residual_scale}},
    }


def standard_parametrisation(c):
    """role -> Rule where nothing depends on width but attention's 1/sqrt(hd); nanoGPT's init."""
    std = c.init_std / 5                           # 0.02 where µP has its default, 0.1
    every_weight = {'lr_knob': 'learning_rate', 'lr_mult': 1}
    return {
        'embedding': Rule(init_std=std, multiplier=1, **every_weight, weight_decay=True),
        'matrix': Rule(init_std=std, **every_weight, muon_lr_mult=1, weight_decay=True),
        'branch_out': Rule(init_std=std / math.sqrt(2 * c.n_layer), multiplier=1,
                           **every_weight, muon_lr_mult=1, weight_decay=True),
        'gain': Rule(**every_weight, weight_decay=False),
        'attention': Rule(multiplier=c.attention_scale / math.sqrt(c.hd)),
        'logits': Rule(multiplier=c.output_scale),
    }


def mup_table(c):
    """role -> Rule for an XmodelConfig: by mup_rules, less the rule that mup_break names.

    'textbook' is the table above. 'authors' breaks two of its rules, as Xmodel-2.5's released code
    does; at the base width (m = 1) both are the same. 'sp' is standard parametrisation.
    ValueError for an unknown mup_break or muon_lr_scaling, and for 'sp' with a mup_break.
    """
    table = textbook(c)
    breaks = broken_rules(c)
    if c.mup_break and (c.mup_break not in breaks or c.mup_rules == 'sp'):
        raise ValueError(f"mup_break={c.mup_break!r} should be a rule of µP, one of "
                         f"{', '.join(breaks)}; mup_rules='sp' has none")
    if c.mup_rules == 'sp':
        return standard_parametrisation(c)
    broken = []
    if c.mup_rules == 'authors':
        broken = ['init_out', 'gain_lr']
    if c.mup_break:
        broken.append(c.mup_break)
    for rule in broken:
        for role, changed in breaks[rule].items():
            table[role] = table[role]._replace(**changed)
    return table


def role_of(name):
    """A parameter's role in mup_table, by its name: 'blocks.3.attn.out.weight' -> 'branch_out'."""
    module = name.split('.')[-2]
    return {'embed': 'embedding', 'qkv': 'matrix', 'gate_up': 'matrix', 'out': 'branch_out',
            'down': 'branch_out', 'norm': 'gain', 'norm1': 'gain', 'norm2': 'gain'}[module]


# --------------------------------------------------------------------------------------------------
# The network

def rope_angles(positions, hd, theta):
    """positions (..., T) -> cos, sin (..., T, 1, hd/2) of RoPE's angles (arXiv 2104.09864, eq. 15).

    In fp32: bf16 would round the angle of position 16 000 by up to 32 radians.
    """
    inv_freq = theta ** (-torch.arange(0, hd, 2, device=positions.device).float() / hd)  # (hd/2,)
    angles = (positions.float()[..., None] * inv_freq)[..., None, :]            # (..., T, 1, hd/2)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate x (B, T, n_head, hd) by its positions' angles; pairs are (i, i + hd/2) as in Llama."""
    x1, x2 = x.float().chunk(2, dim=-1)                            # (B, T, n_head, hd/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with n_head query heads that share n_kv_head keys and values."""

    def __init__(self, c, rule):
        super().__init__()
        self.n_head, self.n_kv_head, self.hd = c.n_head, c.n_kv_head, c.hd
        self.scale = rule.multiplier
        kv = self.n_kv_head * self.hd
        self.qkv = nn.Linear(c.n_embd, c.n_embd + 2 * kv, bias=False)
        self.qkv.parts = (c.n_embd, kv, kv)                        # rows of q, k, v, for Muon
        self.out = nn.Linear(c.n_embd, c.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None, mask=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.hd)                 # (B, T, n_head + 2 n_kv_head, hd)
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        q, k = apply_rope(qk, cos, sin).split((self.n_head, self.n_kv_head), dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))          # (B, n_head or n_kv_head, T, hd)
        if cache is None and mask is None:
            y = causal_attention(q, k, v, self.scale)             # (B, n_head, T, hd)
        else:                                                     # in generation
            if cache is not None:
                k, v = cache.append(k, v)                         # (B, n_kv_head, all T so far, hd)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                               is_causal=mask is None and T > 1,
                                               scale=self.scale, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202; gate and up are one fused weight."""

    def __init__(self, c):
        super().__init__()
        self.gate_up = nn.Linear(c.n_embd, 2 * c.n_ffn, bias=False)
        self.gate_up.parts = (c.n_ffn, c.n_ffn)                    # rows of gate, up, for Muon
        self.down = nn.Linear(c.n_ffn, c.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)                # (B, T, n_ffn) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + branch · attention(norm(x)), then the same with the FFN."""

    def __init__(self, c, table):
        super().__init__()
        self.norm1 = RMSNorm(c.n_embd, eps=c.norm_eps)
        self.attn = Attention(c, table['attention'])
        self.norm2 = RMSNorm(c.n_embd, eps=c.norm_eps)
        self.ffn = SwiGLU(c)
        self.branch = table['branch_out'].multiplier

    def forward(self, x, cos, sin, cache=None, mask=None):
        x = x.add(self.attn(self.norm1(x), cos, sin, cache, mask), alpha=self.branch)
        return x.add(self.ffn(self.norm2(x)), alpha=self.branch)


class Xmodel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = mup_table(config)
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)         # also the output matrix
        self.blocks = nn.ModuleList(Block(config, self.table) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.activation_checkpointing = False              # True: blocks keep their input alone
        self.set_compiled(False)
        self.init_weights()

    def init_weights(self):
        for name, p in self.named_parameters():
            role = role_of(name)
            if role == 'gain':
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=self.table[role].init_std)

    def forward(self, idx, targets=None):
        """idx, targets (B, T) int64 -> (logits, loss).

        Without targets: logits (B, T, vocab_size), loss None. With targets: logits None (they are
        never all in memory at once) and the mean cross-entropy in nats over targets other than -1.
        """
        positions = torch.arange(idx.size(1), device=idx.device)
        cos, sin = rope_angles(positions, self.config.hd, self.config.rope_theta)
        x = self.hidden(idx, cos, sin)                                          # (B, T, C)
        if targets is None:
            return self.logits(x), None
        loss = self.cross_entropy(x.flatten(0, 1), self.embed.weight, targets.flatten(),
                                  self.table['logits'].multiplier)
        return None, loss

    def hidden(self, idx, cos, sin, caches=None, mask=None):
        """The residual stream after the last block, normed: (B, T, C).

        caches: a KV cache for each block, in generation; mask: which columns each token sees.
        """
        x = self.embed(idx) * self.table['embedding'].multiplier                # (B, T, C)
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                cache = None if caches is None else caches[i]
                x = block(x, cos, sin, cache, mask)
        return self.norm(x)

    def logits(self, x):
        """x (..., C) -> logits (..., vocab_size), through the tied embedding."""
        return F.linear(x, self.embed.weight) * self.table['logits'].multiplier

    def set_compiled(self, on):
        """Run blocks and loss through torch.compile, or eagerly again.

        All blocks share one compiled graph; the whole model as one takes longer and runs no faster.
        """
        # torch keeps at most 8 variants of a graph: of each length, of training and evaluation, of
        # FP8's first step and of watched steps. Past that it falls back to eager without a word.
        torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            block._compiled_call_impl = None
            if on:
                block.compile(dynamic=False)
        self.cross_entropy = compiled_cross_entropy() if on else chunked_cross_entropy

    def param_groups(self, weight_decay=0.1):
        """Optimizer groups, by role: {params, names, role, parts, lr_knob, lr_mult, ...}.

        A group's learning rate is the knob `lr_knob` times `lr_mult` (or `muon_lr_mult`). Its
        decoupled decay a step is that learning rate times `weight_decay`. parts: rows of each
        matrix that is fused in the group's weights, or None.
        """
        params_of = {}                                             # (role, parts) -> {name: p}
        for name, p in self.named_parameters():
            module = self.get_submodule(name.rpartition('.')[0])
            key = role_of(name), getattr(module, 'parts', None)
            params_of.setdefault(key, {})[name] = p
        groups = []
        for (role, parts), params in params_of.items():
            rule = self.table[role]
            groups.append({'params': list(params.values()), 'names': list(params),
                           'role': role, 'parts': parts,
                           'lr_knob': rule.lr_knob, 'lr_mult': rule.lr_mult,
                           'muon_lr_mult': rule.muon_lr_mult,
                           'weight_decay': weight_decay if rule.weight_decay else 0.0})
        return groups

    def flops_per_token(self, T):
        """Training FLOPs a token: 6 a weight, and in each layer 12 n_embd for each of T/2 keys."""
        return 6 * self.num_params() + 12 * self.config.n_embd * self.config.n_layer * T // 2

    def num_params(self, embedding=True):
        """Number of parameters; without the embedding, the N of tokens-per-parameter rules."""
        n = sum(p.numel() for p in self.parameters())
        return n if embedding else n - self.embed.weight.numel()


# --------------------------------------------------------------------------------------------------

def print_rules(c):
    """Print mup_table at the base width and at c's, side by side, with c's depth and head size."""
    base = replace(c, n_embd=c.mup_base_width, n_head=c.mup_base_width // c.hd, n_kv_head=1)
    print(f'{"":26}', *(f'{f"width {x.n_embd}":>14}' for x in (base, c)))
    narrow, wide = mup_table(base), mup_table(c)
    for role in wide:
        for field in Rule._fields:
            rules = [getattr(table[role], field) for table in (narrow, wide)]
            if rules[1] is not None:
                cells = [f'{x:.4g}' if isinstance(x, float) else f'{x}' for x in rules]
                print(f'{role:12}{field:14}', *(f'{cell:>14}' for cell in cells))


if __name__ == '__main__':
    with torch.device('meta'):
        model = Xmodel(XmodelConfig())
    print_rules(model.config)
    print(f'{model.num_params():,} parameters, {model.num_params(False):,} without the embedding')
