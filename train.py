"""Train a model through the Xmodel-2.5 curriculum (arXiv 2511.19496): warmup, stable, decay, long.

    python train.py config/nano.py               # a minute: every phase, in small
    python train.py config/proxy20m.py           # the 20M proxy on a laptop, half an hour
    torchrun --standalone --nproc_per_node=8 train.py config/xmodel25.py      # the full run
    python train.py config/proxy20m.py --resume  # go on after an interruption, bit for bit
    python train.py --help                       # every knob with its default

Without a config file it is config/proxy20m.py. Config files, and then --key=value, override the
knobs below; --phases.NAME.KEY=value reaches into the curriculum. What a run writes is in out_dir:
log.jsonl, run.json and checkpoints, step_N.pt.
"""
import copy
import math
import statistics
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from configurator import configure, knob_values
from distributed import (
    data_parallel,
    gradients_stay_here,
    join_ranks,
    pick_device,
    print_once,
    ranks,
    sum_over_ranks,
    world_size,
)
from hardware import StepClock, peak_flops, to_device
from loader import get_batch, get_windows, windows_before
from model import Xmodel
from muon import make_optimizers, step_all
from run import (
    Compiler,
    LossWatch,
    Progress,
    RunFiles,
    Signals,
    end_if_hung,
    end_of_run,
    mistakes_printed_once,
    print_replayed,
    refusing_what_memory_cannot_hold,
    replaying,
    stop_hang_timer,
    system_errors_in_one_line,
)
from start import (
    check_knobs,
    complete_phases,
    computes_in_bf16,
    delayed_scaling,
    open_folder,
    print_plan,
    rows_of_a_micro_batch,
    start_of_run,
)

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
rope_theta = 500_000.0        # RoPE's base, which serves all lengths here: see docs/wsd.md
norm_eps = 1e-5
mup_base_width = 256
attention_scale = 1.0
# found on a proxy, as were both learning rates; µP carries them to other widths (docs/mup.md)
input_scale = 12.0
output_scale = 1.0
residual_scale = 1.4
init_std = 0.1
mup_rules = 'textbook'        # 'textbook' | 'authors' | 'sp': see mup_table in model.py
mup_break = ''                # one rule of µP to break, by its name there
muon_lr_scaling = '1/sqrt(m)'  # '1/m' | '1/sqrt(m)' | 'const': Muon's learning rate across widths
# --- curriculum: a list of phases, each a dict like those in config/proxy20m.py ---
phases = []                   # keys: see start.complete_phases
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
grad_clip = 1.0               # largest gradient norm; 0.0 leaves gradients alone (see docs/muon.md)
# --- log and checkpoints ---
log_interval = 10             # steps between lines on a plain output; log.jsonl has every step
eval_interval = 100           # steps between validations; each phase's end has one as well
eval_rows = 16                # rows of each validation set
checkpoint_interval = 100     # steps between checkpoints; each phase's end has one as well
keep = 2                      # checkpoints to keep besides those of phase ends
hang_seconds = 1800           # a rank that does not come on for so long ends, with its stack
tracker = 'none'              # 'none' | 'tensorboard' | 'wandb' | 'trackio': gets the log as well
reference = ''                # another run's folder, as the proxy's, to compare losses with
reference_margin = 0.2        # nats above it from which validations say so


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
    embedding_lr. (What a phase leaves out, start.complete_phases has filled in.) Linear from start
    to peak over its warmup. Then, with r the share that is done of the steps after the warmup,
    'constant' peak, 'linear' or half a 'cosine' to end, or 'exponential': end + (2 · 0.5^r - 1)
    (peak - end), as in Megatron's WSD and Xmodel-2.5's configuration, one half-life stretched so as
    to reach end.
    """
    phase, first = phase_at(step)
    return (learning_rate * factor_at(phase, step - first, phase['lr']),
            embedding_lr * factor_at(phase, step - first, phase['embedding_lr']))


def factor_at(phase, i, lr):
    """lr_at in units of its knob, at step i of a phase with lr = (start, peak, end)."""
    start, peak, end = lr
    warmup = phase['warmup']
    if i < warmup:
        return start + (peak - start) * i / warmup
    r = (i - warmup) / max(1, phase['steps'] - warmup)           # from 0 after the warmup to 1
    if phase['decay'] == 'constant':
        height = 1
    elif phase['decay'] == 'linear':
        height = 1 - r
    elif phase['decay'] == 'cosine':
        height = (1 + math.cos(math.pi * r)) / 2
    else:
        height = 2 * 0.5**r - 1
    return end + height * (peak - end)


# --------------------------------------------------------------------------------------------------
# One step's passes, and the validation

def count_targets(y):
    """How many tokens of y have a loss: all but -1."""
    return int((y >= 0).sum())


def forward_backward(net, micro_batches, n_targets, autocast):
    """The gradients of a batch, in p.grad, and its mean loss, both added up over the ranks.

    micro_batches: this rank's [(x, y)], (micro_batch, T) each; n_targets: of the whole batch, a
    tensor of the CPU, so that it takes no wait for a GPU. Each micro-batch's mean loss is weighted
    by its targets, so the result is that of one large batch, however it is cut.
    """
    device = next(net.parameters()).device
    loss = torch.zeros((), device=device)
    for i, (x, y) in enumerate(micro_batches, 1):
        weight = count_targets(y) / n_targets
        last = i == len(micro_batches)                           # ranks add gradients up only once
        with nullcontext() if last else gradients_stay_here(net):
            with autocast:
                micro_loss = net(to_device(x, device), to_device(y, device))[1]
            try:
                (micro_loss * weight).backward()
            except RuntimeError as e:
                e.add_note(f'micro-batch {i} of {len(micro_batches)} has loss {micro_loss.item()}')
                raise
        loss += micro_loss.detach() * weight
    return sum_over_ranks(loss, device)


@torch.no_grad()
def evaluate(model, data, phase, rows, device, autocast):
    """data set -> mean loss in nats over eval_rows windows, spread over its validation split.

    rows: of a micro-batch. Each rank takes every world-th micro-batch.
    """
    losses, T, (rank, world) = {}, phase['block_size'], ranks()
    for name in phase['data']:
        end_if_hung(2 * hang_seconds)
        n_windows = data[name].n_windows('val', T)
        n = min(eval_rows, n_windows)
        total = torch.zeros(2, dtype=torch.float64)              # sum of losses, how many
        for i in range(rank * rows, n, world * rows):
            # all of one shape; the last one's surplus rows have no targets
            windows = [min(j, n - 1) * n_windows // n for j in range(i, i + rows)]
            x, y = get_windows(data[name], 'val', windows, T, completion_only)
            y[n - i:] = -1
            with autocast:
                loss = model(x.to(device), y.to(device))[1].item()
            total += torch.tensor([loss, 1.0], dtype=torch.float64) * count_targets(y)
        total = sum_over_ranks(total, 'cpu')
        if total[1]:                                             # a mean of nothing is left out
            losses[name] = (total[0] / total[1]).item()
    return losses


# --------------------------------------------------------------------------------------------------
# The run

def main(knobs, given, defaults):
    """Train with these knobs, which are the globals as well; every rank its rows of each batch.

    given: {knob: value} as the user gave them, before complete_phases scaled them; defaults: {knob:
    value} of this file. Both go into checkpoints and what --resume compares.
    """
    # --- device and ranks: bf16 matmuls where the hardware has them, fp32 weights everywhere ---
    world = world_size()
    device = pick_device(knobs.device, world)
    bf16 = computes_in_bf16(knobs, device)
    compute_dtype = torch.bfloat16 if bf16 else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    if world > 1:
        join_ranks(device, timeout=3 * hang_seconds)
    rank = ranks()[0]

    # --- what the run starts from: nothing, its own newest checkpoint, or another run's ---
    start = start_of_run(knobs, given, defaults)
    data, state = start.data, start.state
    torch.manual_seed(seed)
    with refusing_what_memory_cannot_hold(device):
        model = Xmodel(start.config).to(device)
    start.load_weights(model, phase_at(state.step)[0])
    model.activation_checkpointing = activation_checkpointing
    scaling = delayed_scaling(model, knobs, start)               # FP8's scales, or None
    proxy_log = open_folder(start, knobs, given, device)
    print_plan(knobs, start, model, device)

    # --- around the loop: see run.py ---
    total_steps = sum(phase['steps'] for phase in phases)
    if replay >= 0:
        total_steps = replay + 1
    compiler = Compiler(knobs, model, scaling, autocast)
    watch = LossWatch(knobs, state, scaling, proxy_log)
    files = RunFiles(knobs, given, start)
    peak = world * peak_flops(device, compute_dtype)
    progress = Progress(knobs, model, state, total_steps, peak)
    clock = StepClock(device)
    signals = Signals()

    # --- the loop ---
    net = data_parallel(model, getattr(torch, reduce_dtype))
    phase = optimizers = None
    for step in range(state.step, total_steps):
        end_if_hung(hang_seconds)
        note = None
        if phase is not phase_at(step)[0]:                       # a phase begins, or this run does
            phase, first = phase_at(step)
            T = phase['block_size']
            rows = phase['batch'] // world                       # of this rank, in each batch
            micro_batch = rows_of_a_micro_batch(rows, T, micro_batch_tokens)
            read_before = windows_before(phases, phase, seed)    # by the phases before
            same_kind = phase['optimizer'] == state.optimizer
            if optimizers is None or not same_kind:
                optimizers = make_optimizers(phase['optimizer'], model.param_groups(weight_decay),
                                             (beta1, beta2), momentum, muon_split,
                                             compute_dtype)
                if same_kind:                                    # this run continues from a
                    start.load_moments(optimizers)               # checkpoint: its state, too
            if state.optimizer and not same_kind:
                # AdamW -> Muon, where the decay begins. All state is fresh, as in Xmodel-2.5:
                # AdamW keeps means of gradients and of their squares, Muon a sum of gradients.
                # (Embedding and gains stay with AdamW, but begin anew, too.) See docs/muon.md
                note = f'optimizer {state.optimizer} -> {phase["optimizer"]}, with fresh state'
                watch.expect_no_spike(step)
            state.optimizer = phase['optimizer']
            print_once(f'step {step}: phase {phase["name"]}' + (f', {note}' if note else ''))

        # --- data: this rank's rows of the batch, in micro-batches of (micro_batch, T) ---
        batch_rows = [(step - first) * phase['batch'], (step - first + 1) * phase['batch']]
        row = batch_rows[0] + rank * rows
        asked = time.perf_counter()
        micro_batches = [get_batch(data, phase['data'], range(r, r + micro_batch), T, seed,
                                   read_before, completion_only)
                         for r in range(row, row + rows, micro_batch)]
        data_seconds = time.perf_counter() - asked
        files.heartbeat(step)
        end_if_hung(2 * hang_seconds)                            # one that hangs above ends first
        targets = sum(count_targets(y) for _, y in micro_batches)
        n_targets, n_signals = sum_over_ranks([float(targets), float(signals.count())], 'cpu')
        if n_signals:                                            # some rank is told to end
            break
        compiler.compile_for(*micro_batches[0])

        # --- forward, backward, step ---
        clock.mark()
        if scaling:
            scaling.watch(fp8_monitor and step % log_interval == 0)
            scaling.round_weights()                              # once for all micro-batches
        with replaying(step == replay, step, phase, batch_rows, model):
            loss = forward_backward(net, micro_batches, n_targets.clamp(min=1), autocast)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        amax = scaling.collect() if scaling else torch.zeros(1, device=device)
        clock.mark()
        # here the CPU waits for a GPU, and nowhere else in an ordinary step (docs/running.md)
        loss, grad_norm, largest = torch.stack([loss, grad_norm, amax.amax()]).tolist()
        if not n_targets:
            loss = math.nan
        lr, lr_of_embedding = lr_at(step)
        if watch.is_finite(step, loss, grad_norm, largest, n_targets, amax):
            step_all(optimizers, {'learning_rate': lr, 'embedding_lr': lr_of_embedding})
            if scaling:
                scaling.update(amax)
        else:                                                    # all ranks skip it
            model.zero_grad(set_to_none=False)
        clock.mark()

        # --- log, validate, save ---
        state.step = step + 1
        state.tokens += phase['batch'] * T
        pass_seconds, optimizer_seconds = clock.seconds(phase['optimizer'])
        speed = progress.time_step(phase, pass_seconds, optimizer_seconds, step)
        entry = {'step': step, 'phase': phase['name'], 'tokens': state.tokens, 'loss': loss,
                 'lr': lr, 'embedding_lr': lr_of_embedding, 'grad_norm': grad_norm,
                 **speed, 'data_s': round(data_seconds, 4)}
        if note:
            entry['note'] = note
        if scaling and scaling.watched:
            entry['fp8'] = scaling.report()
        entry |= watch.record(step, first, loss, batch_rows)
        phase_ends = state.step == first + phase['steps']
        if replay < 0 and (state.step % eval_interval == 0 or phase_ends):
            losses = evaluate(model, data, phase, micro_batch, device, autocast)
            entry['val_losses'] = losses
            weights = [phase['data'][name] for name in losses]
            if sum(weights):
                entry['val_loss'] = statistics.fmean(losses.values(), weights)
            news = ','.join(f' {name} {value:.4f}' for name, value in losses.items())
            print_once(f'step {state.step}: validation loss{news}')
            entry |= watch.compare_with_reference(first, phase['batch'] * T)
        files.log(entry)
        progress.show(state.step, phase, entry, phase_ends)
        if watch.gives_up() and replay < 0:
            break
        if state.step % checkpoint_interval == 0 or phase_ends:
            files.save(state, model, optimizers, scaling)
        files.raise_errors()

    # --- the end ---
    if state.step != files.saved:
        files.save(state, model, optimizers, scaling)
    stop_hang_timer()
    progress.bar.close()
    files.wait()
    if state.step > replay >= 0:
        print_replayed(knobs, loss, grad_norm)
    end_of_run(knobs, files, watch, signals, state, total_steps)


if __name__ == '__main__':
    with mistakes_printed_once():
        defaults = knob_values(globals())
        configure(globals(), default='config/proxy20m.py')
        given = copy.deepcopy(knob_values(globals()))            # as the user has set them
        complete_phases(phases, steps_scale)
        knobs = SimpleNamespace(**knob_values(globals()))        # the same values, for run.py
        check_knobs(knobs, world_size())
    with system_errors_in_one_line(out_dir):
        main(knobs, given, defaults)
