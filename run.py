"""A run's life around the training loop: what train.py's loop calls beside the recipe.

    mistakes_printed_once, system_errors_in_one_line, refusing_what_memory_cannot_hold
                               what a user sees of a mistake, of a full disk, of a large model
    Compiler                   torch.compile, where it pays and gives the right loss
    end_if_hung, stop_hang_timer, Signals
                               a rank that hangs; a job that is told to end
    LossWatch                  steps that are not finite, spikes, a loss above the proxy's
    replaying                  one step again, in detail
    RunFiles, Progress         log, checkpoints, the bar and the time left
    end_of_run                 what is said at last, and the exit code

`knobs` is always the namespace of train.py's knobs. This file never imports train.py.
"""
import copy
import faulthandler
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import (
    TrainState,
    checkpoints,
    code_and_packages,
    prune,
    step_of,
    to_json,
    write_checkpoint,
)
from configurator import fail
from distributed import gather_state, print_once, ranks
from muon import zeropower_via_newtonschulz5
from processes import STOPPED
from tracker import Tracker


@contextmanager
def mistakes_printed_once():
    """Let only rank 0 print to stderr: all ranks find the same mistakes in the knobs."""
    if sys.stderr is None:                                       # closed by who started this
        sys.stderr = sys.__stderr__ = open(os.devnull, 'w')  # noqa: SIM115
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True)              # a job's log shows what goes on
    several = os.environ.get('WORLD_SIZE', '1') != '1'
    quiet = several and os.environ.get('RANK', '0') != '0'
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():
        yield


@contextmanager
def system_errors_in_one_line(out_dir):
    """Make one line of an OSError (a full disk, a folder that is read-only) and of Ctrl-C.

    Ctrl-C comes here before Signals is there, and when it is pressed for the second time.
    """
    try:
        yield
    except OSError as e:
        fail(f'{e.filename or out_dir}: {e.strerror or e}; what was saved before is whole')
    except KeyboardInterrupt:
        fail(f'stopped; --resume goes on from the newest checkpoint in {out_dir}', STOPPED)


@contextmanager
def refusing_what_memory_cannot_hold(device):
    """Make one line of the allocator's error for a model that is too large."""
    try:
        yield
    except RuntimeError as e:
        fail(f'{device} cannot hold this model: {str(e).splitlines()[0]}')


# --------------------------------------------------------------------------------------------------
# torch.compile

class Compiler:
    """Compiles the model for each shape of micro-batch, where that pays and gives the right loss.

    It pays where eager would take minutes. On macOS and MPS users report NaN losses.
    """
    def __init__(self, knobs, model, scaling, autocast):
        self.model, self.scaling, self.autocast = model, scaling, autocast
        self.compiled_for = None
        self.on = knobs.compile
        if knobs.compile == 'auto':
            device = next(model.parameters()).device
            has_compiler = sys.platform == 'linux' and any(map(shutil.which,
                                                               ('g++', 'c++', 'clang++')))
            flops = sum(phase['steps'] * phase['batch'] * phase['block_size']
                        * model.flops_per_token(phase['block_size']) for phase in knobs.phases)
            self.on = device.type == 'cuda' or \
                (device.type == 'cpu' and has_compiler and flops > 2e13)

    def compile_for(self, x, y):
        """Compile for micro-batches of x's shape, unless that is done."""
        # FP8's first step, which has no history, is another graph
        first_fp8_step = self.scaling is not None and self.scaling.own_amax
        graph = (*x.shape, first_fp8_step)
        if not self.on or graph == self.compiled_for:
            return
        self.compiled_for = graph
        device = next(self.model.parameters()).device
        if self.scaling:
            self.scaling.round_weights()                         # as a step does: the same graphs
        outcome = try_compile(self.model, x.to(device), y.to(device), self.autocast)
        print_once(outcome)
        if self.scaling:
            torch._foreach_zero_(self.scaling.amaxes)            # those of the trial


def try_compile(model, x, y, autocast):
    """model.set_compiled(True), unless that fails or changes the loss of x, y (B, T).

    Returns one line for the log that tells the outcome. The gradients of the trial are zeroed, not
    dropped: DDP's buckets hold them. The amaxes that FP8 layers note in it are left to the caller.
    """
    def loss_of_a_step(compiled):
        model.set_compiled(compiled)
        with autocast:
            loss = model(x, y)[1]
        loss.backward()
        model.zero_grad(set_to_none=False)
        return loss.item()

    eager_loss = loss_of_a_step(compiled=False)
    began = time.time()
    error = ''
    try:
        compiled_loss = loss_of_a_step(compiled=True)
    except Exception as e:  # noqa: BLE001                         (a compiler can fail in any way)
        compiled_loss = math.nan
        error = f' ({type(e).__name__}: {str(e)[:80]!r})'
    if abs(compiled_loss - eager_loss) <= 0.01 * eager_loss:       # bf16 rounds at 0.4 %
        return (f'compiled for {x.size(0)} x {x.size(1)} tokens, {time.time() - began:.0f} s: '
                f'loss {compiled_loss:.4f}, eager {eager_loss:.4f}')
    model.set_compiled(False)                                      # also where the loss is NaN
    model.zero_grad(set_to_none=False)
    return (f'compiled loss {compiled_loss:.4f}, eager {eager_loss:.4f}{error}: '
            'going on in eager mode')


# --------------------------------------------------------------------------------------------------
# Hangs and signals

def end_if_hung(seconds):
    """End this process, with its stack, unless it is called again within so many seconds."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def stop_hang_timer():
    """From now on this process may take as long as it needs: the last checkpoint, a slow disk."""
    faulthandler.cancel_dump_traceback_later()


class Signals:
    """SIGTERM, Ctrl-C and SIGHUP ask a run to end after one more checkpoint."""
    def __init__(self):
        self.received = []                                       # [(number, time)]
        self.parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            under_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                signal.signal(number, self.receive)

    def receive(self, number, _):
        # A second Ctrl-C ends the run at once. One within a second is torchrun's, which passes the
        # first one on to ranks that have had it from the terminal.
        if number == signal.SIGINT and self.received and \
                time.monotonic() - self.received[0][1] > 1:
            raise KeyboardInterrupt
        self.received.append((number, time.monotonic()))

    def count(self):
        """How many have come. That torchrun was killed, which started the ranks, counts as one."""
        if ranks()[1] > 1 and os.getppid() != self.parent:
            self.received.append((signal.SIGTERM, time.monotonic()))
        return len(self.received)

    def first(self):
        """The signal that came first; SIGTERM where only another rank has got one."""
        return self.received[0][0] if self.received else signal.SIGTERM


# --------------------------------------------------------------------------------------------------
# What the losses say

class LossWatch:
    """Steps that are not finite, spikes, the loss after the switch to Muon, the proxy's curve."""
    def __init__(self, knobs, state, scaling, proxy_log):
        self.knobs, self.state, self.scaling = knobs, state, scaling
        self.proxy_log = proxy_log                               # of --reference, on rank 0
        self.skipped = 0                                         # steps in a row
        self.reason = ''                                         # why the last one was skipped
        self.has_loss = True                                     # of the last step

    def is_finite(self, step, loss, grad_norm, largest, n_targets, amax):
        """Whether a step may be taken; if not, say why. All ranks have the same numbers.

        amax: of FP8's tensors, of which `largest` is the largest, or NaN if one is. Without targets
        there is no loss.
        """
        self.has_loss = bool(n_targets)
        if not self.has_loss:
            print_once(f'step {step} is skipped: none of its rows has a target')
            return False
        if math.isfinite(loss + grad_norm + largest):
            self.skipped = 0
            return True
        self.skipped += 1
        self.reason = f'it has loss {loss}, gradient norm {grad_norm}'
        if self.scaling:                                         # the paper's own advice
            self.reason += (self.scaling.trace(amax) + '; with FP8 look at the type of the weights '
                            '(fp32) and at fp8_amax_history_len='
                            f'{self.knobs.fp8_amax_history_len} (128)')
        print_once(f'step {step} is skipped: {self.reason}; --replay={step} looks at it again')
        return False

    def gives_up(self):
        """Whether the last five steps were not finite."""
        return self.skipped == 5

    def record(self, step, first, loss, rows):
        """Remember a step's loss -> what the log should have beside it: a spike, a skipped step.

        first: of the phase; rows: [first, last + 1] of the step. A spike is six deviations up,
        and not for another phase's data or length.
        """
        extra, history = {}, self.state.loss_history
        if self.skipped or not self.has_loss:
            extra = {'skipped': True, 'rows': rows}
        else:
            if len(history) == 50 and step - first >= 50:
                mean = statistics.fmean(history)
                if loss > mean + 6 * statistics.pstdev(history):
                    extra = {'spike': loss - mean, 'rows': rows}
                    print_once(f'step {step}: loss {loss:.3f} is a spike, {loss - mean:.3f} above '
                               f'the mean of 50; --replay={step} looks at it again')
            self.state.loss_history = history[-49:] + [loss]
        self.check_switch(step)
        return extra

    def expect_no_spike(self, step):
        """The optimizer changes at this step: compare the losses from now on with those before.

        The limit is four deviations up: ten losses are averaged, so not two of a new mixture.
        """
        history = self.state.loss_history
        if history:
            limit = statistics.fmean(history) + 4 * statistics.pstdev(history)
            self.state.switch_alarm = (step, limit)

    def check_switch(self, step):
        """Say once if ten losses within 50 steps of the switch are above what was before it."""
        switch, limit = self.state.switch_alarm
        if not 9 <= step - switch < 50:
            return
        mean = statistics.fmean(self.state.loss_history[-10:])
        if mean > limit:
            print_once(f'step {step}: loss {mean:.3f} after the change of optimizer is above '
                       f'{limit:.3f}, 4 deviations over the 50 steps before: look at lr, weight '
                       'decay')
            self.state.switch_alarm = TrainState.switch_alarm

    def compare_with_reference(self, first, step_tokens):
        """{'reference_gap': nats above the proxy's loss}, after 50 steps of a phase; else {}."""
        step = self.state.step
        if step - first < 50:
            return {}
        gap = reference_gap(self.proxy_log, self.state.loss_history, self.state.tokens, step_tokens)
        if gap is None:
            return {}
        if gap > self.knobs.reference_margin:                    # a wider model's loss is lower
            print_once(f'step {step}: loss is {gap:.3f} above that of {self.knobs.reference}: look '
                       "at µP's attention scale, embedding lr, matrices' lr "
                       '(python -m lab.coord_check), if the knobs are the same but for the width')
        return {'reference_gap': gap}


def reference_gap(proxy_log, losses, tokens, step_tokens):
    """Mean of the last losses less that of the log `proxy_log` over the same tokens, in nats.

    losses: of steps of step_tokens tokens each, of which the last one ended at `tokens`.
    None where the log has not come so far.
    """
    if not proxy_log or proxy_log[-1]['tokens'] < tokens:
        return None
    first = tokens - len(losses) * step_tokens
    theirs = [entry['loss'] for entry in proxy_log if first < entry['tokens'] <= tokens]
    if not theirs:
        return None
    return statistics.fmean(losses) - statistics.fmean(theirs)


# --------------------------------------------------------------------------------------------------
# Replay

@contextmanager
def replaying(on, step, phase, rows, model):
    """Around the passes of the step that --replay looks at: name what is behind its numbers.

    The operation whose gradient is the first NaN (in compiled blocks, the block) ends the program.
    """
    if not on:
        yield
        return
    print_once(f'step {step}: rows {rows[0]} to {rows[1] - 1} of phase {phase["name"]}')
    torch.autograd.set_detect_anomaly(True)
    try:
        yield
    except RuntimeError as e:
        if not hasattr(e, '__notes__'):                          # none of a backward pass
            raise
        fail(f'{e.__notes__[0]}; {e}')
    print_gradients(model)


def print_gradients(model):
    """Print which parameters have the largest gradients, and whose are not finite."""
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    not_finite = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if not_finite:
        names, note = not_finite[:5], f' (of {len(not_finite)} that are not finite)'
    else:
        names, note = sorted(norms, key=norms.get)[:-6:-1], ', the largest'
    print_once('gradients: ' + ', '.join(f'{name} {norms[name]:.3g}' for name in names) + note)


# --------------------------------------------------------------------------------------------------
# Files, progress, and the end

class RunFiles:
    """What a run writes in its folder: heartbeats, log.jsonl, checkpoints. A replay writes nothing.

    A checkpoint is written from a copy in a thread of its own, while training goes on.
    """
    def __init__(self, knobs, given, start):
        self.knobs, self.given, self.config = knobs, given, start.config
        self.folder = Path(knobs.out_dir)
        self.off = knobs.replay >= 0
        self.phase_ends = list(itertools.accumulate(phase['steps'] for phase in knobs.phases))
        self.saved = start.state.step                            # the step of the last checkpoint
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.tracker = None
        if ranks()[0] == 0 and not self.off:
            self.tracker = Tracker(knobs, given, self.folder, start.state.step)

    def heartbeat(self, step):
        """Tell in a file of this rank's that it has the data of a step: who hangs, since when."""
        if not self.off:
            file = self.folder / f'heartbeat_{ranks()[0]}'
            file.write_text(f'step {step}, {time.ctime()}\n')

    def log(self, entry):
        """Append a line to log.jsonl, and tell the tracker."""
        if ranks()[0] == 0 and not self.off:
            with open(self.folder / 'log.jsonl', 'a') as f:
                f.write(to_json(entry) + '\n')
            self.tracker.log(entry)

    def save(self, state, model, optimizers, scaling):
        """Begin to write a checkpoint, once the last one is written; all ranks have to call it."""
        if self.off:
            return
        end_if_hung(2 * self.knobs.hang_seconds)
        self.saved = state.step
        self.wait()
        moments = gather_state(optimizers)                       # from all ranks
        if ranks()[0] > 0:
            return
        weights = {name: t.to('cpu', copy=True) for name, t in model.state_dict().items()}
        checkpoint = {'model': weights, 'config': asdict(self.config), 'knobs': self.given,
                      **state.to_checkpoint(), 'made_by': code_and_packages(),
                      'fp8': scaling and copy.deepcopy(scaling.state_dict()),
                      'optimizer_state': moments}
        file = self.folder / f'step_{state.step}.pt'
        self.writing = self.writer.submit(self.write, file, checkpoint)

    def write(self, file, checkpoint):
        write_checkpoint(file, checkpoint)
        # where weights are not finite, the checkpoints before are the way back
        if all(t.isfinite().all() for t in checkpoint['model'].values()):
            prune(self.folder, self.knobs.keep, self.phase_ends)

    def wait(self):
        """Until the last checkpoint is written; raises what went wrong with it."""
        if self.writing:
            self.writing.result()

    def raise_errors(self):
        """Raise what went wrong with the last checkpoint, if its write has ended; does not wait."""
        if self.writing and self.writing.done():
            self.writing.result()


class Progress:
    """The bar on a terminal, lines on a plain output, and the time left."""
    def __init__(self, knobs, model, state, total, peak=0.0):
        self.knobs, self.model, self.total = knobs, model, total
        self.peak = peak                                         # FLOP/s of all ranks; 0.0: unknown
        if peak:
            print_once(f'MFU is the share of {peak / 1e12:.3g} TFLOP/s')
        off = True if ranks()[0] > 0 else None                   # None: off unless on a terminal
        self.bar = tqdm(total=total, initial=state.step, unit='step', disable=off)
        self.seconds_per_flop = []                               # of forward and backward passes
        self.optimizer_seconds = {}                              # kind -> those of its steps
        self.muon_estimate = None                                # until there are any

    def time_step(self, phase, pass_seconds, optimizer_seconds, step):
        """Record a step's seconds -> {'tok_per_s': tokens/s, 'mfu': share of the peak, if known}.

        After 5 steps with an optimizer, say how long the rest takes.
        """
        tokens = phase['batch'] * phase['block_size']
        flops = tokens * self.model.flops_per_token(phase['block_size'])
        self.seconds_per_flop.append(pass_seconds / flops)
        of_kind = self.optimizer_seconds.setdefault(phase['optimizer'], [])
        of_kind.append(optimizer_seconds)
        if len(of_kind) == 5 and ranks()[0] == 0:
            minutes = self.seconds_left(step) / 60
            left = f'about {minutes:,.0f} minutes' if minutes >= 1 else 'less than a minute'
            print_once(f'{left} to go')
        seconds = pass_seconds + optimizer_seconds
        speed = {'tok_per_s': round(tokens / seconds, 1)}
        if self.peak:
            speed['mfu'] = round(flops / seconds / self.peak, 4)
        return speed

    def seconds_left(self, step):
        """Estimate of the seconds from `step` on, by what has been measured.

        Passes go by their FLOPs. A Muon step that has not come yet is measured beforehand.
        """
        per_flop = statistics.median(self.seconds_per_flop)
        left, end = 0.0, 0
        for phase in self.knobs.phases:
            end += phase['steps']
            steps = min(phase['steps'], max(0, end - step))
            if not steps:
                continue
            T = phase['block_size']
            passes = phase['batch'] * T * self.model.flops_per_token(T) * per_flop
            left += steps * (passes + self.seconds_of_a_step(phase['optimizer']))
        return left

    def seconds_of_a_step(self, kind):
        """Seconds of an optimizer's step: the median or, of Muon before its first, an estimate."""
        if kind in self.optimizer_seconds:
            return statistics.median(self.optimizer_seconds[kind])
        if kind != 'muon':
            return 0.0
        if self.muon_estimate is None:
            self.muon_estimate = seconds_of_a_muon_step(self.model)
        return self.muon_estimate

    def show(self, step, phase, entry, phase_ends):
        """Update the bar or, on a plain output, print a line now and then."""
        mfu = f'MFU {entry["mfu"]:.1%}, ' if 'mfu' in entry else ''
        news = (f'{phase["name"]}: loss {entry["loss"]:.4f}, {entry["tok_per_s"]:,.0f} tok/s, '
                f'{mfu}lr {entry["lr"]:.2e}')
        self.bar.set_postfix_str(news, refresh=False)
        self.bar.update()
        if self.bar.disable and (step % self.knobs.log_interval == 0 or phase_ends):
            print_once(f'step {step}/{self.total} {news}')


def seconds_of_a_muon_step(model):
    """Seconds that Newton–Schulz takes of a rank's matrices, by timing one of each shape."""
    shapes = Counter(p.shape for p in model.blocks.parameters() if p.dim() == 2)
    device = next(model.parameters()).device
    seconds = 0.0
    for shape, n in shapes.items():
        matrix = torch.ones(shape, device=device)
        zeropower_via_newtonschulz5(matrix).sum().item()         # warm up
        began = time.perf_counter()
        zeropower_via_newtonschulz5(matrix).sum().item()         # item() waits for a GPU
        seconds += n * (time.perf_counter() - began)
    return seconds / ranks()[1]


def end_of_run(knobs, files, watch, signals, state, total):
    """Say how the run has ended; exit code 1 after five bad steps, 128 + N by signal N."""
    rank = ranks()[0]
    if ranks()[1] > 1:
        dist.barrier()                                           # until rank 0 has written
        dist.destroy_process_group()
    if files.tracker:
        files.tracker.finish()
    if watch.gives_up() and not files.off:
        sys.exit(1 if rank else f'train.py: step {state.step - 1} is the fifth in a row that is '
                 f'not finite: {watch.reason}; try a lower learning_rate')
    if rank > 0 and state.step >= total:
        return
    if state.step < total:
        number = signals.first()
        if not files.off and rank == 0:
            saved = 'which is saved' if checkpoints(files.folder) else 'with nothing to save'
            print_once(f'stopped by {signal.Signals(number).name} at step {state.step}, {saved}: '
                       '--resume goes on')
        sys.exit(128 + number)
    if not files.off:
        folder = shlex.quote(str(files.folder))
        print_once(f'done: {checkpoints(files.folder)[-1]}; python sample.py {folder} '
                   '--prompt="def fib(n):"')


def print_replayed(knobs, loss, grad_norm):
    """Print a replayed step's loss and gradient norm beside those in the log."""
    log = Path(knobs.out_dir, 'log.jsonl')
    lines = log.read_text(errors='replace').splitlines() if log.exists() else []
    logged = [json.loads(line) for line in lines if step_of(line) == knobs.replay]
    beside = ''
    if logged:
        beside = f'; the log has {logged[0]["loss"]!r}, {logged[0]["grad_norm"]!r}'
    print_once(f'step {knobs.replay}: loss {loss!r}, gradient norm {grad_norm!r}{beside}')
