"""Every picture of the project, from what the other scripts log.

    python plot.py                                       # the newest run under out/
    python plot.py out/proxy20m                          # writes out/proxy20m/loss.png
    python plot.py out/adamw out/muon --png=decay.png    # runs over one another, against tokens
    python plot.py results/transfer                      # of sweep.py: transfer.png in that folder
    python plot.py results/coord_check                   # of coord_check.py: heads.png and so on
    python plot.py results/coord_check/textbook.json results/coord_check/sp.json --png=check.png
"""
import json
import math
import sys
from itertools import groupby
from pathlib import Path

import numpy as np

from checkpoint import read_log
from configurator import configure, fail

png = ''                      # file to write; '': a name by its kind, in the first one's folder

# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that paper swallows
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = 'osD^v'


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


def save(figure, png, default):
    """Write the figure to png or, where that is '', to the path `default`."""
    try:
        figure.savefig(png := png or default, dpi=150)
    except (OSError, ValueError) as e:                           # no such folder, unknown ending
        fail(f'{png}: {e}')
    print(png)


# --- runs of train.py ---

def plot_loss(runs, png, default):
    """Write the picture: loss over learning rate, against tokens; the first run's phases.

    Of several runs also the validation losses less those of the first, at its validations.
    """
    plt = pyplot()
    logs = [read_log(run) for run in runs]
    most = max(log[-1]['tokens'] for log in logs)
    vals = [np.array([(e['tokens'], e['val_loss']) for e in log if 'val_loss' in e]).reshape(-1, 2)
            for log in logs]
    several = len(runs) > 1 and all(map(len, vals))
    figure, (top, *middle, bottom) = plt.subplots(
        2 + several, sharex=True, figsize=(8, 5.5 + 1.5 * several), layout='constrained',
        height_ratios=(4, 2, 1) if several else (4, 1))
    for i, (run, log) in enumerate(zip(runs, logs)):
        x, loss, lr = (np.array([e[key] for e in log]) for key in ('tokens', 'loss', 'lr'))
        window = np.ones(len(x) // 120 * 2 + 1)                  # centred mean, shorter at the ends
        smooth = np.convolve(loss, window, 'same') / np.convolve(np.ones(len(x)), window, 'same')
        who, colour = f'{Path(run).name}: ' if len(runs) > 1 else '', COLOURS[i % 7]
        top.plot(x, loss, color=colour, alpha=0.25, linewidth=0.6)
        top.plot(x, smooth, color=colour, label=f'{who}training')
        bottom.plot(x, lr, color=colour)
        for axes in middle:
            axes.plot(vals[0][:, 0], np.interp(vals[0][:, 0], *vals[i].T, np.nan, np.nan)
                      - vals[0][:, 1], '.-', color=colour, linewidth=1)
            axes.set_ylabel(f'validation\nless {Path(runs[0]).name}', fontsize='small')
        for k, name in enumerate(dict.fromkeys(n for e in log for n in e.get('val_losses', ()))):
            points = [(e['tokens'], e['val_losses'][name]) for e in log
                      if name in e.get('val_losses', ())]
            top.plot(*zip(*points), MARKERS[k % 5] + '--', markersize=4, linewidth=1,
                     color=colour if who else COLOURS[(k + 1) % 7],
                     label=f'{who}validation, {name}')
    left = 0
    for k, (name, entries) in enumerate(groupby(logs[0], key=lambda e: e['phase'])):
        right = [e['tokens'] for e in entries][-1]
        for axes in (top, *middle, bottom):
            axes.axvspan(left, right, color='black', alpha=0.07 * (k % 2), linewidth=0)
        top.text((left + right) / 2, 1.01, name, transform=top.get_xaxis_transform(), ha='center',
                 rotation=90 if right - left < most / 16 else 0)
        left = right
    # the first steps come down from 20 or so; to show them would flatten all the rest
    top.set(ylabel='loss (nats a token)',
            ylim=(None, max(e['loss'] for log in logs for e in log[len(log) // 25:])))
    top.legend(fontsize='small', ncols=1 + (len(runs) > 3))
    bottom.set(xlabel='tokens', ylabel='learning rate', xlim=(0, most * 1.01), ylim=(0, None))
    bottom.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter())
    save(figure, png, default)


# --- results of sweep.py and coord_check.py ---

def read_results(path):
    """[(file, dict)] of the result files that path names: a .json, or those in a folder."""
    files = sorted(Path(path).glob('*.json')) if Path(path).is_dir() else [Path(path)]
    found = []
    for file in files:
        try:
            told = json.loads(file.read_text(encoding='utf-8'))
            if told['kind'] in ('transfer', 'coord_check'):
                found.append((file, told))
        except OSError as e:
            fail(f'{file}: {e.strerror}; give a run of train.py (out/RUN) or results/NAME')
        except (ValueError, KeyError, TypeError):
            fail(f'{file} is no result of sweep.py or coord_check.py')
    return found or fail(f'{path} holds no log.jsonl, and no transfer or check to draw')


def plot_transfer(told, png, default):
    """Loss against the grid, a line for each size, and below it the curves at the carried value."""
    rules, grid, axis = told['rules'], told['grid'], told['axis']
    figure, axes = pyplot().subplots(2, len(rules), figsize=(1.5 + 3.25 * len(rules), 6),
                                     sharey='row', squeeze=False, layout='constrained')
    seen = [x for rule in rules.values() for row in rule['sizes'].values()
            for losses in row['losses'].values() for x in losses if x is not None]
    lowest, highest = min(seen, default=0), max(seen, default=1)
    for (name, rule), top, bottom in zip(rules.items(), *axes):
        carried, sizes = rule['carried'], rule['sizes']
        for (size, row), colour, marker in zip(sizes.items(), shades(len(sizes)), MARKERS * 3):
            points = {int(e): [math.nan if x is None else x for x in losses] for e, losses in
                      sorted(row['losses'].items(), key=lambda p: int(p[0]))}
            # a line through the first seed, which all points have
            top.plot(list(points), [losses[0] for losses in points.values()], color=colour,
                     marker=marker, markersize=4, linewidth=1.2, label=f'{axis} {size}')
            for e, losses in points.items():
                top.plot([e] * len(losses[1:]), losses[1:], marker, color=colour, markersize=4,
                         alpha=0.4, markeredgewidth=0)
            top.plot(row['best'], points[row['best']][0], '*', color='#D55E00', markersize=11,
                     zorder=3, label='best of all seeds' if size == list(sizes)[-1] else None)
            bottom.plot(np.arange(len(row['curve'])) + 20, row['curve'], color=colour,
                        linewidth=1.2)
        price = [x for x in list(sizes.values())[-1]['price'] if x is not None]
        costs = f'costs {np.mean(price):.3f}' if price else 'diverges'
        top.axvline(carried, color='black', linewidth=0.8, linestyle=':',
                    label=f'best at {axis} {next(iter(sizes))}')
        top.set(title=f'{name}: $2^{{{carried}}}$ at {axis} {list(sizes)[-1]} {costs}',
                xlabel=f'log2 of {grid}', ylim=(lowest - 0.05, min(lowest + 1.3, highest + 0.05)))
        bottom.set(title=f'at {grid} = $2^{{{carried}}}$', xlabel='step',
                   ylim=(lowest - 0.05, lowest + 2))
        for panel in (top, bottom):
            panel.grid(alpha=0.25)
            panel.title.set_fontsize('medium')
    axes[0, 0].set(ylabel='loss at the end (nats a token);\nfaint: other seeds')
    axes[1, 0].set(ylabel='loss, mean of 20 steps')
    if axes[0, 0].get_legend_handles_labels()[0]:
        axes[0, 0].legend(fontsize='small', loc='upper center')
    save(figure, png, default)


def plot_coord_check(tables, png, default):
    """A row for each table, a panel for each quantity: size at init and change at each step."""
    quantities = [q for q in tables[0]['rows'] if q != 'norm gain'       # flat but for its own rule
                  or any(table['rows'][q]['holds'] is False for table in tables)]
    figure, axes = pyplot().subplots(
        len(tables), len(quantities), squeeze=False, sharey='col', layout='constrained',
        figsize=(max(6, 1.4 * len(quantities)), 0.6 + 1.6 * len(tables)))
    for table, panels in zip(tables, axes):
        for quantity, panel in zip(quantities, panels):
            row, sizes = table['rows'][quantity], table['sizes']
            size, change = (np.mean(row[kind], axis=1).T for kind in ('size', 'change'))
            panel.plot(sizes, size[0], 'k--', linewidth=1, label='size at init')
            for t, colour in enumerate(shades(len(change) - 1), 1):
                panel.plot(sizes, change[t], color=colour, linewidth=1.2, marker='.',
                           markersize=4, label='change, step 1' if t == 1 else f'{t}')
            panel.set(xscale='log', yscale='log')
            panel.set_xticks(sizes, sizes, fontsize=8)
            panel.minorticks_off()
            panel.tick_params(axis='y', labelsize=8)
            slopes = f'{row["size_slopes"][0]:+.2f}, {max(row["change_slopes"], key=abs):+.2f}'
            panel.set_title(f'{quantity}\n' * (table is tables[0]) + slopes
                            + ' ✗' * (row['holds'] is False), fontsize=9,
                            color='#D55E00' if row['holds'] is False else 'black')
            panel.set_xlabel('depth' if table['vary'] == 'depth' else 'width', fontsize=9)
        panels[0].set_ylabel(table['rules'].replace(', ', '\n') + '\nsize, change', fontsize=9)
    figure.suptitle('log-log slope of the size at init, and the steepest of the change; ✗: fails',
                    fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=6,
                  fontsize=9)
    save(figure, png, default)


def main(paths):
    if not paths:
        paths = sorted(Path('out').glob('*/log.jsonl'), key=lambda log: log.stat().st_mtime)[-1:]
        paths = [log.parent for log in paths] or fail(
            'there is no run under out/ yet; python train.py makes one')
    runs = [path for path in paths if Path(path, 'log.jsonl').exists() or not Path(path).exists()]
    results = [found for path in paths if path not in runs for found in read_results(path)]
    pictures = [(plot_loss, runs, Path(runs[0], 'loss.png'))] if runs else []
    try:
        for file, told in results:
            if told['kind'] == 'transfer':
                pictures.append((plot_transfer, told, file.with_suffix('.png')))
        checks = [(file, told) for file, told in results if told['kind'] == 'coord_check']
        for vary in dict.fromkeys(told['vary'] for _, told in checks):
            tables = [told for _, told in checks if told['vary'] == vary]
            pictures.append((plot_coord_check, tables, checks[0][0].with_name(f'{vary}.png')))
        if png and len(pictures) > 1:
            fail(f'png={png!r} is one file, and these are {len(pictures)} pictures')
        for draw, what, default in pictures:
            draw(what, png, default)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        fail(f'{", ".join(map(str, paths))}: results are damaged or of another version '
             f'({type(e).__name__}: {e})')


if __name__ == '__main__':
    folders = [arg for arg in sys.argv[1:] if arg[:1] != '-']
    configure(globals(), [arg for arg in sys.argv[1:] if arg[:1] == '-'])
    main(folders)
