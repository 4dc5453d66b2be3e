"""What is only there because a run may have several processes: ranks, one for each GPU.

Data parallelism: every rank holds the whole model and reads its own rows of a batch; the gradients
are added up over the ranks, and all take the same step. What is as large as the model and need not
be everywhere is the optimizer's state. It is spread: each rank keeps AdamW's moments for its rows
of every tensor (here) and Muon's momentum for its own matrices (muon.py). A checkpoint holds the
state whole and by name, so that a run may go on with another number of ranks.

torchrun starts the ranks and tells each its number. Without torchrun there is one process, and
everything here does what the same line would do without ranks.
"""
import ctypes
import os
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import fail
from processes import STOPPED


def ranks():
    """(rank of this process, number of ranks)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def usable_device(name):
    """The torch.device of that name; ends the program in one line where it cannot be used."""
    try:
        zero = torch.zeros(1, device=name)
        zero.item()                                                # which 'meta' does not have
        return zero.device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        fail(f'device={name!r} cannot be used here: {str(e).splitlines()[0][:120]}')


def pick_device(device, world):
    """The torch.device of the knob, which is torch's current one from now on if it is a GPU.

    'auto' is cuda, else mps, else cpu. With `world` > 1 ranks each takes the GPU of its own number.
    Ends the program in one line where it cannot be used.
    """
    if device == 'auto':
        device = 'cpu'
        if torch.backends.mps.is_available():
            device = 'mps'
        if torch.cuda.is_available():
            device = 'cuda'
    if device == 'cuda' and world > 1:
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    device = usable_device(device)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


def join_ranks(device, timeout):
    """Begin to talk with the other ranks; `timeout` seconds is how long one waits for another."""
    backend = 'gloo'
    if device.type == 'cuda':
        backend = 'cpu:gloo,cuda:nccl'                           # by where a tensor is
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def print_once(line):
    """Print a line on rank 0, beside the progress bar. A full disk under stdout ends no run."""
    if ranks()[0] > 0:
        return
    try:
        tqdm.write(line)
    except OSError:                                              # log.jsonl has every step
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def world_size():
    """The number of ranks by torchrun's environment; 1 without torchrun."""
    text = os.environ.get('WORLD_SIZE', '')
    if text in ('', '1'):
        return 1
    values = {name: os.environ.get(name, '')
              for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_PORT', 'MASTER_ADDR')}
    wrong = [name for name, value in values.items()
             if not value or (name != 'MASTER_ADDR' and not value.isdecimal())]
    if wrong or text == '0':
        fail(f'WORLD_SIZE={text!r} is set in the environment, where {", ".join(wrong or ["it"])} '
             'should be numbers that torchrun sets; without ranks, unset WORLD_SIZE')
    return int(text)


def rank_0_first(work):
    """Return on every rank what work() returns on rank 0. Where a mistake, a full disk or Ctrl-C
    ends it there, all ranks end.

    It may take hours, as when rank 0 prepares data. The others wait as long as rank 0 is alive.
    """
    rank, world = ranks()
    if world == 1:
        return work()
    result = exit_code = error = None
    with signs_of_life_from_rank_0():
        if rank == 0:
            try:
                result = work()
            except SystemExit as e:
                error, exit_code = e, e.code
            except OSError as e:
                error, exit_code = e, 2
            except KeyboardInterrupt as e:
                error, exit_code = e, STOPPED
    message = [result, exit_code]
    dist.broadcast_object_list(message)
    if error:
        raise error
    if message[1] is not None:
        sys.exit(message[1])
    return message[0]


PATIENCE = 180              # seconds; signs of life are given each 6 s, and looked for each second
n_waits = 0                                                      # so that each has keys of its own


@contextmanager
def signs_of_life_from_rank_0():
    """On rank 0, give a sign of life every few seconds until the end of the block. On the others,
    wait for that end; some minutes (PATIENCE) without a sign end the program.

    A collective cannot wait so: its timeout is that of a step.
    """
    global n_waits
    store = dist.distributed_c10d._get_default_store()           # the ranks' own, by torchrun
    n_waits += 1
    sign, end = f'rank 0 is alive {n_waits}', f'rank 0 has finished {n_waits}'
    if ranks()[0] > 0:
        yield
        signs, since = -1, time.monotonic()
        while not store.check([end]):
            time.sleep(PATIENCE / 180)
            before, signs = signs, store.add(sign, 0)            # adds nothing, and returns it
            if signs != before:
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                fail('waited for rank 0, which prepares data or reads a checkpoint, and had no '
                     f'sign of life from it in {PATIENCE} seconds')
        return
    finished = threading.Event()

    def give_signs():
        with suppress(RuntimeError):                             # told below
            while not finished.wait(PATIENCE / 30):
                store.add(sign, 1)

    thread = threading.Thread(target=give_signs, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        try:
            store.set(end, '')
        except RuntimeError:
            fail('torchrun, which started the ranks, is gone')


def sum_over_ranks(numbers, device):
    """A tensor of these numbers, each added up over all ranks; a tensor is changed in place."""
    total = torch.as_tensor(numbers, device=device)
    if ranks()[1] > 1:
        dist.all_reduce(total)
    return total


# --------------------------------------------------------------------------------------------------
# Gradients

def data_parallel(model, reduce_dtype):
    """The model in DDP, which adds gradients up over the ranks; the model itself without ranks.

    reduce_dtype: the dtype in which gradients travel. They are summed, not averaged: train.py
    divides each loss by the targets of the whole batch.
    """
    if ranks()[1] == 1:
        return model
    # gradient_as_bucket_view: gradients live in the buckets that travel, so there is one copy
    net = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def sum_bucket(_, bucket):
        message = bucket.buffer().to(reduce_dtype)               # with fp32, the bucket itself
        work = dist.all_reduce(message, async_op=True)
        return work.get_future().then(lambda future: bucket.buffer().copy_(future.value()[0]))

    net.register_comm_hook(None, sum_bucket)
    # Never freed: that would end gloo's group while holding Python's lock, and the group waits for
    # threads of which one may want that lock to drop a tensor: a finished rank would hang.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(net))
    return net


def gradients_stay_here(net):
    """A context whose backward passes send nothing: for all but the last of a step."""
    if isinstance(net, DistributedDataParallel):
        return net.no_sync()
    return nullcontext()


# --------------------------------------------------------------------------------------------------
# AdamW, its state spread over the ranks

class AdamW(torch.optim.AdamW):
    """torch's AdamW, which treats every number alone, so each rank can step some of the rows.

    A rank keeps moments for its rows of each tensor, and steps these; then all ranks exchange them.
    A group's `params`, by which torch files the state, are these rows: views of the parameters in
    `whole`, which have the gradients and the names.
    """

    state_keys = ('exp_avg', 'exp_avg_sq')                    # state that is as large as a weight

    def __init__(self, groups, betas):
        groups = [group | {'whole': group['params'],
                           'params': [self.own_part(p, p.detach()) for p in group['params']]}
                  for group in groups]
        super().__init__(groups, betas=betas, eps=1e-8, fused=True)      # eps: the paper's

    def own_part(self, p, t):
        """The rows that this rank steps of t, a tensor of the shape of the parameter p; a view."""
        rank, world = ranks()
        return t.tensor_split(world)[rank]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for own, p in zip(group['params'], group['whole']):
                own.grad = None if p.grad is None else self.own_part(p, p.grad)
        super().step()
        if ranks()[1] > 1:
            self.exchange()

    def exchange(self):
        """Send this rank's rows to the others and receive theirs: one message from each rank."""
        rank, world = ranks()
        parameters = [p.detach() for group in self.param_groups for p in group['whole']]
        for sender in range(world):
            rows = [p.tensor_split(world)[sender] for p in parameters]
            sizes = [part.numel() for part in rows]
            if sender == rank:
                message = torch.cat([part.flatten() for part in rows])
            else:
                message = rows[0].new_empty(sum(sizes))
            dist.broadcast(message, sender)
            received = [new.view_as(part) for new, part in zip(message.split(sizes), rows)]
            torch._foreach_copy_(rows, received)
            del message, received                             # before there is the next


# --------------------------------------------------------------------------------------------------
# The optimizers' state in a checkpoint: whole and by name

def parameters_of(optimizers):
    """Yield (optimizer, name, parameter, what of it the optimizer steps)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            whole = group.get('whole', group['params'])
            yield from zip([optimizer] * len(whole), group['names'], whole, group['params'])


@torch.no_grad()
def gather_state(optimizers):
    """{name: {'exp_avg': whole tensor, ...}} on rank 0, on the CPU. All ranks have to call it."""
    gathered = {}
    rank, world = ranks()
    for optimizer, name, p, own in parameters_of(optimizers):
        state = optimizer.state.get(own, {})
        gathered[name] = {}
        if 'step' in state:
            gathered[name]['step'] = state['step'].to('cpu', copy=True)
        for key in optimizer.state_keys:
            whole = torch.zeros_like(p)
            if key in state:
                optimizer.own_part(p, whole).copy_(state[key])
            if world > 1:
                dist.reduce(whole, 0)                         # the other ranks have zeros there
            if rank == 0:
                gathered[name][key] = whole.cpu()
    return gathered


@torch.no_grad()
def load_state(optimizers, saved):
    """Take this rank's part of what gather_state returned, on whatever number of ranks."""
    for optimizer, name, p, own in parameters_of(optimizers):
        state = saved[name]
        if isinstance(optimizer, AdamW) and 'step' not in state:
            continue                                          # it had not made a step yet
        parts = {key: optimizer.own_part(p, state[key]) for key in optimizer.state_keys}
        if any(part is None for part in parts.values()):
            continue                                          # another rank's matrix
        if 'step' in state:
            parts['step'] = state['step']
        optimizer.state[own] = {key: t.to(p.device, copy=True) for key, t in parts.items()}
