"""The files of a run: written whole or not at all, read without running what is in them.

A checkpoint out/RUN/step_N.pt is a dict of tensors and plain Python values, after N steps: model,
optimizer states, config, knobs, step, tokens. It is read with weights_only, so that a foreign file
cannot bring code along.

    python checkpoint.py out/RUN                   # what is in the newest checkpoint of a run
"""
import os
import sys
from pathlib import Path

import torch

from model import Xmodel, XmodelConfig

CONTENT = {'model', 'config', 'knobs', 'step', 'tokens', 'recent', 'watch', 'optimizer',
           'optimizer_states'}


def replace_file(path, write):
    """Let write(file) make the file `path` so that it is whole, or as before, whatever happens."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checkpoints(run):
    """The step_N.pt files of a run's folder, in order of N."""
    files = [f for f in Path(run).glob('step_*.pt') if f.stem[5:].isdecimal()]
    return sorted(files, key=lambda f: int(f.stem[5:]))


def read_checkpoint(path):
    """The dict that train.py saved as the file `path`, or as the newest of the run folder `path`.

    ValueError, in one line, for a missing or foreign file; which cannot run code (weights_only).
    """
    path = Path(path)
    if path.is_dir():
        files = checkpoints(path)
        if not files:
            raise ValueError(f'{path} holds no checkpoint (step_N.pt)')
        path = files[-1]
    if not path.exists():
        raise ValueError(f'{path} does not exist; a checkpoint is a file out/RUN/step_N.pt')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        checkpoint |= {'config': XmodelConfig(**checkpoint['config']), 'path': str(path)}
        with torch.device('meta'):
            right = Xmodel(checkpoint['config']).state_dict()
        shapes, right = ({k: v.shape for k, v in d.items()} for d in (checkpoint['model'], right))
        if shapes != right or not CONTENT <= checkpoint.keys():
            raise ValueError
        return checkpoint
    except Exception as e:  # noqa: BLE001                         (torch.load raises many kinds)
        raise ValueError(f'{path} is not a checkpoint of train.py, or is damaged '
                         f'({type(e).__name__})') from None


def load_model(path, device='cpu'):
    """(Xmodel in eval mode, the rest of the checkpoint), of what read_checkpoint reads."""
    checkpoint = read_checkpoint(path)
    model = Xmodel(checkpoint['config']).to(device)
    model.load_state_dict(checkpoint.pop('model'))
    return model.eval(), checkpoint


def changes(old, new, path=''):
    """Lines 'path: old -> new' for what differs between two nested values of knobs."""
    if path == 'phases':
        old, new = ({phase['name']: phase for phase in phases} for phases in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in {**old, **new}
                for line in changes(old.get(key), new.get(key), f'{path}.{key}' if path else key)]
    return [] if old == new else [f'{path}: {old!r} -> {new!r}']


if __name__ == '__main__':
    try:
        for key, value in read_checkpoint(sys.argv[1] if sys.argv[1:] else 'out/proxy20m').items():
            print(f'{key}: {", ".join(value) if key == "model" else str(value)[:1000]}')
    except ValueError as e:
        print(f'checkpoint.py: {e}', file=sys.stderr)
        sys.exit(2)
