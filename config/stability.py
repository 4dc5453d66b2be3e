"""A model of 5M parameters, the proxy's width, for runs that are compared with one another, such as
FP8 with bf16 (results/README.md). 1500 steps: ten to twenty minutes on one CPU core.

    python train.py config/stability.py --fp8=True --out_dir=out/stability/fp8

One kind of text throughout, so that the loss at the end is of one thing.
"""
out_dir = 'out/stability/bf16'
data_dir = 'data/stability'
sources = {'stdlib': 'stdlib'}

n_layer = 6
n_head = 4
n_kv_head = 1
n_embd = 256
n_ffn = 640
vocab_size = 5120

phases = [
    {'name': 'stable', 'steps': 1100, 'batch': 4, 'block_size': 128, 'data': {'stdlib': 1.0},
     'optimizer': 'adamw', 'warmup': 40, 'decay': 'constant', 'lr': (0, 1, 1)},
    {'name': 'decay', 'steps': 400, 'batch': 4, 'block_size': 128, 'data': {'stdlib': 1.0},
     'optimizer': 'muon', 'decay': 'exponential',
     'lr': (0, 2, 1 / 8), 'embedding_lr': (0, 1, 1 / 16)},
]
eval_rows = 64
checkpoint_interval = 300
