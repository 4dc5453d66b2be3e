"""A small model of the recipe's shape for sweep.py, which sets its width, depth and learning rates.

    python -m lab.sweep transfer

Sizes as in the paper's grids: few layers, heads of 64 with one of keys and values, FFN 2.5 x width.
Warmup, stable and decay in small; sweep.py lets AdamW take the decay as well, unless told muon. Of
so few steps the decay takes most: a short one punishes large learning rates for their noise alone,
and wide models more than narrow ones.
"""
out_dir = 'out/transfer'
data_dir = 'data/nano'
sources = {'stdlib': 'stdlib --max_mb=2'}

n_layer = 4
n_head = 4
n_kv_head = 1
n_embd = 256
n_ffn = 640
vocab_size = 1024

phases = [
    {'name': 'stable', 'steps': 60, 'batch': 4, 'block_size': 128, 'data': {'stdlib': 1.0},
     'optimizer': 'adamw', 'warmup': 20, 'decay': 'constant', 'lr': (0, 1, 1)},
    {'name': 'decay', 'steps': 150, 'batch': 4, 'block_size': 128, 'data': {'stdlib': 1.0},
     'optimizer': 'muon', 'decay': 'exponential', 'lr': (0, 1, 1 / 16)},
]
compile = False                         # takes longer than a trial
