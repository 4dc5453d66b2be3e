"""Measure the paper's claims in small: runs that differ in one thing, with seeds and intervals.

    python -m lab.ablate decay_optimizer         # one experiment: hours of two CPU cores
    python -m lab.ablate decay_optimizer --quick # the same in a minute or two, to see that it works
    python -m lab.ablate sft_timing
    python -m lab.ablate schedule
    python -m lab.ablate recipe

An experiment is a list of comparisons, and a comparison a list of arms: runs of config/ablation.py
with other flags. The method is one for all.

- Runs of one seed read the same data in the same order. Where arms differ in the decay phase alone,
  they start from one checkpoint, at its onset.
- Each arm has its own learning rate: a power of two times the config's, of which both neighbours
  are worse. It is found with a seed that is not used for the result.
- The result has `seeds` seeds. Each arm is compared with the first one seed by seed: the mean of
  the differences, and its 95 % interval by Student's t. An interval about 0 says that this size
  cannot show a difference, or only one that is larger than the interval.

Measured are the losses of held-out text and held-out sums, in nats, and the share of held-out sums
that greedy decoding solves. A trial, which is one run, is not run again once it has its line in
out/ablate/trials.jsonl, unless code or text have changed: the same command goes on where it was
stopped. What was measured is in results/ablations/NAME.json, and as a table in NAME.md.
"""
import functools
import hashlib
import math
import os
import shlex
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import checkpoints, read_checkpoint, replace_file, to_json, write_checkpoint
from configurator import check_range, configure, fail
from data_prep import prepare_missing
from lab.trials import data_sets, hash_of, make_checkpoints, read_trials, results_of, train_knobs
from processes import ending_in_one_line
from start import model_config

command = ''                  # 'decay_optimizer', 'sft_timing', 'schedule' or 'recipe'
quick = False                 # tiny runs of two seeds, one comparison, no search for learning rates
seeds = 5                     # of the result
first_seed = 1337             # finds the learning rates; those of the result follow it
problems = 1000               # held-out sums to solve
flags = ''                    # more of train.py's flags for every run, as in a shell
jobs = 0                      # runs at a time; 0: one a CPU core, one on a GPU
folder = ''                   # of the results; '': results/ablations, of --quick out/ablate/quick

CONFIG = 'config/ablation.py'
QUICK = ('--data_dir=data/ablation-quick', '--sources.stdlib=stdlib --max_mb=0.3',
         '--sources.arith=arith --num_docs=1000', '--vocab_size=512', '--n_layer=1', '--n_head=1',
         '--n_embd=64', '--n_ffn=160', '--steps_scale=0.02', '--compile=False')
FILE = Path('out/ablate/trials.jsonl')
RESULTS = 'results/ablations'


class Arm(NamedTuple):
    """Runs that are alike but for seed and learning rate."""
    name: str
    flags: tuple = ()            # train.py's
    start: str = ''              # the checkpoint to begin with, see write_start; '': none
    guess: int = 0               # power of two, times the config's learning rate, to try first


class Comparison(NamedTuple):
    """Arms that are compared with the first of them."""
    name: str
    arms: list


# --------------------------------------------------------------------------------------------------
# Statistics

# 97.5 % quantiles of Student's t, for 1 to 9 degrees of freedom
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def interval(values):
    """(mean, standard error, half of the 95 % interval of the mean) of 2 to 10 numbers."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), error, T_975[len(values) - 2] * error


# --------------------------------------------------------------------------------------------------
# The flags of a run, and the checkpoints that runs start from

def base_flags():
    return [CONFIG, *(QUICK if quick else ()), *shlex.split(flags)]


@functools.cache
def base_knobs():
    return train_knobs(*base_flags())


def scoring():
    """eval.py's flags for a run's last checkpoint."""
    return [f'--problems={problems}', f'--block_size={base_knobs()["phases"][0]["block_size"]}']


@functools.cache
def made_of():
    return hash_of(base_knobs(), scoring())


def stable_run(seed):
    """(folder, flags) of the run of the stable phase that ends where decay begins."""
    trial = [*base_flags(), '--phases.decay.steps=0', f'--seed={seed}']
    sha = hashlib.sha256(repr([made_of(), *trial]).encode()).hexdigest()[:8]
    run = f'out/ablate/stable-{sha}'
    return run, [*trial, f'--out_dir={run}', '--resume']


def trial_flags(arm, seed, exponent):
    """train.py's flags for one run of an arm."""
    learning_rate = base_knobs()['learning_rate'] * 2.0**exponent
    trial = [*base_flags(), *arm.flags, f'--seed={seed}', f'--learning_rate={learning_rate!r}']
    if arm.start:
        trial.append(f'--init_from={start_folder(arm.start, seed)}')
    return trial


def start_folder(start, seed):
    run, _ = stable_run(seed)
    return run if start == 'as it is' else f'{run}/{start.replace(" ", "-")}'


def write_start(start, seed):
    """Write the checkpoint of the stable run with part of AdamW's state dropped, or another.

    'as it is': nothing is changed. 'fresh': no state. 'embedding kept': what Muon begins with if
    the embedding and the gains, which stay with AdamW, keep theirs.
    """
    target = Path(start_folder(start, seed))
    if start == 'as it is' or checkpoints(target):
        return
    checkpoint = read_checkpoint(stable_run(seed)[0])
    state = checkpoint['optimizer_state']
    if start == 'fresh':
        checkpoint['optimizer_state'] = {name: {} for name in state}
    else:
        for name, weight in checkpoint['model'].items():
            if weight.dim() == 2 and name != 'embed.weight':
                state[name] = {'momentum_buffer': torch.zeros_like(weight)}
        checkpoint['optimizer'] = 'muon'
    file = target / Path(checkpoint.pop('path')).name
    target.mkdir(exist_ok=True)
    write_checkpoint(file, checkpoint | {'config': asdict(checkpoint['config'])})


def run(points):
    """{(arm, seed, exponent): entry of trials.jsonl}, for points of that form, run if they have to
    be."""
    points = list(dict.fromkeys(points))
    known = read_trials(FILE)
    missing = [point for point in points if (made_of(), *trial_flags(*point)) not in known]
    starts = dict.fromkeys((arm.start, seed) for arm, seed, _ in missing if arm.start)
    stable_runs = dict(stable_run(seed) for _, seed in starts)
    make_checkpoints(stable_runs, [[f'--init_from={run}'] for run in stable_runs], jobs)
    for start, seed in starts:
        write_start(start, seed)
    wanted = [trial_flags(*point) for point in points]
    return dict(zip(points, results_of(wanted, FILE, made_of(), jobs, {}, scoring())))


# --------------------------------------------------------------------------------------------------
# A comparison

def measured(entry):
    """What a run's entry says: {'text', 'sums': losses, 'both': their mean as the config's decay
    mixes them, 'solved': share of sums, 'solved by steps': {steps: [solved, tried]}}; None if it
    diverged. A run that read no sums has 'text' and 'both', which are equal."""
    if entry['status'] == 'nan':
        return None
    losses = {name: scores['loss'] for name, scores in entry['scores']['validation'].items()}
    mixture = base_knobs()['phases'][-1]['data']
    found = {'text': losses['stdlib'],
             'both': statistics.fmean(losses.values(), map(mixture.get, losses))}
    if 'arith' in losses:
        solved = entry['scores']['problems']['arith']
        found |= {'sums': losses['arith'], 'solved': solved['solved'] / solved['tried'],
                  'solved by steps': solved['by_steps']}
    return found


def best_exponents(arms):
    """({arm: exponent of the lowest loss}, {arm: {exponent: loss}}), with the seed that tunes.

    Where the lowest loss is at the edge of what was tried, the next exponent is tried as well.
    """
    if quick:
        return {arm: arm.guess for arm in arms}, {arm: {} for arm in arms}
    losses = {arm: {} for arm in arms}
    best = {arm: arm.guess for arm in arms}
    wanted = [(arm, first_seed, arm.guess + i) for arm in arms for i in (-1, 0, 1)]
    while wanted:
        for (arm, _, exponent), entry in run(wanted).items():
            found = measured(entry)
            losses[arm][exponent] = found['both'] if found else math.inf
        wanted = []
        for arm, tried in losses.items():
            best[arm] = min(tried, key=tried.get)
            beside = {best[arm] - 1, best[arm] + 1}
            wanted += [(arm, first_seed, exponent) for exponent in beside - tried.keys()]
    return best, losses


def compare(comparison):
    """Run a comparison -> {arm's name: its learning rate, measures and differences}."""
    arms = comparison.arms
    exponents, tried = best_exponents(arms)
    own_seeds = range(first_seed + 1, first_seed + 1 + (2 if quick else seeds))
    points = [(arm, seed, exponents[arm]) for arm in arms for seed in own_seeds]
    entries = run(points)
    table = {}
    for arm in arms:
        own = [entries[point] for point in points if point[0] == arm]
        runs = [measured(entry) for entry in own]
        row = {'flags': arm.flags, 'start': arm.start, 'exponent': exponents[arm],
               'tried': tried[arm], 'runs': runs,
               'core_seconds': sum(entry['seconds'] for entry in own)}
        table[arm.name] = row
        if None not in runs:
            row['mean'] = {key: interval(values) for key, values in by_measure(runs).items()}
        first = table[arms[0].name]['runs']
        if None not in runs + first:
            others = by_measure(first)
            row['difference'] = {key: interval([a - b for a, b in zip(values, others[key])])
                                 for key, values in by_measure(runs).items() if key in others}
    return table


def by_measure(runs):
    """{measure: its number in each of the runs}."""
    return {key: [found[key] for found in runs] for key in runs[0] if key != 'solved by steps'}


# --------------------------------------------------------------------------------------------------
# The experiments: each a function that returns its comparisons; its docstring is the question

# a decay by AdamW, from the stable phase's learning rate
ADAMW = ('--phases.decay.optimizer=adamw', '--phases.decay.lr=(0, 0.5, 0.03125)')


def stable_and_decay():
    """The config's phases that have steps."""
    return base_knobs()['phases']


def decay_optimizer():
    """Does the decay phase gain by going over to Muon, or by a fresh start? At which batch size?
    And would an earlier switch gain more?"""
    stable, decay = stable_and_decay()
    T, rows = decay['block_size'], decay['batch']
    comparisons = []
    for times in (1 / 4, 1, 4, 8):
        sizes = (f'--phases.decay.batch={round(rows * times)}',
                 f'--phases.decay.steps={round(decay["steps"] / times)}')
        adamw = (*sizes, *ADAMW)
        comparisons.append(Comparison(f'{round(rows * times) * T} tokens a step', [
            Arm('AdamW', adamw, 'as it is'),
            Arm('AdamW, fresh state', adamw, 'fresh'),
            Arm('Muon, fresh state', sizes, 'as it is'),
            Arm("Muon, embedding's state kept", sizes, 'embedding kept')]))
    arms = [Arm('AdamW throughout', ADAMW)]
    for share in (1, 0.75, 0.5, 0.25, 0):
        before = round(stable['steps'] * share)
        after = stable['steps'] - before
        switch = [f'--phases.stable.steps={before}', f'--phases.stable_muon.steps={after}']
        if not before:
            switch.append(f'--phases.stable_muon.warmup={stable["warmup"]}')
        arms.append(Arm(f'Muon from {share:.0%} of the stable phase on', tuple(switch)))
    comparisons.append(Comparison('when to switch', arms))
    return comparisons


def sft_timing():
    """Is it better to see the instruction data in the decay phase alone, throughout, or before it?
    All arms read as many tokens of sums, and as many of text."""
    stable, decay = stable_and_decay()
    n_stable, n_decay = (phase['steps'] * phase['batch'] * phase['block_size']
                         for phase in (stable, decay))
    n_sums = decay['data']['arith'] * n_decay

    def arm(name, in_stable, in_decay):
        """An arm with these tokens of sums in each of the phases."""
        mixtures = {'stable': in_stable / n_stable, 'decay': in_decay / n_decay}
        return Arm(name, tuple(f'--phases.{phase}.data.{data}={weight!r}'
                               for phase, share in mixtures.items()
                               for data, weight in (('arith', share), ('stdlib', 1 - share))))
    share = n_sums / (n_stable + n_decay)
    return [Comparison('sums', [arm('in the decay phase', 0.0, n_sums),
                                arm('throughout', share * n_stable, share * n_decay),
                                arm('in the stable phase', n_sums, 0.0)])]


# text alone; no data set is made, or compared with its source
TEXT = ('--sources={}', '--phases.decay.data={"stdlib": 1.0}')


def of_length(times, share):
    """Flags of a run of `times` the config's tokens, of which decay takes this share."""
    stable, decay = stable_and_decay()
    total = times * (stable['steps'] + decay['steps'])
    n_decay = round(total * share)
    return (f'--phases.stable.steps={round(total) - n_decay}', f'--phases.decay.steps={n_decay}')


def cosine(times):
    """Flags of a run of one phase, a cosine after the warmup, with `times` the config's tokens."""
    stable, decay = stable_and_decay()
    total = round(times * (stable['steps'] + decay['steps']))
    peak = stable['lr'][1]
    return (*TEXT, '--phases.decay.steps=0', f'--phases.stable.steps={total}',
            '--phases.stable.decay=cosine', f'--phases.stable.lr=(0, {peak}, {peak / 16!r})',
            '--phases.stable.embedding_lr=(0, 1, 0.0625)')


def schedule():
    """Does a stable phase with a short decay reach what a cosine over all steps reaches? How short
    may the decay be? AdamW and text alone."""
    comparisons = []
    for times in (1, 2, 3):
        arms = [Arm('cosine', cosine(times))]
        shares = (0.05, 0.1, 0.2, 0.4) if times == 1 else (0.2,)
        for share in shares:
            own_flags = (*ADAMW, *TEXT, *of_length(times, share))
            arms.append(Arm(f'WSD, decay {share:.0%}', own_flags))
        comparisons.append(Comparison(f'{times} x the tokens', arms))
    return comparisons


def recipe():
    """How many of the tokens does this recipe need to reach the loss of nanoGPT's: standard
    parametrisation, AdamW, cosine? Text alone."""
    arms = [Arm("nanoGPT's recipe", ('--mup_rules=sp', *cosine(1)), guess=-2)]
    arms += [Arm(f'this recipe, {share:.0%} of the tokens',
                 (*TEXT, *of_length(share, 0.4)))
             for share in (1, 0.8, 0.6, 0.4)]
    return [Comparison('text', arms)]


EXPERIMENTS = {function.__name__: function
               for function in (decay_optimizer, sft_timing, schedule, recipe)}


# --------------------------------------------------------------------------------------------------
# The table

LEGEND = ('± is half of the 95 % interval. Less the first: the mean of the differences, seed by '
          'seed. lr x: the factor on the config\'s learning rates of matrices.')
COLUMNS = {'text': 'loss of text', 'sums': 'loss of sums', 'solved': 'sums solved'}


def show(key, mean, error, half):
    """A mean with half of its 95 % interval, as text; sums solved in per cent."""
    if key == 'solved':
        return f'{mean:.1%} ± {100 * half:.1f}'
    return f'{mean:.4f} ± {half:.4f}'


def markdown(result):
    """The page of a result: question, command, and a table for each comparison."""
    trial = 'A trial: its figures mean nothing. ' if result['quick'] else ''
    lines = [f'# {result["name"]}', '', result['question'], '', f'`{result["command"]}`', '',
             f'{trial}{result["seeds"]} seeds, {result["core_hours"]:.2g} hours of a core.',
             LEGEND, '']
    for name, table in result['comparisons'].items():
        keys = [key for key in COLUMNS if any(key in row.get('mean', ()) for row in table.values())]
        head = ['arm', 'lr x', *(COLUMNS[key] for key in keys),
                *(f'{COLUMNS[key]}, less the first' for key in keys)]
        lines += [f'## {name}', '', f'| {" | ".join(head)} |', f'|{" --- |" * len(head)}']
        first = next(iter(table))
        for arm, row in table.items():
            cells = [arm, f'{2.0**row["exponent"]:g}']
            for part in ('mean', 'difference'):
                for key in keys:
                    found = row.get(part, {}).get(key)
                    is_first = part == 'difference' and arm == first
                    cells.append(show(key, *found) if found and not is_first else '')
            lines.append(f'| {" | ".join(cells)} |')
        lines.append('')
    return '\n'.join(lines)


def main():
    if command not in EXPERIMENTS:
        fail(f'{command!r} should be one of {", ".join(EXPERIMENTS)}: python -m lab.ablate --help')
    check_range(globals(), 2, len(T_975) + 2, 'seeds')      # to 10
    check_range(globals(), 1, 2**31, 'problems')
    check_range(globals(), 0, 2**31, 'first_seed', 'jobs')
    try:
        knobs = base_knobs()
        model_config(knobs)
        if [phase['name'] for phase in knobs['phases']] != ['stable', 'decay']:
            raise ValueError('the phases stable and decay should keep their steps')
    except ValueError as e:
        fail(f'flags={flags!r}: {e}')
    Path(folder).mkdir(parents=True, exist_ok=True)
    prepare_missing(knobs['data_dir'], data_sets(knobs), knobs['sources'], knobs['vocab_size'])
    experiment = EXPERIMENTS[command]
    comparisons = experiment()
    if quick:
        comparisons = comparisons[:1]
    try:
        tables = {comparison.name: compare(comparison) for comparison in comparisons}
    except ValueError as e:                                      # a damaged checkpoint
        fail(e)
    seconds = sum(row['core_seconds'] for table in tables.values() for row in table.values())
    result = {'kind': 'ablation', 'name': command, 'question': ' '.join(experiment.__doc__.split()),
              'command': shlex.join(['python', '-m', 'lab.ablate', *sys.argv[1:]]),
              'quick': quick, 'seeds': 2 if quick else seeds, 'core_hours': seconds / 3600,
              'comparisons': tables, 'made_of': made_of(), 'torch': torch.__version__}
    page, as_json = markdown(result), to_json(result, indent=1)
    replace_file(Path(folder, f'{command}.json'), lambda f: f.write(as_json.encode()))
    replace_file(Path(folder, f'{command}.md'), lambda f: f.write(page.encode()))
    print(page)


if __name__ == '__main__':
    configure(globals(), positional=['command'])
    if quick:
        problems = min(problems, 8)
    folder = folder or ('out/ablate/quick' if quick else RESULTS)
    jobs = jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    with ending_in_one_line(folder, '; the same command goes on from the runs that have finished'):
        main()
