"""train.py with one thing changed that no knob changes, for lab/ablate.py and lab/signatures.py.

    python lab/variants.py --variant=muon_for_attention config/ablation.py

    muon_for_attention   Muon trains attention's matrices alone, AdamW the FFN's
    muon_for_ffn         the other way round
    bf16_weights         no fp32 master weights: all are rounded to bf16 after each step
"""
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import muon

ATTENTION, FFN = ('qkv', 'out'), ('gate_up', 'down')             # modules


def muon_for(modules):
    """Let Muon train the matrices of these modules alone.

    The others have half the learning rate, which is what experiments.ADAMW gives AdamW beside Muon.
    """
    original = muon.make_optimizers

    def make_optimizers(kind, groups, *settings):
        if kind == 'muon':
            groups = [part for group in groups for part in in_two(group)]
        return original(kind, groups, *settings)

    def in_two(group):
        """The group's weights that Muon may train, and the others, which have another role."""
        if group['muon_lr_mult'] is None:                        # no matrices of the blocks
            yield group
            return
        for chosen in (True, False):
            both = [(name, p) for name, p in zip(group['names'], group['params'])
                    if (name.split('.')[-2] in modules) == chosen]
            if both:
                names, params = map(list, zip(*both))
                part = group | {'names': names, 'params': params}
                if not chosen:
                    part |= {'role': 'not for Muon', 'lr_mult': group['lr_mult'] / 2}
                yield part

    muon.make_optimizers = make_optimizers


def bf16_weights():
    """Round all weights after each step."""
    original = muon.step_all

    @torch.no_grad()
    def step_all(optimizers, lrs):
        original(optimizers, lrs)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for p in group['params']:
                    p.copy_(p.bfloat16())

    muon.step_all = step_all


VARIANTS = {'muon_for_attention': lambda: muon_for(ATTENTION),
            'muon_for_ffn': lambda: muon_for(FFN), 'bf16_weights': bf16_weights}


if __name__ == '__main__':
    flag = next(word for word in sys.argv if word.startswith('--variant='))
    sys.argv.remove(flag)
    VARIANTS[flag.removeprefix('--variant=')]()
    sys.argv[0] = str(ROOT / 'train.py')
    runpy.run_path(sys.argv[0], run_name='__main__')
