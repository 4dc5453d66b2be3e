"""A model of 5M parameters, the proxy's width, for lab/ablate.py.

    python -m lab.ablate decay_optimizer

What each arm changes is in lab/experiments.py.

Text and sums as in the proxy. 1M tokens, of which decay takes 40 %: minutes on one CPU core. Two
phases have no steps but in runs that go over to Muon before the decay, or on to long texts.
"""
out_dir = 'out/ablation'
data_dir = 'data/ablation'
sources = {'stdlib': 'stdlib', 'arith': 'arith'}

n_layer = 6
n_head = 4
n_kv_head = 1
n_embd = 256
n_ffn = 640
vocab_size = 5120

_text = {'stdlib': 1.0}

# small batches want a lower learning rate for matrices than the paper's 0.01
phases = [
    {'name': 'stable', 'steps': 300, 'batch': 8, 'block_size': 256, 'data': _text,
     'optimizer': 'adamw', 'warmup': 30, 'decay': 'constant',
     'lr': (0, 0.5, 0.5), 'embedding_lr': (0, 1, 1)},
    {'name': 'stable_muon', 'steps': 0, 'batch': 8, 'block_size': 256, 'data': _text,
     'optimizer': 'muon', 'decay': 'constant',
     'lr': (0, 1, 1), 'embedding_lr': (0, 1, 1)},
    {'name': 'decay', 'steps': 200, 'batch': 8, 'block_size': 256,
     'data': {'arith': 0.67, 'stdlib': 0.33},
     'optimizer': 'muon', 'decay': 'exponential',
     'lr': (0, 1, 1 / 16), 'embedding_lr': (0, 1, 1 / 16)},
    {'name': 'long', 'steps': 0, 'batch': 2, 'block_size': 1024,
     'data': {'arith': 0.67, 'stdlib': 0.33},
     'optimizer': 'muon', 'warmup': 8, 'decay': 'linear',
     'lr': (0, 1 / 16, 1 / 160), 'embedding_lr': (0, 1 / 16, 1 / 160)},
]
eval_rows = 64
