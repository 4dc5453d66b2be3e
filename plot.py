"""Draw the loss of a run, or of several over one another, from what train.py logs.

    python plot.py                                       # the newest run under out/
    python plot.py out/proxy20m                          # writes out/proxy20m/loss.png
    python plot.py out/adamw out/muon --png=decay.png    # each run in a colour of its own
"""
import sys
from itertools import groupby
from pathlib import Path

import numpy as np

from checkpoint import read_log
from configurator import configure, fail

png = ''                      # file to write; '': loss.png in the first run's folder

# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that paper swallows
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = 'osD^v'


def plot_loss(runs, png):
    """Write the picture: loss over learning rate, against tokens; the first run's phases."""
    try:
        import matplotlib
    except ImportError:
        fail('pip install matplotlib')
    matplotlib.use('Agg')                                        # draws without a screen
    import matplotlib.pyplot as plt
    logs = [read_log(run) for run in runs]
    most = max(log[-1]['tokens'] for log in logs)
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 5.5), layout='constrained',
                                         height_ratios=(4, 1))
    for i, (run, log) in enumerate(zip(runs, logs)):
        x, loss, lr = (np.array([e[key] for e in log]) for key in ('tokens', 'loss', 'lr'))
        window = np.ones(len(x) // 120 * 2 + 1)                  # centred mean, shorter at the ends
        smooth = np.convolve(loss, window, 'same') / np.convolve(np.ones(len(x)), window, 'same')
        who, colour = f'{Path(run).name}: ' if len(runs) > 1 else '', COLOURS[i % 7]
        top.plot(x, loss, color=colour, alpha=0.25, linewidth=0.6)
        top.plot(x, smooth, color=colour, label=f'{who}training')
        bottom.plot(x, lr, color=colour)
        for k, name in enumerate(dict.fromkeys(n for e in log for n in e.get('val_losses', ()))):
            points = [(e['tokens'], e['val_losses'][name]) for e in log
                      if name in e.get('val_losses', ())]
            top.plot(*zip(*points), MARKERS[k % 5] + '--', markersize=4, linewidth=1,
                     color=colour if who else COLOURS[(k + 1) % 7],
                     label=f'{who}validation, {name}')
    left = 0
    for k, (name, entries) in enumerate(groupby(logs[0], key=lambda e: e['phase'])):
        right = [e['tokens'] for e in entries][-1]
        for axes in (top, bottom):
            axes.axvspan(left, right, color='black', alpha=0.07 * (k % 2), linewidth=0)
        top.text((left + right) / 2, 1.01, name, transform=top.get_xaxis_transform(), ha='center',
                 rotation=90 if right - left < most / 16 else 0)
        left = right
    # the first steps come down from ln(vocab_size); to show them would flatten all the rest
    top.set(ylabel='loss (nats a token)',
            ylim=(None, max(e['loss'] for log in logs for e in log[len(log) // 25:])))
    top.legend(fontsize='small')
    bottom.set(xlabel='tokens', ylabel='learning rate', xlim=(0, most * 1.01), ylim=(0, None))
    bottom.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    try:
        figure.savefig(png := png or Path(runs[0], 'loss.png'), dpi=150)
    except (OSError, ValueError) as e:                           # no such folder, unknown ending
        fail(f'{png}: {e}')
    print(png)


if __name__ == '__main__':
    folders = [arg for arg in sys.argv[1:] if arg[:1] != '-']
    configure(globals(), [arg for arg in sys.argv[1:] if arg[:1] == '-'])
    newest = sorted(Path('out').glob('*/log.jsonl'), key=lambda log: log.stat().st_mtime)[-1:]
    if not folders and not newest:
        fail('there is no run under out/ yet; python train.py makes one')
    plot_loss(folders or [newest[0].parent], png)
