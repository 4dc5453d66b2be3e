"""Measure the paper's claims in small: runs that differ in one thing, with seeds and intervals.

    python -m lab.ablate decay_optimizer         # one experiment: hours of two CPU cores
    python -m lab.ablate decay_optimizer --quick # the same in a minute or two, to see that it works
    python -m lab.ablate switch_timing
    python -m lab.ablate sft_timing
    python -m lab.ablate schedule
    python -m lab.ablate long_context
    python -m lab.ablate why_muon
    python -m lab.ablate steps
    python -m lab.ablate recipe
    python -m lab.ablate signatures

An experiment (experiments.py) is a list of comparisons, and a comparison a list of arms: runs of
config/ablation.py with other flags. The method is one for all.

- Runs of one seed read the same data in the same order. Where arms of an experiment have their
  first steps in common, these are run once: the arms start from a checkpoint at the end of them.
- Each arm's learning rate is tuned in powers of two times the config's, until both neighbours are
  worse, with a seed that the result does not use. The intervals do not include the choice of that
  seed. Where arms start from a checkpoint, only the rate after it is tuned. (The arms of
  long_context keep the config's rate.) The factor is that of matrices and gains. The embedding's
  rate stays, but in nanoGPT's recipe, which has one rate for all.
- The result has `seeds` seeds. Each arm is compared with the first one seed by seed: the mean of
  the differences, and its 95 % interval by Student's t. An interval about 0 says that this size
  cannot show a difference, or only one that is larger than the interval.

Measured are the losses of held-out text and held-out sums, in nats, and that of the decay's mixture
of them, which tuning goes by. Greedy decoding solves held-out sums: the share that is right is
measured as well. Some experiments measure more on the checkpoints (probe.py).

A trial is one run. Once it has its line in out/ablate/trials.jsonl it is not run again, unless
code, text or --problems have changed: the same command goes on where it was stopped. What was
measured is in results/ablations/NAME.json, and as a table in NAME.md.
"""
import copy
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
from types import SimpleNamespace

import numpy as np
import torch

from checkpoint import (
    checkpoints,
    read_checkpoint,
    replace_file,
    take_folder,
    to_json,
    write_checkpoint,
)
from configurator import check_range, configure, fail
from lab import probe, signatures
from lab.ablate_page import markdown
from lab.experiments import EXPERIMENTS, RECIPE_BUDGETS, recall_file
from lab.trials import (
    check_flags,
    hash_of,
    make_checkpoints,
    prepare_data_of,
    read_trials,
    results_of,
    train_knobs,
)
from model import Xmodel
from processes import ending_in_one_line
from start import check_knobs, complete_phases, model_config

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
         '--n_embd=64', '--n_ffn=160', '--steps_scale=0.02', '--compile=False',
         '--phases.stable.batch=4', '--phases.stable_muon.batch=4', '--phases.decay.batch=4',
         '--eval_rows=8')
FILE = Path('out/ablate/trials.jsonl')
RESULTS = 'results/ablations'
STATE_DROPPED = ('fresh', 'embedding kept')     # starts without some of the optimizer's state
PROBE_CODE = Path(probe.__file__).read_text()
SECONDS_OF = {}               # a core's, of each run that the result needs


# --------------------------------------------------------------------------------------------------
# Statistics

# 97.5 % quantiles of Student's t, for 1 to 9 degrees of freedom
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def interval(values):
    """(mean, standard error, half of the 95 % interval of the mean) of 2 to 10 numbers."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), error, T_975[len(values) - 2] * error


def share_of_tokens(runs_of_nanogpt, *runs_of_budgets):
    """Interval of the share of tokens with which this recipe has the loss of nanoGPT's.

    Seed by seed, on straight lines between RECIPE_BUDGETS. None where the loss does not fall from
    each budget to the next larger one, or nanoGPT's is not between their losses.
    """
    shares = []
    for nanogpt, *ours in zip(runs_of_nanogpt, *runs_of_budgets):
        if None in (nanogpt, *ours):
            return None
        target, *losses = (found['text'] for found in (nanogpt, *ours))
        if losses != sorted(losses) or not losses[0] <= target <= losses[-1]:
            return None
        shares.append(float(np.interp(target, losses, RECIPE_BUDGETS)))
    return interval(shares)


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


def run_before(start, seed):
    """(folder, flags) of the run that ends where an arm of this start begins.

    start: as of an Arm. 'decayed' is the end of the decay, a tuple that of a stable phase of as
    many steps as its last number, extended from the run that ends at the number before it. All
    others are the end of the stable phase.
    """
    trial = [*base_flags(), f'--seed={seed}']
    if start != 'decayed':
        trial.append('--phases.decay.steps=0')
    if isinstance(start, tuple):
        *shorter, steps = start
        trial.append(f'--phases.stable.steps={steps}')
        if shorter:
            trial.append(f'--init_from={run_before(tuple(shorter), seed)[0]}')
    return in_own_folder('start', trial)


def in_own_folder(kind, trial):
    """(folder, flags) of a trial whose checkpoints stay."""
    sha = hashlib.sha256(repr([made_of(), *trial]).encode()).hexdigest()[:8]
    folder = f'out/ablate/{kind}-{sha}'
    return folder, [*trial, f'--out_dir={folder}', '--resume']


def trial_flags(arm, seed, exponent):
    """train.py's flags for one run of an arm."""
    learning_rate = base_knobs()['learning_rate'] * 2.0**exponent
    trial = [*base_flags(), *arm.flags, f'--seed={seed}', f'--learning_rate={learning_rate!r}']
    if arm.start:
        trial.append(f'--init_from={start_folder(arm.start, seed)}')
    return trial


def kept_run(arm, seed, exponent):
    """(folder, flags) of the same run, whose checkpoints stay."""
    return in_own_folder('run', trial_flags(arm, seed, exponent))


def start_folder(start, seed):
    """The folder of the checkpoint with which an arm of this start begins."""
    folder_before, _ = run_before(start, seed)
    if start in STATE_DROPPED:
        return f'{folder_before}/{start.replace(" ", "-")}'
    return folder_before


def write_start(start, seed):
    """Write the checkpoint of the stable run with part of AdamW's state dropped, if start says so.

    'fresh': no state. 'embedding kept': what Muon begins with if the embedding and the gains, which
    stay with AdamW, keep theirs.
    """
    target = Path(start_folder(start, seed))
    if start not in STATE_DROPPED or checkpoints(target):
        return
    checkpoint = read_checkpoint(run_before(start, seed)[0])
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


def make_starts(starts):
    """Make the checkpoints that runs start from, (start, seed) each, where they are not there."""
    if before := [(start[:-1], seed) for start, seed in starts
                  if isinstance(start, tuple) and len(start) > 1]:
        make_starts(before)
    make_checkpoints(dict(run_before(start, seed) for start, seed in starts), jobs)
    for start, seed in starts:
        write_start(start, seed)


def run(points, solve=True, keep=False):
    """{(arm, seed, exponent): entry of trials.jsonl}, for points of that form, run if they have to
    be.

    solve: their entries have to tell of sums that are solved; keep: their checkpoints stay.
    """
    points = list(dict.fromkeys(points))
    wanted = [kept_run(*point)[1] if keep else trial_flags(*point) for point in points]
    known = read_trials(FILE)
    missing = [point for point, flags in zip(points, wanted)
               if (made_of(solve), *flags) not in known]
    starts = dict.fromkeys((arm.start, seed) for arm, seed, _ in missing if arm.start)
    make_starts(starts)
    entries = results_of(wanted, FILE, made_of(solve), jobs, {}, scoring(solve))
    for flags, entry in zip(wanted, entries):
        SECONDS_OF[made_of(solve), *flags] = entry['seconds']
    if keep:                                                     # a checkpoint may be gone since
        finished = [point for point, entry in zip(points, entries) if entry['status'] == 'ok']
        gone = [point for point in finished if not checkpoints(kept_run(*point)[0])]
        make_starts([(arm.start, seed) for arm, seed, _ in gone if arm.start])
        make_checkpoints(dict(kept_run(*point) for point in gone), jobs)
    return dict(zip(points, entries))


def measure_checkpoint(kind, point, first):
    """{measure: number} of a point's last checkpoint; 'landscape' compares it with that of `first`.

    kind: 'length', 'steps' or 'landscape', a function of probe.py. What was measured is kept beside
    the checkpoint.
    """
    folder, other = (Path(kept_run(*each)[0]) for each in (point, first))
    sha = hashlib.sha256(repr([PROBE_CODE, other.name]).encode()).hexdigest()[:8]
    file = folder / f'{kind}-{sha}.json'
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
    if None in losses.values():                                  # it broke in its last steps
        return None
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
    """Run a comparison -> {arm's name: its learning rate, measures and differences}.

    What is measured on a checkpoint may compare it with the first arm's: it is left out for a seed
    of which either diverged.
    """
    arms = comparison.arms
    exponents, tried = best_exponents(arms)
    own_seeds = range(first_seed + 1, first_seed + 1 + (2 if quick else seeds))
    points = [(arm, seed, exponents[arm]) for arm in arms for seed in own_seeds]
    entries = run(points, keep=bool(comparison.probe))
    table = {}
    for arm in arms:
        runs = [measured(entries[arm, seed, exponents[arm]]) for seed in own_seeds]
        table[arm.name] = {'flags': arm.flags, 'start': arm.start, 'exponent': exponents[arm],
                           'tried': tried[arm], 'runs': runs}
    first = arms[0]
    if comparison.probe:
        for arm in arms:
            for seed, run_of_first, found in zip(own_seeds, table[first.name]['runs'],
                                                 table[arm.name]['runs']):
                if run_of_first and found:
                    found |= measure_checkpoint(comparison.probe, (arm, seed, exponents[arm]),
                                                (first, seed, exponents[first]))
    for arm in arms:
        row = table[arm.name]
        if None not in row['runs']:
            row['mean'] = {key: interval(values) for key, values in by_measure(row['runs']).items()}
        if arm != first:
            row['difference'] = less(row, table[first.name])
        row['also'] = {name: less(row, table[name]) for name in arm.also}
    return table


def less(row, other):
    """{measure: interval of the differences of two arms, seed by seed}; {} if a run diverged."""
    if None in row['runs'] + other['runs']:
        return {}
    others = by_measure(other['runs'])
    return {key: interval([a - b for a, b in zip(values, others[key])])
            for key, values in by_measure(row['runs']).items() if key in others}


def by_measure(runs):
    """{measure: its number in each of the runs}, of what was measured in all of them."""
    return {key: [found[key] for found in runs] for key in runs[0]
            if key != 'solved by steps' and all(key in found for found in runs)}


# --------------------------------------------------------------------------------------------------
# The program

def size_of(knobs):
    """How large the model is, and how many tokens it reads, in words."""
    with torch.device('meta'):
        model = Xmodel(model_config(knobs))
    tokens = [f'{phase["name"]} {phase["steps"] * phase["batch"] * phase["block_size"]:,}'
              for phase in phases_as_run(knobs)]
    return f'{model.num_params():,} parameters; tokens: {", ".join(tokens)}'


def phases_as_run(knobs):
    """The phases with as many steps as train.py gives them."""
    phases = copy.deepcopy(knobs['phases'])
    complete_phases(phases, knobs['steps_scale'])
    return phases


def without_variant(flags):
    """Those that train.py itself knows."""
    return [flag for flag in flags if not flag.startswith('--variant=')]


def prepare_data(comparisons):
    """Make the data sets that the arms read and that are not there."""
    arms = [arm.flags for comparison in comparisons for arm in comparison.arms]
    for flags_of_arm in [(), *arms]:
        knobs = train_knobs(*base_flags(), *without_variant(flags_of_arm))
        if 'recall' in knobs['sources'] and not recall_file(knobs).exists():
            write_recall(recall_file(knobs))
        prepare_data_of(knobs)


def write_recall(file):
    """Write the texts of keys that are told early and asked late."""
    records = probe.recall(400 if quick else 4000, 1)
    text = ''.join(json.dumps(record) + '\n' for record in records)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda f: f.write(text.encode()))


def main():
    names = (*EXPERIMENTS, 'signatures')
    if command not in names:
        fail(f'{command!r} should be one of {", ".join(names)}: python -m lab.ablate --help')
    check_range(globals(), 2, len(T_975) + 2, 'seeds')      # to 10
    check_range(globals(), 1, 2**31, 'problems')
    check_range(globals(), 0, 2**31, 'first_seed', 'jobs')
    if quick:
        probe.WINDOWS, probe.PROBLEMS, probe.ITERATIONS, probe.N_STEPS = 8, 4, 2, (1, 6)
    try:
        check_flags(flags)
        knobs = base_knobs()
        model_config(knobs)
        check_knobs(SimpleNamespace(**knobs), 1)
        if [phase['name'] for phase in knobs['phases']] != ['stable', 'decay']:
            raise ValueError('stable and decay should have steps, and no other phase')
    except ValueError as e:
        fail(f'flags={flags!r}: {e}')
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = take_folder(FILE.parent)                              # noqa: F841, held to the end
    result = {'name': command, 'command': shlex.join(['python', '-m', 'lab.ablate', *sys.argv[1:]]),
              'model': size_of(knobs), 'quick': quick, 'seeds': 2 if quick else seeds,
              'torch': torch.__version__}
    if command == 'signatures':
        prepare_data([])
        own_seeds = range(first_seed, first_seed + (1 if quick else seeds))
        switch = phases_as_run(knobs)[0]['steps']
        rows = signatures.provoke(base_flags(), switch, own_seeds, jobs)
        result |= {'kind': 'signatures', 'question': question_of(signatures.provoke), 'signs': rows}
    else:
        experiment = EXPERIMENTS[command]
        tables = compare_all(experiment(knobs))
        result |= {'kind': 'ablation', 'question': question_of(experiment), 'comparisons': tables,
                   'runs': len(SECONDS_OF), 'hours': sum(SECONDS_OF.values()) / 3600}
        if command == 'recipe':
            runs_of = [row['runs'] for row in tables['text'].values()]
            result['share_of_tokens'] = share_of_tokens(*runs_of)
    result['made_of'] = made_of()
    page, as_json = markdown(result), to_json(result, indent=1)
    replace_file(Path(folder, f'{command}.json'), lambda f: f.write(as_json.encode()))
    replace_file(Path(folder, f'{command}.md'), lambda f: f.write(page.encode()))
    print(page)


def question_of(function):
    """The first paragraph of its docstring, on one line."""
    return ' '.join(function.__doc__.partition('\n\n')[0].split())


def compare_all(comparisons):
    """{comparison's name: its table}; with --quick, of the first one."""
    if quick:
        comparisons = comparisons[:1]
    SECONDS_OF.clear()
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
    goes_on = '; the same command goes on from the runs that have finished'
    if command == 'signatures':
        goes_on = ''                                             # its runs are not kept
    with ending_in_one_line(folder, goes_on):
        main()
