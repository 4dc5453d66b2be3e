"""The Xmodel-2.5 network (arXiv 2511.19496, sec. 2) with µP: a decoder-only transformer of pre-norm
blocks, RMSNorm, rotary positions, grouped-query attention, SwiGLU, one matrix for input and output.

µP (maximal update parametrisation, Tensor Programs V, arXiv 2203.03466) answers one question: how
must init, multipliers and Adam's learning rates change with width so that every activation moves by
the same amount in a step, whatever the width? Where they do, a learning rate found on a 256-wide
proxy is the right one at width 1536. All of its rules stand in `mup_table`; init, forward pass and
optimizer groups read them there.

    python model.py        # the table, and the parameters of the 1.3B model
"""
import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


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
    mup_break: str = ''          # one rule of µP to break, to see what it is for: see mup_table
    muon_lr_scaling: str = '1/sqrt(m)'  # '1/m' | '1/sqrt(m)' | 'const': Muon's lr across widths

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, str) and not 0 < value < math.inf:
                raise ValueError(f'{name}={value} should be above 0, and finite')
        for part, whole in (('n_head', 'n_embd'), ('n_kv_head', 'n_head')):
            a, b = getattr(self, part), getattr(self, whole)
            if b % a:
                raise ValueError(f'{part}={a} does not divide {whole}={b}')
        if self.hd % 2:
            raise ValueError(f'head size n_embd / n_head = {self.hd} is odd; RoPE rotates pairs')
        if self.mup_rules not in ('textbook', 'authors', 'sp'):
            raise ValueError(f"mup_rules={self.mup_rules!r} is not 'textbook', 'authors' or 'sp'")
        mup_table(self)                                            # refuses what it does not know

    @property
    def hd(self):
        """Size of a head."""
        return self.n_embd // self.n_head


# --------------------------------------------------------------------------------------------------
# µP: one table

class Rule(NamedTuple):
    """What µP prescribes for one role in the network; None where the role has no such thing."""
    init_std: float | None       # std of the normal init (a gain starts at exactly 1)
    multiplier: float | None     # factor in the forward pass
    lr_knob: str | None          # which learning rate it follows: 'learning_rate' or 'embedding_lr'
    lr_mult: float | None        # factor on that learning rate, under AdamW
    muon_lr_mult: float | None   # the same where Muon has taken over
    weight_decay: bool | None


def mup_table(c):
    """role -> Rule for an XmodelConfig, by its mup_rules.

    Why: Adam moves every weight by about lr. A matrix sums over the width: independent terms at
    init (so std 1/sqrt(m)), aligned ones in an update (so lr 1/m). An embedding row is looked up
    alone: nothing scales. q·k and the logits sum what comes to be aligned: 1/hd and 1/m, no root.
    Muon's update has a spectral norm of 0.2 lr sqrt(max(rows, cols)), so activations move by
    lr sqrt(m): its lr goes as 1/sqrt(m) (`python coord_check.py --optimizer=muon`).

    'textbook' is Tensor Programs V, table 8 (Adam), with the embedding tied to the output. Of depth
    it has 1/sqrt(L) on residual branches, as in Tensor Programs VI (arXiv 2310.02244), but not its
    1/sqrt(L) on the learning rate, and GPT-2's 1/sqrt(2 L) in the init of a branch's last matrix.
    'authors' is Xmodel-2.5's released code: two of the textbook's rules broken, which changes
    nothing at the base width (m = 1). 'sp' is standard parametrisation, with nanoGPT's init.
    mup_break breaks one rule more, named in `broken`. m is every matrix's, so n_ffn and n_kv_head
    should grow with n_embd. Weight decay follows the learning rate, so it falls as 1/m on matrices.
    """
    m = c.n_embd / c.mup_base_width                     # width multiplier, 6 for the 1.3B model
    L, std, lr, emb = c.n_layer, c.init_std, 'learning_rate', 'embedding_lr'
    branch, attention = c.residual_scale / math.sqrt(L), c.attention_scale / c.hd
    muon = {'1/m': 1 / m, '1/sqrt(m)': 1 / math.sqrt(m), 'const': 1}.get(c.muon_lr_scaling)
    textbook = {
        #                  init std                  multiplier          lr knob, lr, Muon's, decay
        'embedding':  Rule(std,                      c.input_scale,      emb,  1,   None,  True),
        'matrix':     Rule(std / math.sqrt(m),       None,               lr, 1 / m, muon,  True),
        'branch_out': Rule(std / math.sqrt(2*L * m), branch,             lr, 1 / m, muon,  True),
        'gain':       Rule(None,                     None,               lr,   1,   None,  False),
        'attention':  Rule(None,                     attention,          None, None, None, None),
        'logits':     Rule(None,                     c.output_scale / m, None, None, None, None),
    }
    broken = {
        'init_out':       {'branch_out': {'init_std': std / math.sqrt(2*L)}},
        'gain_lr':        {'gain': {'lr_mult': 1 / m}},
        'lr_hidden':      {'matrix': {'lr_mult': 1}, 'branch_out': {'lr_mult': 1}},
        'embedding_lr':   {'embedding': {'lr_mult': 1 / m}},
        'logits':         {'logits': {'multiplier': c.output_scale}},
        'attn_scale':     {'attention': {'multiplier': 1 / math.sqrt(64 * c.hd)}},
        'attn_const':     {'attention': {'multiplier': 1 / 64}},     # all the same at heads of 64
        'residual_depth': {'branch_out': {'multiplier': c.residual_scale}},
    }
    sp_attention = c.attention_scale / math.sqrt(c.hd)
    sp_std = std / 5                                    # 0.02 where µP has its default, 0.1
    sp = {
        'embedding':  Rule(sp_std,                   1,                  lr,   1,   None,  True),
        'matrix':     Rule(sp_std,                   None,               lr,   1,   1,     True),
        'branch_out': Rule(sp_std / math.sqrt(2*L),  1,                  lr,   1,   1,     True),
        'gain':       Rule(None,                     None,               lr,   1,   None,  False),
        'attention':  Rule(None,                     sp_attention,       None, None, None, None),
        'logits':     Rule(None,                     c.output_scale,     None, None, None, None),
    }
    if muon is None:
        raise ValueError(f"muon_lr_scaling={c.muon_lr_scaling!r} is not '1/m', '1/sqrt(m)' or "
                         "'const'")
    if c.mup_break and (c.mup_break not in broken or c.mup_rules == 'sp'):
        raise ValueError(f"mup_break={c.mup_break!r} should be a rule of µP, one of "
                         f"{', '.join(broken)}; mup_rules='sp' has none")
    table = sp if c.mup_rules == 'sp' else textbook
    for rule in (*(('init_out', 'gain_lr') if c.mup_rules == 'authors' else ()), c.mup_break):
        for role, changed in broken.get(rule, {}).items():
            table[role] = table[role]._replace(**changed)
    return table


def role_of(name):
    """The role in mup_table of the parameter called `name` in Xmodel.named_parameters()."""
    module = name.split('.')[-2]
    return {'embed': 'embedding', 'qkv': 'matrix', 'gate_up': 'matrix',
            'out': 'branch_out', 'down': 'branch_out'}.get(module, 'gain')


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
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))          # (B, n_head or n_kv_head, T, hd)
        if cache is not None:
            k, v = cache.append(k, v)                             # (B, n_kv_head, all T so far, hd)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
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
    def __init__(self, c, table):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.attn = Attention(c, table['attention'])
        self.norm2 = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.ffn = SwiGLU(c)
        self.branch = table['branch_out'].multiplier

    def forward(self, x, cos, sin, cache=None, mask=None):
        x = x + self.branch * self.attn(self.norm1(x), cos, sin, cache, mask)
        return x + self.branch * self.ffn(self.norm2(x))


class Xmodel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = mup_table(config)
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)         # also the output matrix
        self.blocks = nn.ModuleList(Block(config, self.table) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.activation_checkpointing = False              # True: blocks keep their input alone
        self.set_compiled(False)
        for name, p in self.named_parameters():
            std = self.table[role_of(name)].init_std
            nn.init.ones_(p) if std is None else nn.init.normal_(p, std=std)

    def forward(self, idx, targets=None):
        """idx, targets (B, T) int64 -> (logits, loss).

        Without targets: logits (B, T, vocab_size), loss None. With targets: logits None (they are
        never all in memory at once) and the mean cross-entropy in nats over targets other than -1.
        """
        cos, sin = rope_angles(torch.arange(idx.size(1), device=idx.device),
                               self.config.hd, self.config.rope_theta)
        x = self.hidden(idx, cos, sin)                                          # (B, T, C)
        if targets is None:
            return self.logits(x), None
        return None, self.cross_entropy(x.flatten(0, 1), self.embed.weight, targets.flatten(),
                                        self.table['logits'].multiplier)

    def hidden(self, idx, cos, sin, cache=None, mask=None):
        """The residual stream after the last block, normed: (B, T, C)."""
        x = self.embed(idx) * self.table['embedding'].multiplier                # (B, T, C)
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache and cache[i], mask)
        return self.norm(x)

    def logits(self, x):
        """x (..., C) -> logits (..., vocab_size), through the tied embedding."""
        return F.linear(x, self.embed.weight) * self.table['logits'].multiplier

    def set_compiled(self, on):
        """Run blocks and loss through torch.compile, or eagerly again.

        All blocks share one compiled graph; the whole model as one takes longer and runs no faster.
        """
        # There is a graph for each length, training or not, FP8's first step and watched ones;
        # beyond the default limit of 8 blocks would silently be eager again.
        torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            block._compiled_call_impl = None
            if on:
                block.compile(dynamic=False)
        self.cross_entropy = torch.compile(chunked_cross_entropy, dynamic=False) if on \
            else chunked_cross_entropy

    def try_compiled(self, x, y, autocast):
        """set_compiled(True), unless that fails or changes the loss of x, y; says which it was."""
        def loss_of_a_step(on):
            self.set_compiled(on)
            with autocast:
                loss = self(x, y)[1]
            loss.backward()
            self.zero_grad(set_to_none=False)                      # DDP's buckets hold them
            return loss.item()

        eager, began, trouble = loss_of_a_step(False), time.time(), ''
        try:
            compiled = loss_of_a_step(True)
        except Exception as e:  # noqa: BLE001                     (a compiler can fail in any way)
            compiled, trouble = math.nan, f' ({type(e).__name__}: {str(e)[:80]!r})'
        if abs(compiled - eager) <= 0.01 * eager:                  # bf16 rounds at 0.4 %
            return (f'compiled for {x.size(0)} x {x.size(1)} tokens, {time.time() - began:.0f} s: '
                    f'loss {compiled:.4f}, eager {eager:.4f}')
        self.set_compiled(False)                                   # here also where loss is NaN
        self.zero_grad(set_to_none=False)
        return f'compiled loss {compiled:.4f}, eager {eager:.4f}{trouble}: going on in eager mode'

    def param_groups(self, weight_decay=0.1):
        """Optimizer groups, by role: {params, names, role, parts, lr_knob, lr_mult, ...}.

        A group's learning rate is the knob `lr_knob` times `lr_mult` (or `muon_lr_mult`); its
        decoupled decay a step is that times `weight_decay`, so it falls with width on matrices,
        too. parts: rows of each matrix that the group's weights fuse, or None.
        """
        groups = {}
        for name, p in self.named_parameters():
            parts = getattr(self.get_submodule(name.rpartition('.')[0]), 'parts', None)
            groups.setdefault((role_of(name), parts), {})[name] = p
        return [{'params': list(params.values()), 'names': list(params), 'role': role,
                 'parts': parts,
                 'lr_knob': self.table[role].lr_knob, 'lr_mult': self.table[role].lr_mult,
                 'muon_lr_mult': self.table[role].muon_lr_mult,
                 'weight_decay': weight_decay if self.table[role].weight_decay else 0.0}
                for (role, parts), params in groups.items()]

    def flops_per_token(self, T):
        """Training FLOPs a token: 6 a weight, and in each layer 12 n_embd for each of T/2 keys."""
        return 6 * self.num_params() + 12 * self.config.n_embd * self.config.n_layer * T // 2

    def num_params(self, embedding=True):
        """Number of parameters; without the embedding, the N of tokens-per-parameter rules."""
        n = sum(p.numel() for p in self.parameters())
        return n if embedding else n - self.embed.weight.numel()


# --------------------------------------------------------------------------------------------------
# Loss in chunks: with 129 280 words, the logits of one 16 384-token row would fill 8.5 GB in fp32

CHUNK, CHUNK_ON_GPU = 2**24, 2**28                     # logits at a time: 64 MB and 1 GB of fp32


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(multiplier · x Wᵀ); gradients are computed in the forward pass.

    d loss / d logits = (softmax - onehot) / N needs nothing from later layers, so each chunk of
    rows makes its logits, takes from them the loss and both gradients, and drops them: no product
    is computed twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, multiplier, dtype, with_grad):
        w, x = weight.to(dtype), x.to(dtype)                                    # (V, C), (N, C)
        rows = max(1, (CHUNK_ON_GPU if x.is_cuda else CHUNK) // len(w))
        share = multiplier / (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if with_grad else None
        grad_w = torch.zeros_like(w, dtype=torch.float32) if with_grad else None
        for i in range(0, len(x), rows):
            xs, ts = x[i:i + rows], targets[i:i + rows]
            logits = (xs @ w.T).float() * multiplier                            # (rows, V)
            lse = logits.logsumexp(-1, keepdim=True)                            # (rows, 1)
            valid, at = (ts >= 0)[:, None], ts.clamp(min=0)[:, None]            # (rows, 1)
            total += ((lse - logits.gather(1, at)) * valid).sum()
            if with_grad:
                onehot = torch.arange(len(w), device=x.device) == at        # (rows, V)
                grad = (((logits - lse).exp() - onehot.float()) * (valid * share)).to(dtype)
                grad_x[i:i + rows] = grad @ w
                grad_w += grad.T @ xs
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w)
        return total * share / multiplier

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad_loss, grad_w * grad_loss, None, None, None, None


def chunked_cross_entropy(x, weight, targets, multiplier):
    """x (N, C), weight (V, C), targets (N,) with -1 = ignored -> scalar loss in nats."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return ChunkedCrossEntropy.apply(x, weight, targets, multiplier, dtype, torch.is_grad_enabled())


if __name__ == '__main__':
    with torch.device('meta'):
        model = Xmodel(XmodelConfig())
    print(f'width {model.config.n_embd}, {model.config.n_layer} blocks, by the textbook:')
    for role, rule in model.table.items():
        print(f'{role:11}', ', '.join(f'{key} {value:.4g}' if type(value) in (int, float) else
                                      f'{key} {value}' for key, value in rule._asdict().items()
                                      if value is not None))
    print(f'{model.num_params():,} parameters, {model.num_params(False):,} without the embedding')
