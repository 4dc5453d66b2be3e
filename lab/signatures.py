"""The paper's signs of failure, provoked on purpose: what a run's log says, and how soon.

    python -m lab.ablate signatures

Each run has a twin without the provocation, which should say nothing. The lines are
those of run.LossWatch.
"""
import re
import shlex
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

from configurator import fail
from lab import trials
from processes import temporary_folder

# a line by which a run says that something is wrong, of which the first number is the step
WARNING = re.compile(r'step (\d+)(?: is skipped: it has|'
                     r': loss .* (?:is a spike|is above|above that of))')
TEXT = ('--sources={}', '--phases.stable.data={"stdlib": 1.0}',
        '--phases.decay.data={"stdlib": 1.0}')


class Sign(NamedTuple):
    """A sign of failure, as the paper's table has it."""
    sign: str
    look_at: str                 # the paper's advice
    provoked_by: str             # in words
    flags: tuple                 # train.py's, of both twins
    fault: tuple                 # of the provoked run
    after: str = 'stable'        # the phase with which the fault begins


def signs(fp8_steps=80):
    """The rows of the paper's table. {proxy} in a flag is the folder of a narrower run."""
    wide = ('--mup_base_width=64', '--phases.decay.steps=0', *TEXT, '--reference={proxy}')
    fp8 = ('--fp8=True', '--phases.decay.steps=0', f'--phases.stable.steps={fp8_steps}',
           '--phases.stable.batch=2', *TEXT)
    spike, apart, nan = ('loss spike right after AdamW -> Muon',
                         'proxy and full curves diverge', 'NaN gradients in FP8')
    widths = 'attention scale, embedding lr'
    return [
        Sign(spike, 'lr scaling, weight decay', "Muon's learning rate times 8", TEXT,
             ('--phases.decay.lr=(0, 8, 0.5)',), 'decay'),
        Sign(apart, widths, "the embedding's learning rate divided by m", wide,
             ('--mup_break=embedding_lr',)),
        Sign(apart, widths, "the embedding's learning rate divided by m³", wide,
             ('--embedding_lr=0.00015625',)),
        Sign(apart, widths, 'attention scale times 16', wide, ('--attention_scale=16',)),
        Sign(nan, 'master-weight type, amax history below 128', 'bf16 weights, a history of 1', fp8,
             ('--variant=bf16_weights', '--fp8_amax_history_len=1')),
        Sign(nan, 'master-weight type, amax history below 128',
             'the same, learning rate times 16', fp8,
             ('--variant=bf16_weights', '--fp8_amax_history_len=1', '--learning_rate=0.16')),
    ]


def warnings_of(flags, running):
    """[(step, line)] of what a run warns of. running: a list that gets its process."""
    returncode, errors, output = trials.run_script([trials.script_of(flags), *flags], running)
    lines = output.splitlines()
    found = [(int(match[1]), line) for line in lines if (match := WARNING.match(line))]
    if returncode and not found:
        fail(f'train.py {shlex.join(flags)}: {errors.strip().splitlines()[-1]}')
    return found


def provoke(base_flags, phases, seeds, jobs, quick=False):
    """[row] of the signs: what provoked and calm runs of each seed said.

    base_flags: train.py's; phases: {name: first step}.
    """
    rows = signs(4) if quick else signs()
    running, results = [], {}
    with temporary_folder('out/ablate', 'nano-xmodel-signatures') as folder, \
            ThreadPoolExecutor(jobs) as pool:
        def one(i, fault, seed):
            flags = [flag.replace('{proxy}', f'{folder}/proxy-{seed}') for flag in rows[i].flags]
            out_dir = f'{folder}/{i}-{"fault" if fault else "calm"}-{seed}'
            return warnings_of([*base_flags, f'--seed={seed}', f'--out_dir={out_dir}', *flags,
                                *(rows[i].fault if fault else ())], running)

        for seed in seeds:
            warnings_of([*base_flags, *TEXT, '--phases.decay.steps=0', '--mup_base_width=64',
                         '--n_embd=64', '--n_head=1', '--n_ffn=160', f'--seed={seed}',
                         f'--out_dir={folder}/proxy-{seed}'], running)
        wanted = [(i, fault, seed) for i in range(len(rows)) for fault in (False, True)
                  for seed in seeds]
        try:
            bar = tqdm(total=len(wanted), unit='run', disable=None)
            for key, found in zip(wanted, pool.map(lambda key: one(*key), wanted)):
                results[key] = found
                bar.update()
        finally:
            for process in running:
                process.kill()
    return [row(sign, phases, *({seed: results[i, fault, seed] for seed in seeds}
                                for fault in (True, False)))
            for i, sign in enumerate(rows)]


def row(sign, phases, provoked, calm):
    """One sign's row, from {seed: warnings} of its runs."""
    first = [found[0][0] - phases[sign.after] for found in provoked.values() if found]
    says = next((found[0][1] for found in provoked.values() if found), '')
    return {**sign._asdict(), 'says': says, 'seen': len(first), 'steps later': first,
            'seeds': len(provoked), 'calm': [line for found in calm.values() for _, line in found]}


def table_of_signs(rows):
    """Lines of a Markdown table."""
    head = ('sign', 'look at', 'provoked by', 'seen in', 'steps later, median', 'the log says',
            'without it')
    lines = [f'| {" | ".join(head)} |', f'|{" --- |" * len(head)}']
    for each in rows:
        later = statistics.median(each['steps later']) if each['seen'] else ''
        calm = f'{len(each["calm"])} lines' if each['calm'] else 'nothing'
        lines.append(f'| {each["sign"]} | {each["look_at"]} | {each["provoked_by"]} | '
                     f'{each["seen"]} of {each["seeds"]} | {later} | {each["says"]} | {calm} |')
    return lines
