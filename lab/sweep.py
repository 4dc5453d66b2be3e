"""Search hyperparameters on a small model, and measure whether they transfer to a larger one.

    python -m lab.sweep transfer                         # lr x width: µP beside standard
    python -m lab.sweep transfer --depths=2,4,8,16 --rules=textbook,residual_depth
    python -m lab.sweep transfer --optimizer=muon        # in the decay phase
    python -m lab.sweep search --config=config/transfer.py --trials=40 --apply=config/xmodel25.py
    python -m lab.sweep search                           # the 20M proxy at the paper's budget: GPUs

A trial is one run of train.py, and its result one line of out/sweep/NAME/trials.jsonl. To resume a
sweep that was stopped, give the same command again: a trial that has its line is not repeated
unless code or text have changed (see trials.py), and the sweep ends in the same table and the same
file in results/NAME/. A trial's loss is the mean training loss over the last tenth of its steps.
"""
import functools
import hashlib
import itertools
import math
import os
import re
import shlex
import statistics
import sys
import time
import warnings
from difflib import unified_diff
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import replace_file, to_json
from configurator import check_range, configure, fail, int_list
from lab.coord_check import shape
from lab.trials import check_flags, hash_of, prepare_data_of, results_of, train_knobs
from model import Xmodel, mup_table
from processes import ending_in_one_line
from start import model_config

command = ''                  # 'search' or 'transfer'
name = ''                     # of the folder under results/; '': by the command and what grows
config = ''                   # of the trials; '': config/proxy20m.py, config/transfer.py
flags = ''                    # more of train.py's flags for every trial, as in a shell
steps = 0                     # of a trial; 0: as in config, in a search as in the paper
seed = 1337                   # the first
jobs = 0                      # trials at a time; 0: one a CPU core, one on a GPU
# --- search: the first phase alone ---
trials = 100
sampler = 'auto'              # 'auto' | 'tpe' | 'sobol': auto is tpe where optuna is installed
apply = ''                    # a config in which to show what the best values become
# --- transfer: loss on a grid of powers of two, at each width or depth ---
widths = '64,128,256,512'
depths = ''                   # such as '2,4,8,16', at the config's width, instead
grow = 'heads'                # 'heads' | 'head_size': what makes a model wide; heads are of 64
grid = 'lr'                   # 'lr' | 'embedding_lr' | 'init_std' | 'output_scale'
exponents = ''                # first and last power of two; '': as in GRIDS
rules = ''                    # names in model.mup_table; '': 'textbook,sp'
optimizer = 'adamw'           # 'adamw' | 'muon': muon in the second phase, from one first phase a
                              # width; rules are then of muon_lr_scaling, '1/m,1/sqrt(m),const'
seeds = 3                     # at each optimum, its neighbours and what it is compared with

# grid -> train.py's knobs that take the value, default exponents
GRIDS = {'lr': (('learning_rate', 'embedding_lr'), '-12,-4'),
         'embedding_lr': (('embedding_lr',), '-12,-4'),
         'init_std': (('init_std',), '-8,0'),
         'output_scale': (('output_scale',), '-4,4')}

# knob -> lowest, highest, whether its logarithm is uniform: as in the paper's search
RANGES = {'learning_rate': (2**-15, 2**-3, True), 'embedding_lr': (2**-15, 2**-3, True),
          'init_std': (0.001, 0.2, False), 'input_scale': (10.0, 20.0, False),
          'output_scale': (0.5, 2.0, False), 'residual_scale': (1.0, 8.0, False)}


# --------------------------------------------------------------------------------------------------
# What both commands need: the config's knobs, its data, running trials, the file of the result

def base_knobs():
    """train.py's knobs in the config, with the flags that every trial has."""
    return train_knobs(config, *shlex.split(flags))


@functools.cache
def made_of():
    """Hash of what decides a trial's result beside its flags."""
    return hash_of(base_knobs())


def prepare_data():
    """Make the config's data sets, unless they exist, before trials side by side would do so."""
    prepare_data_of(base_knobs())


def results(wanted, stable_runs):
    """The entries of the wanted trials (lists of flags), which are run unless they have been.

    stable_runs: {folder: trial that makes the checkpoint in it}, for trials that start from one.
    """
    file = Path('out/sweep', name, 'trials.jsonl')
    return results_of(wanted, file, made_of(), jobs, stable_runs)


def write_result(file, result):
    """Write a sweep's result as JSON, with what made it."""
    result |= {'kind': command, 'command': shlex.join(['python', '-m', 'lab.sweep', *sys.argv[1:]]),
               'config': config, 'made_of': made_of(), 'torch': torch.__version__}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = to_json(result).encode()
    replace_file(file, lambda f: f.write(text))


def first_phase(n_steps):
    """Flags that leave the config's first phase alone, with n_steps (0: its own number)."""
    first, *others = base_knobs()['phases']
    chosen = []
    if n_steps:
        chosen.append(f'--phases.{first["name"]}.steps={n_steps}')
        chosen.append(f'--phases.{first["name"]}.warmup={n_steps // 10}')
    return chosen + [f'--phases.{phase["name"]}.steps=0' for phase in others]


# --------------------------------------------------------------------------------------------------
# transfer: the flags of a point of the grid

def base_flags(size):
    """train.py's flags for a width or, with depths, a depth."""
    base = [config, *shlex.split(flags)]
    if steps:
        total = sum(phase['steps'] for phase in base_knobs()['phases'])
        base.append(f'--steps_scale={steps / total!r}')
    dimensions = shape(size, 'depth' if depths else grow)
    return base + [f'--{key}={value}' for key, value in dimensions.items()]


def stable_trial(size):
    """(folder, flags) of the run of the first phase from which Muon goes on."""
    trial = [*base_flags(size), *first_phase(0), f'--seed={seed}']
    sha = hashlib.sha256(repr([made_of(), *trial]).encode()).hexdigest()[:8]
    folder = f'out/sweep/{name}/{size}-{sha}'
    return folder, [*trial, f'--out_dir={folder}', '--resume']


def rule_flag(rule):
    """train.py's flag for a name in `rules`."""
    if optimizer == 'muon':
        return f'--muon_lr_scaling={rule}'
    if rule in ('textbook', 'authors', 'sp'):
        return f'--mup_rules={rule}'
    return f'--mup_break={rule}'


def trial_flags(rule, size, exponent, trial_seed):
    """train.py's flags for a point of the grid."""
    trial = [*base_flags(size), rule_flag(rule), f'--seed={trial_seed}']
    value = 2.0**exponent
    if optimizer == 'muon':
        folder, _ = stable_trial(size)
        return [*trial, f'--init_from={folder}', f'--learning_rate={value!r}']
    for phase in base_knobs()['phases']:
        if phase['optimizer'] != 'adamw':
            trial.append(f'--phases.{phase["name"]}.optimizer=adamw')
    knobs, _ = GRIDS[grid]
    return trial + [f'--{knob}={value!r}' for knob in knobs]


# --------------------------------------------------------------------------------------------------
# transfer: optima of the grid, and what it costs to carry over the smallest model's

def losses_by_exponent(entries, rule, size):
    """{exponent: {seed: loss}} of one rule and size, both in order; a loss is None if it diverged.

    entries: {(rule, size, exponent, seed): entry}.
    """
    losses = {}
    for key in sorted(entries):
        if key[:2] == (rule, size):
            _, _, exponent, trial_seed = key
            losses.setdefault(exponent, {})[trial_seed] = entries[key]['loss']
    return losses


def best_exponent(losses):
    """The exponent with the lowest mean loss, among those that were tried with most seeds."""
    def mean(exponent):
        return statistics.fmean(math.inf if x is None else x for x in losses[exponent].values())

    most_seeds = max(map(len, losses.values()))
    return min((e for e in losses if len(losses[e]) == most_seeds), key=mean)


def prices(carried, best):
    """What the carried value costs, for each seed that has both: loss(carried) - loss(best).

    Both are {seed: loss}. In nats; None where one of them diverged.
    """
    result = []
    for trial_seed in carried:
        if trial_seed not in best:
            continue
        pair = carried[trial_seed], best[trial_seed]
        result.append(None if None in pair else round(pair[0] - pair[1], 5))
    return result


def mean_curve(runs):
    """Losses of several seeds, step by step -> their mean over the seeds and 20 steps."""
    if not runs or len(runs[0]) < 20:
        return []
    means = np.convolve(np.mean(runs, 0), np.ones(20) / 20, 'valid')
    return [round(x, 4) for x in means]


def summarise(entries, names, sizes):
    """Summary of {(rule, size, exponent, seed): entry}, as a dict for JSON and plot.py.

    A rule's `carried` exponent is the smallest model's best one. A size's `price` is what it loses
    by that: loss(carried) - loss(own best), in nats, a figure for each seed. Its `curve` is the
    loss over the steps with the carried value.
    """
    summary = {}
    for rule in names:
        losses = {size: losses_by_exponent(entries, rule, size) for size in sizes}
        carried = best_exponent(losses[sizes[0]])
        of_sizes = {}
        for size in sizes:
            best = best_exponent(losses[size])
            runs = [entries[rule, size, carried, s] for s in losses[size][carried]]
            of_sizes[size] = {
                'best': best,
                'losses': {e: list(by_seed.values()) for e, by_seed in losses[size].items()},
                'price': prices(losses[size][carried], losses[size][best]),
                'curve': mean_curve([run['losses'] for run in runs if run['loss'] is not None])}
        summary[rule] = {'carried': carried, 'sizes': of_sizes}
    return summary


def print_transfer(summary, axis, warmup):
    """Print a table for each rule; warmup is the number of steps left out of the comparison."""
    for rule, of_rule in summary.items():
        carried, of_sizes = of_rule['carried'], of_rule['sizes']
        grid_points = list(next(iter(of_sizes.values()))['losses'])
        print(f'\n{rule}: loss of seed {seed} by log2 of {grid}, * the best of all seeds; price: '
              f'loss with 2^{carried} less the best, mean and range over seeds')
        print(f'{axis:>6}', *(f'{e:>6}' for e in grid_points), '  best  price')
        for size, row in of_sizes.items():
            print_size(size, row, grid_points)
        print_ranking([row['curve'][warmup:] for row in of_sizes.values()], carried, axis)


def print_size(size, row, grid_points):
    """Print a size's row: losses of the first seed, the best exponent, the price of carrying."""
    cells = []
    for exponent, losses in row['losses'].items():
        loss = 'nan' if losses[0] is None else f'{losses[0]:.3f}'
        mark = '*' if exponent == row['best'] else ' '
        cells.append(f'{loss + mark:>6}')
    prices_known = [x for x in row['price'] if x is not None]
    price = 'diverges'
    if prices_known:
        low, high = min(prices_known), max(prices_known)
        price = f'{statistics.fmean(prices_known):.4f} ({low:.4f} to {high:.4f})'
    edge = ', at the edge' if row['best'] in (grid_points[0], grid_points[-1]) else ''
    print(f'{size:>6}', *cells, f'  2^{row["best"]:<4}{price}{edge}')


def print_ranking(curves, carried, axis):
    """Print in how many of the steps each size's loss is lower than that of the one before."""
    if len(curves) < 2 or not all(curves):                       # a curve is empty: all diverged
        return
    better = [np.mean(np.array(larger) < np.array(smaller))
              for smaller, larger in itertools.pairwise(curves)]
    print(f'at 2^{carried}, share of the steps after warmup at which each {axis} '
          f'has lower loss than the one before: {", ".join(f"{x:.0%}" for x in better)}')


# --------------------------------------------------------------------------------------------------
# transfer: which points of the grid are run

def exponent_range():
    """(lowest, highest) exponent of the grid."""
    text = exponents or GRIDS[grid][1]
    if re.fullmatch(r'-?\d+,-?\d+', text):
        low, high = (int(exponent) for exponent in text.split(','))
        if -60 <= low <= high <= 60:
            return low, high
    fail(f'exponents={text!r} should be the lowest and the highest power of two, as -12,-4')


def sizes_of_models():
    """The depths, or else the widths, in order."""
    if depths:
        return sorted(int_list('depths', depths))
    return sorted(int_list('widths', widths))


def check_transfer(names, sizes):
    """End the program in one line where the knobs of a transfer exclude each other."""
    phases = base_knobs()['phases']
    if depths and grow != 'heads':
        fail('depths and grow: models can grow in one way at a time')
    if optimizer == 'muon':
        then_muon = all(phase['optimizer'] == 'muon' for phase in phases[1:])
        if grid != 'lr' or len(phases) == 1 or not then_muon:
            fail("optimizer='muon' needs grid='lr', and a config whose later phases are all Muon's")
    if '' in names:
        fail(f'rules={rules!r} should be names, as textbook,sp')
    if 'sp' in names and grid == 'embedding_lr':
        fail("rules: 'sp' has no embedding_lr to try")
    for rule in names:
        for size in sizes:                                       # ValueError: no such model
            model_config(train_knobs(*base_flags(size), rule_flag(rule)))


def deciding_exponents(of_rule, size, first, last):
    """The exponents of which a size needs all seeds: its best, the neighbours, the carried one."""
    best = of_rule['sizes'][size]['best']
    return {of_rule['carried'], *range(max(first, best - 1), min(last, best + 1) + 1)}


def run_grid(names, sizes, first, last):
    """Run the grid -> {(rule, size, exponent, seed): entry}.

    One seed runs everywhere. The others run about each optimum, and where the smallest model's
    falls. As they can move an optimum, this is repeated until no point is left to run.
    """
    stable_runs = dict(stable_trial(size) for size in sizes) if optimizer == 'muon' else {}
    entries = {}

    def run(points):
        points = sorted(dict.fromkeys(points), key=lambda point: -point[1])    # the longest first
        trials_of_points = [trial_flags(*point) for point in points]
        entries.update(zip(points, results(trials_of_points, stable_runs)))

    exponents_tried = range(first, last + 1)
    run(itertools.product(names, sizes, exponents_tried, [seed]))
    n_before = 0
    while n_before < len(entries):
        n_before = len(entries)
        summary = summarise(entries, names, sizes)
        points = list(entries)
        for rule, size in itertools.product(names, sizes):
            deciding = deciding_exponents(summary[rule], size, first, last)
            points += itertools.product([rule], [size], deciding, range(seed, seed + seeds))
        run(points)
    return entries


def transfer(folder):
    """Run the grid, print its tables and write folder/transfer.json."""
    names, (first, last) = rules.split(','), exponent_range()
    sizes = sizes_of_models()
    check_transfer(names, sizes)
    prepare_data()
    began = time.time()
    entries = run_grid(names, sizes, first, last)
    summary = summarise(entries, names, sizes)

    phases = base_knobs()['phases']
    total = sum(phase['steps'] for phase in phases)
    warmup = phases[0].get('warmup', 0) * (steps or total) // total
    axis = 'depth' if depths else 'width'
    print_transfer(summary, axis, 0 if optimizer == 'muon' else warmup)
    hours = round(sum(entry['seconds'] for entry in entries.values()) / 3600, 2)
    write_result(folder / 'transfer.json', {
        'grid': grid, 'axis': axis, 'optimizer': optimizer, 'warmup': warmup, 'seeds': seeds,
        'trials': len(entries), 'hours_of_a_core': hours, 'rules': summary})
    minutes = (time.time() - began) / 60
    print(f'\n{len(entries)} trials, {hours} hours of a core, {minutes:.0f} minutes now; '
          f'{folder}/transfer.json')


# --------------------------------------------------------------------------------------------------
# search: the paper's six hyperparameters, on the proxy

def make_study():
    """optuna's study by a tree-structured Parzen estimator, as in the paper; None: Sobol points."""
    if sampler == 'sobol':
        return None
    try:
        import optuna
    except ImportError:
        if sampler == 'auto':
            return None
        fail('pip install optuna, or --sampler=sobol')
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True))


def ask_study(asked):
    """{knob: value} that optuna suggests for one of its trials."""
    return {key: asked.suggest_float(key, low, high, log=log)
            for key, (low, high, log) in RANGES.items()}


def from_sobol(point):
    """{knob: value} for a point of the unit cube: where it lies in each of RANGES."""
    values = {}
    for u, (key, (low, high, log)) in zip(point, RANGES.items()):
        values[key] = low * (high / low)**u if log else low + u * (high - low)
    return values


def search_trial(n_steps, values):
    """train.py's flags for a trial of a search."""
    return [config, *shlex.split(flags), *first_phase(n_steps), f'--seed={seed}',
            *(f'--{key}={value!r}' for key, value in values.items())]


def run_search(n_steps):
    """Run all trials, `jobs` a round -> [(loss or None, {knob: value})] in the order of the rounds.

    Both samplers follow from the seed, and tpe from jobs, too: it knows the losses of the rounds
    before. So a resumed search asks for the same trials.
    """
    study, tried = make_study(), []
    points = torch.quasirandom.SobolEngine(len(RANGES), scramble=True, seed=seed).draw(trials)
    for i in tqdm(range(0, trials, jobs), unit='round', disable=None):
        round_points = points[i:i + jobs].tolist()
        if study:
            asked = [study.ask() for _ in round_points]
            settings = [ask_study(trial) for trial in asked]
        else:
            settings = [from_sobol(point) for point in round_points]
        settings = [{key: float(f'{value:.4g}') for key, value in values.items()}
                    for values in settings]
        entries = results([search_trial(n_steps, values) for values in settings], stable_runs={})
        losses = [entry['loss'] for entry in entries]
        if study:
            for trial, loss in zip(asked, losses):
                study.tell(trial, math.inf if loss is None else loss)
        tried += zip(losses, settings)
    return tried


def search(folder):
    """Run a search, print its best values and write folder/search.json."""
    base = base_knobs()
    phase = base['phases'][0]
    with torch.device('meta'):
        N = Xmodel(model_config(base)).num_params(embedding=False)
    batch_tokens = phase['batch'] * phase['block_size']
    n_steps = steps or math.ceil(10 * N / batch_tokens)
    if apply:
        target = train_knobs(apply)
        lines_before = mup_lines(target)                         # ValueError: no such model
    prepare_data()
    print(f'{trials} trials of {n_steps} steps, {n_steps * batch_tokens / N:.2g} tokens a parameter'
          f' outside the embedding, {jobs} at a time')

    tried = run_search(n_steps)
    tried.sort(key=lambda trial: math.inf if trial[0] is None else trial[0])
    loss, best = tried[0]
    if loss is None:
        fail(f'all {trials} trials diverged: out/sweep/{name}/trials.jsonl')
    next_losses = ', '.join(f'{x:.3f}' for x, _ in tried[1:4] if x is not None)
    print(f'\n# the best of {trials} trials of {n_steps} steps of {config}: loss {loss}; '
          f'the next {next_losses}')
    print(*(f'{key} = {value!r}' for key, value in best.items()), sep='\n')
    for key in at_the_edge(best):
        low, high, _ = RANGES[key]
        print(f'# {key} is at the edge of its range, {low:.3g} to {high:.3g}: '
              'a better value may lie outside')
    write_result(folder / 'search.json', {
        'loss': loss, 'best': best, 'steps': n_steps, 'trials': tried, 'sampler': sampler,
        'seed': seed, 'jobs': jobs})
    if apply:
        lines_after = mup_lines(target | best)
        print(*unified_diff(lines_before, lines_after, apply, f'{apply} with the best', n=99,
                            lineterm=''), sep='\n')


def at_the_edge(values):
    """Names of the searched knobs that lie in the outermost twentieths of their range."""
    for key, (low, high, log) in RANGES.items():
        value = values[key]
        if log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        if not 0.05 < (value - low) / (high - low) < 0.95:
            yield key


def mup_lines(knobs):
    """Lines to compare: the searched knobs, and what model.mup_table makes of them at this size."""
    c = model_config(knobs)
    lines = [f'{key} = {knobs[key]!r}' for key in RANGES]
    lines.append(f'# at n_embd={c.n_embd}, n_layer={c.n_layer}, by mup_rules={c.mup_rules!r}:')
    for role, rule in mup_table(c).items():
        cells = {'init std': rule.init_std, 'multiplier': rule.multiplier}
        if rule.lr_knob is not None:
            cells['lr'] = knobs[rule.lr_knob] * rule.lr_mult
        if rule.muon_lr_mult is not None:
            cells["Muon's lr"] = knobs[rule.lr_knob] * rule.muon_lr_mult
        shown = [f' {key} {value:.4g}' for key, value in cells.items() if value is not None]
        lines.append(f'# {role:10}' + ','.join(shown))
    return lines


# --------------------------------------------------------------------------------------------------

def default_name():
    """The name of a sweep: the command, and what differs from its usual settings."""
    parts = [command]
    if optimizer != 'adamw':
        parts.append(optimizer)
    if depths:
        parts.append('depth')
    if grow != 'heads':
        parts.append(grow)
    if grid != 'lr':
        parts.append(grid)
    return '-'.join(parts)


def fill_in_defaults():
    """Set the knobs whose default depends on other knobs, or on the machine."""
    global jobs, name, config, rules
    if not jobs:
        jobs = 1 if torch.cuda.is_available() else os.cpu_count()
    if not name:
        name = default_name()
    if not config:
        config = 'config/proxy20m.py' if command == 'search' else 'config/transfer.py'
    if not rules:
        rules = '1/m,1/sqrt(m),const' if optimizer == 'muon' else 'textbook,sp'


def main():
    if command not in ('search', 'transfer'):
        fail(f'{command!r} should be search or transfer: python -m lab.sweep --help')
    check_range(globals(), 0, 2**32, 'steps', 'seed', 'jobs')
    check_range(globals(), 1, 2**63, 'trials', 'seeds')
    fill_in_defaults()
    if not re.fullmatch(r'\w[\w.()-]*', name):
        fail(f'name={name!r} should be that of a folder under results/')
    try:
        check_flags(flags)
    except ValueError as e:
        fail(f'flags={flags!r}: {e}')
    folder = Path('results', name)
    try:
        if command == 'search':
            search(folder)
        else:
            transfer(folder)
    except ValueError as e:
        fail(e)


if __name__ == '__main__':
    configure(globals(), positional=['command'])
    with ending_in_one_line(name, '; the same command goes on from the trials that have finished'):
        main()
