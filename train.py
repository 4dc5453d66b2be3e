"""Train a model through the Xmodel-2.5 curriculum (arXiv 2511.19496): warmup, stable, decay, long.

    python train.py config/nano.py               # a minute: every phase, in small
    python train.py config/proxy20m.py           # the 20M proxy on a laptop, under 40 minutes
    torchrun --standalone --nproc_per_node=8 train.py config/xmodel25.py      # the full run
    python train.py config/proxy20m.py --resume  # go on after an interruption, bit for bit
    python train.py --help                       # every knob with its default

Without a config file it is config/proxy20m.py. Config files, and then --key=value, override the
knobs below; --phases.NAME.KEY=value reaches into the curriculum. What a run writes is in out_dir:
log.jsonl, run.json and checkpoints, step_N.pt.
"""
import copy
import ctypes
import faulthandler
import io
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stderr, suppress
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import (
    begin_folder,
    changes,
    checkpoints,
    made_by,
    prune,
    read_checkpoint,
    read_log,
    step_of,
    take_folder,
    usable_device,
    write_checkpoint,
)
from configurator import check_range, configure, fail, knob_values
from data_prep import (
    check_ids,
    get_batch,
    get_windows,
    open_data,
    prepare_missing,
    windows_before,
)
from fp8 import E4M3, E5M2, convert_to_float8
from model import Xmodel, XmodelConfig
from muon import gather_state, has_bf16, load_state, make_optimizers, ranks, step_all

# --- run ---
out_dir = 'out/run'           # folder of this run; never overwrites another's
resume = False                # go on from the newest checkpoint in out_dir
init_from = ''                # begin with this checkpoint's weights, at its step of the curriculum
replay = -1                   # only look at this step of the run in out_dir again; writes nothing
init_step = -1                # with init_from: begin at this step; if not its own, fresh optimizers
seed = 1337                   # fixes init and the order of the data
device = 'auto'               # 'auto' takes cuda, mps or cpu, whichever is there
dtype = 'auto'                # 'auto' | 'bfloat16' | 'float32': of matmuls; weights are always fp32
compile = 'auto'              # 'auto' | True | False: torch.compile the blocks and the loss
activation_checkpointing = False        # compute blocks again in the backward pass: less memory
# --- FP8 matmuls in the blocks (see fp8.py) ---
fp8 = False                   # False | True | 'dynamic': delayed scaling, or by a tensor's own amax
fp8_amax_history_len = 128    # steps whose largest amax decides a scale
fp8_margin = 0                # powers of two left free above that amax
fp8_format = 'hybrid'         # 'hybrid' | 'e4m3': hybrid has E5M2 for gradients
fp8_monitor = False           # log what saturates or becomes 0, every log_interval steps
# --- data ---
data_dir = 'data'             # holds one folder a data set, as data_prep.py writes them
sources = {}                  # data set -> arguments of data_prep.py that make it if it is missing
completion_only = False       # SFT data: loss on completions only, instead of on every token
# --- model (see model.XmodelConfig) ---
n_layer = 24
n_head = 4
n_kv_head = 1
n_embd = 256
n_ffn = 640
vocab_size = 16_384
rope_theta = 500_000.0
norm_eps = 1e-5
mup_base_width = 256
input_scale = 12.0
output_scale = 1.0
residual_scale = 1.4
attention_scale = 1.0
init_std = 0.1
mup_rules = 'textbook'        # 'textbook' | 'authors' | 'sp': see mup_table in model.py
mup_break = ''                # one rule of µP to break, by its name there
muon_lr_scaling = '1/sqrt(m)'  # '1/m' | '1/sqrt(m)' | 'const': Muon's learning rate across widths
# --- curriculum: a list of phases, each a dict like those in config/proxy20m.py ---
phases = []                   # keys: see check_phases
steps_scale = 1.0             # multiplies every phase's steps and warmup, to try a run in small
micro_batch_tokens = 4096     # most tokens in one forward pass of one rank; the rest accumulates
reduce_dtype = 'float32'      # 'float32' | 'bfloat16': in which ranks add up their gradients
# --- optimizer ---
learning_rate = 0.01          # what 1 in a phase's lr means, at the base width (µP scales it)
embedding_lr = 0.01           # the same for the tied embedding; unused with mup_rules='sp'
weight_decay = 0.1            # times the learning rate, on matrices and embedding
beta1 = 0.9
beta2 = 0.95
momentum = 0.95               # Muon's
muon_split = False            # orthogonalise q, k, v and gate, up one by one
grad_clip = 1.0               # largest gradient norm; 0.0 leaves gradients alone
# --- log and checkpoints ---
log_interval = 10             # steps between lines on a plain output; log.jsonl has every step
eval_interval = 100           # steps between validations; each phase's end has one as well
eval_rows = 16                # rows of each validation set
checkpoint_interval = 100     # steps between checkpoints; each phase's end has one as well
keep = 2                      # checkpoints to keep besides those of phase ends
hang_seconds = 1800           # a rank that does not come on for so long ends, with its stack
reference = ''                # another run's folder, as the proxy's, to compare losses with
reference_margin = 0.2        # nats above it from which validations say so

# knobs that --resume lets change, since they do not decide what is learned; all others it refuses
FREE = {'out_dir', 'resume', 'replay', 'init_from', 'init_step', 'device', 'dtype', 'compile',
        'data_dir', 'sources', 'micro_batch_tokens', 'reduce_dtype', 'log_interval',
        'eval_interval', 'eval_rows', 'checkpoint_interval', 'keep', 'hang_seconds', 'reference',
        'reference_margin', 'fp8_monitor', 'activation_checkpointing'}


# --------------------------------------------------------------------------------------------------
# The schedule: pure functions of the phases

def phase_at(step):
    """(phase, number of its first step) of the curriculum's step number `step`, counted from 0."""
    first = 0
    for phase in phases:
        if step < first + phase['steps']:
            return phase, first
        first += phase['steps']
    raise ValueError(f'step {step} is past the curriculum, which has {first} steps')


def lr_at(step):
    """(learning rate, embedding's learning rate) at a step, before µP's factors (model.mup_table).

    Warmup-Stable-Decay: a phase's lr = (start, peak, end), in units of the knobs learning_rate and
    embedding_lr. Linear from start to peak over its warmup; then, at share r of the steps left,
    'constant' peak, 'linear' to end, or 'exponential', which in Megatron's WSD is
    end + (2 · 0.5^r - 1)(peak - end), shifted so as to reach end (Xmodel-2.5's configuration).
    """
    phase, first = phase_at(step)
    i, warmup = step - first, phase['warmup']
    r = (i - warmup) / max(1, phase['steps'] - warmup)
    left = {'constant': 1, 'linear': 1 - r, 'exponential': 2 * 0.5**r - 1}[phase['decay']]
    return tuple(knob * (start + (peak - start) * i / warmup if i < warmup
                         else end + left * (peak - end))
                 for knob, (start, peak, end) in ((learning_rate, phase['lr']),
                                                  (embedding_lr, phase['embedding_lr'])))


def rows_of_a_micro_batch(share, T):
    """As many of a rank's `share` rows of T tokens as micro_batch_tokens allow, in equal parts."""
    most = max(1, min(share, micro_batch_tokens // T))
    return max(r for r in range(1, most + 1) if share % r == 0)


def check_phases(phases, steps_scale=1.0):
    """Fill in what phases may leave out and scale their steps; refuse in one line what is wrong."""
    if wrong := [phase for phase in phases if not isinstance(phase, dict)]:
        fail(f'phases: {wrong[0]!r} should be a dict, like those in config/proxy20m.py')
    names = [phase.get('name') for phase in phases]
    lowest = {'steps': 0, 'batch': 1, 'block_size': 1, 'warmup': 0}
    choices = {'optimizer': ('adamw', 'muon'), 'decay': ('constant', 'linear', 'exponential')}
    lrs = ('lr', 'embedding_lr')
    for phase in phases:
        phase.setdefault('warmup', 0)
        phase.setdefault('embedding_lr', phase.get('lr'))
        for key in ('name', *lowest, 'data', *choices, *lrs, *phase):
            value, right = phase.get(key), ''
            if key == 'name' and (not isinstance(value, str) or names.count(value) > 1):
                right = 'a name of its own'
            elif key in lowest and (type(value) is not int or not lowest[key] <= value < 2**31):
                right = f'an integer of at least {lowest[key]}, and below {2**31}'
            elif key in choices and value not in choices[key]:
                right = f'one of {", ".join(choices[key])}'
            elif key in lrs and not (isinstance(value, tuple) and len(value) == 3 and all(
                    type(v) in (int, float) and 0 <= v < 1e9 for v in value)):
                right = '(start, peak, end) in units of the learning rate'
            elif key == 'data' and not (isinstance(value, dict) and value and
                                        all(type(name) is str for name in value)):
                right = '{data set: weight}'
            elif key not in ('name', *lowest, 'data', *choices, *lrs):
                right = 'left out: no phase has such a key'
            if right:
                fail(f'phase {phase.get("name")!r}: {key}={value!r} should be {right}')
        for key in ('steps', 'warmup'):
            phase[key] = round(phase[key] * steps_scale) or min(1, phase[key])
        if phase['warmup'] > phase['steps'] > 0:
            fail(f'phase {phase["name"]!r}: its warmup is longer than its steps={phase["steps"]}')
    phases[:] = [phase for phase in phases if phase['steps'] > 0]
    if not phases:
        fail('the curriculum (phases, steps_scale) is empty; a config with one: config/nano.py')


# --------------------------------------------------------------------------------------------------
# The run

def end_if_hung(seconds):
    """End this process, with its stack, unless it is called again within so many seconds."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def evaluate(model, data, phase, rows, device, autocast):
    """data set -> mean loss in nats over eval_rows windows, spread over its validation split."""
    losses, T, (rank, world) = {}, phase['block_size'], ranks()
    for name in phase['data']:
        end_if_hung(2 * hang_seconds)
        there = data[name].n_windows('val', T)
        n = min(eval_rows, there)
        found = torch.zeros(2, dtype=torch.float64)              # sum of losses, how many
        # in micro-batches of one shape, the last one with rows that do not count; each rank some
        for i in range(rank * rows, n, world * rows):
            windows = [min(j, n - 1) * there // n for j in range(i, i + rows)]
            x, y = get_windows(data[name], 'val', windows, T, completion_only)
            y[n - i:] = -1
            with torch.no_grad(), autocast:
                loss = model(x.to(device), y.to(device))[1].item()
            targets = int((y >= 0).sum())
            found += torch.tensor([loss * targets, targets], dtype=torch.float64)
        if world > 1:
            found = found.to(device)
            dist.all_reduce(found)
        losses[name] = (found[0] / found[1].clamp(min=1)).item()
    return losses


def reference_gap(proxy, recent, tokens, step_tokens):
    """Mean of the last losses less that of the log `proxy` over the same tokens, in nats.

    recent: losses of steps of step_tokens tokens each, of which the last one ended at `tokens`.
    None where the log has not come so far.
    """
    first = tokens - len(recent) * step_tokens
    if not proxy or proxy[-1]['tokens'] < tokens:
        return None
    theirs = [entry['loss'] for entry in proxy if first < entry['tokens'] <= tokens]
    return statistics.fmean(recent) - statistics.fmean(theirs) if theirs else None


def tell(line):
    """Print a line beside the progress bar; that stdout takes none (a full disk) ends no run."""
    try:
        tqdm.write(line)
    except OSError:                                              # log.jsonl has every step
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell_of_gradients(model, say):
    """Say which parameters have the largest gradients, and whose are not finite."""
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    odd = [name for name, norm in norms.items() if not math.isfinite(norm)]
    largest = sorted(norms, key=norms.get)[:-6:-1]
    say('gradients: ' + ', '.join(f'{name} {norms[name]:.3g}' for name in odd[:5] or largest)
        + (f' (of {len(odd)} that are not finite)' if odd else ', the largest'))


def add_up(state, bucket):
    """DDP's hook for a bucket of gradients: their sum over the ranks, in reduce_dtype."""
    # (in fp32 the bucket itself)
    sent = dist.all_reduce(bucket.buffer().to(getattr(torch, reduce_dtype)), async_op=True)
    return sent.get_future().then(lambda future: bucket.buffer().copy_(future.value()[0]))


def keep_checkpoint(path, state, ends):
    """Write a checkpoint; then delete those before it that are no longer to be kept."""
    write_checkpoint(path, state)
    if all(t.isfinite().all() for t in state['model'].values()):  # else they are the way back
        prune(path.parent, keep, ends)


def model_config(knobs):
    """The XmodelConfig of these knobs; ValueError where no such model can be."""
    shape = {f.name: knobs[f.name] for f in fields(XmodelConfig) if f.name in knobs}
    return XmodelConfig(**shape, block_size=max(phase['block_size'] for phase in knobs['phases']))


def read_start(path, config, check=True):
    """The checkpoint `path`; ValueError, in one line, where this model cannot go on from it."""
    start = read_checkpoint(path, check)
    if (own := Path(start['path']).with_name('tokenizer.json')).exists():
        raise ValueError(f'{own}: a model with a tokenizer of its own cannot read our data sets')
    for line in changes(asdict(start['config']), asdict(config)):
        if not line.startswith(('block_size', 'muon_lr_scaling')):
            raise ValueError(f'{start["path"]} holds another model than this config: {line}')
    for name, t in start['model'].items() if check and replay < 0 else ():       # or to see why
        if not t.isfinite().all():
            raise ValueError(f'{start["path"]}: {name} has values that are not finite')
    return start


def way_on(there, config):
    """What to do where a run's last checkpoint is none to go on from; '' if no other is."""
    for n in range(len(there) - 1, 0, -1):
        with suppress(ValueError):
            read_start(there[n - 1], config)
            return (f'; --resume without {", ".join(file.name for file in there[n:])} goes on from '
                    f'{there[n - 1].name}')
    return ''


def set_up(defaults, knobs, there, rank=0, path=''):
    """(model's config, data, checkpoint to start from or None, whether that resumes, first step).

    there: the checkpoints in out_dir; path: the one that rank 0 starts from. A mistake ends the
    program in one line. Rank 0, which comes first, makes data sets that are missing, and tells what
    the others need not repeat.
    """
    run = Path(out_dir)
    if replay >= 0:
        if not (run / 'run.json').exists():
            fail(f'{run} holds no run whose step could be looked at again')
        there = [file for file in there if int(file.stem[5:]) <= replay]
    elif rank == 0 and not resume and (Path(run, 'log.jsonl').exists() or there):
        fail(f'{run} holds a run already: --resume goes on with it, --out_dir=DIR starts another')
    resuming, start, step = (resume or replay >= 0) and bool(there), None, 0
    names = list(dict.fromkeys(name for phase in phases for name in phase['data']))
    try:
        config = model_config(globals())
        if fp8:                                                  # before data are made
            with torch.device('meta'):
                convert_to_float8(Xmodel(config))
        try:
            if resuming or init_from:
                start = read_start(path or (there[-1] if resuming else init_from), config,
                                   rank == 0)
        except ValueError as e:
            fail(f'{e}{way_on(there, config) if resume else ""}')
        if rank == 0 and replay < 0:
            prepare_missing(data_dir, names, sources, vocab_size)
        data = open_data(data_dir, names, vocab_size, sources)
        if rank == 0:
            check_ids(data_dir, data)
        for phase in phases:
            get_batch(data, phase['data'], [0], phase['block_size'], seed)     # weights are fit
            for name, split in itertools.product(phase['data'], ('train', 'val')):
                data[name].n_windows(split, phase['block_size'])
    except ValueError as e:
        fail(e)
    knobs['data'] = {name: data[name].meta['train']['sha256'] for name in names}
    if start:
        # a knob that there was not then has its default
        lines = changes(defaults | start['knobs'], knobs) if resuming else []
        for line in lines:
            if line.split(':')[0].split('.')[0] not in FREE:
                fail(f'--resume goes on with the same run, but {line}; for a changed one: '
                     f'--init_from={start["path"]} --out_dir=NEW')
        lines += changes(start['made_by'], made_by()) if resuming and start['made_by'] else []
        for line in lines:
            if rank == 0 and not line.startswith(('resume:', 'replay:')):
                tell(f'resume: {line}')
        step = start['step'] if resuming or init_step < 0 else init_step
        if 0 <= replay < step:
            fail(f'{run} began at step {step}: there is no step {replay} to look at')
        total = sum(phase['steps'] for phase in phases)
        if step >= total:
            fail(f'{start["path"]} is at step {step} of {total}: nothing is left to do'
                 + (' (--init_step=0 starts anew with its weights)' if not resuming else ''))
    if replay >= 0 and not there:                                # then from where it began
        try:
            told = json.loads((run / 'run.json').read_text())
            told = {'knobs': dict(told['knobs']), 'first_step': told['first_step']}
        except (ValueError, LookupError, TypeError):
            fail(f'{run}/run.json is damaged, and there is no checkpoint at or before step '
                 f'{replay} to begin with')
        now, then = ({k: v for k, v in found.items() if k not in FREE - {'init_from'}}
                     for found in (json.loads(json.dumps(knobs)), told['knobs']))
        if now != then or step != told['first_step']:
            fail(f'{run} has no checkpoint at or before step {replay}, and it began, or last went '
                 'on, otherwise than this would, by its run.json')
    return config, data, start, resuming, step


def tell_of_disk(e):
    """End the program in one line for an OSError: a full disk, a folder that is read-only."""
    fail(f'{e.filename or out_dir}: {e.strerror or e}; what was saved before is whole')


def rank_0_first(work, rank, world):
    """Give all ranks what work() gives on rank 0; where it ends the program there, all end."""
    found = code = None
    if rank == 0:
        try:
            try:
                found = work()
            except OSError as e:
                tell_of_disk(e)
        except SystemExit as e:
            code = e.code
    told = [found, code]
    if world > 1:
        dist.broadcast_object_list(told)
    if told[1] is not None:
        sys.exit(told[1])
    return told[0]


def check_knobs(world):
    """End the program in one line where the knobs cannot be right for so many ranks."""
    check_range(globals(), 1, 2**63, 'log_interval', 'eval_interval', 'eval_rows',
                'checkpoint_interval', 'micro_batch_tokens')
    check_range(globals(), 1, 2**16, 'fp8_amax_history_len')
    check_range(globals(), 1, 2**22, 'hang_seconds')
    check_range(globals(), 0, 2**63, 'seed', 'steps_scale', 'learning_rate', 'embedding_lr',
                'weight_decay', 'grad_clip', 'keep', 'reference_margin')
    check_range(globals(), -16, 17, 'fp8_margin')
    check_range(globals(), 0, 1, 'beta1', 'beta2', 'momentum')
    check_phases(phases, steps_scale)
    check_range(globals(), -1, sum(phase['steps'] for phase in phases), 'replay')
    for phase in phases:
        if phase['batch'] % world:
            fail(f'phase {phase["name"]!r}: batch={phase["batch"]} cannot be shared out evenly '
                 f'among {world} ranks')
        if fp8 and phase['block_size'] % 16:
            fail(f'fp8: block_size of phase {phase["name"]!r} should be a multiple of 16')


def main(defaults, knobs, rank, world):
    """Train with these knobs, which are the globals as well; every rank its share of each batch."""
    total = sum(phase['steps'] for phase in phases)
    say = tell if rank == 0 else lambda line: None

    # --- device and dtype: bf16 matmuls where the hardware has them, fp32 weights everywhere ---
    where = device if device != 'auto' else 'cuda' if torch.cuda.is_available() else \
        'mps' if torch.backends.mps.is_available() else 'cpu'
    where = usable_device(f'cuda:{os.environ["LOCAL_RANK"]}' if where == 'cuda' and world > 1
                          else where)
    if where.type == 'cuda':
        torch.cuda.set_device(where)
    bf16 = has_bf16(where.type) if dtype == 'auto' else dtype == 'bfloat16'
    autocast = torch.autocast(where.type, torch.bfloat16) if bf16 else nullcontext()
    if world > 1:
        dist.init_process_group('nccl' if where.type == 'cuda' else 'gloo',
                                timeout=timedelta(seconds=3 * hang_seconds))

    # --- what the run starts from: nothing, its own newest checkpoint, or another run's ---
    run, log_file, lock, found = Path(out_dir), Path(out_dir, 'log.jsonl'), None, None

    def choose():
        nonlocal lock, found
        # locked before the checkpoint is chosen, which is rank 0's choice for all
        lock = take_folder(run) if replay < 0 and run.is_dir() else None
        there = checkpoints(run)
        found = set_up(defaults, knobs, there)
        return there, found[2] and found[2]['path']

    there, path = rank_0_first(choose, rank, world)
    config, data, start, resuming, step = found or set_up(defaults, knobs, there, rank, path)
    if replay >= 0:
        total = replay + 1

    torch.manual_seed(seed)
    try:
        model = Xmodel(config).to(where)
    except RuntimeError as e:                                    # the allocator's
        fail(f'{where} cannot hold this model: {str(e).splitlines()[0]}')
    tokens, kind, optimizers = 0, None, None                     # kind: 'adamw' or 'muon'
    recent, watch = [], (-50, 0.0)          # last losses; (change of optimizer, limit after it)
    if start:
        model.load_state_dict(start.pop('model'))
        if step == start['step']:
            tokens, kind = start['tokens'], start['optimizer']
            recent, watch = start['recent'], start['watch']
        say(f'begins with {start["path"]}: weights'
            + (f", {kind}'s state" if kind == phase_at(step)[0]['optimizer'] else ''))
    model.activation_checkpointing = activation_checkpointing
    scaling = None
    if fp8:
        try:
            scaling = convert_to_float8(model, fp8 == 'dynamic', fp8_amax_history_len, fp8_margin,
                                        E4M3 if fp8_format == 'e4m3' else E5M2)
        except ValueError as e:
            fail(e)
        if start and start['fp8'] and step == start['step'] and fp8_amax_history_len == \
                start['knobs']['fp8_amax_history_len']:          # else a new history begins
            scaling.load_state_dict(start['fp8'])

    proxy = []

    def begin():
        nonlocal lock, proxy
        proxy = read_log(reference) if reference else []
        lock = lock or take_folder(run)                          # kept open to the end
        if checkpoints(run) != there or log_file.exists() and not resume:
            fail(f'{run} holds a run by now, which began when this one did')
        begin_folder(run, step if resuming else 0, {
            'knobs': knobs, 'first_step': step, 'argv': sys.argv, 'device': str(where),
            'bf16': bf16, 'ranks': world, 'threads': torch.get_num_threads(), **made_by()})

    if replay < 0:
        if world > 1:
            dist.barrier()                                       # all have got so far
        rank_0_first(begin, rank, world)

    # --- the table of what is going to happen ---
    size = [phase['steps'] * phase['batch'] * phase['block_size'] for phase in phases]  # in tokens
    say(f'{"phase":9} {"steps":>8} {"batch x length":>15} {"tokens":>19}  optimizer  lr')
    for phase, phase_tokens in zip(phases, size):
        low, peak, end = (f'{learning_rate * times:.3g}' for times in phase['lr'])
        lr = (f'{low} -> ' if phase['warmup'] else '') + peak
        lr += f' -> {end}, {phase["decay"]}' if phase['decay'] != 'constant' else ', constant'
        say(f'{phase["name"]:9} {phase["steps"]:8,} {phase["batch"]:>6} x {phase["block_size"]:<6} '
            f'{phase_tokens:19,}  {phase["optimizer"]:9}  {lr}')
    for name, d in data.items():
        say(f'{data_dir}/{name}: {d.meta["train"]["tokens"]:,} tokens of {d.meta["sources"][0]}')
    N = model.num_params(embedding=False)
    say(f'{model.num_params():,} parameters, {N:,} outside the embedding; '
        f'{sum(size):,} tokens, {sum(size) / N:.3g} a parameter outside it')
    formats = ('bf16' if bf16 else 'fp32') + {False: '', True: ', FP8 in blocks',
                                              'dynamic': ', dynamic FP8 in blocks'}[fp8]
    say(f'{where}, {formats}, '
        + (f'{world} ranks that add up gradients in {reduce_dtype}, each ' if world > 1 else '')
        + f'{torch.get_num_threads()} threads, '
        + (f'looks at step {replay} of' if replay >= 0 else 'to') + f' {run}'
        + (', where there is no checkpoint yet' if resume and not resuming else ''))

    # Compiling pays where eager would take minutes. On macOS and MPS users report NaN losses.
    flops = [n * model.flops_per_token(phase['block_size']) for phase, n in zip(phases, size)]
    compiler = sys.platform == 'linux' and any(map(shutil.which, ('g++', 'c++', 'clang++')))
    pays = where.type == 'cuda' or (where.type == 'cpu' and compiler and sum(flops) > 2e13)
    compiling = pays if compile == 'auto' else compile

    # --- the loop ---
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    # Never freed: that would end gloo's group while holding Python's lock, and the group waits for
    # threads of which one may want that lock to drop a tensor: a finished rank would hang.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(net))
    if world > 1:
        net.register_comm_hook(None, add_up)
    bar = tqdm(total=total, initial=step, unit='step', disable=True if rank else None)
    ends = list(itertools.accumulate(phase['steps'] for phase in phases))
    phase, compiled, skipped, speed = None, None, 0, []          # speed: FLOP/s of steps
    signals, writer, writing, saved = [], ThreadPoolExecutor(1), None, step

    def save():
        """Write a checkpoint, from a copy, while training goes on; first the last one has to be."""
        nonlocal writing, saved
        end_if_hung(2 * hang_seconds)
        saved = step
        if writing:
            writing.result()
        moments = gather_state(optimizers)                       # from all ranks
        if rank == 0:
            state = {'model': {k: t.to('cpu', copy=True) for k, t in model.state_dict().items()},
                     'config': asdict(config), 'step': step, 'tokens': tokens, 'recent': recent,
                     'watch': watch, 'knobs': knobs, 'made_by': made_by(), 'optimizer': kind,
                     'fp8': scaling and copy.deepcopy(scaling.state_dict()),
                     'optimizer_state': moments}
            writing = writer.submit(keep_checkpoint, run / f'step_{step}.pt', state, ends)

    def on_signal(number, _):
        # Ctrl-C for the second time; but torchrun passes the first one on to those who had it
        if number == signal.SIGINT and signals and time.monotonic() - signals[0][1] > 1:
            raise KeyboardInterrupt
        signals.append((number, time.monotonic()))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:        # by nohup
            signal.signal(number, on_signal)
    while step < total:
        # A hang ends the job: torchrun ends the others and names the rank. From where ranks wait
        # for one another on, they have twice the time: one that hangs in its data ends first.
        end_if_hung(hang_seconds)
        if phase is not phase_at(step)[0]:                       # a phase begins, or this run does
            phase, first = phase_at(step)
            T, share = phase['block_size'], phase['batch'] // world
            rows = rows_of_a_micro_batch(share, T)
            drawn, note = windows_before(phases, phase, seed), None
            if optimizers is None or kind != phase['optimizer']:
                optimizers = make_optimizers(phase['optimizer'], model.param_groups(weight_decay),
                                             (beta1, beta2), momentum, muon_split,
                                             torch.bfloat16 if bf16 else torch.float32)
                if kind == phase['optimizer']:
                    try:
                        load_state(optimizers, start.pop('optimizer_state'))
                    except ValueError as e:
                        fail(f'{start["path"]}: {e}; --init_from with another --init_step begins '
                             'with a fresh optimizer')
                elif kind:
                    note = f'optimizer {kind} -> {phase["optimizer"]}, with fresh state'
                    # a spike: ten losses (so not two of a new mixture) 4 deviations up
                    if recent:
                        watch = (step, statistics.fmean(recent) + 4 * statistics.pstdev(recent))
                kind = phase['optimizer']
            say(f'step {step}: phase {phase["name"]}' + (f', {note}' if note else ''))

        # --- data: this rank's rows of the global batch, cut into micro-batches of (rows, T) ---
        rows_of_step = [(step - first) * phase['batch'], (step - first + 1) * phase['batch']]
        row = rows_of_step[0] + rank * share
        micro = [get_batch(data, phase['data'], range(r, r + rows), T, seed, drawn, completion_only)
                 for r in range(row, row + share, rows)]
        sizes = [int((y >= 0).sum()) for _, y in micro]          # targets of each
        if replay < 0:                                           # tells who hangs, and since when
            (run / f'heartbeat_{rank}').write_text(f'step {step}, {time.ctime()}\n')
        # (one message for both: how many targets, and whether to end)
        counts = torch.tensor([float(sum(sizes)), float(len(signals))], device=where)
        end_if_hung(2 * hang_seconds)
        if world > 1:
            dist.all_reduce(counts)
        targets, signalled = counts[0].clamp(min=1), counts[1]   # (prompts alone have no target)
        if signalled:                                            # some rank is to end
            break
        graph = rows, T, scaling and scaling.own_amax
        if compiling and graph != compiled:
            say(model.try_compiled(*(t.to(where) for t in micro[0]), autocast))
            compiled = graph
            if scaling:
                torch._foreach_zero_(scaling.amaxes)             # those of that trial

        # --- forward and backward: each micro-batch weighs as many targets as it has ---
        began = time.perf_counter()                              # which nobody sets back
        loss = torch.zeros((), device=where)
        if scaling:
            scaling.watch(fp8_monitor and step % log_interval == 0)
        # names the operation (of compiled blocks, the block) whose gradient is the first NaN
        torch.autograd.set_detect_anomaly(step == replay)
        if step == replay:
            say(f'step {step}: rows {rows_of_step[0]} to {rows_of_step[1] - 1} of phase '
                f'{phase["name"]}')
        for i, ((x, y), size) in enumerate(zip(micro, sizes), 1):
            last = world == 1 or i == len(micro)                 # ranks add gradients up only once
            with nullcontext() if last else net.no_sync():
                with autocast:
                    part = net(x.to(where), y.to(where))[1]
                try:
                    (part * (size / targets)).backward()
                except RuntimeError as e:                        # by set_detect_anomaly
                    if step != replay:
                        raise
                    fail(f'micro-batch {i} of {len(micro)} has loss {part.item()}; {e}')
            loss += part.detach() * (size / targets)
        if world > 1:
            dist.all_reduce(loss)
        if step == replay:
            tell_of_gradients(model, say)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)

        lrs = dict(zip(('learning_rate', 'embedding_lr'), lr_at(step)))
        loss, grad_norm = loss.item(), grad_norm.item()
        amax = scaling.collect() if scaling else torch.zeros(1)
        if math.isfinite(loss + grad_norm) and amax.isfinite().all():
            step_all(optimizers, lrs)
            skipped = 0
            if scaling:
                scaling.update(amax)
        else:
            skipped += 1                                         # in a row
            what = (f'it has loss {loss}, gradient norm {grad_norm}'
                    + (scaling.trace(amax) + '; with FP8 look at the type of the weights (fp32) '
                       f'and at fp8_amax_history_len={fp8_amax_history_len} (128)'
                       if scaling else ''))
            say(f'step {step} is skipped: {what}; --replay={step} looks at it again')
            model.zero_grad(set_to_none=False)
        if where.type != 'cpu':
            torch.accelerator.synchronize()                      # the optimizer takes time, too
        seconds = time.perf_counter() - began

        # --- log ---
        step_tokens = phase['batch'] * T
        tokens += step_tokens
        speed.append(step_tokens * model.flops_per_token(T) / seconds)
        if len(speed) == 5:
            left = sum(f * min(1, max(0, end - step) / p['steps'])
                       for f, end, p in zip(flops, ends, phases))
            say(f'about {left / statistics.median(speed) / 60:,.0f} minutes to go')
        entry = {'step': step, 'phase': phase['name'], 'tokens': tokens, 'loss': loss,
                 'lr': lrs['learning_rate'], 'embedding_lr': lrs['embedding_lr'],
                 'grad_norm': grad_norm, 'tok_per_s': round(step_tokens / seconds, 1)}
        if note:
            entry['note'], note = note, None
        if scaling and scaling.watched:
            entry['fp8'] = scaling.report()
        if skipped:
            entry |= {'skipped': True, 'rows': rows_of_step}
        else:
            # six deviations up, and not for a phase's other data or length
            if len(recent) == 50 and step - first >= 50 and \
                    loss > statistics.fmean(recent) + 6 * statistics.pstdev(recent):
                entry |= {'spike': loss - statistics.fmean(recent), 'rows': rows_of_step}
                say(f'step {step}: loss {loss:.3f} is a spike, {entry["spike"]:.3f} above the mean '
                    f'of 50; --replay={step} looks at it again')
            recent = recent[-49:] + [loss]
        if 9 <= step - watch[0] < 50 and (mean := statistics.fmean(recent[-10:])) > watch[1]:
            say(f'step {step}: loss {mean:.3f} after the change of optimizer is above '
                f'{watch[1]:.3f}, 4 deviations over the 50 steps before: look at lr, weight decay')
            watch = (-50, 0.0)
        step += 1
        phase_ends = step == first + phase['steps']
        if replay < 0 and (step % eval_interval == 0 or phase_ends):
            entry['val_losses'] = val = evaluate(model, data, phase, rows, where, autocast)
            entry['val_loss'] = statistics.fmean(val.values(), phase['data'].values())
            say(f'step {step}: validation loss' + ','.join(f' {k} {v:.4f}' for k, v in val.items()))
            gap = reference_gap(proxy, recent, tokens, step_tokens) if step - first >= 50 else None
            if gap is not None:
                entry['reference_gap'] = gap
                if gap > reference_margin:                       # a wider model's loss is lower
                    say(f'step {step}: loss is {gap:.3f} above that of {reference}: look at µP\'s '
                        "attention scale, embedding lr, matrices' lr (coord_check.py), if the "
                        'knobs are the same but for the width')
        if rank == 0 and replay < 0:
            with open(log_file, 'a') as f:
                f.write(json.dumps(entry) + '\n')
        news = (f'{phase["name"]}: loss {loss:.4f}, {entry["tok_per_s"]:,.0f} tok/s, '
                f'lr {entry["lr"]:.2e}')
        bar.set_postfix_str(news, refresh=False)
        bar.update()
        if bar.disable and (step % log_interval == 0 or phase_ends):
            say(f'step {step}/{total} {news}')
        if skipped == 5 and replay < 0:
            break

        # --- checkpoint ---
        if replay < 0 and (step % checkpoint_interval == 0 or phase_ends):
            save()
        if writing and writing.done():
            writing.result()                                     # which raises what went wrong
    if step != saved and replay < 0:
        save()
    faulthandler.cancel_dump_traceback_later()
    bar.close()
    if writing:
        writing.result()
    if world > 1:
        dist.barrier()                                           # until rank 0 has written
        dist.destroy_process_group()
    if skipped == 5 and replay < 0:
        sys.exit(1 if rank else f'train.py: step {step - 1} is the fifth in a row that is not '
                 f'finite: {what}; try a lower learning_rate')
    if step < total:
        number = signals[0][0] if signals else signal.SIGTERM
        if replay < 0:
            say(f'stopped by {signal.Signals(number).name} at step {step}, '
                + ('which is saved' if checkpoints(run) else 'with nothing to save')
                + ': --resume goes on')
        sys.exit(128 + number)
    if replay >= 0:
        lines = log_file.read_text(errors='replace').splitlines() if log_file.exists() else []
        right = [json.loads(line) for line in lines if step_of(line) == replay]
        say(f'step {replay}: loss {loss!r}, gradient norm {grad_norm!r}'
            + (f'; the log has {right[0]["loss"]!r}, {right[0]["grad_norm"]!r}' if right else ''))
        return
    say(f'done: {checkpoints(run)[-1]}; python sample.py {run} --prompt="def fib(n):"')


if __name__ == '__main__':
    if sys.stderr is None:                                       # closed by who started this
        sys.stderr = sys.__stderr__ = open(os.devnull, 'w')  # noqa: SIM115
    defaults = knob_values(globals())
    rank, world = (int(os.environ.get(key, n)) for key, n in (('RANK', '0'), ('WORLD_SIZE', '1')))
    with nullcontext() if rank == 0 else redirect_stderr(io.StringIO()):     # rank 0 tells for all
        configure(globals(), default='config/proxy20m.py')
        knobs = copy.deepcopy(knob_values(globals()))
        check_knobs(world)
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True)              # a job's log shows what goes on
    try:
        main(defaults, knobs, rank, world)
    except OSError as e:
        tell_of_disk(e)
    except KeyboardInterrupt:
        print(f'train.py: stopped; --resume goes on from the newest checkpoint in {out_dir}',
              file=sys.stderr)
        sys.exit(130)
