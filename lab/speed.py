"""Speed and memory in one page: beside other implementations, and as the sizes grow.

    python -m lab.speed                            # 20 minutes on two CPU cores that are idle
    python -m lab.speed --quick --out=out/speed    # every part, tiny, in two or three minutes
    python -m lab.speed --parts=muon,tokens --out=out/speed
    python -m lab.speed --redraw                   # speed.md and speed.png anew, from speed.json

It writes speed.md, speed.json (every figure of every round) and speed.png. What is compared takes
turns, and ratios are taken within a round, as in bench.py: a machine's speed can swing by a factor
of two. All on the CPU; `python -m lab.bench --device=cuda` measures a GPU.
"""
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed.run
from tqdm import tqdm

from checkpoint import read_log, replace_file, to_json
from configurator import check_range, configure, fail, knob_values
from data_prep import prepare_missing
from hardware import gemm_flops, matmul_dtype
from lab import bench, speed_page
from loader import get_batch, open_data
from model import Xmodel, XmodelConfig
from muon import Muon, newton_schulz_flops
from processes import ending_in_one_line, start_worker, temporary_folder

out = 'results'               # folder for speed.md, speed.json and speed.png
parts = 'work,decoding,muon,loading,width,length,vocabulary,tokens,ranks'      # what to measure
rounds = 5                    # timed rounds of each part; ranks run twice at most
quick = False                 # tiny shapes, few points, one round, no compiled step: a trial
redraw = False                # measure nothing: page and picture from the speed.json in `out`

ROOT = Path(__file__).parent.parent
PARTS = parts.split(',')
SHAPE = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_ffn', 'vocab_size', 'block_size')
# of four blocks, where not all of a sweep's models would have time for 24
GROWTH = {'width': (64, 128, 256, 512), 'length': (128, 256, 512, 1024, 2048, 4096),
          'vocabulary': (1024, 4096, 16_384, 65_536, 129_280), 'tokens': (1, 2, 4, 8, 16)}
RANKS = ((1, 1), (2, 1), (1, 2))                                 # (processes, threads of each)
CPU, SECONDS_OF_GEMM = torch.device('cpu'), 0.3                   # of each look at its peak
LONG = 3712                                                      # block_size of the full run


# --------------------------------------------------------------------------------------------------
# Shapes

def proxy():
    """(XmodelConfig, rows of a batch): the 20M proxy, whose shape bench.py has; or a tiny one."""
    if quick:
        return XmodelConfig(1, 2, 1, 64, 96, 512, 32), 2
    return XmodelConfig(**{key: getattr(bench, key) for key in SHAPE}), bench.batch_size


def num_layers():
    return 1 if quick else 4


def models_of(curve):
    """{x: (XmodelConfig, rows)} of a curve: the proxy with fewer blocks, and a size that grows."""
    c, B = proxy()
    c = replace(c, n_layer=num_layers())
    tokens = 512 if quick else 4096                              # at every length
    xs = GROWTH[curve][:2] if quick else GROWTH[curve]
    if curve == 'width':
        return {x: (replace(c, n_embd=x, n_head=x // 64, n_ffn=5 * x // 2), B) for x in xs}
    if curve == 'length':
        return {x: (replace(c, block_size=x), tokens // x) for x in xs}
    if curve == 'vocabulary':
        return {x: (replace(c, vocab_size=x), B) for x in xs}
    return {rows * c.block_size: (c, rows) for rows in xs}


def flops_per_token(c):
    with torch.device('meta'):
        return Xmodel(c).flops_per_token(c.block_size)


# --------------------------------------------------------------------------------------------------
# Measure

def run_child(*argv, env=(), silent=False):
    """Run a script of ours in a process of its own, which ends with this one."""
    command = [sys.executable, ROOT / 'processes.py', *argv]
    stdout = subprocess.DEVNULL if silent else None
    with subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=stdout,
                          env=os.environ | dict(env)) as process:
        process.wait()
    if process.returncode:
        fail(f'{Path(argv[0]).name} ended with exit code {process.returncode}')


def run_bench(*flags):
    """The figures of `python -m lab.bench` with the proxy's shape."""
    c, B = proxy()
    shape = [f'--{key}={getattr(c, key)}' for key in SHAPE]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'bench.json')
        run_child(ROOT / 'lab/bench.py', *shape, f'--batch_size={B}', f'--rounds={rounds}',
                  '--device=cpu', f'--json={file}', *flags)
        return json.loads(file.read_text())


def measure_work(folder):
    """Steps of the proxy beside Granite's."""
    c, _ = proxy()
    flags = []
    if quick:
        flags = ['--variants=ours-eager,granite-eager', '--full_vocab_size=0']
    return run_bench(*flags) | {'flops_per_token': flops_per_token(c)}


def measure_decoding(folder):
    """Decoding with the proxy beside transformers' generate."""
    return run_bench('--generate')


def make_muons(shapes):
    """(our Muon, torch.optim.Muon) with the same settings, weights and random gradients."""
    torch.manual_seed(0)
    values = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]

    def parameters():
        params = [weight.clone().requires_grad_() for weight, _ in values]
        for p, (_, grad) in zip(params, values):
            p.grad = grad.clone()
        return params

    settings = {'lr': 0.01, 'momentum': 0.95, 'weight_decay': 0.1}
    theirs = torch.optim.Muon(parameters(), adjust_lr_fn='match_rms_adamw', **settings)
    return Muon(parameters(), dtype=torch.bfloat16, **settings), theirs


def measure_muon(folder):
    """{threads: seconds of both Muons' steps and GEMM's FLOP/s}, of the proxy's matrices."""
    c, _ = proxy()
    with torch.device('meta'):
        shapes = [p.shape for p in Xmodel(c).blocks.parameters() if p.dim() == 2]
    figures = {'flops': sum(map(newton_schulz_flops, shapes)), 'threads': {}}
    ours, theirs = make_muons(shapes)
    for threads in sorted({1, torch.get_num_threads()}):         # so it ends with as many as before
        torch.set_num_threads(threads)
        seconds = {'ours': [], 'torch': [], 'gemm_flops': []}
        for i in tqdm(range(rounds + 1), desc=f'Muon, {threads} threads', leave=False,
                      disable=None):
            peak = gemm_flops(CPU, torch.bfloat16, SECONDS_OF_GEMM)
            for name, optimizer in (('ours', ours), ('torch', theirs)):
                began = time.perf_counter()
                optimizer.step()
                if i > 0:                                        # the first warms up
                    seconds[name].append(time.perf_counter() - began)
            if i > 0:
                seconds['gemm_flops'].append(peak)
        figures['threads'][threads] = seconds
    return figures


def prepare_data(folder):
    """Python's library and made-up sums in folder/data, if they are not there yet."""
    size, n = (0.5, 2000) if quick else (8, 20_000)
    sources = {'stdlib': f'stdlib --max_mb={size}', 'arith': f'arith --num_docs={n}'}
    prepare_missing(folder / 'data', list(sources), sources, proxy()[0].vocab_size)
    return folder / 'data'


def measure_loading(folder):
    """Seconds to get a batch of the proxy's decay, and one of rows as long as the full run's."""
    c, B = proxy()
    data = open_data(prepare_data(folder), ['stdlib', 'arith'], c.vocab_size)
    figures = {}
    for what, T, R in (('proxy', c.block_size, B), ('long', LONG, 4)):
        seconds = []
        for i in range(40 * rounds + 1):
            began = time.perf_counter()
            get_batch(data, {'arith': 0.67, 'stdlib': 0.33}, range(i * R, (i + 1) * R), T, 1337)
            seconds.append(time.perf_counter() - began)
        # the first packs documents
        figures[what] = {'block_size': T, 'tokens': R * T, 'seconds': seconds[1:]}
    return figures


def measure_curve(curve):
    """[figures of a point]: our step, all points of a curve in turn, each beside a GEMM."""
    variant = 'ours-eager' if quick else 'ours-compiled'
    dtype = dtype_name()
    models, pipes, points = models_of(curve), {}, []
    for x, (c, B) in models.items():
        _, pipes[x] = start_worker(bench.worker, variant, c, B, 'cpu', dtype)
        tokens = B * c.block_size
        points.append({'x': x, 'rows': B, 'tokens': tokens, 'flops': tokens * flops_per_token(c),
                       'seconds': [], 'gemm_flops': []})
    bar = tqdm(total=len(models) * (2 + rounds), desc=curve, leave=False, disable=None)
    for i in range(2 + rounds):                                  # the first two compile, warm up
        for point in points:
            peak = gemm_flops(CPU, matmul_dtype('cpu'), SECONDS_OF_GEMM)
            name = f'{variant}, {curve} {point["x"]}'
            seconds, memory = bench.ask(name, pipes[point['x']])
            if i > 1:
                point['seconds'].append(seconds)
                point['gemm_flops'].append(peak)
                point['peak_mb'], point['beyond_mb'] = memory
            bar.update()
    bar.close()
    for pipe in pipes.values():
        pipe.close()                                             # which ends its worker
    return points


def train_config(folder):
    """A config file of train.py: one phase of the proxy with fewer blocks."""
    c, B = proxy()
    knobs = {key: getattr(c, key) for key in SHAPE[:-1]} | {'n_layer': num_layers()}
    knobs['phases'] = [{'name': 'stable', 'steps': 4 if quick else 24, 'batch': B,
                        'block_size': c.block_size, 'data': {'stdlib': 1.0}, 'optimizer': 'adamw',
                        'warmup': 2, 'decay': 'constant', 'lr': (0, 1, 1)}]
    file = folder / 'ranks.py'
    file.write_text(''.join(f'{key} = {value!r}\n' for key, value in knobs.items()))
    return file


def measure_ranks(folder):
    """[figures of a point]: tokens/s of train.py, by its log, in one or two processes."""
    c, B = proxy()
    c = replace(c, n_layer=num_layers())
    tokens = B * c.block_size
    config, data = train_config(folder), prepare_data(folder)
    settings = RANKS[:2] if quick else RANKS
    points = [{'processes': n, 'threads': threads, 'tokens': tokens,
               'flops': tokens * flops_per_token(c), 'seconds': [], 'gemm_flops': []}
              for n, threads in settings]
    for i in range(min(rounds, 2)):
        for point in tqdm(points, desc='ranks', leave=False, disable=None):
            run = folder / f'{point["processes"]}-{point["threads"]}-{i}'
            peak = gemm_flops(CPU, matmul_dtype('cpu'), SECONDS_OF_GEMM)
            point['gemm_flops'].append(peak)
            train = [ROOT / 'train.py', config, f'--data_dir={data}', f'--out_dir={run}',
                     f'--compile={not quick}', f'--dtype={dtype_name()}', '--device=cpu']
            if point['processes'] > 1:
                train = [torch.distributed.run.__file__, '--standalone',
                         f'--nproc_per_node={point["processes"]}', *train]
            run_child(*train, env={'OMP_NUM_THREADS': f'{point["threads"]}'}, silent=True)
            log = read_log(run)
            speeds = [step['tok_per_s'] for step in log[len(log) // 2:]]     # past compiling
            point['seconds'].append(tokens / median(speeds))
    return points


MEASURE = {'work': measure_work, 'decoding': measure_decoding, 'muon': measure_muon,
           'loading': measure_loading, 'ranks': measure_ranks}


def dtype_name():
    """bfloat16 where the CPU has it, as in train.py."""
    return str(matmul_dtype('cpu')).removeprefix('torch.')


def cpu_name():
    """The processor's name where Linux tells it, else its architecture."""
    file = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.*)', file.read_text()) if file.exists() else []
    return names[0] if names else platform.machine()


def measure(names):
    """Measure these parts -> all figures, as JSON has them."""
    figures = {'command': shlex.join(['python', '-m', 'lab.speed', *sys.argv[1:]]),
               'date': time.strftime('%Y-%m-%d'), 'torch': torch.__version__,
               'cpu': cpu_name(), 'threads': torch.get_num_threads(),
               'dtype': dtype_name(), 'knobs': knob_values(globals())}
    with temporary_folder(tempfile.gettempdir(), 'nano-xmodel-speed') as folder:
        for name in tqdm(names, unit='part', disable=None):
            if name in GROWTH:
                figures[name] = measure_curve(name)
            else:
                figures[name] = MEASURE[name](folder)
    return json.loads(to_json(figures))


# --------------------------------------------------------------------------------------------------

def part_names():
    """The names in the knob `parts`, each once; ends the program where one is unknown."""
    names = list(dict.fromkeys(parts.split(',')))
    for name in names:
        if name not in PARTS:
            fail(f'parts: {name!r} should be one of {", ".join(PARTS)}')
    return names


def main():
    check_range(globals(), 1, 2**31, 'rounds')
    names, folder = part_names(), Path(out)
    file = folder / 'speed.json'
    if not redraw:
        folder.mkdir(parents=True, exist_ok=True)
        text = to_json(measure(names), indent=1)
        replace_file(file, lambda f: f.write(text.encode()))
    figures = json.loads(file.read_text(encoding='utf-8'))
    has_picture = importlib.util.find_spec('matplotlib') is not None
    page = speed_page.page(figures, has_picture).encode()
    replace_file(folder / 'speed.md', lambda f: f.write(page))
    print(folder / 'speed.md')
    if not speed_page.curves_of(figures):
        return
    if has_picture:
        speed_page.draw(figures, folder / 'speed.png')
    else:
        print('speed.py: no picture: pip install matplotlib, then --redraw', file=sys.stderr)


if __name__ == '__main__':
    if {'--quick', '--quick=True', '--quick=true'} & set(sys.argv):        # another default
        rounds = 1
    configure(globals())
    with ending_in_one_line(out):
        main()
