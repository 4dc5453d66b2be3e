"""The full 1.3B run of Xmodel-2.5 (arXiv 2511.19496), from its released training scripts.

    torchrun --standalone --nproc_per_node=8 --shutdown-timeout=110 train.py config/xmodel25.py

1.4T tokens in the stable phases, then 112B in decay and long context. The data sets below are not
built in: make each from its text with data_prep.py, as train.py says in one line for a missing one.
"""
out_dir = 'out/xmodel25'

# 1 350 059 520 parameters; m = 1536 / 256 = 6
n_layer = 48
n_head = 24
n_kv_head = 8
n_embd = 1536
n_ffn = 3840
vocab_size = 129_280
mup_rules = 'authors'                   # with the released code's two deviations from the textbook
# the authors' own; '1/sqrt(m)' is what transfers (results/README.md): at m = 6, 2.4 times this
muon_lr_scaling = '1/m'
fp8 = True                              # fast on an H100, or what came after it

_stable = {
    'ultrafineweb-en': 0.41, 'ultrafineweb-zh': 0.20, 'starcoder': 0.26, 'books': 0.01,
    'algebraic-stack': 0.005, 'open-web-math': 0.005, 'wiki': 0.01, 'arxiv': 0.0133,
    'stackexchange': 0.009, 'reddit': 0.0391, 'pes2o': 0.0285, 'megawika': 0.0023,
    'tulu-flan': 0.0078,
}
# the paper's weights add up to 0.99999; the loader divides by their sum
_decay = {
    'sft-mixed': 0.6687, 'ultrafineweb-en': 0.18725, 'ultrafineweb-zh': 0.03716,
    'starcoder': 0.02209, 'books': 0.00287, 'algebraic-stack': 0.01722, 'open-web-math': 0.01722,
    'wiki': 0.01147, 'stackexchange': 0.009, 'reddit': 0.009, 'megawika': 0.01801,
}

# Peaks at the base width; µP divides the matrices' by m = 6: 0.01 / 6 = 1.6667e-3
learning_rate = 0.01
embedding_lr = 0.01

phases = [
    {'name': 'stable1', 'steps': 270_000, 'batch': 480, 'block_size': 3712, 'data': _stable,
     'optimizer': 'adamw', 'warmup': 2000, 'decay': 'constant', 'lr': (0, 1, 1)},
    {'name': 'stable2', 'steps': 260_000, 'batch': 960, 'block_size': 3712, 'data': _stable,
     'optimizer': 'adamw', 'decay': 'constant', 'lr': (0, 1, 1)},
    {'name': 'decay', 'steps': 20_000, 'batch': 960, 'block_size': 3776, 'data': _decay,
     'optimizer': 'muon', 'decay': 'exponential', 'lr': (0, 1, 1 / 16)},
    # matrices 1e-6 -> 1.0417e-4 -> 1e-5 once divided by m; embedding 1e-6 -> 6.25e-4 -> 1e-5
    {'name': 'long', 'steps': 10_000, 'batch': 240, 'block_size': 16_384, 'data': _decay,
     'optimizer': 'muon', 'warmup': 500, 'decay': 'linear',
     'lr': (6e-4, 1 / 16, 6e-3), 'embedding_lr': (1e-4, 1 / 16, 1e-3)},
]

micro_batch_tokens = 16_384             # on one GPU of 80 GB
eval_interval = 1000
eval_rows = 64
checkpoint_interval = 1000
