"""The 20M proxy through the whole curriculum, on a laptop: 24 layers of the 1.3B model's shape,
256 wide, so that µP's width multiplier is 1. Half an hour on two CPU cores.

    python train.py config/proxy20m.py

Text is the source of the Python that runs this; instruction data are made-up sums in words. With
3.4M tokens, not 1.4T, the phases keep the paper's order but not its proportions: decay takes 52 %.
"""
out_dir = 'out/proxy20m'
sources = {'stdlib': 'stdlib', 'arith': 'arith'}

n_layer = 24
n_head = 4
n_kv_head = 1
n_embd = 256
n_ffn = 640
vocab_size = 16_384

_text = {'stdlib': 1.0}
_decay = {'arith': 0.67, 'stdlib': 0.33}             # two thirds SFT, as in the paper's decay

# Batches are small, since so few tokens must make many steps; and small batches want a lower
# learning rate for matrices than the paper's 0.01. Muon's is higher: see results/README.md.
# With so few tokens a step (2048) no gain by Muon is seen in a 5M model: the loss of its decay's
# mixture changes by -0.008 +- 0.022, as it learns more of the sums and loses some of the text. With
# 8192 it gains 0.097 +- 0.021 (results/ablations.md). Muon is here because the recipe has it.
phases = [
    {'name': 'stable1', 'steps': 600, 'batch': 2, 'block_size': 512, 'data': _text,
     'optimizer': 'adamw', 'warmup': 40, 'decay': 'constant',
     'lr': (0, 0.3, 0.3), 'embedding_lr': (0, 1, 1)},
    {'name': 'stable2', 'steps': 460, 'batch': 4, 'block_size': 512, 'data': _text,
     'optimizer': 'adamw', 'decay': 'constant',
     'lr': (0, 0.3, 0.3), 'embedding_lr': (0, 1, 1)},
    {'name': 'decay', 'steps': 860, 'batch': 4, 'block_size': 512, 'data': _decay,
     'optimizer': 'muon', 'decay': 'exponential',
     'lr': (0, 1.2, 1 / 10), 'embedding_lr': (0, 1, 1 / 16)},
    {'name': 'long', 'steps': 16, 'batch': 2, 'block_size': 2048, 'data': _decay,
     'optimizer': 'muon', 'warmup': 2, 'decay': 'linear',
     'lr': (0, 1 / 10, 1 / 100), 'embedding_lr': (0, 1 / 16, 1 / 160)},
]
