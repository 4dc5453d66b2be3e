"""Coordinate check: do activations change by as much in a wide model as in a narrow one?

    python -m lab.coord_check                        # the textbook's rules hold: exit code 0
    python -m lab.coord_check --break=lr_hidden      # one rule broken: a row fails, exit code 1
    python -m lab.coord_check --mup_rules=authors    # or sp
    python -m lab.coord_check --optimizer=muon       # three scalings of Muon's lr: one holds
    python -m lab.coord_check --vary=depth           # or head_size: what else grows with a model

Models of several widths take a few small AdamW steps each. After every step they read the same
text again. Under µP neither the size of an activation nor its change since init depends on the
width: the slope of log size over log width is 0 (Tensor Programs V, arXiv 2203.03466, app. D.1).
The one exception is the final logits, where theory expects -0.5 at init. What a slope means: with
0.5, an activation is 2.4 times as large at m = 6.

The learning rates are small, so that five steps stay near init, where each rule shows alone. At
0.01 without warmup, five steps lead far away whatever the rules. Gradients are clipped and weights
decay as in train.py. Slopes and figures are written to results/coord_check/; plot.py draws them.
"""
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

from checkpoint import replace_file, to_json
from configurator import check_range, configure, fail, int_list
from data_prep import prepare_missing
from loader import get_batch, open_data
from model import Xmodel, XmodelConfig, causal_attention
from muon import make_optimizers, step_all
from processes import ending_in_one_line

mup_rules = 'textbook'        # 'textbook' | 'authors' | 'sp'
break_ = ''                   # a rule of model.mup_table to break, with --break=RULE
optimizer = 'adamw'           # 'adamw' | 'muon': muon with each muon_lr_scaling
vary = 'auto'                 # 'auto' | 'heads' | 'head_size' | 'depth': what makes a model larger:
                              # more heads of 64, four larger heads, more blocks; auto: where the
                              # rule that is checked acts
widths = '64,128,256,512'
depths = ''                   # of models 128 wide, for vary='depth'; '': 2,4,8,16,32
n_layer = 4
steps = 5
seeds = 3                     # each with another init and other text
learning_rate = 2**-11        # before µP's factors; over depths a quarter of it, and for Muon four
                              # times, as Muon's update has RMS 0.2 where AdamW's begins with 1
embedding_lr = 2**-11
batch_size = 4
block_size = 128
vocab_size = 1024
data_dir = 'data/nano'        # text is Python's library, as in config/nano.py
out = 'results/coord_check'   # folder for the JSON files


# --------------------------------------------------------------------------------------------------
# Measure: activations of a model, before and after each step

def recording_attention(recorded):
    """model.causal_attention, which appends its q·k x scale to a list at each call."""
    def attention(q, k, v, scale):
        all_k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)            # (B, n_head, T, hd)
        logits = q @ all_k.mT * scale                             # (B, n_head, T, T)
        causal = torch.ones_like(logits[0, 0], dtype=torch.bool).tril()       # (T, T)
        recorded.append(logits[..., causal])
        return causal_attention(q, k, v, scale)
    return attention


@torch.no_grad()
def activations(model, idx):
    """{quantity: its values} for idx (B, T).

    Those of attention and FFN are stacked over all blocks, and are taken before the factor on the
    residual branch. 'norm gain' is no activation, but a parameter that should change alike, too.
    """
    recorded = {'embedding': [], 'attention logits': [], 'attention output': [], 'FFN output': [],
                'residual stream': [], 'logits': []}

    def record_input(quantity):
        def hook(module, args):
            recorded[quantity].append(args[0])
        return hook

    def record_output(quantity):
        def hook(module, args, output):
            recorded[quantity].append(output)
        return hook

    hooks = [model.blocks[0].register_forward_pre_hook(record_input('embedding')),
             model.norm.register_forward_pre_hook(record_input('residual stream'))]
    for block in model.blocks:
        hooks.append(block.attn.register_forward_hook(record_output('attention output')))
        hooks.append(block.ffn.register_forward_hook(record_output('FFN output')))
    recording = recording_attention(recorded['attention logits'])
    with mock.patch('model.causal_attention', recording):
        logits, _ = model(idx)
    for hook in hooks:
        hook.remove()
    recorded['logits'].append(logits)
    recorded['norm gain'] = [p.clone() for name, p in model.named_parameters() if 'norm' in name]
    return {quantity: torch.stack(values) for quantity, values in recorded.items()}


def size_and_change(x, init):
    """[mean |x|, RMS of x - init], to five digits."""
    size = x.abs().mean()
    change = (x - init).square().mean().sqrt()
    return [float(f'{figure:.5g}') for figure in (size, change)]


def coordinates(c, batches, kind, lrs, seed):
    """Train a model of config c, one step a batch, and measure it at init and after each step.

    kind: 'adamw' or 'muon'. lrs: {knob: learning rate before µP's factors}. Returns a list of
    len(batches) + 1 dicts {quantity: [size, change since init]}, all on the first batch's inputs.
    """
    torch.manual_seed(seed)
    model = Xmodel(c)
    optimizers = make_optimizers(kind, model.param_groups())
    idx = batches[0][0]                                           # (B, T)
    init = activations(model, idx)

    def measure():
        return {quantity: size_and_change(x, init[quantity])
                for quantity, x in activations(model, idx).items()}

    measured = [measure()]
    for x, y in batches:
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_all(optimizers, lrs)
        measured.append(measure())
    return measured


# --------------------------------------------------------------------------------------------------
# Judge: slopes over the sizes of the models, and the bounds in which they should lie

def bounds(quantity, vary):
    """(bounds of the slope of the size at init, bounds of the slopes of the change).

    Bounds are (low, high), or None where any slope will do. They leave room for chance at the
    default settings; with one block, or with few tokens, slopes scatter more.
    """
    if vary == 'depth':
        if quantity == 'residual stream':
            return (-0.5, 0.1), (-0.2, 0.5)
        return None, None
    if quantity == 'logits' or (quantity == 'attention logits' and vary == 'head_size'):
        return (-0.6, -0.4), (-0.7, 0.2)
    if quantity == 'attention output' and vary == 'head_size':    # depends on those logits in part
        return (-0.2, 0.1), (-0.6, 0.2)
    return (-0.1, 0.1), (-0.2, 0.2)


def slope(sizes, values):
    """Slope of the least-squares line through log values over log sizes; NaN if a value is."""
    x = torch.tensor(sizes, dtype=torch.float64).log2()
    y = torch.tensor(values, dtype=torch.float64).log2()
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def slopes_by_step(sizes, values):
    """values[size][seed][step] -> slopes[step][seed]."""
    n_seeds, n_steps = len(values[0]), len(values[0][0])
    return [[slope(sizes, [of_size[seed][step] for of_size in values]) for seed in range(n_seeds)]
            for step in range(n_steps)]


def judge(quantity, vary, sizes, row):
    """Add slopes, their bounds and the verdict to a row {'size': ..., 'change': ...}.

    Both are values[size][seed][step]. 'holds' is None where there is nothing to hold.
    """
    def mean_over_seeds(slopes):
        return [round(sum(of_seeds) / len(of_seeds), 4) for of_seeds in slopes]

    of_size = slopes_by_step(sizes, row['size'])
    of_change = slopes_by_step(sizes, row['change'])
    size_slopes = mean_over_seeds(of_size)
    change_slopes = mean_over_seeds(of_change[1:])                # at init there is no change
    spread = max(max(of_seeds) - min(of_seeds) for of_seeds in (of_size[0], of_change[-1]))

    init_bounds, change_bounds = bounds(quantity, vary)
    holds = None
    if init_bounds is not None:
        low, high = change_bounds
        init_holds = init_bounds[0] <= size_slopes[0] <= init_bounds[1]
        holds = init_holds and all(low <= s <= high for s in change_slopes)
    return row | {'size_slopes': size_slopes, 'change_slopes': change_slopes,
                  'spread': round(spread, 4), 'bounds': [init_bounds, change_bounds],
                  'holds': holds}


# --------------------------------------------------------------------------------------------------
# One table: models of all sizes, under one set of rules

def shape(size, vary):
    """XmodelConfig's arguments for a width (vary: 'heads', 'head_size') or a depth ('depth').

    'heads' has more heads of 64, 'head_size' four heads that grow; the FFN is 2.5 times the width.
    """
    if vary == 'depth':
        return {'n_layer': size}
    if vary == 'heads' and size > 64 and size % 64:
        raise ValueError(f'width {size} is not made of heads of 64')
    n_head = 4 if vary == 'head_size' else max(1, size // 64)
    return {'n_embd': size, 'n_ffn': 5 * size // 2, 'n_head': n_head}


def sizes_of(vary):
    """The widths, or depths, of a table's models, in order."""
    if vary == 'depth':
        default = '2,4,8,16,32'
        return sorted(int_list('depths', depths or default, 2))
    sizes = sorted(int_list('widths', widths, 2))
    if sizes[-1] < 4 * sizes[0]:
        fail(f'widths={widths!r} should span a factor of 4: over less, chance decides the slope')
    if vary == 'heads' and sizes[0] < 64:
        fail(f'widths={widths!r} should begin at 64 or above, as heads are of 64')
    return sizes


def config_of(size, vary, scaling):
    """The XmodelConfig of a table's model; scaling is its muon_lr_scaling."""
    dimensions = {'n_layer': n_layer, **shape(128, 'heads')}
    dimensions |= shape(size, vary)
    return XmodelConfig(**dimensions, n_kv_head=1, mup_rules=mup_rules, mup_break=break_,
                        vocab_size=vocab_size, block_size=block_size, muon_lr_scaling=scaling)


def learning_rates(vary):
    """{knob: learning rate before µP's factors} of a table's models."""
    depth_factor = 1 / 4 if vary == 'depth' else 1
    muon_factor = 4 if optimizer == 'muon' else 1
    return {'learning_rate': learning_rate * depth_factor * muon_factor,
            'embedding_lr': embedding_lr * depth_factor}


def make_batches(data, seed):
    """[(x, y)], each (batch_size, block_size), one a step."""
    batches = []
    for step in range(steps):
        rows = range(step * batch_size, (step + 1) * batch_size)
        batches.append(get_batch(data, {'stdlib': 1.0}, rows, block_size, seed))
    return batches


def check(data, vary, scaling):
    """Run one table's models -> {sizes, lrs, rows}; a row has a quantity's figures and verdict."""
    sizes, lrs = sizes_of(vary), learning_rates(vary)
    measured = {}                                  # (size, seed) -> what coordinates() returns
    bar = tqdm(total=len(sizes) * seeds, unit='model', disable=None)
    for size in sizes:
        for seed in range(seeds):
            c, batches = config_of(size, vary, scaling), make_batches(data, seed)
            measured[size, seed] = coordinates(c, batches, optimizer, lrs, seed)
            bar.update()
    bar.close()

    def values_of(quantity, i):                    # i: 0 for the size, 1 for the change
        return [[[at_step[quantity][i] for at_step in measured[size, seed]]
                 for seed in range(seeds)] for size in sizes]

    rows = {}
    for quantity in measured[sizes[0], 0][0]:
        row = {'size': values_of(quantity, 0), 'change': values_of(quantity, 1)}
        rows[quantity] = judge(quantity, vary, sizes, row)
    return {'sizes': sizes, 'lrs': lrs, 'rows': rows}


# --------------------------------------------------------------------------------------------------
# Print and write tables

EXPLANATIONS = {
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
GROWTH = {'heads': 'width by more heads of 64', 'head_size': 'width by four larger heads',
          'depth': 'depth, 128 wide'}
VERDICTS = {True: 'holds', False: 'FAILS', None: 'not judged'}


def print_table(table):
    """Print a table: a row for each quantity, with its slopes and whether they hold."""
    sizes = ', '.join(map(str, table['sizes']))
    step_numbers = ' '.join(f'{step:>5}' for step in range(1, steps + 1))
    print(f'{table["title"]}, {seeds} seeds')
    print(f'slopes over {sizes}; spread: most over seeds, first and last')
    print(f'{"":18} |x| at init, end  change after step')
    print(f'{"":37}{step_numbers}  spread')
    for quantity, row in table['rows'].items():
        size_slopes = f'{row["size_slopes"][0]:+8.2f} {row["size_slopes"][-1]:+8.2f}'
        change_slopes = ' '.join(f'{s:+.2f}' for s in row['change_slopes'])
        verdict = VERDICTS[row['holds']]
        print(f'{quantity:17} {size_slopes}   {change_slopes} {row["spread"]:7.2f}  {verdict}')
    print()


def pick_growth():
    """What makes models larger: the knob `vary` or, with 'auto', what the broken rule acts on."""
    if vary != 'auto':
        return vary
    if depths or break_ == 'residual_depth':
        return 'depth'
    if break_ in ('attn_scale', 'attn_const'):
        return 'head_size'
    return 'heads'


def names_of_rules(mark=''):
    """The column of mup_table, which goes without saying where one of its rules is broken; and
    that rule, with a mark behind its name."""
    names = []
    if mup_rules != 'textbook' or not break_:
        names.append(mup_rules)
    if break_:
        names.append(break_ + mark)
    return names


def write_table(table, growth, scaling):
    """Write a table as JSON to the folder `out`, named by its rules and by what grows."""
    names = names_of_rules()
    if growth != 'heads':
        names.append(growth)
    if optimizer == 'muon':
        names += ['muon', scaling]
    stem = re.sub(r'[^\w-]+', '_', '-'.join(names)).strip('_')
    text = to_json(table).encode()
    replace_file(Path(out, f'{stem}.json'), lambda f: f.write(text))


def open_text():
    """Python's library as an opened data set, made first if it is missing."""
    prepare_missing(data_dir, ['stdlib'], {'stdlib': 'stdlib --max_mb=2'}, vocab_size)
    return open_data(data_dir, ['stdlib'], vocab_size)


def main():
    check_range(globals(), 1, 2**31, 'steps', 'seeds', 'n_layer', 'vocab_size')
    check_range(globals(), 1, 4097, 'batch_size', 'block_size')   # all logits q·k are in memory
    check_range(globals(), 2**-60, 2**60, 'learning_rate', 'embedding_lr')
    if optimizer == 'muon' and (mup_rules == 'sp' or break_ == 'lr_hidden'):
        fail(f"optimizer='muon' compares scalings of Muon's lr, and {break_ or mup_rules} has none")
    growth = pick_growth()
    if depths and growth != 'depth':
        fail(f'depths={depths!r} is for vary=depth, and this checks {GROWTH[growth]}')
    scalings = ('1/m', '1/sqrt(m)', 'const') if optimizer == 'muon' else ('1/sqrt(m)',)
    try:
        for size in sizes_of(growth):
            config_of(size, growth, scalings[0])                  # ValueError: no such model
        data = open_text()
        make_batches(data, 0)                                     # ValueError: too little text
    except ValueError as e:
        fail(e)

    Path(out).mkdir(parents=True, exist_ok=True)
    n_failed = 0
    for scaling in scalings:
        rules = ', '.join(names_of_rules(' broken'))
        if optimizer == 'muon':
            rules += f', Muon lr {scaling}'
        table = check(data, growth, scaling) | {
            'kind': 'coord_check', 'vary': growth, 'seeds': seeds, 'rules': rules,
            'title': f'{rules}: {GROWTH[growth]}, {steps} steps of {optimizer}',
            'command': shlex.join(['python', '-m', 'lab.coord_check', *sys.argv[1:]]),
            'torch': torch.__version__}
        print_table(table)
        write_table(table, growth, scaling)
        n_failed += sum(row['holds'] is False for row in table['rows'].values())

    print(EXPLANATIONS['depth' if growth == 'depth' else 'logits'])
    if growth == 'head_size':
        print(EXPLANATIONS['head_size'])
    if optimizer == 'muon':
        print(EXPLANATIONS['muon'])
    sys.exit(1 if n_failed else 0)


if __name__ == '__main__':
    configure(globals())
    with ending_in_one_line(out):
        main()
