"""Trials: many runs of train.py side by side, and a file with the result of each.

A trial is one run of train.py in a process of its own, given by its flags. Its result is one line
of a file trials.jsonl. A trial that has its line is not run again: a program that was stopped
resumes with the trials that are left when the same command is given. Such programs are sweep.py and
ablate.py.
"""
import copy
import functools
import hashlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path

import torch
from tqdm import tqdm

import train
from checkpoint import CODE, checkpoints, read_checkpoint, read_log, replace_file, to_json
from configurator import configure, fail, knob_values
from data_prep import prepare_missing
from processes import temporary_folder
from start import complete_phases

ROOT = Path(__file__).parent.parent
TRAIN, EVAL, VARIANTS = ROOT / 'train.py', ROOT / 'eval.py', ROOT / 'lab/variants.py'


@functools.cache
def train_knobs(*argv):
    """train.py's knobs as these arguments set them; a mistake in them ends the program."""
    knobs = dict(vars(train))
    configure(knobs, list(argv))
    complete_phases(knobs['phases'])
    return knob_values(knobs)


def check_flags(flags):
    """ValueError where flags, which all trials get, set what each trial has of its own."""
    for flag in shlex.split(flags):
        name = flag.partition('=')[0]
        if name in ('--seed', '--out_dir', '--resume', '--init_from', '--help'):
            raise ValueError(f'{name} is set for each trial')


def data_sets(knobs):
    """The names of the data sets of knobs' phases, in order; the values are None."""
    return dict.fromkeys(name for phase in knobs['phases'] for name in phase['data'])


def prepare_data_of(knobs):
    """Make the data sets of knobs' phases that are not there."""
    prepare_missing(knobs['data_dir'], data_sets(knobs), knobs['sources'], knobs['vocab_size'])


def read_code(scoring=True):
    """[text] of the scripts that decide a trial's result; scoring: those of its scores as well."""
    names = (*CODE, 'eval', 'generate', 'lab/variants') if scoring else CODE
    return [Path(ROOT, f'{name}.py').read_text() for name in names]


CODE_AT_START = read_code()


def hash_of(knobs, scoring=()):
    """Hash of what decides a trial's result beside its flags: config, code, torch and text."""
    parts = [repr(knobs), repr(scoring) if scoring else '', torch.__version__, *read_code(scoring)]
    parts += [Path(knobs['data_dir'], name, 'meta.json').read_text() for name in data_sets(knobs)]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:12]


def out_dir_of(trial, default):
    """The folder of a trial's run: as its flags have it, else the default."""
    for flag in trial:
        if flag.startswith('--out_dir='):
            return flag.removeprefix('--out_dir=')
    return default


def run_script(words, running):
    """Run `python *words`, which ends with this process -> (exit code, its stderr, its stdout).

    running: a list to which its process is appended, so that the caller can kill it.
    """
    with tempfile.TemporaryFile('w+') as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / 'processes.py'), *words], stdin=subprocess.PIPE,
            stdout=output, stderr=subprocess.PIPE, text=True,
            env=os.environ | {'OMP_NUM_THREADS': '1'})           # so jobs do not change results
        running.append(process)
        errors = process.stderr.read()                           # (its stdin stays open till then)
        process.communicate()
        output.seek(0)
        return process.returncode, errors, output.read()


def script_of(trial):
    """The script that runs train.py with the flags of a trial; --variant=NAME is for variants.py.
    """
    changed = any(flag.startswith('--variant=') for flag in trial)
    return str(VARIANTS if changed else TRAIN)


def run_trial(trial, folder, running, scoring=()):
    """Run train.py with the flags `trial`; its result, as a dict for its line.

    It writes into `folder`. scoring: flags with which eval.py then scores the last checkpoint; its
    table is in the result. running: as for run_script.
    """
    began = time.time()
    with tempfile.TemporaryDirectory(dir=folder) as own_folder:
        run = out_dir_of(trial, f'{own_folder}/run')
        never = 2**62                                            # but at the ends of phases
        flags = [f'--out_dir={run}', f'--eval_interval={never}', f'--checkpoint_interval={never}']
        returncode = 0
        if not is_complete(run):                                 # but for its scores
            returncode, errors, _ = run_script([script_of(trial), *trial, *flags], running)
        if not returncode and scoring:
            returncode, errors, _ = run_script([str(EVAL), run, *scoring], running)
        entry = {'status': 'ok', 'loss': None, 'seconds': round(time.time() - began, 1)}
        if returncode:
            return entry | describe_failure(errors, returncode)
        losses = [step['loss'] for step in read_log(run)]
        if scoring:
            entry['scores'] = json.loads(checkpoints(run)[-1].with_suffix('.eval.json').read_text())
    last_tenth = losses[-max(1, len(losses) // 10):]
    return entry | {'loss': round(statistics.fmean(last_tenth), 5),
                    'losses': [round(loss, 4) for loss in losses]}


def describe_failure(errors, returncode):
    """{status, error} of a run that ended in an error, from what it wrote to stderr."""
    lines = errors.strip().splitlines()
    if not lines:
        return {'status': 'failed', 'error': f'train.py ended with {returncode}'}
    # train.py's words for a loss of NaN or inf, and eval.py's for the weights that are left
    diverged = re.search(' has loss |training ruined the weights', lines[-1])
    return {'status': 'nan' if diverged else 'failed', 'error': lines[-1]}


def read_trials(file):
    """{(made_of, *flags): entry} of the trials in a trials.jsonl that have a result.

    One that failed has none, and is tried again. A last line without a newline was cut off by a
    kill, and is left out. Any other line that is not a trial's ends the program.
    """
    entries = {}
    if not file.exists():
        return entries
    for line in file.read_text('utf-8', 'replace').splitlines(keepends=True):
        try:
            entry = json.loads(line)
            if entry['status'] not in ('ok', 'nan'):
                continue
            required = {'loss', 'seconds'}
            if entry['status'] == 'ok':
                required.add('losses')
            if not required <= entry.keys():
                raise KeyError(required)
            entries[entry['made_of'], *entry['flags']] = entry
        except (ValueError, KeyError, TypeError):
            if line.endswith('\n'):
                fail(f'{file}: not the line of a trial: {line[:60]!r}')
    return entries


def run_trials(todo, jobs, scoring=()):
    """Run trials, `jobs` at a time; yield each with its entry as it ends. If stopped, kill them."""
    running, futures, pool = [], {}, ThreadPoolExecutor(jobs)
    # trials that all run at once have no bar: the caller may have one of its own
    hide = None if len(todo) > jobs else True
    bar = tqdm(total=len(todo), unit='trial', disable=hide)
    with temporary_folder(tempfile.gettempdir(), 'nano-xmodel-trials') as folder:
        try:
            for trial in todo:
                futures[pool.submit(run_trial, trial, folder, running, scoring)] = trial
            for future in as_completed(futures):
                trial, entry = futures[future], future.result()
                if entry['status'] != 'ok':
                    tqdm.write(f'{entry["status"]}: train.py {shlex.join(trial)}: '
                               f'{entry["error"]}')
                bar.set_postfix_str(f'loss {entry["loss"]}', refresh=False)
                bar.update()
                yield trial, entry
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):  # a process may just be starting
                for process in running:
                    process.kill()                               # has no effect on one that ended
                wait([future for future in futures if not future.done()], timeout=0.1)
            bar.close()


def known_trials(file, keys):
    """The trials in `file`, and those of `keys` that other sweeps have run; `file` gets them all.

    Other sweeps are the folders beside the file's own.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = read_trials(file)
    for other in file.parent.parent.glob('*/trials.jsonl'):
        entries |= {key: entry for key, entry in read_trials(other).items() if key in keys}
    text = ''.join(json.dumps(entry) + '\n' for entry in entries.values())
    replace_file(file, lambda f: f.write(text.encode()))
    return entries


def is_complete(run):
    """Whether a run's newest checkpoint is that of the end of its curriculum."""
    if not checkpoints(run):
        return False
    checkpoint = read_checkpoint(run, check=False)
    phases = copy.deepcopy(checkpoint['knobs']['phases'])
    complete_phases(phases, checkpoint['knobs']['steps_scale'])
    return checkpoint['step'] == sum(phase['steps'] for phase in phases)


def make_checkpoints(runs, jobs):
    """Run those of `runs`, {folder: trial}, that are not complete. Their flags should have
    --resume: one that was stopped goes on."""
    missing = [trial for folder, trial in runs.items() if not is_complete(folder)]
    for trial, entry in run_trials(missing, jobs):
        if entry['status'] != 'ok':
            fail(f'{shlex.join(trial)}: {entry["error"]}')


def results_of(wanted, file, made_of, jobs, stable_runs, scoring=()):
    """The entries of the wanted trials (lists of flags); runs those that have none in `file` yet.

    made_of: a hash of what decides the results beside the flags, so that an entry of other code or
    text is not taken. stable_runs: {folder: trial that makes the checkpoint in it}. scoring: as for
    run_trial; its flags should be part of made_of.
    """
    keys = [(made_of, *trial) for trial in wanted]
    unique_keys = dict.fromkeys(keys)
    entries = known_trials(file, unique_keys)
    todo = [key[1:] for key in unique_keys if key not in entries]
    make_checkpoints({folder: run for folder, run in stable_runs.items()
                      if any(f'--init_from={folder}' in trial for trial in todo)}, jobs)
    for trial, entry in run_trials(todo, jobs, scoring):
        if read_code() != CODE_AT_START:                         # the trial may have run either
            fail('the code has changed since this program began: give the same command again')
        entry = {'flags': trial, 'made_of': made_of} | entry
        entries[made_of, *trial] = entry
        with open(file, 'a', encoding='utf-8') as f:
            f.write(to_json(entry) + '\n')
    errors = [entries[key]['error'] for key in unique_keys if entries[key]['status'] == 'failed']
    if errors:
        fail(f'{len(errors)} of {len(unique_keys)} trials failed, and will be tried again by the '
             f'same command; the first: {errors[0]}')
    return [entries[key] for key in keys]
