"""Every phase of the curriculum in under a minute: to see that all works, and for the tests.

    python train.py config/nano.py
"""
out_dir = 'out/nano'
data_dir = 'data/nano'
sources = {'stdlib': 'stdlib --max_mb=2', 'arith': 'arith --num_docs=4000'}

n_layer = 4
n_head = 2
n_kv_head = 1
n_embd = 64
n_ffn = 160
vocab_size = 1024

phases = [
    {'name': 'stable1', 'steps': 60, 'batch': 4, 'block_size': 128, 'data': {'stdlib': 1.0},
     'optimizer': 'adamw', 'warmup': 10, 'decay': 'constant', 'lr': (0, 1, 1)},
    {'name': 'stable2', 'steps': 40, 'batch': 8, 'block_size': 128, 'data': {'stdlib': 1.0},
     'optimizer': 'adamw', 'decay': 'constant', 'lr': (0, 1, 1)},
    {'name': 'decay', 'steps': 60, 'batch': 8, 'block_size': 128,
     'data': {'arith': 0.6687, 'stdlib': 0.3313},
     'optimizer': 'muon', 'decay': 'exponential', 'lr': (0, 1, 1 / 16)},
    {'name': 'long', 'steps': 10, 'batch': 2, 'block_size': 512,
     'data': {'arith': 0.6687, 'stdlib': 0.3313},
     'optimizer': 'muon', 'warmup': 2, 'decay': 'linear', 'lr': (0, 1 / 16, 1 / 160)},
]
log_interval = 20
eval_interval = 50
checkpoint_interval = 25
