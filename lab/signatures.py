"""The paper's signs of failure, provoked on purpose: what a run's log says, and how soon.

    python -m lab.ablate signatures

Each run has a twin without the provocation, which should say nothing. The lines are those of
run.LossWatch.
"""
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

from configurator import fail
from lab import trials
from lab.experiments import TEXT
from processes import temporary_folder

# lines of run.LossWatch, of which the first number is the step
SWITCH = r'step (\d+): loss .* after the change of optimizer is above'
SPIKE = r'step (\d+): loss .* is a spike'
APART = r'step (\d+): loss is .* above that of'
SKIPPED = r'step (\d+) is skipped: it has'
ANY = f'{SWITCH}|{SPIKE}|{APART}|{SKIPPED}'


class Sign(NamedTuple):
    """A sign of failure, as the paper's table has it."""
    sign: str
    look_at: str                 # the paper's advice
    provoked_by: str             # in words
    line: str                    # pattern of what the log should say
    flags: tuple                 # train.py's, of both twins
    fault: tuple                 # of the provoked run
    at_switch: bool = False      # the fault begins with the decay


def signs():
    """The rows of the paper's table. {proxy} in a flag is the folder of a narrower run."""
    wide = ('--mup_base_width=64', '--phases.decay.steps=0', *TEXT, '--reference={proxy}',
            '--reference_margin=0', '--eval_interval=10')        # it speaks at validations alone
    fp8 = ('--fp8=True', '--phases.decay.steps=0', '--phases.stable.steps=120',
           '--phases.stable.batch=2', *TEXT)
    spike, apart, nan = ('loss spike right after AdamW -> Muon',
                         'proxy and full curves diverge', 'NaN gradients in FP8')
    widths, weights = 'attention scale, embedding lr', 'master-weight type, amax history below 128'
    bf16, short = '--variant=bf16_weights', '--fp8_amax_history_len=1'
    return [
        Sign(spike, 'lr scaling, weight decay', "Muon's learning rate times 8", SWITCH, TEXT,
             ('--phases.decay.lr=(0, 8, 0.5)',), True),
        Sign(spike, 'lr scaling, weight decay', "Muon's learning rate times 32", SWITCH, TEXT,
             ('--phases.decay.lr=(0, 32, 2)',), True),
        Sign(apart, widths, "the embedding's learning rate divided by m = 4", APART, wide,
             ('--mup_break=embedding_lr',)),
        Sign(apart, widths, 'the same divided by 64', APART, wide, ('--embedding_lr=0.00015625',)),
        Sign(apart, widths, 'attention scale times 64', APART, wide, ('--attention_scale=64',)),
        Sign(nan, weights, 'weights rounded to bf16', SKIPPED, fp8, (bf16,)),
        Sign(nan, weights, 'an amax history of 1', SKIPPED, fp8, (short,)),
        Sign(nan, weights, 'both, and the learning rate times a million', SKIPPED, fp8,
             (bf16, short, '--learning_rate=10000.0')),
    ]


def warnings_of(flags, running):
    """[(step, line)] of what a run warns of; ValueError where it failed without a warning.

    running: a list that gets its process.
    """
    returncode, errors, output = trials.run_script([trials.script_of(flags), *flags], running)
    found = []
    for line in output.splitlines():
        if match := re.match(ANY, line):
            step = next(group for group in match.groups() if group)
            found.append((int(step), line))
    if returncode and not found:
        error = trials.describe_failure(errors, returncode)['error']
        raise ValueError(f'train.py {shlex.join(flags)}: {error}')
    return found


def provoke(base_flags, switch, seeds, jobs):
    """What does a run's log say when the paper's signs of failure are provoked, and how soon?

    Returns [row] of the signs. base_flags: train.py's; switch: the step at which the decay begins.
    """
    rows, running = signs(), []
    seldom = ('--eval_interval=1000000', '--checkpoint_interval=1000000')
    with temporary_folder('out/ablate', 'nano-xmodel-signatures') as folder, \
            ThreadPoolExecutor(jobs) as pool:
        def flags_of(sign, fault, seed):
            flags = [*base_flags, f'--seed={seed}', *seldom, *sign.flags]
            if fault:
                flags += sign.fault
            return tuple(flag.replace('{proxy}', f'{folder}/proxy-{seed}') for flag in flags)

        def one(number, flags):
            found = warnings_of([*flags, f'--out_dir={folder}/{number}'], running)
            return [(step, line.replace(f'{folder}/', '')) for step, line in found]

        try:
            for seed in seeds:
                warnings_of([*base_flags, *TEXT, '--phases.decay.steps=0', '--mup_base_width=64',
                             '--n_embd=64', '--n_head=1', '--n_ffn=160', f'--seed={seed}',
                             f'--out_dir={folder}/proxy-{seed}'], running)
            # several signs share a calm twin
            wanted = list(dict.fromkeys(flags_of(sign, fault, seed) for sign in rows
                                        for fault in (False, True) for seed in seeds))
            said = {}
            bar = tqdm(total=len(wanted), unit='run', disable=None)
            for flags, found in zip(wanted, pool.map(one, range(len(wanted)), wanted)):
                said[flags] = found
                bar.update()
        except ValueError as e:
            fail(e)
        finally:
            for process in running:
                process.kill()
        return [row(sign, switch, *([said[flags_of(sign, fault, seed)] for seed in seeds]
                                    for fault in (True, False)))
                for sign in rows]


def row(sign, switch, provoked, calm):
    """One sign's row, from the warnings of its runs, a list for each seed."""
    begins = switch if sign.at_switch else 0
    firsts = []
    for found in provoked:
        matching = [(step - begins, line) for step, line in found
                    if step >= begins and re.match(sign.line, line)]
        firsts += matching[:1]
    return {**sign._asdict(), 'seeds': len(provoked), 'seen': len(firsts),
            'steps_later': [step for step, _ in firsts], 'says': firsts[0][1] if firsts else '',
            'calm': [line for found in calm for _, line in found[:1]]}
