"""Measure the paper's claims in small: runs that differ in one thing, with seeds and intervals.

    python -m lab.ablate decay_optimizer         # one experiment: hours of two CPU cores
    python -m lab.ablate decay_optimizer --quick # the same in a minute or two, to see that it works
    python -m lab.ablate sft_timing
    python -m lab.ablate schedule
    python -m lab.ablate long_context
    python -m lab.ablate why_muon
    python -m lab.ablate steps
    python -m lab.ablate recipe
    python -m lab.ablate signatures

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
that greedy decoding solves; some experiments measure more on the checkpoints (probe.py). A trial,
which is one run, is not run again once it has its line in out/ablate/trials.jsonl, unless code or
text have changed: the same command goes on where it was stopped. What was measured is in
results/ablations/NAME.json, and as a table in NAME.md.
"""
import functools
import hashlib
import json
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
from lab import probe
from lab.signatures import provoke, table_of_signs
from lab.trials import data_sets, hash_of, make_checkpoints, read_trials, results_of, train_knobs
from processes import ending_in_one_line
from start import model_config

command = ''                  # an experiment, see above
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
    tuned: bool = True           # False: the guess stays


class Comparison(NamedTuple):
    """Arms that are compared with the first of them."""
    name: str
    arms: list
    probe: str = ''              # what to measure on the checkpoints, see measure_checkpoint


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


def scoring(solve):
    """eval.py's flags for a run's last checkpoint; solve: sums are not only read."""
    T = base_knobs()['phases'][0]['block_size']
    return [f'--problems={problems if solve else 0}', f'--block_size={T}']


@functools.cache
def made_of(solve=True):
    return hash_of(base_knobs(), scoring(solve))


def run_before(seed, decayed=False):
    """(folder, flags) of the run that ends where decay begins or, decayed, where it ends."""
    trial = [*base_flags(), f'--seed={seed}', *([] if decayed else ['--phases.decay.steps=0'])]
    return in_own_folder('start', trial)


def in_own_folder(kind, trial):
    """(folder, flags) of a trial whose checkpoints stay."""
    sha = hashlib.sha256(repr([made_of(), *trial]).encode()).hexdigest()[:8]
    folder = f'out/ablate/{kind}-{sha}'
    return folder, [*trial, f'--out_dir={folder}', '--resume']


def trial_flags(arm, seed, exponent, keep=False):
    """train.py's flags for one run of an arm; keep: its checkpoints stay."""
    learning_rate = base_knobs()['learning_rate'] * 2.0**exponent
    trial = [*base_flags(), *arm.flags, f'--seed={seed}', f'--learning_rate={learning_rate!r}']
    if arm.start:
        trial.append(f'--init_from={start_folder(arm.start, seed)}')
    return in_own_folder('run', trial)[1] if keep else trial


def start_folder(start, seed):
    run, _ = run_before(seed, start == 'decayed')
    return run if start in ('as it is', 'decayed') else f'{run}/{start.replace(" ", "-")}'


def write_start(start, seed):
    """Write the checkpoint of the stable run with part of AdamW's state dropped, or another.

    'as it is', 'decayed': nothing is changed. 'fresh': no state. 'embedding kept': what Muon begins
    with if the embedding and the gains, which stay with AdamW, keep theirs.
    """
    target = Path(start_folder(start, seed))
    if start in ('as it is', 'decayed') or checkpoints(target):
        return
    checkpoint = read_checkpoint(run_before(seed)[0])
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


def run(points, solve=True, keep=False):
    """{(arm, seed, exponent): entry of trials.jsonl}, for points of that form, run if they have to
    be.

    solve: their entries have to tell of sums that are solved; keep: their checkpoints stay.
    """
    points = list(dict.fromkeys(points))
    wanted = [trial_flags(*point, keep=keep) for point in points]
    known = read_trials(FILE)
    missing = [point for point, flags in zip(points, wanted)
               if (made_of(solve), *flags) not in known]
    starts = dict.fromkeys((arm.start, seed) for arm, seed, _ in missing if arm.start)
    earlier_runs = dict(run_before(seed, start == 'decayed') for start, seed in starts)
    make_checkpoints(earlier_runs, [[f'--init_from={folder}'] for folder in earlier_runs], jobs)
    for start, seed in starts:
        write_start(start, seed)
    return dict(zip(points, results_of(wanted, FILE, made_of(solve), jobs, {}, scoring(solve))))


def measure_checkpoint(kind, point, first):
    """{measure: number} of the checkpoint that a point's run has kept; of `first` as well.

    kind: 'length', 'steps' or 'landscape', a function of probe.py. What was measured is kept beside
    the checkpoint.
    """
    folder, other = (Path(in_own_folder('run', trial_flags(*p))[0]) for p in (point, first))
    if not checkpoints(folder):
        fail(f'{folder} has no checkpoint any more, of a run that is in {FILE}: without that file '
             'all runs are made anew')
    file = folder / f'{kind}.json'
    if not file.exists():
        finished = probe.load(folder)
        weights = []
        if kind == 'landscape':
            before = start_folder(point[0].start, point[1])
            weights = [read_checkpoint(path)['model'] for path in (before, other)]
        found = getattr(probe, kind)(finished, *weights)
        replace_file(file, lambda f: f.write(to_json(found).encode()))
    return json.loads(file.read_text())


# --------------------------------------------------------------------------------------------------
# A comparison

def measured(entry):
    """What a run's entry says: {'text', 'sums': losses, 'both': their mean as the config's decay
    mixes them, 'solved': share of sums, 'solved by steps': {steps: [solved, tried]}}; None if it
    diverged. A run that read no sums has 'text' and 'both', which are equal; one that was not to
    solve them has no 'solved'."""
    if entry['status'] == 'nan':
        return None
    losses = {name: scores['loss'] for name, scores in entry['scores']['validation'].items()}
    mixture = base_knobs()['phases'][-1]['data']
    found = {'text': losses['stdlib'],
             'both': statistics.fmean([losses[name] for name in mixture if name in losses],
                                      [mixture[name] for name in mixture if name in losses])}
    if 'arith' in losses:
        solved = entry['scores']['problems'].get('arith')
        found['sums'] = losses['arith']
        if solved:
            found |= {'solved': solved['solved'] / solved['tried'],
                      'solved by steps': solved['by_steps']}
    return found


def best_exponents(arms):
    """({arm: exponent of the lowest loss}, {arm: {exponent: loss}}), with the seed that tunes.

    Where the lowest loss is at the edge of what was tried, the next exponent is tried as well.
    """
    losses = {arm: {} for arm in arms}
    best = {arm: arm.guess for arm in arms}
    tuned = [] if quick else [arm for arm in arms if arm.tuned]
    wanted = [(arm, first_seed, arm.guess + i) for arm in tuned for i in (-1, 0, 1)]
    while wanted:
        for (arm, _, exponent), entry in run(wanted, solve=False).items():
            found = measured(entry)
            losses[arm][exponent] = found['both'] if found else math.inf
        wanted = []
        for arm in tuned:
            tried = losses[arm]
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
    entries = run(points, keep=bool(comparison.probe))
    table = {}
    for arm in arms:
        own_points = [point for point in points if point[0] == arm]
        own = [entries[point] for point in own_points]
        runs = [measured(entry) for entry in own]
        if comparison.probe:
            for found, point in zip(runs, own_points):
                if found:
                    first = arms[0], point[1], exponents[arms[0]]
                    found |= measure_checkpoint(comparison.probe, point, first)
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


def decay_arms(times=1):
    """(AdamW, Muon), as the phases say, with decays of `times` the config's batch size and as many
    tokens."""
    decay = stable_and_decay()[1]
    sizes = (f'--phases.decay.batch={round(decay["batch"] * times)}',
             f'--phases.decay.steps={round(decay["steps"] / times)}')
    return (Arm('AdamW', (*sizes, *ADAMW), 'as it is'),
            Arm('Muon, fresh state', sizes, 'as it is'))


def decay_optimizer():
    """Does the decay phase gain by going over to Muon, or by a fresh start? At which batch size?
    And would an earlier switch gain more?"""
    stable, decay = stable_and_decay()
    comparisons = []
    for times in (1 / 4, 1, 4, 8):
        adamw, muon = decay_arms(times)
        comparisons.append(Comparison(
            f'{round(decay["batch"] * times) * decay["block_size"]} tokens a step', [
                adamw, adamw._replace(name='AdamW, fresh state', start='fresh'),
                muon, muon._replace(name="Muon, embedding's state kept", start='embedding kept')]))
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


def long_context():
    """Does a phase of long texts raise the perplexity of text while tasks improve? From what: the
    mixture, the length, or the schedule that begins anew? All start from one decayed checkpoint."""
    _, decay = stable_and_decay()
    T, batch = 4 * decay['block_size'], decay['batch'] // 4
    decayed = decay['lr'][2]                                     # as a share of learning_rate
    steps = round(decay['steps'] * 0.75)

    def arm(name, T, batch, mixture, *more):
        return Arm(name, (f'--sources.recall={recall_file()}', f'--phases.long.steps={steps}',
                          f'--phases.long.block_size={T}', f'--phases.long.batch={batch}',
                          f'--phases.long.data={mixture}', *more), 'decayed')

    mixture = {'recall': 0.34, 'arith': 0.33, 'stdlib': 0.33}
    return [Comparison('the long phase', [
        arm('no more steps', T, batch, mixture, '--phases.long.steps=1', '--phases.long.warmup=0',
            '--phases.long.lr=(0, 0, 0)',
            '--phases.long.embedding_lr=(0, 0, 0)')._replace(tuned=False),
        arm('long', T, batch, mixture),
        arm('short', decay['block_size'], decay['batch'], mixture),
        arm('without keys', T, batch, {'recall': 0.0, 'arith': 0.67, 'stdlib': 0.33}),
        arm('text alone', T, batch, {'recall': 0.0, 'stdlib': 1.0}),
        arm('no new warmup', T, batch, mixture, '--phases.long.warmup=0',
            f'--phases.long.lr=({decayed}, {decayed}, {decayed})',
            f'--phases.long.embedding_lr=({decayed}, {decayed}, {decayed})')], 'length')]


def why_muon():
    """Why does Muon's decay end where it ends: in AdamW's basin, in a flatter place, with other
    spectra, with rare tokens learned? And which of its matrices matter?"""
    adamw, muon = decay_arms()
    alone = [muon._replace(name=f'Muon for {part} alone',
                           flags=(*muon.flags, f'--variant=muon_for_{part}'))
             for part in ('attention', 'ffn')]
    return [Comparison('ends of the decay', [adamw, muon, *alone], 'landscape')]


def steps():
    """Trained on sums of 1 to 3 steps, which of 1 to 6 are solved, before and after the decay?"""
    adamw, muon = decay_arms()
    before = Arm('before the decay', ('--phases.decay.steps=1', '--phases.decay.lr=(0, 0, 0)',
                                      '--phases.decay.embedding_lr=(0, 0, 0)'), 'as it is',
                 tuned=False)
    return [Comparison('sums of more steps', [before, adamw, muon], 'steps')]


def recipe():
    """How many of the tokens does this recipe need to reach the loss of nanoGPT's: standard
    parametrisation, AdamW, cosine? Text alone."""
    arms = [Arm("nanoGPT's recipe", ('--mup_rules=sp', *cosine(1)), guess=-2)]
    arms += [Arm(f'this recipe, {share:.0%} of the tokens',
                 (*TEXT, *of_length(share, 0.4)))
             for share in (1, 0.8, 0.6, 0.4)]
    return [Comparison('text', arms)]


def signatures():
    """What does a run's log say when the paper's signs of failure are provoked, and how soon?"""
    prepare_data([])
    phases = base_knobs()['phases']
    begins = {'stable': 0, 'decay': phases[0]['steps']}
    return provoke(base_flags(), begins, range(first_seed, first_seed + (1 if quick else seeds)),
                   jobs, quick)


EXPERIMENTS = {function.__name__: function
               for function in (decay_optimizer, sft_timing, schedule, long_context, why_muon,
                                steps, recipe, signatures)}


# --------------------------------------------------------------------------------------------------
# The table

LEGEND = ('± is half of the 95 % interval. Less the first: the mean of the differences, seed by '
          'seed. lr x: the factor on the config\'s learning rates of matrices.')
COLUMNS = {'text': 'loss of text', 'sums': 'loss of sums', 'solved': 'sums solved'}
KNOWN = {*COLUMNS, 'both', 'solved by steps'}


def show(key, mean, error, half):
    """A mean with half of its 95 % interval, as text; shares in per cent."""
    if key.endswith(('solved', 'errors')):
        return f'{mean:.1%} ± {100 * half:.1f}'
    if abs(mean) >= 100:
        return f'{mean:.0f} ± {half:.0f}'
    return f'{mean:.4f} ± {half:.4f}'


def table_of_probes(table):
    """Lines of a table of what was measured on the checkpoints: a measure a row, an arm a column.

    After each mean, in brackets, the difference from the first.
    """
    keys = [key for key in next(iter(table.values())).get('mean', ()) if key not in KNOWN]
    if not keys:
        return []
    lines = [f'| on the checkpoints | {" | ".join(table)} |', f'|{" --- |" * (1 + len(table))}']
    for key in keys:
        cells = [key]
        for i, row in enumerate(table.values()):
            cell = show(key, *row['mean'][key]) if key in row.get('mean', ()) else ''
            if i > 0 and key in row.get('difference', ()):
                cell += f' ({show(key, *row["difference"][key])})'
            cells.append(cell)
        lines.append(f'| {" | ".join(cells)} |')
    return [*lines, '']


def markdown(result):
    """The page of a result: question, command, and a table for each comparison."""
    trial = 'A trial: its figures mean nothing. ' if result['quick'] else ''
    lines = [f'# {result["name"]}', '', result['question'], '', f'`{result["command"]}`', '']
    if result['kind'] == 'signatures':
        return '\n'.join([*lines, f'{trial}{result["seeds"]} seeds.', '',
                          *table_of_signs(result['signs']), ''])
    hours = sum(row['core_seconds'] for table in result['comparisons'].values()
                for row in table.values()) / 3600
    lines += [f'{trial}{result["seeds"]} seeds, {hours:.2g} hours of a core.', LEGEND, '']
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
        lines += ['', *table_of_probes(table)]
    return '\n'.join(lines)


def recall_file():
    """The texts of keys told early and asked late, which this script makes: see probe.recall."""
    return Path(f'{base_knobs()["data_dir"]}-recall.jsonl')


def without_variant(flags):
    """Those that train.py itself knows."""
    return [flag for flag in flags if not flag.startswith('--variant=')]


def prepare_data(comparisons):
    """Make the data sets that the arms read and that are not there."""
    arms = [arm.flags for comparison in comparisons for arm in comparison.arms]
    for flags_of_arm in [(), *arms]:
        knobs = train_knobs(*base_flags(), *without_variant(flags_of_arm))
        if 'recall' in knobs['sources'] and not recall_file().exists():
            records = probe.recall(400 if quick else 4000, 1)
            recall_file().parent.mkdir(parents=True, exist_ok=True)
            recall_file().write_text(''.join(json.dumps(record) + '\n' for record in records))
        prepare_missing(knobs['data_dir'], data_sets(knobs), knobs['sources'], knobs['vocab_size'])


def main():
    if command not in EXPERIMENTS:
        fail(f'{command!r} should be one of {", ".join(EXPERIMENTS)}: python -m lab.ablate --help')
    check_range(globals(), 2, len(T_975) + 2, 'seeds')      # to 10
    check_range(globals(), 1, 2**31, 'problems')
    check_range(globals(), 0, 2**31, 'first_seed', 'jobs')
    if quick:
        probe.WINDOWS, probe.PROBLEMS, probe.ITERATIONS = 8, 4, 2
    try:
        knobs = base_knobs()
        model_config(knobs)
        if [phase['name'] for phase in knobs['phases']] != ['stable', 'decay']:
            raise ValueError('the phases stable and decay should keep their steps')
    except ValueError as e:
        fail(f'flags={flags!r}: {e}')
    Path(folder).mkdir(parents=True, exist_ok=True)
    experiment = EXPERIMENTS[command]
    result = {'kind': 'ablation', 'name': command, 'question': ' '.join(experiment.__doc__.split()),
              'command': shlex.join(['python', '-m', 'lab.ablate', *sys.argv[1:]]),
              'quick': quick, 'seeds': 2 if quick else seeds, 'torch': torch.__version__}
    found = experiment()
    if command == 'signatures':
        result |= {'kind': 'signatures', 'signs': found}
    else:
        result['comparisons'] = compare_all(found)
    result['made_of'] = made_of()
    page, as_json = markdown(result), to_json(result, indent=1)
    replace_file(Path(folder, f'{command}.json'), lambda f: f.write(as_json.encode()))
    replace_file(Path(folder, f'{command}.md'), lambda f: f.write(page.encode()))
    print(page)


def compare_all(comparisons):
    """{comparison's name: its table}; with --quick, of the first one."""
    if quick:
        comparisons = comparisons[:1]
    prepare_data(comparisons)
    try:
        return {comparison.name: compare(comparison) for comparison in comparisons}
    except ValueError as e:                                      # a damaged checkpoint
        fail(e)


if __name__ == '__main__':
    configure(globals(), positional=['command'])
    if quick:
        problems = min(problems, 8)
    folder = folder or ('out/ablate/quick' if quick else RESULTS)
    jobs = jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    with ending_in_one_line(folder, '; the same command goes on from the runs that have finished'):
        main()
