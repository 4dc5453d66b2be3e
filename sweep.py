"""Search hyperparameters on a small model, and measure whether they transfer to a larger one.

    python sweep.py transfer                             # lr x width: µP beside standard
    python sweep.py transfer --depths=2,4,8,16 --rules=textbook,residual_depth
    python sweep.py transfer --optimizer=muon            # in the decay phase
    python sweep.py search --config=config/transfer.py --trials=40 --apply=config/xmodel25.py
    python sweep.py search                               # the 20M proxy at the paper's budget: GPUs

A trial is a run of train.py in a process of its own, and a line of out/sweep/NAME/trials.jsonl. One
that has its line is not run again, unless code or text have changed: a sweep that was stopped, by
whatever, goes on where it was when the same command is given, and ends in the same table and file
in results/NAME/. A trial's loss is the mean training loss over the last tenth of its steps.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from difflib import unified_diff
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from checkpoint import checkpoints, read_log, replace_file
from configurator import check_range, configure, fail, int_list, knob_values
from coord_check import shape
from data_prep import prepare_missing
from model import Xmodel, mup_table

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
# Trials: flags in, lines of trials.jsonl out

def run_trial(trial, running):
    """Run train.py with the flags `trial`; what became of it, as a dict for its line."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        run = next((flag.removeprefix('--out_dir=') for flag in trial
                    if flag.startswith('--out_dir=')), f'{folder}/run')
        process = subprocess.Popen(
            [sys.executable, train.__file__, *trial, f'--out_dir={run}',
             f'--eval_interval={2**62}', f'--checkpoint_interval={2**62}'],     # phase ends alone
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {'OMP_NUM_THREADS': '1'})             # so jobs do not change results
        running.append(process)
        error = (process.communicate()[1].strip().splitlines() or [''])[-1]
        entry = {'status': 'ok', 'loss': None, 'seconds': round(time.time() - began, 1)}
        if process.returncode:
            return entry | {'status': 'nan' if ' has loss ' in error else 'failed',
                            'error': error or f'train.py ended with {process.returncode}'}
        losses = [e['loss'] for e in read_log(run)]
    loss = statistics.fmean(losses[-max(1, len(losses) // 10):])
    return entry | {'loss': round(loss, 5), 'losses': [round(x, 4) for x in losses]}


def read_trials(file):
    """{(made_of, *flags): entry} of a trials.jsonl, without a line cut off by a kill."""
    found = {}
    for line in file.read_text('utf-8', 'replace').splitlines(True) if file.exists() else ():
        try:
            entry = json.loads(line)
            if entry['status'] in ('ok', 'nan'):                 # one that failed is tried again
                _ = entry['loss'], entry['seconds'], entry['status'] == 'nan' or entry['losses']
                found[entry['made_of'], *entry['flags']] = entry
        except (ValueError, KeyError, TypeError):
            if line.endswith('\n'):
                fail(f'{file}: not the line of a trial: {line[:60]!r}')
    return found


def run_trials(todo):
    """Run trials, `jobs` at a time; yield each with its entry as it ends. If stopped, kill them."""
    running, pool = [], ThreadPoolExecutor(jobs)
    # a round of a search has the search's bar
    bar = tqdm(total=len(todo), unit='trial', disable=None if len(todo) > jobs else True)
    try:
        futures = {pool.submit(run_trial, trial, running): trial for trial in todo}
        for future in as_completed(futures):
            trial, entry = futures[future], future.result()
            if entry['status'] != 'ok':
                tqdm.write(f'{entry["status"]}: train.py {shlex.join(trial)}: {entry["error"]}')
            bar.set_postfix_str(f'loss {entry["loss"]}', refresh=False)
            bar.update()
            yield trial, entry
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:                                  # does nothing to one that ended
            process.kill()
        bar.close()


def results(wanted, starts=()):
    """The entries of the wanted trials (lists of flags), having run those that have none yet.

    One that another sweep has run is copied from there. starts: {folder: trial} of checkpoints that
    trials go on from; the trial makes a checkpoint that is missing and needed.
    """
    file = Path('out/sweep', name, 'trials.jsonl')
    file.parent.mkdir(parents=True, exist_ok=True)
    found, sha = read_trials(file), made_of()
    keys = dict.fromkeys((sha, *trial) for trial in wanted)
    for other in file.parent.parent.glob('*/trials.jsonl'):
        found |= {key: entry for key, entry in read_trials(other).items() if key in keys}
    replace_file(file, lambda f: f.write(
        ''.join(json.dumps(entry) + '\n' for entry in found.values()).encode()))
    todo = [key[1:] for key in keys if key not in found]
    needed = [starts[folder] for folder in starts if not checkpoints(folder)
              and any(f'--init_from={folder}' in trial for trial in todo)]
    for trial, entry in run_trials(needed):
        if entry['status'] != 'ok':
            fail(f'{shlex.join(trial)}: {entry["error"]}')
    for trial, entry in run_trials(todo):
        found[sha, *trial] = {'flags': trial, 'made_of': sha} | entry
        with open(file, 'a', encoding='utf-8') as f:
            f.write(json.dumps(found[sha, *trial]) + '\n')
    if failed := [found[key]['error'] for key in keys if found[key]['status'] == 'failed']:
        fail(f'{len(failed)} of {len(keys)} trials failed, and will be tried again by the same '
             f'command; the first: {failed[0]}')
    return [found[key] for key in ((sha, *trial) for trial in wanted)]


def write_result(file, told):
    told |= {'kind': command, 'command': shlex.join(['python', 'sweep.py', *sys.argv[1:]]),
             'config': config, 'made_of': made_of(), 'torch': torch.__version__}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda f: f.write(json.dumps(told).encode()))


@functools.cache
def train_knobs(*argv):
    """train.py's knobs as these arguments set them; a mistake in them ends the program."""
    knobs = dict(vars(train))
    configure(knobs, list(argv))
    train.check_phases(knobs['phases'])
    return knob_values(knobs)


def base_knobs():
    """train.py's knobs in the config, with the flags that every trial has."""
    return train_knobs(config, *shlex.split(flags))


def data_sets():
    return dict.fromkeys(name for phase in base_knobs()['phases'] for name in phase['data'])


@functools.cache
def made_of():
    """Hash of what decides a trial's result beside its flags: config, code, torch and text."""
    here, knobs = Path(__file__).parent, base_knobs()
    code = ('data_prep.py', 'fp8.py', 'model.py', 'muon.py', 'train.py')
    parts = [repr(knobs), torch.__version__, *(here.joinpath(file).read_text() for file in code),
             *(Path(knobs['data_dir'], name, 'meta.json').read_text() for name in data_sets())]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:12]


def prepare_data():
    """Make the config's data sets before trials side by side would; they may be there."""
    knobs = base_knobs()
    prepare_missing(knobs['data_dir'], data_sets(), knobs['sources'], knobs['vocab_size'])


def first_phase(n_steps):
    """Flags by which the config's first phase is all there is, of n_steps (0: its own)."""
    first, *others = base_knobs()['phases']
    own = [f'--phases.{first["name"]}.steps={n_steps}',
           f'--phases.{first["name"]}.warmup={n_steps // 10}'] if n_steps else []
    return own + [f'--phases.{phase["name"]}.steps=0' for phase in others]


# --------------------------------------------------------------------------------------------------
# transfer: the grid, its optima, and what it costs to carry over the smallest model's

def base_flags(size):
    """train.py's flags for a width or, with depths, a depth."""
    total = sum(phase['steps'] for phase in base_knobs()['phases'])
    scale = [f'--steps_scale={steps / total!r}'] if steps else []
    vary = 'depth' if depths else grow
    return [config, *shlex.split(flags), *scale,
            *(f'--{key}={value}' for key, value in shape(size, vary).items())]


def stable_trial(size):
    """(folder, flags) of the run of the first phase from which Muon goes on."""
    trial = [*base_flags(size), *first_phase(0), f'--seed={seed}']
    sha = hashlib.sha256(repr([made_of(), *trial]).encode()).hexdigest()[:8]
    folder = f'out/sweep/{name}/{size}-{sha}'
    return folder, [*trial, f'--out_dir={folder}', '--resume']


def rule_flag(rule):
    return f'--muon_lr_scaling={rule}' if optimizer == 'muon' else f'--mup_rules={rule}' \
        if rule in ('textbook', 'authors', 'sp') else f'--mup_break={rule}'


def trial_flags(rule, size, exponent, trial_seed):
    """train.py's flags for a point of the grid."""
    base, value = [*base_flags(size), rule_flag(rule), f'--seed={trial_seed}'], 2.0**exponent
    if optimizer == 'muon':
        return [*base, f'--init_from={stable_trial(size)[0]}', f'--learning_rate={value!r}']
    return [*base, *(f'--phases.{phase["name"]}.optimizer=adamw' for phase in base_knobs()['phases']
                     if phase['optimizer'] != 'adamw'),
            *(f'--{key}={value!r}' for key in GRIDS[grid][0])]


def summarise(entries, names, sizes):
    """What the trials say: {(rule, size, exponent, seed): entry} -> a dict for JSON and plot.py.

    A rule's `carried` exponent is the smallest model's best one. A size's `price` is what it loses
    by that: loss(carried) - loss(own best), in nats, a figure for each seed.
    """
    def mean(losses):
        return statistics.fmean(math.inf if x is None else x for x in losses.values())
    summary = {}
    for rule in names:
        sizes_told = {}
        for size in sizes:
            at = {}                                              # exponent -> {seed: loss}
            for (r, n, e, s), entry in sorted(entries.items()):
                if (r, n) == (rule, size):
                    at.setdefault(e, {})[s] = entry['loss']
            most = max(map(len, at.values()))                    # seeds, as about the optimum
            best = min((e for e in at if len(at[e]) == most), key=lambda e: mean(at[e]))
            carried = sizes_told[sizes[0]]['best'] if sizes_told else best
            runs = [entries[rule, size, carried, s] for s in at[carried]]
            sizes_told[size] = {
                'best': best, 'losses': {e: list(losses.values()) for e, losses in at.items()},
                'price': [None if None in (at[carried][s], at[best][s]) else
                          round(at[carried][s] - at[best][s], 5) for s in at[carried]
                          if s in at[best]],
                'curve': mean_curve([run['losses'] for run in runs if run['loss'] is not None])}
        summary[rule] = {'carried': sizes_told[sizes[0]]['best'], 'sizes': sizes_told}
    return summary


def mean_curve(runs):
    """Losses of several seeds, step by step -> their mean over the seeds and 20 steps."""
    if not runs or len(runs[0]) < 20:
        return []
    return [round(x, 4) for x in np.convolve(np.mean(runs, 0), np.ones(20) / 20, 'valid')]


def print_transfer(summary, axis, warmup):
    for rule, told in summary.items():
        grid_points = list(next(iter(told['sizes'].values()))['losses'])
        print(f'\n{rule}: loss of seed {seed} by log2 of {grid}, * the best of all seeds; price: '
              f'loss with 2^{told["carried"]} less the best, mean and range over seeds')
        print(f'{axis:>6}', *(f'{e:>6}' for e in grid_points), '  best  price')
        curves = []
        for size, row in told['sizes'].items():
            cells = [('nan' if losses[0] is None else f'{losses[0]:.3f}')
                     + ('*' if e == row['best'] else ' ') for e, losses in row['losses'].items()]
            price = [x for x in row['price'] if x is not None]
            edge = ', at the edge' if row['best'] in (grid_points[0], grid_points[-1]) else ''
            print(f'{size:>6}', *(f'{cell:>6}' for cell in cells), f'  2^{row["best"]:<4}'
                  + (f'{statistics.fmean(price):.4f} ({min(price):.4f} to {max(price):.4f})'
                     if price else 'diverges') + edge)
            curves.append(row['curve'][warmup:])
        if all(curves) and curves[1:]:                           # none where all seeds diverged
            better = [np.mean(np.array(b) < np.array(a)) for a, b in itertools.pairwise(curves)]
            print(f'at 2^{told["carried"]}, share of the steps after warmup at which each {axis} '
                  f'has lower loss than the one before: {", ".join(f"{x:.0%}" for x in better)}')


def exponent_range():
    text = exponents or GRIDS[grid][1]
    pair = [int(e) for e in text.split(',')] if re.fullmatch(r'-?\d+,-?\d+', text) else [1, 0]
    if not -60 <= pair[0] <= pair[1] <= 60:
        fail(f'exponents={text!r} should be the lowest and the highest power of two, as -12,-4')
    return pair


def about(told, size, first, last):
    """Exponents of a rule's summary at which a size's loss decides: best, neighbours, carried."""
    best = told['sizes'][size]['best']
    return {told['carried'], *range(max(first, best - 1), min(last, best + 1) + 1)}


def transfer(folder):
    names, (first, last) = rules.split(','), exponent_range()
    sizes = sorted(int_list('depths', depths) if depths else int_list('widths', widths))
    if depths and grow != 'heads':
        fail('depths and grow: models can grow in one way at a time')
    phases = base_knobs()['phases']
    if optimizer == 'muon' and (grid != 'lr' or not phases[1:] or not all(
            phase['optimizer'] == 'muon' for phase in phases[1:])):
        fail("optimizer='muon' needs grid='lr', and a config whose later phases are all Muon's")
    if '' in names:
        fail(f'rules={rules!r} should be names, as textbook,sp')
    if 'sp' in names and grid == 'embedding_lr':
        fail("rules: 'sp' has no embedding_lr to try")
    for rule in names:
        for size in sizes:
            train.model_config(train_knobs(*base_flags(size), rule_flag(rule)))     # is possible
    prepare_data()
    entries, began = {}, time.time()

    starts = dict(map(stable_trial, sizes)) if optimizer == 'muon' else {}

    def run(points):
        points = sorted(set(points), key=lambda p: -p[1])        # the longest first
        entries.update(zip(points, results([trial_flags(*p) for p in points], starts)))

    # one seed everywhere, then the others about each optimum, and where the smallest one's falls
    run((r, n, e, seed) for r in names for n in sizes for e in range(first, last + 1))
    known = 0
    while known < len(entries):
        known, summary = len(entries), summarise(entries, names, sizes)
        run([*entries, *((r, n, e, s) for r in names for n in sizes
                         for e in about(summary[r], n, first, last)
                         for s in range(seed, seed + seeds))])
    total = sum(phase['steps'] for phase in phases)
    warmup = phases[0].get('warmup', 0) * (steps or total) // total
    axis = 'depth' if depths else 'width'
    print_transfer(summary, axis, 0 if optimizer == 'muon' else warmup)
    told = {'grid': grid, 'axis': axis, 'optimizer': optimizer, 'warmup': warmup, 'seeds': seeds,
            'trials': len(entries),
            'hours_of_a_core': round(sum(e['seconds'] for e in entries.values()) / 3600, 2),
            'rules': summary}
    write_result(folder / 'transfer.json', told)
    print(f'\n{len(entries)} trials, {told["hours_of_a_core"]} hours of a core, '
          f'{(time.time() - began) / 60:.0f} minutes now; {folder}/transfer.json')


# --------------------------------------------------------------------------------------------------
# search: the paper's six hyperparameters, on the proxy

def tpe():
    """optuna's study by a tree-structured Parzen estimator, as in the paper; None: Sobol points."""
    if sampler == 'sobol':
        return None
    try:
        import optuna
    except ImportError:
        return None if sampler == 'auto' else fail('pip install optuna, or --sampler=sobol')
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True))


def search(folder):
    base, phase = base_knobs(), base_knobs()['phases'][0]
    with torch.device('meta'):
        N = Xmodel(train.model_config(base)).num_params(embedding=False)
    batch_tokens = phase['batch'] * phase['block_size']
    n_steps = steps or math.ceil(10 * N / batch_tokens)
    target = apply and train_knobs(apply)
    if apply:
        mup_lines(target)                                        # such a model is possible
    prepare_data()
    print(f'{trials} trials of {n_steps} steps, {n_steps * batch_tokens / N:.2g} tokens a parameter'
          f' outside the embedding, {jobs} at a time')
    # both samplers follow from the seed, and tpe from jobs: a resumed search asks for the same
    study, tried = tpe(), []
    points = torch.quasirandom.SobolEngine(len(RANGES), scramble=True, seed=seed).draw(trials)
    for i in tqdm(range(0, trials, jobs), unit='round', disable=None):
        k = min(jobs, trials - i)
        if study:
            asked = [study.ask() for _ in range(k)]
            settings = [{key: trial.suggest_float(key, low, high, log=log)
                         for key, (low, high, log) in RANGES.items()} for trial in asked]
        else:
            settings = [{key: low * (high / low)**u if log else low + u * (high - low)
                         for (key, (low, high, log)), u in zip(RANGES.items(), point)}
                        for point in points[i:i + k].tolist()]
        settings = [{key: float(f'{value:.4g}') for key, value in values.items()}
                    for values in settings]
        entries = results([[config, *shlex.split(flags), *first_phase(n_steps), f'--seed={seed}',
                            *(f'--{key}={value!r}' for key, value in values.items())]
                           for values in settings])
        for j, entry in enumerate(entries):
            if study:
                study.tell(asked[j], math.inf if entry['loss'] is None else entry['loss'])
            tried.append((entry['loss'], settings[j]))
    tried.sort(key=lambda t: math.inf if t[0] is None else t[0])
    loss, best = tried[0]
    if loss is None:
        fail(f'all {trials} trials diverged: out/sweep/{name}/trials.jsonl')
    print(f'\n# the best of {trials} trials of {n_steps} steps of {config}: loss {loss}; the next '
          + ', '.join(f'{x:.3f}' for x, _ in tried[1:4] if x is not None))
    print(*(f'{key} = {value!r}' for key, value in best.items()), sep='\n')
    for key in at_the_edge(best):
        print(f'# {key} is at the edge of its range, {RANGES[key][0]:.3g} to {RANGES[key][1]:.3g}: '
              'a better value may lie outside')
    write_result(folder / 'search.json', {
        'loss': loss, 'best': best, 'steps': n_steps, 'trials': tried, 'sampler': sampler,
        'seed': seed, 'jobs': jobs})
    if apply:
        print(*unified_diff(mup_lines(target), mup_lines(target | best), apply,
                            f'{apply} with the best', n=99, lineterm=''), sep='\n')


def at_the_edge(values):
    """Names of the searched knobs that lie in the outermost twentieths of their range."""
    for key, (low, high, log) in RANGES.items():
        low, high, value = (math.log(x) if log else x for x in (low, high, values[key]))
        if not 0.05 < (value - low) / (high - low) < 0.95:
            yield key


def mup_lines(knobs):
    """Lines to compare: the searched knobs, and what model.mup_table makes of them at this size."""
    c = train.model_config(knobs)
    lines = [f'{key} = {knobs[key]!r}' for key in RANGES]
    lines.append(f'# at n_embd={c.n_embd}, n_layer={c.n_layer}, by mup_rules={c.mup_rules!r}:')
    for role, rule in mup_table(c).items():
        lr = rule.lr_knob and knobs[rule.lr_knob]
        cells = {'init std': rule.init_std, 'multiplier': rule.multiplier,
                 'lr': lr and lr * rule.lr_mult,
                 "Muon's lr": rule.muon_lr_mult and lr * rule.muon_lr_mult}
        lines.append(f'# {role:10}' + ','.join(f' {key} {value:.4g}' for key, value in cells.items()
                                               if value is not None))
    return lines


def main():
    global jobs, name, config, rules
    if command not in ('search', 'transfer'):
        fail(f'{command!r} should be search or transfer: python sweep.py --help')
    check_range(globals(), 0, 2**32, 'steps', 'seed', 'jobs')
    check_range(globals(), 1, 2**63, 'trials', 'seeds')
    jobs = jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    usual = ('adamw', '', 'heads', 'lr')
    name = name or '-'.join([command, *(has for has, common in zip(
        (optimizer, 'depth' * bool(depths), grow, grid), usual) if has != common)])
    config = config or ('config/proxy20m.py' if command == 'search' else 'config/transfer.py')
    rules = rules or ('1/m,1/sqrt(m),const' if optimizer == 'muon' else 'textbook,sp')
    if not re.fullmatch(r'\w[\w.()-]*', name):
        fail(f'name={name!r} should be that of a folder under results/')
    folder = Path('results', name)
    try:
        shlex.split(flags)
    except ValueError as e:
        fail(f'flags={flags!r}: {e}')
    try:
        (search if command == 'search' else transfer)(folder)
    except ValueError as e:
        fail(e)


if __name__ == '__main__':
    configure(globals(), positional=['command'])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except OSError as e:
        fail(f'{e.filename or name}: {e.strerror}; the lines of finished trials are whole')
    except KeyboardInterrupt:
        sys.exit('sweep.py: stopped; the same command goes on from the trials that have finished')
