"""What Microsoft's mup package prescribes for this network's tensors, for test_model.py to compare.

    python -m venv /tmp/mup && . /tmp/mup/bin/activate
    pip install torch==2.13.0 numpy
    pip install --no-deps mup==1.0.0 pyyaml pandas tqdm python-dateutil six
    python tests/mup_oracle.py > tests/mup_oracle.json

An environment of its own, without mup's dependencies: it asks for a torchvision that does not fit
this torch. mup has no tied embeddings and no depth: the output matrix is a MuReadout of its own.
Its AdamW multiplies the weight decay of matrices by m, so that lr x decay is constant in width; in
Xmodel-2.5's it falls with the learning rate.
"""
import json

import mup
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, C, kv, n_ffn):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(C), nn.RMSNorm(C)
        self.qkv = nn.Linear(C, C + 2 * kv, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.gate_up = nn.Linear(C, 2 * n_ffn, bias=False)
        self.down = nn.Linear(n_ffn, C, bias=False)


class Network(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.embed = nn.Embedding(96, C)
        self.block = Block(C, 64, 5 * C // 2)                      # one key-value head of 64
        self.norm = nn.RMSNorm(C)
        self.readout = mup.MuReadout(C, 96, bias=False)


told = {}
for C in (128, 256, 1536):
    network = Network(C)
    mup.set_base_shapes(network, Network(256), delta=Network(320))
    names = {id(p): name for name, p in network.named_parameters()}
    torch.manual_seed(0)
    for p in network.parameters():
        if p.dim() == 2:
            mup.init.normal_(p, std=0.1)
    optimizer = mup.MuAdamW(network.parameters(), lr=1.0, weight_decay=0.1)
    told[C] = {'output_divisor': network.readout.width_mult(), 'parameters': {
        names[id(p)]: {'lr': group['lr'], 'weight_decay': group['weight_decay'],
                       'std': round(p.std().item(), 5) if p.dim() == 2 else None}
        for group in optimizer.param_groups for p in group['params']}}
print(json.dumps(told, indent=1))
