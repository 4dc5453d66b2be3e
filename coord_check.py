"""Coordinate check: do activations move by as much in a wide model as in a narrow one?

    python coord_check.py                        # the textbook's rules: all rows hold, exit code 0
    python coord_check.py --break=lr_hidden      # one rule broken: a row fails, exit code 1
    python coord_check.py --mup_rules=authors    # or sp
    python coord_check.py --optimizer=muon       # three scalings of Muon's lr, of which one holds
    python coord_check.py --vary=depth           # or head_size: what else grows with a model

A model of each width takes a few small AdamW steps; after each, the same text is read again. µP
holds if no activation's size, nor its change since init, depends on the width: the slope of log
size over log width is 0 (Tensor Programs V, arXiv 2203.03466, app. D.1), but for the final logits,
where theory has -0.5 at init. A slope of 0.5 makes an activation 2.4 times as large at m = 6.
The learning rates are small, so that five steps stay near init, where each rule shows alone; at
0.01 without warmup they lead far away, whatever the rules. Gradients are clipped and weights
decayed as in train.py. Slopes and figures go to results/coord_check/, for plot.py.
"""
import json
import re
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
vary = 'auto'                 # 'auto' | 'heads' | 'head_size' | 'depth': what makes a model larger:
                              # more heads of 64, four larger ones, blocks; auto: where a rule acts
widths = '64,128,256,512'
depths = ''                   # of models 128 wide, for vary='depth'; '': 2,4,8,16,32
n_layer = 4
steps = 5
seeds = 3                     # each another init and other text
learning_rate = 2**-11        # before µP's factors; over depths a quarter of it, and for Muon four
                              # times, as its update has RMS 0.2 where AdamW's begins with 1
embedding_lr = 2**-11
batch_size = 4
block_size = 128
vocab_size = 1024
data_dir = 'data/nano'        # text is Python's library, as in config/nano.py
out = 'results/coord_check'   # folder for the JSON files

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
    """{quantity: its values} for idx (B, T); those of attention and FFN are of all blocks, before
    the factor on the branch."""
    seen = {'embedding': [], 'attention logits': [], 'attention output': [], 'FFN output': [],
            'residual stream': [], 'logits': []}

    def keep(quantity):                          # a module's output, or in a pre-hook its input
        return lambda module, args, out=None: seen[quantity].append(args[0] if out is None else out)
    hooks = [model.blocks[0].register_forward_pre_hook(keep('embedding')),
             model.norm.register_forward_pre_hook(keep('residual stream'))]
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

    def figures():
        now = activations(model, batches[0][0])
        return {quantity: [float(f'{figure:.5g}') for figure in (
                    x.abs().mean(), (x - init[quantity]).square().mean().sqrt())]
                for quantity, x in now.items()}
    told = [figures()]
    for x, y in batches:
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_all(optimizers, lrs)
        told.append(figures())
    return told


# --------------------------------------------------------------------------------------------------
# What it should be

def bounds(quantity, vary):
    """((low, high) of the slope of the size at init, the same of the change), None: anything.

    They leave room for chance at the default settings; with one block, or a few tokens, slopes
    scatter more.
    """
    if vary == 'depth':
        return {'residual stream': ((-0.5, 0.1), (-0.2, 0.5))}.get(quantity, (None, None))
    if quantity == 'logits' or (quantity == 'attention logits' and vary == 'head_size'):
        return (-0.6, -0.4), (-0.7, 0.2)
    if quantity == 'attention output' and vary == 'head_size':     # moved in part by those logits
        return (-0.2, 0.1), (-0.6, 0.2)
    return (-0.1, 0.1), (-0.2, 0.2)


def slope(sizes, values):
    """Of the least-squares line through log values over log sizes; NaN where a value is none."""
    x, y = (torch.tensor(v, dtype=torch.float64).log2() for v in (sizes, values))
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def shape(size, vary):
    """XmodelConfig's arguments for a width, or a depth: heads of 64, or four of growing size."""
    if vary == 'depth':
        return {'n_layer': size}
    if vary == 'heads' and size > 64 and size % 64:
        raise ValueError(f'width {size} is not made of heads of 64')
    return {'n_embd': size, 'n_ffn': 5 * size // 2,
            'n_head': 4 if vary == 'head_size' else max(1, size // 64)}


def sizes_of(vary):
    if vary == 'depth':
        return sorted(int_list('depths', depths or '2,4,8,16,32', 2))
    sizes = sorted(int_list('widths', widths, 2))
    if sizes[-1] < 4 * sizes[0]:
        fail(f'widths={widths!r} should span a factor of 4: over less, chance makes the slope')
    if vary == 'heads' and sizes[0] < 64:
        fail(f'widths={widths!r} should begin at 64 or above, where heads are of 64')
    return sizes


def config_of(size, vary, scaling):
    return XmodelConfig(**{'n_layer': n_layer, **shape(128, 'heads'), **shape(size, vary)},
                        n_kv_head=1, mup_rules=mup_rules, mup_break=break_,
                        vocab_size=vocab_size, block_size=block_size, muon_lr_scaling=scaling)


def some_batches(data, seed):
    return [get_batch(data, {'stdlib': 1.0}, range(t * batch_size, (t + 1) * batch_size),
                      block_size, seed) for t in range(steps)]


def check(data, vary, scaling):
    """Run one table's models -> {sizes, lrs, rows}; a row has a quantity's figures and verdict."""
    sizes, scale = sizes_of(vary), 1 / 4 if vary == 'depth' else 1
    lrs = {'learning_rate': learning_rate * scale * (4 if optimizer == 'muon' else 1),
           'embedding_lr': embedding_lr * scale}
    runs, bar = {}, tqdm(total=len(sizes) * seeds, unit='model', disable=None)
    for size in sizes:
        for seed in range(seeds):
            runs[size, seed] = coordinates(config_of(size, vary, scaling),
                                           some_batches(data, seed), optimizer, lrs, seed)
            bar.update()
    bar.close()
    rows = {}
    for quantity in runs[sizes[0], 0][0]:
        row = {kind: [[[step[quantity][i] for step in runs[size, seed]] for seed in range(seeds)]
                      for size in sizes] for i, kind in enumerate(('size', 'change'))}
        slopes = {kind: [[slope(sizes, [of_size[seed][t] for of_size in row[kind]])
                          for seed in range(seeds)] for t in range(steps + 1)]
                  for kind in ('size', 'change')}                 # [t][seed]
        size_slopes = [round(sum(of_seeds) / seeds, 4) for of_seeds in slopes['size']]
        change_slopes = [round(sum(of_seeds) / seeds, 4) for of_seeds in slopes['change'][1:]]
        spread = max(max(of_seeds) - min(of_seeds)
                     for of_seeds in (slopes['size'][0], slopes['change'][-1]))
        at_init, of_change = bounds(quantity, vary)
        holds = None if at_init is None else at_init[0] <= size_slopes[0] <= at_init[1] and \
            all(of_change[0] <= s <= of_change[1] for s in change_slopes)
        rows[quantity] = row | {'size_slopes': size_slopes, 'change_slopes': change_slopes,
                                'spread': round(spread, 4), 'bounds': [at_init, of_change],
                                'holds': holds}
    return {'sizes': sizes, 'lrs': lrs, 'rows': rows}


WHY = {
    'logits': """\
Logits start at -0.5: all but the input token's own sum n_embd independent terms, and are divided by
m, not sqrt(m). That is the theory and no fault (an untied output could start at 0). What is learned
is aligned with the embedding and does not shrink, but five small steps hardly leave -0.5.""",
    'head_size': """\
Where heads grow, so do the attention logits: q·k sums head_size terms and is divided by head_size,
for the sake of what comes to be aligned. The check shows which rule is in force, and cannot show
which is right: in heads of 16 to 64 the slope is still near -0.5 after 60 steps at 0.004.""",
    'depth': """\
AdamW moves every block by the same amount, so with branches times 1/sqrt(L) the residual stream
changes by up to L / sqrt(L), slope 0.5; without the factor by L. Tensor Programs VI (arXiv
2310.02244) divides the learning rate by sqrt(L) as well, for a slope of 0; Xmodel-2.5 does not.
At init branches shrink by 1/sqrt(2 L) more: a deep stream begins as little but the embedding.""",
    'muon': """\
Muon's update has a spectral norm of 0.2 sqrt(max(rows, cols)) lr, whatever the gradient, and moves
activations by lr sqrt(m): const lets their change grow as sqrt(m), 1/sqrt(m) keeps it, and 1/m,
Adam's rule, lets it shrink. Xmodel-2.5 took 1/m for its decay phase, and 1/sqrt(m) in its searches
with Muon alone.""",
}
WAYS = {'heads': 'width by more heads of 64', 'head_size': 'width by four larger heads',
        'depth': 'depth, 128 wide'}


def print_table(table):
    changes = ' '.join(f'{t:>5}' for t in range(1, steps + 1))
    print(f'{table["title"]}, {seeds} seeds\n'
          f'slopes over {", ".join(map(str, table["sizes"]))}; spread: most over seeds, first and '
          f'last\n{"":18} |x| at init, end  change after step\n{"":37}{changes}  spread')
    for quantity, row in table['rows'].items():
        print(f'{quantity:17}', *(f'{row["size_slopes"][t]:+8.2f}' for t in (0, -1)), ' ',
              *(f'{s:+.2f}' for s in row['change_slopes']), f'{row["spread"]:7.2f}  '
              + {True: 'holds', False: 'FAILS', None: 'not judged'}[row['holds']])
    print()


def main():
    check_range(globals(), 1, 2**31, 'steps', 'seeds', 'n_layer', 'vocab_size')
    check_range(globals(), 1, 4097, 'batch_size', 'block_size')  # q·k is kept whole
    check_range(globals(), 2**-60, 2**60, 'learning_rate', 'embedding_lr')
    if optimizer == 'muon' and (mup_rules == 'sp' or break_ == 'lr_hidden'):
        fail(f"optimizer='muon' compares scalings of Muon's lr, and {break_ or mup_rules} has none")
    kind = vary if vary != 'auto' else 'depth' if depths or break_ == 'residual_depth' else \
        'head_size' if break_ in ('attn_scale', 'attn_const') else 'heads'
    if depths and kind != 'depth':
        fail(f'depths={depths!r} is for vary=depth, and this checks {WAYS[kind]}')
    scalings = ('1/m', '1/sqrt(m)', 'const') if optimizer == 'muon' else ('1/sqrt(m)',)
    try:
        for size in sizes_of(kind):
            config_of(size, kind, scalings[0])
        prepare_missing(data_dir, ['stdlib'], {'stdlib': 'stdlib --max_mb=2'}, vocab_size)
        data = open_data(data_dir, ['stdlib'], vocab_size)
        some_batches(data, 0)
    except ValueError as e:
        fail(e)
    Path(out).mkdir(parents=True, exist_ok=True)
    failed, base = 0, [mup_rules] if mup_rules != 'textbook' or not break_ else []
    rules = ', '.join(base + [f'{break_} broken'] * bool(break_))
    for scaling in scalings:
        muon = f', Muon lr {scaling}' * (optimizer == 'muon')
        table = check(data, kind, scaling) | {
            'kind': 'coord_check', 'vary': kind, 'seeds': seeds, 'rules': rules + muon,
            'title': f'{rules}{muon}: {WAYS[kind]}, {steps} steps of {optimizer}',
            'command': shlex.join(['python', 'coord_check.py', *sys.argv[1:]]),
            'torch': torch.__version__}
        print_table(table)
        failed += sum(row['holds'] is False for row in table['rows'].values())
        names = base + [break_] * bool(break_) + [kind] * (kind != 'heads') \
            + ['muon', scaling] * (optimizer == 'muon')
        file = Path(out, re.sub(r'[^\w-]+', '_', '-'.join(names)).strip('_') + '.json')
        replace_file(file, lambda f: f.write(json.dumps(table).encode()))       # noqa: B023
    print(WHY['depth' if kind == 'depth' else 'logits'])
    if kind == 'head_size':
        print(WHY['head_size'])
    if optimizer == 'muon':
        print(WHY['muon'])
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    configure(globals())
    try:
        main()
    except OSError as e:
        fail(f'{e.filename or out}: {e.strerror}')
    except KeyboardInterrupt:
        sys.exit('coord_check.py: stopped')
