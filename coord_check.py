"""Coordinate check: do activations move by as much in a wide model as in a narrow one?

    python coord_check.py                        # the textbook's rules: all rows hold, exit code 0
    python coord_check.py --break=lr_hidden      # one rule broken: a row fails, exit code 1
    python coord_check.py --mup_rules=authors    # or sp
    python coord_check.py --optimizer=muon       # which power of the width Muon's lr should take
    python coord_check.py --vary=depth           # or head_size: what else grows with a model

A model of each width takes a few small AdamW steps; after each, the same text is read again. µP
holds if no activation's size, nor its change since init, depends on the width: the slope of log
size over log width is 0 (Tensor Programs V, arXiv 2203.03466, app. D.1). A slope of 0.5 makes an
activation 2.4 times as large at m = 6. The learning rates are small, so that five steps stay near
init, where each rule shows alone; at 0.01 without warmup they lead far away, whatever the rules.
Slopes and figures go to results/coord_check/, for plot.py.
"""
import json
import math
import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from checkpoint import replace_file
from configurator import check_range, configure, fail, int_list
from data_prep import get_batch, open_data, prepare_missing
from model import Xmodel, XmodelConfig
from muon import make_optimizers, step_all

mup_rules = 'textbook'        # 'textbook' | 'authors' | 'sp'
break_ = ''                   # a rule of model.mup_table to break, with --break=RULE
optimizer = 'adamw'           # 'adamw' | 'muon': muon with each muon_lr_scaling
vary = 'auto'                 # 'auto' | 'heads' | 'head_size' | 'depth': heads of one size make a
                              # model wide, or four of growing size; auto: where the rule acts
widths = '64,128,256,512'
depths = '2,4,8,16,32'        # at a width of 128
n_layer = 4
steps = 5
seeds = 3                     # each another init and other text
learning_rate = 2**-11        # before µP's factors; with depths a quarter of it, and four times for
                              # Muon, whose update has a fifth of AdamW's size
embedding_lr = 2**-11
batch_size = 4
block_size = 128
vocab_size = 1024
data_dir = 'data/nano'        # text is Python's library, as in config/nano.py
out = 'results/coord_check'   # folder for the JSON files

WHY = {
    'logits': """\
Tied logits start at -0.5: they sum n_embd independent terms and are divided by m, not sqrt(m). That
is the theory and no fault. What is learned is aligned with the embedding and sums without the root:
the slope of their change comes from -0.5 towards 0 as training goes on. It may not pass 0.""",
    'head_size': """\
So do the attention logits where heads grow: q·k sums head_size terms and is divided by them.""",
    'depth': """\
AdamW moves every block by the same amount, so with branches times 1/sqrt(L) the residual stream
changes by up to L / sqrt(L), slope 0.5; without the factor by L. Tensor Programs VI (arXiv
2310.02244) divides the learning rate by sqrt(L) as well, for a slope of 0; Xmodel-2.5 does not.""",
    'muon': """\
Muon's update has a spectral norm of 0.2 sqrt(max(rows, cols)) lr, whatever the gradient, and moves
activations by lr sqrt(m). So 1/sqrt(m) keeps their change constant; const lets it grow as sqrt(m),
and 1/m, Adam's rule, lets it shrink. Xmodel-2.5 took 1/m for its decay phase, and 1/sqrt(m) in its
searches with Muon alone.""",
}


WAYS = {'heads': 'width by more heads of 64', 'head_size': 'width by four larger heads',
        'depth': 'depth, 128 wide'}

# --------------------------------------------------------------------------------------------------
# What is looked at

class AttentionLogits(TorchFunctionMode):
    """Keeps q·k x scale of each call of attention, which the fused kernel never shows."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]                                       # (B, n_head or n_kv_head, T, hd)
            k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)           # (B, n_head, T, hd)
            logits = q @ k.mT * kwargs['scale']                   # (B, n_head, T, T)
            self.seen.append(logits[..., torch.ones_like(logits[0, 0], dtype=torch.bool).tril()])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def activations(model, idx):
    """{quantity: its values} for idx (B, T); those of attention and FFN are of all blocks."""
    seen = {'embedding': [], 'attention logits': [], 'attention output': [], 'FFN output': [],
            'residual stream': [], 'logits': []}

    def keep(quantity, out=True):
        return lambda module, args, result=None: seen[quantity].append(result if out else args[0])
    hooks = [model.blocks[0].register_forward_pre_hook(keep('embedding', False)),
             model.norm.register_forward_pre_hook(keep('residual stream', False))]
    for block in model.blocks:
        hooks += [block.attn.register_forward_hook(keep('attention output')),
                  block.ffn.register_forward_hook(keep('FFN output'))]
    with AttentionLogits(seen['attention logits']):
        seen['logits'].append(model(idx)[0])
    for hook in hooks:
        hook.remove()
    seen['norm gain'] = [p.clone() for name, p in model.named_parameters() if 'norm' in name]
    return {quantity: torch.stack(values) for quantity, values in seen.items()}


def coordinates(c, batches, kind, lrs, seed):
    """A model of config c trained on batches, a step each -> [{quantity: (size, change)}], 0...n.

    Size is the mean |x|, change the RMS of x - (x at init), both on the first batch's inputs.
    """
    torch.manual_seed(seed)
    model = Xmodel(c)
    optimizers = make_optimizers(kind, model.param_groups())
    init = activations(model, batches[0][0])
    told = [{quantity: (x.abs().mean().item(), 0.0) for quantity, x in init.items()}]
    for x, y in batches:
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_all(optimizers, lrs)
        now = activations(model, batches[0][0])
        told.append({quantity: (x.abs().mean().item(),
                                (x - init[quantity]).square().mean().sqrt().item())
                     for quantity, x in now.items()})
    return told


# --------------------------------------------------------------------------------------------------
# What it should be

def bounds(quantity, vary):
    """((low, high) of the slope of the size at init, the same of the change), None: anything."""
    if vary == 'depth':
        return {'residual stream': ((-1, 0.1), (-0.2, 0.5))}.get(quantity, (None, None))
    if quantity == 'logits' or (quantity == 'attention logits' and vary == 'head_size'):
        return (-0.6, -0.4), (-0.7, 0.2)
    return (-0.1, 0.1), (-0.2, 0.2)


def slope(sizes, values):
    """Of the least-squares line through log values over log sizes; NaN where a value is none."""
    x, y = (torch.tensor(v, dtype=torch.float64).log2() for v in (sizes, values))
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def sizes_of(vary):
    knob, text = ('depths', depths) if vary == 'depth' else ('widths', widths)
    return int_list(knob, text, 2)


def config_of(size, vary, scaling):
    shape = {'n_layer': size, 'n_embd': 128, 'n_head': 2} if vary == 'depth' else \
        {'n_layer': n_layer, 'n_embd': size, 
         'n_head': 4 if vary == 'head_size' else max(1, size // 64)}
    return XmodelConfig(**shape, n_kv_head=1, n_ffn=5 * shape['n_embd'] // 2, mup_rules=mup_rules,
                        vocab_size=vocab_size, block_size=block_size, mup_break=break_,
                        muon_lr_scaling=scaling)


def check(data, vary, scaling):
    """Run one table's models -> {sizes, and for each quantity its figures, slopes and verdict}."""
    sizes = sizes_of(vary)
    lr = learning_rate / (4 if vary == 'depth' else 1) * (4 if optimizer == 'muon' else 1)
    lrs = {'learning_rate': lr, 'embedding_lr': embedding_lr / (4 if vary == 'depth' else 1)}
    configs = {size: config_of(size, vary, scaling) for size in sizes}
    told, bar = {}, tqdm(total=len(sizes) * seeds, unit='model', disable=None)
    for size in sizes:
        for seed in range(seeds):
            batches = [get_batch(data, {'stdlib': 1.0}, range(t * batch_size, (t + 1) * batch_size),
                                 block_size, seed) for t in range(steps)]
            told[size, seed] = coordinates(configs[size], batches, optimizer, lrs, seed)
            bar.update()
    bar.close()
    rows = {}
    for quantity in told[sizes[0], 0][0]:
        figures = {kind: [[[told[size, seed][t][quantity][i] for t in range(steps + 1)]
                           for seed in range(seeds)] for size in sizes]         # [size][seed][t]
                   for i, kind in enumerate(('size', 'change'))}

        def slopes(kind, t):
            return [slope(sizes, [of_size[seed][t] for of_size in figures[kind]])   # noqa: B023
                    for seed in range(seeds)]
        size = [sum(slopes('size', t)) / seeds for t in range(steps + 1)]
        change = [sum(slopes('change', t)) / seeds for t in range(1, steps + 1)]
        spread = max(max(s) - min(s) for s in (slopes('size', 0), slopes('change', steps)))
        at_init, of_change = bounds(quantity, vary)
        holds = None if at_init is None else \
            at_init[0] <= size[0] <= at_init[1] and \
            all(of_change[0] <= s <= of_change[1] for s in change)
        rows[quantity] = figures | {'slopes_size': size, 'slopes_change': change, 'spread': spread,
                                    'bounds': (at_init, of_change), 'holds': holds}
    return {'sizes': sizes, 'lrs': lrs, 'rows': rows}


def print_table(told):
    changes = ' '.join(f'{t:>5}' for t in range(1, steps + 1))
    print(f'{told["title"]}, {seeds} seeds\n'
          f'slope over {", ".join(map(str, told["sizes"]))} of the size |x| and of its change\n'
          f'{"":17} at init   at end  {changes}  spread')
    for quantity, row in told['rows'].items():
        print(f'{quantity:17}', *(f'{row["slopes_size"][t]:+8.2f}' for t in (0, -1)), '',
              *(f'{s:+.2f}' for s in row['slopes_change']), f'{row["spread"]:7.2f}  '
              + {True: 'holds', False: 'FAILS', None: 'not judged'}[row['holds']])
    print()


def main():
    check_range(globals(), 1, 2**63, 'steps', 'seeds', 'n_layer', 'batch_size', 'block_size')
    check_range(globals(), 0, math.inf, 'learning_rate', 'embedding_lr')
    varied = [vary] if vary != 'auto' else ['depth'] if break_ == 'residual_depth' else \
        ['heads', 'head_size'] if break_ in ('attn_scale', 'attn_const') else ['heads']
    scalings = ('1/m', '1/sqrt(m)', 'const') if optimizer == 'muon' else ('1/sqrt(m)',)
    try:
        for kind in varied:
            for size in sizes_of(kind):
                config_of(size, kind, scalings[0])
        prepare_missing(data_dir, ['stdlib'], {'stdlib': 'stdlib --max_mb=2'}, vocab_size)
        data = open_data(data_dir, ['stdlib'], vocab_size)
    except ValueError as e:
        fail(e)
    failed = 0
    for kind in varied:
        for scaling in scalings:
            told = check(data, kind, scaling)
            told |= {'kind': 'coord_check', 'vary': kind, 'seeds': seeds, 'title': ', '.join([
                mup_rules + f', {break_} broken' * bool(break_), WAYS[kind],
                f'{steps} steps of {optimizer}'
                + f', its lr scaled {scaling}' * (optimizer == 'muon')]),
                'command': f'python coord_check.py {shlex.join(sys.argv[1:])}',
                'torch': torch.__version__}
            print_table(told)
            failed += sum(row['holds'] is False for row in told['rows'].values())
            parts = [f'muon-{scaling}'.replace('/', '_over_') * (optimizer == 'muon'),
                     break_ or mup_rules, kind * (kind != 'heads')]
            file = Path(out, '-'.join(filter(None, parts)) + '.json')
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, lambda f: f.write(json.dumps(told).encode()))    # noqa: B023
    for why, said in (('logits', varied != ['depth']), ('head_size', 'head_size' in varied),
                      ('depth', varied == ['depth']), ('muon', optimizer == 'muon')):
        print(*[WHY[why]] if said else [], end='\n' * said)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    configure(globals())
    main()
