"""The numbers of each step for TensorBoard, Weights & Biases or Trackio, beside log.jsonl.

    pip install tensorboard && python train.py config/nano.py --tracker=tensorboard
    tensorboard --logdir=out                                     # all runs in out/

Each package is imported only where a run asks for it. What it writes lies in the run's folder, and
--resume continues the same record. A tracker that fails, as without a network, is left out from
then on, in one line: training goes on.
"""
import importlib.util
import json
import os
import secrets

from checkpoint import replace_file, to_json
from configurator import fail
from distributed import print_once

PROJECT = 'nano-xmodel'                                          # in which runs stand together


def check_tracker(name):
    """End the program in one line where the package of that name is not installed."""
    if name == 'none':
        return
    spec = importlib.util.find_spec(name)
    if not spec or not spec.origin:                              # a mere folder of that name
        fail(f'tracker={name!r}: the package is missing: pip install {name}')


class Tracker:
    """The record of a run; nothing with tracker='none'. Only rank 0 has one.

    step: the run's first one, from which on an older record is continued.
    """
    def __init__(self, knobs, given, folder, step):
        self.name = knobs.tracker
        self.send = self.close = None                            # none, or it has failed
        if self.name != 'none':
            self.attempt(lambda: self.open(folder.resolve(), given, step))

    def open(self, folder, given, step):
        config = json.loads(to_json(given))                      # tuples become lists
        self.send, self.close = OPEN[self.name](folder, config, step)

    def log(self, entry):
        if self.send:
            self.attempt(lambda: self.send(numbers_of(entry), entry['step']))

    def finish(self):
        if self.close:
            self.attempt(self.close)

    def attempt(self, call):
        try:
            call()
        except Exception as e:  # noqa: BLE001                   (a network, a disk, a package)
            self.send = self.close = None
            what = f'{type(e).__name__}: {str(e)[:120]!r}'
            print_once(f'tracker={self.name} fails ({what}): going on without it')


def numbers_of(entry, prefix=''):
    """The numbers of an entry of the log; those in dicts by their path, as 'val_losses/stdlib'."""
    numbers = {}
    for key, value in entry.items():
        if isinstance(value, tuple):                             # of DelayedScaling's report
            value = dict(zip(('mean', 'largest'), value))
        if isinstance(value, dict):
            numbers |= numbers_of(value, f'{prefix}{key}/')
        elif type(value) in (int, float) and key != 'step':
            numbers[prefix + key] = value
    return numbers


# --------------------------------------------------------------------------------------------------
# Each returns (send(numbers, step), close)

def open_tensorboard(folder, config, step):
    from torch.utils.tensorboard import SummaryWriter
    # of an older record only what is before `step` is shown
    writer = SummaryWriter(folder, purge_step=step)
    knobs = json.dumps(config, indent=1).replace('\n', '\n    ')
    writer.add_text('knobs', f'    {knobs}', step)               # Markdown: as it stands

    def send(numbers, step):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()                                           # kill -9 loses nothing
    return send, writer.close


def open_wandb(folder, config, step):
    import wandb
    os.environ.setdefault('WANDB_PROJECT', PROJECT)
    run = wandb.init(dir=folder, name=folder.name, id=wandb_id(folder), resume='allow',
                     config=config, settings=wandb.Settings(console='off'))
    return after(run.step, run.log), run.finish


def wandb_id(folder):
    """The id of the run's record, by which it is found again: run.json keeps it."""
    about = json.loads((folder / 'run.json').read_text())
    if 'wandb_id' not in about:
        about['wandb_id'] = secrets.token_hex(4)
        text = json.dumps(about, indent=1)
        replace_file(folder / 'run.json', lambda f: f.write(text.encode()))
    return about['wandb_id']


def open_trackio(folder, config, step):
    os.environ.setdefault('TRACKIO_DIR', str(folder / 'trackio'))        # read when imported
    import trackio
    run = trackio.init(PROJECT, name=folder.name, resume='allow' if step else 'never',
                       config=config, embed=False)
    return after(getattr(run, '_next_step', 0), run.log), run.finish


def after(first, log):
    """send(numbers, step) by log, without steps that the record has, which begins at `first`."""
    def send(numbers, step):
        if step >= first:
            log(numbers, step=step)
    return send


OPEN = {'tensorboard': open_tensorboard, 'wandb': open_wandb, 'trackio': open_trackio}
