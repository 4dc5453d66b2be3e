"""What a run starts from, and what it refuses before it starts.

    check_knobs                 mistakes in the knobs end the program in one line
    start_of_run                a new run, one that goes on (resume), a branch of another
                                (init_from), a step to look at again (replay)
    open_folder, print_plan     its folder is locked, and what is going to happen is printed

`knobs` is the namespace of train.py's knobs (for model_config, a dict). This file never imports
train.py.
"""
import itertools
import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import (
    TrainState,
    begin_folder,
    changes,
    checkpoints,
    code_and_packages,
    read_checkpoint,
    read_log,
    take_folder,
)
from configurator import check_range, fail, unknown
from data_prep import prepare_missing
from distributed import load_state, print_once, rank_0_first, ranks
from documents import SPLITS
from fp8 import E4M3, E5M2, convert_to_float8
from hardware import has_bf16
from loader import check_ids, get_batch, open_data
from model import Xmodel, XmodelConfig
from tracker import check_tracker

# knobs that --resume lets change, since they do not decide what is learned; all others it refuses
FREE = {'out_dir', 'resume', 'replay', 'init_from', 'init_step', 'device', 'dtype', 'compile',
        'data_dir', 'sources', 'micro_batch_tokens', 'reduce_dtype', 'log_interval',
        'eval_interval', 'eval_rows', 'checkpoint_interval', 'keep', 'hang_seconds', 'tracker',
        'reference', 'reference_margin', 'fp8_monitor', 'activation_checkpointing'}


# --------------------------------------------------------------------------------------------------
# Knobs that cannot be right

AT_LEAST = {'steps': 0, 'batch': 1, 'block_size': 1, 'warmup': 0}
CHOICES = {'optimizer': ('adamw', 'muon'), 'decay': ('constant', 'linear', 'cosine', 'exponential')}
PHASE_KEYS = ('name', *AT_LEAST, 'data', *CHOICES, 'lr', 'embedding_lr')


def is_lr(value):
    return type(value) in (int, float) and 0 <= value < 1e9


def expected_of_phase(key, value, names):
    """What a phase's `key` should be instead of `value`; '' where it may be that."""
    if key == 'name':
        if isinstance(value, str) and names.count(value) == 1:
            return ''
        return 'a name of its own'
    if key in AT_LEAST:
        if type(value) is int and AT_LEAST[key] <= value < 2**31:
            return ''
        return f'an integer of at least {AT_LEAST[key]}, and below {2**31}'
    if key in CHOICES:
        if value in CHOICES[key]:
            return ''
        return f'one of {", ".join(CHOICES[key])}'
    if key in ('lr', 'embedding_lr'):
        if isinstance(value, tuple) and len(value) == 3 and all(map(is_lr, value)):
            return ''
        return '(start, peak, end) in units of the learning rate'
    if key == 'data':
        if isinstance(value, dict) and value and all(type(name) is str for name in value):
            return ''
        return '{data set: weight}'
    return 'left out: no phase has such a key'


def complete_phases(phases, steps_scale=1.0):
    """Fill in, in place, what phases may leave out, and multiply their steps and warmups.

    What is wrong with them ends the program in one line.
    """
    check_range({'steps_scale': steps_scale}, 0, 2**63, 'steps_scale')
    for phase in phases:
        if not isinstance(phase, dict):
            fail(f'phases: {phase!r} should be a dict, like those in config/proxy20m.py')
    names = [phase.get('name') for phase in phases]
    for phase in phases:
        phase.setdefault('warmup', 0)
        phase.setdefault('embedding_lr', phase.get('lr'))
        for key in (*PHASE_KEYS, *phase):
            value = phase.get(key)
            expected = expected_of_phase(key, value, names)
            if expected:
                fail(f'phase {phase.get("name")!r}: {key}={value!r} should be {expected}')
        for key in ('steps', 'warmup'):                          # what is there keeps one step
            phase[key] = round(phase[key] * steps_scale) or min(1, phase[key])
        if phase['warmup'] > phase['steps'] > 0:
            fail(f'phase {phase["name"]!r}: its warmup is longer than its steps={phase["steps"]}')
    phases[:] = [phase for phase in phases if phase['steps'] > 0]
    if not phases:
        fail('the curriculum (phases, steps_scale) is empty; a config with one: config/nano.py')


def check_knobs(knobs, world):
    """End the program in one line where the knobs cannot be right for `world` ranks.

    Their phases are those that complete_phases has left.
    """
    values = vars(knobs)
    for name in ('out_dir', 'data_dir'):
        if not values[name]:
            fail(f'{name} is empty, and should be a folder')
    check_range(values, 1, 2**63, 'log_interval', 'eval_interval', 'eval_rows',
                'checkpoint_interval', 'micro_batch_tokens')
    check_range(values, 1, 2**16, 'fp8_amax_history_len')
    check_range(values, 1, 2**22, 'hang_seconds')
    check_range(values, 0, 2**63, 'seed', 'learning_rate', 'embedding_lr',
                'weight_decay', 'grad_clip', 'keep', 'reference_margin')
    check_range(values, -16, 17, 'fp8_margin')
    check_range(values, 0, 1, 'beta1', 'beta2', 'momentum')
    check_range(values, -1, sum(phase['steps'] for phase in knobs.phases), 'replay')
    for phase in knobs.phases:
        if phase['batch'] % world:
            fail(f'phase {phase["name"]!r}: batch={phase["batch"]} cannot be shared out evenly '
                 f'among {world} ranks')
        if knobs.fp8 and phase['block_size'] % 16:
            fail(f'fp8: block_size of phase {phase["name"]!r} should be a multiple of 16')


# --------------------------------------------------------------------------------------------------
# The model

def computes_in_bf16(knobs, device):
    """Whether matmuls are in bf16: by the knob dtype or, with 'auto', where hardware has it."""
    if knobs.dtype == 'auto':
        return has_bf16(device.type)
    return knobs.dtype == 'bfloat16'


def model_config(knobs):
    """The XmodelConfig of knobs, here a dict; ValueError where no such model can be."""
    shape = {f.name: knobs[f.name] for f in fields(XmodelConfig) if f.name in knobs}
    return XmodelConfig(**shape, block_size=max(phase['block_size'] for phase in knobs['phases']))


def rows_of_a_micro_batch(rows, T, micro_batch_tokens):
    """As many of a rank's rows of T tokens as fit in micro_batch_tokens, in equal parts.

    (12, 512, 4096) -> 6: two micro-batches of 6 rows, as 8 would fit but do not divide 12.
    """
    most = max(1, min(rows, micro_batch_tokens // T))
    return max(r for r in range(1, most + 1) if rows % r == 0)


def delayed_scaling(model, knobs, start):
    """Turn the model's linears to FP8 and return their DelayedScaling; None with --fp8=False.

    Scales go on where the run does, unless the history has another length.
    """
    if not knobs.fp8:
        return None
    try:
        scaling = convert_to_float8(model, knobs.fp8 == 'dynamic', knobs.fp8_amax_history_len,
                                    knobs.fp8_margin, E4M3 if knobs.fp8_format == 'e4m3' else E5M2)
    except ValueError as e:
        fail(e)
    checkpoint = start.checkpoint
    if checkpoint and checkpoint['fp8'] and start.state.step == checkpoint['step'] and \
            knobs.fp8_amax_history_len == checkpoint['knobs']['fp8_amax_history_len']:
        scaling.load_state_dict(checkpoint['fp8'])
    return scaling


# --------------------------------------------------------------------------------------------------
# What a run starts from

@dataclass
class Start:
    """A new run has no checkpoint. One that resumes goes on in out_dir, from its newest one; one
    with init_from begins there from another run's; a replay starts before the step it looks at."""
    config: XmodelConfig
    data: dict                          # {name: loader.Dataset}
    checkpoint: dict | None             # as read_checkpoint returns it
    resuming: bool                      # true of a replay as well, where it has a checkpoint
    state: TrainState
    existing: list                      # checkpoints that out_dir held before
    lock: object = None                 # open as long as the run goes on

    def load_weights(self, model, phase):
        """Take the checkpoint's weights, if there is one, and say what the run begins with.

        phase: the one to begin in, which takes the moments as well if they are of its optimizer.
        """
        if not self.checkpoint:
            return
        model.load_state_dict(self.checkpoint.pop('model'))      # they are dropped from it
        moments = ''
        if phase['optimizer'] == self.state.optimizer:
            moments = f", {self.state.optimizer}'s state"
        print_once(f'begins with {self.checkpoint["path"]}: weights{moments}')

    def load_moments(self, optimizers):
        """Take the checkpoint's moments."""
        load_state(optimizers, self.checkpoint.pop('optimizer_state'))


def start_of_run(knobs, given, defaults):
    """The Start of this run, the same on all ranks; a mistake ends the program in one line.

    given: {knob: value} as the user has set them; its 'data' is added: sha256 of each data set.
    defaults: {knob: value}. Rank 0 comes first: it locks the folder, chooses the checkpoint for
    all, and makes data sets that are missing.
    """
    folder, start, lock = Path(knobs.out_dir), None, None

    def choose():
        nonlocal start, lock
        check_tracker(knobs.tracker)
        if knobs.replay < 0 and folder.is_dir():
            lock = take_folder(folder)           # before the checkpoint is chosen
        existing = checkpoints(folder)
        start = find_start(knobs, given, defaults, existing)
        return existing, start.checkpoint and start.checkpoint['path']

    existing, path = rank_0_first(choose)
    start = start or find_start(knobs, given, defaults, existing, path)
    start.lock = lock
    return start


def find_start(knobs, given, defaults, existing, path=''):
    """start_of_run on one rank. path: the checkpoint that rank 0 has chosen, on other ranks."""
    folder, replay = Path(knobs.out_dir), knobs.replay >= 0
    rank = ranks()[0]
    if replay:
        if not (folder / 'run.json').exists():
            fail(f'{folder} holds no run whose step could be looked at again')
        existing = [file for file in existing if int(file.stem[5:]) <= knobs.replay]
    elif rank == 0 and not knobs.resume and ((folder / 'log.jsonl').exists() or existing):
        fail(f'{folder} holds a run already: --resume goes on with it, --out_dir=DIR starts '
             'another')
    resuming = bool(existing) and (knobs.resume or replay)
    try:
        config = model_config(vars(knobs))
        if knobs.fp8:                                            # refused before data are made
            with torch.device('meta'):
                convert_to_float8(Xmodel(config))
    except ValueError as e:
        fail(e)
    checkpoint = None
    if resuming or knobs.init_from:
        if not path:
            path = existing[-1] if resuming else knobs.init_from
        try:
            checkpoint = usable_checkpoint(path, config, rank == 0, replay)
        except ValueError as e:
            advice = older_checkpoint(existing, config, replay) if knobs.resume else ''
            fail(f'{e}{advice}')
    refuse_sources_of_no_phase(knobs.sources, given['phases'])
    data = data_of_run(knobs, resuming)
    given['data'] = {name: dataset.meta['train']['sha256'] for name, dataset in data.items()}
    state = state_of(checkpoint, knobs, resuming)
    if resuming:
        refuse_changes(checkpoint, knobs, given, defaults)
    if checkpoint:
        total = sum(phase['steps'] for phase in knobs.phases)
        if 0 <= knobs.replay < state.step:
            fail(f'{folder} began at step {state.step}: there is no step {knobs.replay} to look at')
        if state.step >= total:
            advice = '' if resuming else ' (--init_step=0 starts anew with its weights)'
            fail(f'{checkpoint["path"]} is at step {state.step} of {total}: nothing is left to do'
                 + advice)
    if replay and not existing:
        check_first_start(folder, knobs, given, state.step)
    return Start(config, data, checkpoint, resuming, state, existing)


def usable_checkpoint(path, config, check, replay=False):
    """The checkpoint `path`; ValueError, in one line, where this model cannot go on from it.

    check: its checksums, and that weights are finite, unless a replay is to find out why they are
    not.
    """
    checkpoint = read_checkpoint(path, check)
    own = Path(checkpoint['path']).with_name('tokenizer.json')
    if own.exists():
        raise ValueError(f'{own}: a model with a tokenizer of its own cannot read our data sets')
    for line in changes(asdict(checkpoint['config']), asdict(config)):
        if not line.startswith(('block_size', 'muon_lr_scaling')):
            raise ValueError(f'{checkpoint["path"]} holds another model than this config: {line}')
    if check and not replay:
        for name, t in checkpoint['model'].items():
            if not t.isfinite().all():
                raise ValueError(f'{checkpoint["path"]}: {name} has values that are not finite')
    return checkpoint


def older_checkpoint(existing, config, replay):
    """What to do where a run's newest checkpoint is not usable; '' if no older one is either."""
    for n in range(len(existing) - 1, 0, -1):
        with suppress(ValueError):
            usable_checkpoint(existing[n - 1], config, True, replay)
            bad = ', '.join(file.name for file in existing[n:])
            return f'; --resume without {bad} goes on from {existing[n - 1].name}'
    return ''


def refuse_sources_of_no_phase(sources, phases):
    """End the program where a data set that sources names is in no phase's mixture."""
    used = list(dict.fromkeys(name for phase in phases for name in phase['data']))
    for name in sources:
        if name not in used:
            fail(f'sources.{name}: {unknown(name, used)}; a phase takes another data set by '
                 f'--phases.{phases[-1]["name"]}.data.{name}=WEIGHT')


def data_of_run(knobs, resuming):
    """{name: Dataset} of all phases. Rank 0 makes those that are missing and checks their ids and,
    for a new run, that they are what its sources make: one that resumes goes by their sha256."""
    names = list(dict.fromkeys(name for phase in knobs.phases for name in phase['data']))
    rank = ranks()[0]
    try:
        if rank == 0 and knobs.replay < 0:
            prepare_missing(knobs.data_dir, names, knobs.sources, knobs.vocab_size)
        sources = knobs.sources if rank == 0 and not resuming else {}
        data = open_data(knobs.data_dir, names, knobs.vocab_size, sources)
        if rank == 0:
            check_ids(knobs.data_dir, data)
        for phase in knobs.phases:                               # weights and lengths are possible
            get_batch(data, phase['data'], [0], phase['block_size'], knobs.seed)
            for name, split in itertools.product(phase['data'], SPLITS):
                data[name].n_windows(split, phase['block_size'])
    except ValueError as e:
        fail(e)
    if rank == 0:                                                # it reads all masks
        for phase in knobs.phases:
            refuse_without_completions(phase, data, knobs.completion_only)
    return data


def refuse_without_completions(phase, data, completion_only):
    """End the program where a phase has an SFT data set whose windows reach no completion; where
    prompts are learned as well, say so instead."""
    T = phase['block_size']
    for name, split in itertools.product(phase['data'], SPLITS):
        if not data[name].masks:
            continue
        counts = data[name].coverage(split, T)
        if counts['without_completion'] == counts['windows']:
            shortest = min(len(prompt) for prompt, _ in data[name].pairs(split))
            line = (f'phase {phase["name"]!r}: no window of {T} tokens of {name}\'s {split} split '
                    f'reaches a completion, as its prompts have {shortest} and more: '
                    f'--phases.{phase["name"]}.block_size={2 ** shortest.bit_length()}')
            if completion_only:
                fail(line)
            print_once(line)


def print_coverage(knobs, data):
    """Print what the windows of each phase leave out of each data set."""
    print_once(f'{"data":12} {"phase":9} {"window":>7} {"documents cut":>20} '
               f'{"tokens never seen":>18} {"windows without completion":>26}')
    for phase in knobs.phases:
        for name in phase['data']:
            n = data[name].coverage('train', phase['block_size'])
            cut = without = 'plain text'
            if data[name].masks:
                cut = f'{n["cut"]:,} of {n["documents"]:,}'
                without = f'{n["without_completion"]:,} of {n["windows"]:,}'
            print_once(f'{name:12} {phase["name"]:9} {phase["block_size"]:7} {cut:>20} '
                       f'{n["never_seen"] / n["tokens"]:18.1%} {without:>26}')


def state_of(checkpoint, knobs, resuming):
    """The TrainState to begin with; with init_step other than the checkpoint's, a fresh one."""
    if not checkpoint:
        return TrainState()
    if resuming or knobs.init_step < 0 or knobs.init_step == checkpoint['step']:
        return TrainState.from_checkpoint(checkpoint)
    return TrainState(step=knobs.init_step)


def refuse_changes(checkpoint, knobs, given, defaults):
    """--resume goes on with the same run: end the program where knobs differ that decide it, and
    print what else differs: other knobs, the code, packages.

    A knob that the checkpoint does not have, since it is older, had its default.
    """
    lines = changes(defaults | checkpoint['knobs'], given)
    for line in lines:
        if knob_of(line) not in FREE:
            fail(f'--resume goes on with the same run, but {line}; for a changed one: '
                 f'--init_from={checkpoint["path"]} --out_dir=NEW')
    if checkpoint['made_by']:
        lines += changes(checkpoint['made_by'], code_and_packages())
    for line in lines:
        if not line.startswith(('resume:', 'replay:')):
            print_once(f'resume: {line}')


def knob_of(line):
    """The knob that a line of `changes` is about: 'phases.decay.lr: 1 -> 2' -> 'phases'."""
    return line.split(':')[0].split('.')[0]


def check_first_start(folder, knobs, given, step):
    """End the program unless a replay without a checkpoint begins as the run in `folder` did."""
    try:
        about = json.loads((folder / 'run.json').read_text())
        first_knobs, first_step = dict(about['knobs']), about['first_step']
    except (ValueError, LookupError, TypeError):
        fail(f'{folder}/run.json is damaged, and there is no checkpoint at or before step '
             f'{knobs.replay} to begin with')
    now = json.loads(json.dumps(given))                          # tuples become lists
    lines = changes(first_knobs | {'first_step': first_step}, now | {'first_step': step})
    lines = [line for line in lines if knob_of(line) not in FREE - {'init_from'}]
    if lines:
        fail(f'{folder} has no checkpoint at or before step {knobs.replay}, and it began otherwise '
             f'than this would, by its run.json: {lines[0]}')


def open_folder(start, knobs, given, device):
    """Begin in out_dir, on rank 0, which writes run.json; returns the log of --reference, or [].

    Nothing is written for a replay.
    """
    if knobs.replay >= 0:
        return []
    folder = Path(knobs.out_dir)
    world = ranks()[1]
    proxy_log = []

    def begin():
        if knobs.reference:
            proxy_log.extend(read_log(knobs.reference))
        start.lock = start.lock or take_folder(folder)
        if checkpoints(folder) != start.existing or \
                ((folder / 'log.jsonl').exists() and not knobs.resume):
            fail(f'{folder} holds a run by now, which began when this one did')
        about = {'knobs': given, 'first_step': start.state.step, 'argv': sys.argv,
                 'device': str(device), 'bf16': computes_in_bf16(knobs, device), 'ranks': world,
                 'threads': torch.get_num_threads(), **code_and_packages()}
        begin_folder(folder, start.state.step if start.resuming else 0, about)

    if world > 1:
        dist.barrier()                                           # all have come so far
    rank_0_first(begin)
    return proxy_log


def print_plan(knobs, start, model, device):
    """Print the table of phases, and what is trained on what and where."""
    print_once(f'{"phase":9} {"steps":>8} {"batch x length":>15} {"tokens":>19}  optimizer  lr')
    all_tokens = 0
    for phase in knobs.phases:
        tokens = phase['steps'] * phase['batch'] * phase['block_size']
        all_tokens += tokens
        low, peak, end = (f'{knobs.learning_rate * times:.3g}' for times in phase['lr'])
        lr = f'{low} -> {peak}' if phase['warmup'] else peak
        if phase['decay'] == 'constant':
            lr += ', constant'
        else:
            lr += f' -> {end}, {phase["decay"]}'
        print_once(f'{phase["name"]:9} {phase["steps"]:8,} {phase["batch"]:>6} x '
                   f'{phase["block_size"]:<6} {tokens:19,}  {phase["optimizer"]:9}  {lr}')
    for name, dataset in start.data.items():
        print_once(f'{knobs.data_dir}/{name}: {dataset.meta["train"]["tokens"]:,} tokens of '
                   f'{dataset.meta["sources"][0]}')
    if ranks()[0] == 0:                                          # it reads all masks
        print_coverage(knobs, start.data)
    N = model.num_params(embedding=False)
    print_once(f'{model.num_params():,} parameters, {N:,} outside the embedding; '
               f'{all_tokens:,} tokens, {all_tokens / N:.3g} a parameter outside it')
    formats = 'bf16' if computes_in_bf16(knobs, device) else 'fp32'
    formats += {False: '', True: ', FP8 in blocks', 'dynamic': ', dynamic FP8 in blocks'}[knobs.fp8]
    world = ranks()[1]
    if world > 1:
        formats += f', {world} ranks that add up gradients in {knobs.reduce_dtype}, each'
    else:
        formats += ','
    goal = f'looks at step {knobs.replay} of' if knobs.replay >= 0 else 'to'
    note = ''
    if knobs.resume and not start.resuming:
        note = ', where there is no checkpoint yet'
    threads = torch.get_num_threads()
    print_once(f'{device}, {formats} {threads} threads, {goal} {Path(knobs.out_dir)}{note}')
