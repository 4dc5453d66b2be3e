"""Every picture of the project, from what the other scripts log, and of the recipe itself.

    python -m lab.plot                                       # the newest run under out/
    python -m lab.plot out/proxy20m                          # writes out/proxy20m/loss.png
    python -m lab.plot out/adamw out/muon --png=decay.png    # runs over one another, by tokens
    python -m lab.plot results/transfer                      # of sweep.py: transfer.png there
    python -m lab.plot results/coord_check                   # of coord_check.py: heads.png and more
    python -m lab.plot results/coord_check/textbook.json results/coord_check/sp.json --png=check.png
    python -m lab.plot ablate                    # results of ablate.py: a picture of each
    python -m lab.plot schedule                  # the recipe of config/xmodel25.py over its steps
    python -m lab.plot schedule config/nano.py --png=nano.png    # takes train.py's flags, too
"""
import json
import math
import sys
import textwrap
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import train
from checkpoint import read_log
from configurator import configure, fail
from lab import ablate
from lab.ablate_page import COLUMNS, columns_of, is_share, measures_of
from model import mup_table
from start import check_knobs, complete_phases, model_config
from train import lr_at

png = ''                      # file to write; '': a name by its kind, in the first one's folder

# Okabe and Ito's colours, which the colour-blind tell apart, with a brown in place of the yellow,
# which paper swallows
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000',
           '#8C510A')
MARKERS = 'osD^v'
HIGHLIGHT = '#D55E00'


def pyplot():
    try:
        import matplotlib
    except ImportError:
        fail('pip install matplotlib')
    matplotlib.use('Agg')                                        # draws without a screen
    import matplotlib.pyplot as plt
    return plt


def shades(n):
    """n colours for what has an order, dark to light: of viridis, made for the colour-blind."""
    return pyplot().get_cmap('viridis')(np.linspace(0, 0.88, n))


def save(figure, png, default, dpi=150):
    """Write the figure to png or, where that is '', to the path `default`."""
    file = png or default
    try:
        figure.savefig(file, dpi=dpi)
    except (OSError, ValueError) as e:                           # no such folder, unknown ending
        fail(f'{file}: {e}')
    print(file)


# --------------------------------------------------------------------------------------------------
# Runs of train.py

def smooth(values):
    """Centred mean over about 1/60 of all values; the window is shorter at the ends."""
    window = np.ones(len(values) // 120 * 2 + 1)
    counts = np.convolve(np.ones(len(values)), window, 'same')
    return np.convolve(values, window, 'same') / counts


def mean_validations(log):
    """(n, 2): tokens and mean validation loss of a log's validations."""
    points = [(entry['tokens'], entry['val_loss']) for entry in log if 'val_loss' in entry]
    return np.array(points).reshape(-1, 2)


def validations_by_set(log):
    """{data set: [(tokens, validation loss)]} of a log."""
    points = {}
    for entry in log:
        for name, loss in entry.get('val_losses', {}).items():
            points.setdefault(name, []).append((entry['tokens'], loss))
    return points


def draw_phases(panels, log, last_token):
    """Shade every second phase of a log in all panels; write its name above the first one."""
    left = 0
    for k, (name, entries) in enumerate(groupby(log, key=lambda entry: entry['phase'])):
        right = [entry['tokens'] for entry in entries][-1]
        for panel in panels:
            panel.axvspan(left, right, color='black', alpha=0.07 * (k % 2), linewidth=0)
        narrow = right - left < last_token / 16
        panels[0].text((left + right) / 2, 1.01, name, ha='center', rotation=90 if narrow else 0,
                       transform=panels[0].get_xaxis_transform())
        left = right


def plot_loss(runs, png, default):
    """Loss over learning rate, against tokens, with the first run's phases.

    Of several runs also the validation losses less those of the first, at its validations.
    """
    plt = pyplot()
    logs = [read_log(run) for run in runs]
    last_token = max(log[-1]['tokens'] for log in logs)
    validations = [mean_validations(log) for log in logs]
    several = len(runs) > 1
    compared = several and all(map(len, validations))
    if compared:
        figure, panels = plt.subplots(3, sharex=True, figsize=(8, 7), layout='constrained',
                                      height_ratios=(4, 2, 1))
    else:
        figure, panels = plt.subplots(2, sharex=True, figsize=(8, 5.5), layout='constrained',
                                      height_ratios=(4, 1))
    top, bottom = panels[0], panels[-1]

    names = [Path(run).name for run in runs]
    if len(set(names)) < len(names):
        names = list(map(str, runs))
    for i, (name_of_run, log) in enumerate(zip(names, logs)):
        tokens, loss, lr = (np.array([entry[key] for entry in log])
                            for key in ('tokens', 'loss', 'lr'))
        prefix = f'{name_of_run}: ' if several else ''
        colour = COLOURS[i % len(COLOURS)]
        top.plot(tokens, loss, color=colour, alpha=0.25, linewidth=0.6)
        top.plot(tokens, smooth(loss), color=colour, label=f'{prefix}training')
        bottom.plot(tokens, lr, color=colour)
        if compared:
            first_tokens, first_losses = validations[0].T
            losses = np.interp(first_tokens, *validations[i].T, np.nan, np.nan)
            panels[1].plot(first_tokens, losses - first_losses, '.-', color=colour, linewidth=1)
        for k, (name, points) in enumerate(validations_by_set(log).items()):
            top.plot(*zip(*points), MARKERS[k % 5] + '--', markersize=4, linewidth=1,
                     color=colour if several else COLOURS[(k + 1) % len(COLOURS)],
                     label=f'{prefix}validation, {name}')

    draw_phases(panels, logs[0], last_token)
    # the first steps come down from 20 or so; to show them would flatten all the rest
    highest = max(entry['loss'] for log in logs for entry in log[len(log) // 25:])
    top.set(ylabel='loss (nats a token)', ylim=(None, highest))
    top.legend(fontsize='small', ncols=1 + (len(runs) > 3))
    if compared:
        panels[1].set_ylabel(f'validation\nless {Path(runs[0]).name}', fontsize='small')
    bottom.set(xlabel='tokens', ylabel='learning rate', xlim=(0, last_token * 1.01), ylim=(0, None))
    bottom.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter())
    save(figure, png, default)


# --------------------------------------------------------------------------------------------------
# Results of sweep.py, coord_check.py and ablate.py

def read_results(path):
    """[(file, dict)] of the result files that path names: a .json, or those in a folder."""
    files = sorted(Path(path).glob('*.json')) if Path(path).is_dir() else [Path(path)]
    results = []
    for file in files:
        try:
            result = json.loads(file.read_text(encoding='utf-8'))
            if result['kind'] in ('transfer', 'coord_check', 'ablation'):
                results.append((file, result))
        except (OSError, ValueError, KeyError, TypeError):
            fail(f'{file} is no result of sweep.py, coord_check.py or ablate.py')
    if not results:
        fail(f'{path} holds no log.jsonl, and no transfer, check or ablation to draw')
    return results


def without_none(losses):
    """Losses with NaN, which is not drawn, where a trial diverged."""
    return [math.nan if loss is None else loss for loss in losses]


def draw_grid(panel, rule, axis):
    """Loss against the grid, a line for each size through its first seed; other seeds are faint."""
    sizes = rule['sizes']
    largest = list(sizes)[-1]
    for (size, row), colour, marker in zip(sizes.items(), shades(len(sizes)), MARKERS * 3):
        points = {int(exponent): without_none(losses) for exponent, losses in row['losses'].items()}
        points = dict(sorted(points.items()))
        panel.plot(list(points), [losses[0] for losses in points.values()], color=colour,
                   marker=marker, markersize=4, linewidth=1.2, label=f'{axis} {size}')
        for exponent, losses in points.items():
            others = losses[1:]
            panel.plot([exponent] * len(others), others, marker, color=colour, markersize=4,
                       alpha=0.4, markeredgewidth=0)
        panel.plot(row['best'], points[row['best']][0], '*', color=HIGHLIGHT, markersize=11,
                   zorder=3, label='best of all seeds' if size == largest else None)
    panel.axvline(rule['carried'], color='black', linewidth=0.8, linestyle=':',
                  label=f'best at {axis} {next(iter(sizes))}')


def draw_curves(panel, sizes):
    """Loss over the steps at the carried value, a line for each size."""
    for row, colour in zip(sizes.values(), shades(len(sizes))):
        steps = np.arange(len(row['curve'])) + 20                # each is the mean of 20 steps
        panel.plot(steps, row['curve'], color=colour, linewidth=1.2)


def plot_transfer(result, png, default):
    """Loss against the grid, a column for each rule, over the curves at the carried value."""
    rules, grid, axis = result['rules'], result['grid'], result['axis']
    figure, panels = pyplot().subplots(2, len(rules), figsize=(1.5 + 3.25 * len(rules), 6),
                                       sharey='row', squeeze=False, layout='constrained')
    finite = [loss for rule in rules.values() for row in rule['sizes'].values()
              for losses in row['losses'].values() for loss in losses if loss is not None]
    lowest, highest = min(finite, default=0), max(finite, default=1)
    for (name, rule), top, bottom in zip(rules.items(), *panels):
        carried, sizes = rule['carried'], rule['sizes']
        draw_grid(top, rule, axis)
        draw_curves(bottom, sizes)
        largest = list(sizes)[-1]
        prices = [price for price in sizes[largest]['price'] if price is not None]
        costs = f'costs {np.mean(prices):.3f}' if prices else 'diverges'
        top.set(title=f'{name}: $2^{{{carried}}}$ at {axis} {largest} {costs}',
                xlabel=f'log2 of {grid}', ylim=(lowest - 0.05, min(lowest + 1.3, highest + 0.05)))
        bottom.set(title=f'at {grid} = $2^{{{carried}}}$', xlabel='step',
                   ylim=(lowest - 0.05, lowest + 2))
        for panel in (top, bottom):
            panel.grid(alpha=0.25)
            panel.title.set_fontsize('medium')
    panels[0, 0].set(ylabel='loss at the end (nats a token);\nfaint: other seeds')
    panels[1, 0].set(ylabel='loss, mean of 20 steps')
    if panels[0, 0].get_legend_handles_labels()[0]:
        panels[0, 0].legend(fontsize='small', loc='upper center')
    save(figure, png, default)


def draw_quantity(panel, row, sizes):
    """Size at init, and change at each step, over the sizes of the models."""
    size = np.mean(row['size'], axis=1).T                        # (steps + 1, sizes), over seeds
    change = np.mean(row['change'], axis=1).T
    panel.plot(sizes, size[0], 'k--', linewidth=1, label='size at init')
    for step, colour in enumerate(shades(len(change) - 1), 1):
        panel.plot(sizes, change[step], color=colour, linewidth=1.2, marker='.', markersize=4,
                   label='change, step 1' if step == 1 else f'{step}')
    panel.set(xscale='log', yscale='log')
    panel.set_xticks(sizes, sizes, fontsize=8)
    panel.minorticks_off()
    panel.tick_params(axis='y', labelsize=8)


def plot_coord_check(tables, png, default):
    """A row for each table, a panel for each quantity: size at init and change at each step."""
    quantities = []
    for quantity in tables[0]['rows']:
        fails = any(table['rows'][quantity]['holds'] is False for table in tables)
        if quantity != 'norm gain' or fails:                     # flat but for its own rule
            quantities.append(quantity)
    figure, panels = pyplot().subplots(
        len(tables), len(quantities), squeeze=False, sharey='col', layout='constrained',
        figsize=(max(6, 1.4 * len(quantities)), 0.6 + 1.6 * len(tables)))
    for table, panels_of_table in zip(tables, panels):
        for quantity, panel in zip(quantities, panels_of_table):
            row = table['rows'][quantity]
            draw_quantity(panel, row, table['sizes'])
            steepest = max(row['change_slopes'], key=abs)
            title = f'{row["size_slopes"][0]:+.2f}, {steepest:+.2f}'
            if table is tables[0]:
                title = f'{quantity}\n{title}'
            if row['holds'] is False:
                panel.set_title(f'{title} ✗', fontsize=9, color=HIGHLIGHT)
            else:
                panel.set_title(title, fontsize=9, color='black')
            panel.set_xlabel('depth' if table['vary'] == 'depth' else 'width', fontsize=9)
        rules = table['rules'].replace(', ', '\n')
        panels_of_table[0].set_ylabel(f'{rules}\nsize, change', fontsize=9)
    figure.suptitle('log-log slope of the size at init, and the steepest of the change; ✗: fails',
                    fontsize=9)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=6,
                  fontsize=9)
    save(figure, png, default)


def draw_differences(panel, key, arms, tables):
    """Each arm less the first in one measure, with its 95 % interval, over the comparisons."""
    for i, arm in enumerate(arms, 1):                            # the colours of plot_measures
        found = [table.get(arm, {}).get('difference', {}).get(key, [math.nan] * 3)
                 for table in tables.values()]
        mean, _, half = np.transpose(found) * (100 if is_share(key) else 1)
        beside = (i - (len(arms) + 1) / 2) * 0.1                 # so that none hides another
        panel.errorbar(np.arange(len(tables)) + beside, mean, half, color=COLOURS[i % len(COLOURS)],
                       marker=MARKERS[i % 5], markersize=5, linewidth=1, capsize=3, label=arm)
    panel.axhline(0, color='black', linewidth=0.8)
    names = [textwrap.fill(name, 14) for name in tables]
    panel.set_xticks(range(len(tables)), names, fontsize=8)
    panel.set_xlim(-0.5, len(tables) - 0.5)
    panel.grid(axis='y', alpha=0.25)


def plot_ablation(result, png, default):
    """Each arm less the first; comparisons with the same first arm are points of the same lines."""
    rows = {}                                          # first arm -> {comparison: its table}
    for name, table in result['comparisons'].items():
        rows.setdefault(next(iter(table)), {})[name] = table
    keys = columns_of(result['comparisons'].values())
    figure, panels = pyplot().subplots(len(rows), max(1, len(keys)), squeeze=False,
                                       figsize=(1 + 4 * max(1, len(keys)), 3.5 * len(rows)),
                                       layout='constrained')
    for (first, tables), line in zip(rows.items(), panels):
        longest_first = sorted(tables.values(), key=len, reverse=True)
        arms = list(dict.fromkeys(arm for table in longest_first for arm in table))
        for key, panel in zip(keys, line):
            draw_differences(panel, key, arms[1:], tables)
            points = ' (points)' if is_share(key) else ''
            panel.set_title(f'{COLUMNS[key]}, less that of: {first}{points}', fontsize=9)
        line[0].legend(fontsize='x-small')
    save(figure, png, default)


def plot_measures(table, png, default):
    """A panel for each measure on a comparison's checkpoints: means with their intervals."""
    keys = measures_of(table)
    columns = min(4, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure, panels = pyplot().subplots(lines, columns, squeeze=False, layout='constrained',
                                       figsize=(3.2 * columns, 0.6 + 2 * lines))
    for panel in panels.flat[len(keys):]:
        panel.axis('off')
    for key, panel in zip(keys, panels.flat):
        for i, (arm, row) in enumerate(table.items()):
            found = row.get('mean', {}).get(key, [math.nan] * 3)
            mean, _, half = np.array(found) * (100 if is_share(key) else 1)
            panel.errorbar([i], [mean], [half], color=COLOURS[i % len(COLOURS)],
                           marker=MARKERS[i % 5], markersize=5, capsize=3, label=arm)
        unit = ' (%)' if is_share(key) else ''
        panel.set_title(textwrap.fill(key + unit, 36), fontsize=8)
        panel.set_xticks([])
        panel.grid(axis='y', alpha=0.25)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3,
                  fontsize=9)
    save(figure, png, default)


# --------------------------------------------------------------------------------------------------
# The recipe: learning rates, optimizers, batches and data over the steps of a config

OPTIMIZERS = {'adamw': ('AdamW', '#EAF2F8'),                     # name, colour of the background
              'muon': ('Muon; the embedding stays with AdamW', '#FBEEE2')}
LEAST_SHARE = 0.02                                # of a mixture; what is below is drawn as one
OTHER = 'others, below 2%'
WARMUP_WIDTH = 0.1                                # at least so much of a phase's width


def first_steps(phases):
    """The number of each phase's first step and, at the end, of all steps."""
    return [0, *np.cumsum([phase['steps'] for phase in phases]).tolist()]


def step_scale(phases):
    """(forward, inverse) of a scale on which all phases are equally wide, and warmups can be seen.

    Phases differ too much for one scale: 530 000 stable steps, 10 000 of long context.
    """
    steps, positions = [0], [0.0]                                # steps and where they are drawn
    for i, (phase, first) in enumerate(zip(phases, first_steps(phases))):
        warmup = phase['warmup']
        if 0 < warmup < phase['steps']:
            steps.append(first + warmup)
            positions.append(i + max(WARMUP_WIDTH, warmup / phase['steps']))
        steps.append(first + phase['steps'])
        positions.append(i + 1.0)
    return lambda x: np.interp(x, steps, positions), lambda x: np.interp(x, positions, steps)


def steps_to_draw(phase, first):
    """Steps of a phase at which to draw its learning rates: some 200 of the warmup, as of the rest.
    """
    last = phase['steps'] - 1
    warmup = min(phase['warmup'], last)
    chosen = np.concatenate((np.linspace(0, warmup, 200), np.linspace(warmup, last, 200)))
    return (first + np.unique(chosen.round().astype(int))).tolist()


def learning_rates(phases, table):
    """(steps, {'matrices': lr, 'embedding': lr}) after µP's factors; three lists of one length."""
    all_steps, rates = [], {'matrices': [], 'embedding': []}
    for phase, first in zip(phases, first_steps(phases)):
        for step in steps_to_draw(phase, first):
            lr, embedding_lr = lr_at(step)
            knobs = {'learning_rate': lr, 'embedding_lr': embedding_lr}
            matrix, embedding = table['matrix'], table['embedding']
            factor = matrix.muon_lr_mult if phase['optimizer'] == 'muon' else matrix.lr_mult
            all_steps.append(step)
            rates['matrices'].append(knobs[matrix.lr_knob] * factor)
            rates['embedding'].append(knobs[embedding.lr_knob] * embedding.lr_mult)
    return all_steps, rates


def large_shares(phase):
    """{data set: share} of a phase's mixture, with those below LEAST_SHARE added up as OTHER."""
    total = sum(phase['data'].values())
    shares = {name: weight / total for name, weight in phase['data'].items()}
    large = {name: share for name, share in shares.items() if share >= LEAST_SHARE}
    if len(large) < len(shares):
        large[OTHER] = 1 - sum(large.values())
    return large


def short(number):
    """A number in three digits with k, M, B or T, such as 270k or 1.78M."""
    for unit, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if number >= unit:
            return f'{number / unit:.3g}{letter}'
    return f'{number:.3g}'


def draw_steps(panels, phases, scale):
    """The scale of steps in all panels, lines between phases, their names, the warmups."""
    _, inverse = scale
    first = first_steps(phases)
    top, bottom = panels[0], panels[-1]
    for panel in panels:
        panel.set_xscale('function', functions=scale)
        panel.set(xlim=(0, first[-1]))
        panel.set_xticks(first, [])
        for step in first[1:-1]:
            panel.axvline(step, color='black', linewidth=0.8)
    bottom.set_xticks(first, [f'{step:,}' for step in first])
    bottom.set_xlabel('step (every phase is drawn equally wide)')
    for i, phase in enumerate(phases):
        tokens = phase['steps'] * phase['batch'] * phase['block_size']
        title = f'{phase["name"]}\n{short(phase["steps"])} steps, {short(tokens)} tokens'
        top.text(inverse(i + 0.5), 1.02, title, ha='center', transform=top.get_xaxis_transform())
        if phase['warmup']:
            end = first[i] + phase['warmup']
            top.axvline(end, color='black', linewidth=0.8, linestyle=':')
            top.annotate(f'warmup:\n{short(phase["warmup"])} steps', (end, 0), xytext=(4, 5),
                         xycoords=('data', 'axes fraction'), textcoords='offset points')


def draw_optimizers(panel, phases, inverse):
    """Bands for the optimizer in force, each with its name."""
    first = first_steps(phases)
    for kind, group in groupby(range(len(phases)), key=lambda i: phases[i]['optimizer']):
        numbers = list(group)                                    # of the band's phases
        begin, end = numbers[0], numbers[-1] + 1
        name, colour = OPTIMIZERS[kind]
        panel.axvspan(first[begin], first[end], color=colour, linewidth=0, zorder=0)
        panel.text(inverse((begin + end) / 2), 0.96, name, ha='center', va='top', weight='bold',
                   transform=panel.get_xaxis_transform(),
                   bbox={'facecolor': colour, 'linewidth': 0, 'pad': 1})   # over the phases' lines


def new_peaks(phases, rates):
    """[(step, learning rate, names)] where a phase's peak differs from that of the phase before.

    rates: {name: {step: learning rate}}. names are of all lines with this peak there.
    """
    peaks, last_peaks = [], dict.fromkeys(rates, 0.0)
    for phase, first in zip(phases, first_steps(phases)):
        step = first + min(phase['warmup'], phase['steps'] - 1)
        of_phase = {}                                            # text of a peak -> names
        for name, rate_at in rates.items():
            if not math.isclose(rate_at[step], last_peaks[name], rel_tol=0.01):
                of_phase.setdefault(f'{rate_at[step]:.3g}', []).append(name)
            last_peaks[name] = rate_at[step]
        peaks += [(step, float(text), names) for text, names in of_phase.items()]
    return peaks


def draw_rates(panel, phases, table):
    """Learning rates of matrices and embedding; a peak has its value where it is a new one."""
    steps, rates = learning_rates(phases, table)
    colours = dict(zip(rates, COLOURS))
    for name, values in rates.items():
        panel.plot(steps, values, color=colours[name], linewidth=1.8, label=name)
    rate_at = {name: dict(zip(steps, values)) for name, values in rates.items()}
    named = set()
    for step, peak, names in new_peaks(phases, rate_at):
        text = f'{peak:.3g}'
        if not named.issuperset(names):                          # later the colour will do
            text = f'{" and ".join(names)}: {text}'
        named.update(names)
        colour = colours[names[0]] if len(names) == 1 else 'black'
        panel.annotate(text, (step, peak), xytext=(4, 4), textcoords='offset points', color=colour,
                       bbox={'facecolor': 'white', 'alpha': 0.7, 'linewidth': 0, 'pad': 0.5})

    shown = []                                                   # without the warmups from 0
    for phase, first in zip(phases, first_steps(phases)):
        last = first + phase['steps'] - 1
        for step in (first, min(first + phase['warmup'], last), last):
            shown += [of_name[step] for of_name in rate_at.values() if of_name[step] > 0]
    panel.set_yscale('log', nonpositive='mask')
    panel.set(ylim=(min(shown, default=1e-6) / 1.5, max(shown, default=1) * 6),
              ylabel='learning rate')
    panel.grid(axis='y', alpha=0.25)


def draw_batches(panel, phases, inverse):
    """The batch of each phase as text, in rows x tokens and in tokens."""
    for i, phase in enumerate(phases):
        tokens = phase['batch'] * phase['block_size']
        text = f'{phase["batch"]} x {phase["block_size"]}\n{short(tokens)} tokens a step'
        panel.text(inverse(i + 0.5), 0.48, text, ha='center', va='center')
    panel.set(ylim=(0, 1), yticks=[])
    panel.set_ylabel('batch x\nlength', rotation=0, ha='right', va='center')


def draw_mixtures(panel, phases, inverse):
    """The mixture of each phase as a stacked bar, with those shares that have room for a number."""
    mixtures = [large_shares(phase) for phase in phases]
    names = list(dict.fromkeys(name for mixture in mixtures for name in mixture))
    if OTHER in names:
        names.remove(OTHER)
        names.append(OTHER)                                      # at the bottom
    first = first_steps(phases)
    for i, mixture in enumerate(mixtures):
        above = 0.0
        for k, name in enumerate(names):
            share = mixture.get(name, 0.0)
            colour = '#999999' if name == OTHER else COLOURS[k % len(COLOURS)]
            panel.bar(first[i], share, first[i + 1] - first[i], above, align='edge', color=colour,
                      alpha=0.6, edgecolor='white', linewidth=1, label=name if i == 0 else None)
            if share >= 0.06:
                panel.text(inverse(i + 0.5), above + share / 2, f'{share:.0%}', ha='center',
                           va='center')
            above += share
    panel.set(ylim=(1, 0), yticks=[])
    panel.set_ylabel('data', rotation=0, ha='right', va='center')


def plot_schedule(phases, table, png, default):
    """Learning rates and optimizers, batches, and data of each phase, over the steps.

    phases: as start.complete_phases leaves them; the module train has them and the other knobs, for
    lr_at. table: model.mup_table of their model.
    """
    plt = pyplot()
    with plt.rc_context({'font.size': 9}):
        figure, panels = plt.subplots(3, figsize=(9, 6), layout='constrained',
                                      height_ratios=(5, 0.8, 3))
        scale = step_scale(phases)
        _, inverse = scale
        draw_steps(panels, phases, scale)
        draw_optimizers(panels[0], phases, inverse)
        draw_rates(panels[0], phases, table)
        draw_batches(panels[1], phases, inverse)
        draw_mixtures(panels[2], phases, inverse)
        figure.legend(*panels[2].get_legend_handles_labels(), loc='outside lower center', ncols=7,
                      frameon=False, columnspacing=1.2, handlelength=1.2)
        save(figure, png, default, dpi=130)


# --------------------------------------------------------------------------------------------------

def main_schedule(argv):
    """Draw the recipe of a config; argv: a config file, --png=FILE, and flags of train.py."""
    own = [arg for arg in argv if arg.partition('=')[0] in ('--png', '--help', '-h')]
    configure(globals(), own)
    configure(vars(train), [arg for arg in argv if arg not in own], default='config/xmodel25.py')
    complete_phases(train.phases, train.steps_scale)
    check_knobs(SimpleNamespace(**vars(train)), 1)
    try:
        table = mup_table(model_config(vars(train)))
    except ValueError as e:
        fail(e)
    plot_schedule(train.phases, table, png, Path('results/schedule.png'))


def newest_run():
    """The folder under out/ whose log was written last."""
    logs = sorted(Path('out').glob('*/log.jsonl'), key=lambda log: log.stat().st_mtime)
    if not logs:
        fail('there is no run under out/ yet; python train.py makes one')
    return logs[-1].parent


def is_run(path):
    """Whether path is a run's folder, or nothing at all, of which read_log says so."""
    return Path(path, 'log.jsonl').exists() or not Path(path).exists()


def list_pictures(paths):
    """[(function, what it draws, default file)] for runs and results."""
    runs = [path for path in paths if is_run(path)]
    results = []
    for path in paths:
        if path not in runs:
            results += read_results(path)
    pictures = []
    if runs:
        pictures.append((plot_loss, runs, Path(runs[0], 'loss.png')))
    for file, result in results:
        if result['kind'] == 'transfer':
            pictures.append((plot_transfer, result, file.with_suffix('.png')))
        if result['kind'] == 'ablation':
            pictures.append((plot_ablation, result, file.with_suffix('.png')))
            for table in filter(measures_of, result['comparisons'].values()):
                pictures.append((plot_measures, table, file.with_suffix('.checkpoints.png')))
    checks = [(file, result) for file, result in results if result['kind'] == 'coord_check']
    for vary in dict.fromkeys(result['vary'] for _, result in checks):
        tables = [result for _, result in checks if result['vary'] == vary]
        first_file, _ = checks[0]
        pictures.append((plot_coord_check, tables, first_file.with_name(f'{vary}.png')))
    return pictures


def main(paths):
    """Draw the runs and results that paths name; of no paths, the newest run."""
    if not paths:
        paths = [newest_run()]
    elif paths == ['ablate']:
        paths = [ablate.RESULTS]
        if not Path(ablate.RESULTS).exists():
            fail(f'there is no {ablate.RESULTS} yet; python -m lab.ablate NAME makes it')
    try:
        pictures = list_pictures(paths)
        if png and len(pictures) > 1:
            fail(f'png={png!r} is one file, and these are {len(pictures)} pictures')
        for draw, what, default in pictures:
            draw(what, png, default)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        fail(f'{", ".join(map(str, paths))}: results are damaged or of another version '
             f'({type(e).__name__}: {e})')


if __name__ == '__main__':
    if sys.argv[1:2] == ['schedule']:
        main_schedule(sys.argv[2:])
    else:
        folders = [arg for arg in sys.argv[1:] if arg[:1] != '-']
        configure(globals(), [arg for arg in sys.argv[1:] if arg[:1] == '-'])
        main(folders)
