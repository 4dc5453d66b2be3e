"""What several tests share: a tiny curriculum, its data, and running a script as a user does."""
import ast
import json
import multiprocessing
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')     # before torch: two test processes share two cores

import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TINY = """
n_layer, n_head, n_kv_head, n_embd, n_ffn, vocab_size = 2, 2, 1, 32, 80, 512
phases = [
    {'name': 'stable', 'steps': 8, 'batch': 4, 'block_size': 64, 'data': {'stdlib': 1.0},
     'optimizer': 'adamw', 'warmup': 3, 'decay': 'constant', 'lr': (0, 1, 1)},
    {'name': 'decay', 'steps': 8, 'batch': 8, 'block_size': 64,
     'data': {'arith': 0.6, 'stdlib': 0.4},
     'optimizer': 'muon', 'decay': 'exponential', 'lr': (0, 1, 0.1)},
    {'name': 'long', 'steps': 4, 'batch': 4, 'block_size': 128,
     'data': {'arith': 0.6, 'stdlib': 0.4},
     'optimizer': 'muon', 'warmup': 1, 'decay': 'linear', 'lr': (0, 0.1, 0.01)},
]
log_interval, eval_interval, eval_rows, checkpoint_interval = 1, 6, 8, 3
"""


os.environ['PYTHONPATH'] = str(ROOT)                             # for python -m lab.NAME, anywhere
os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:9'                 # no test reaches the hub
# forks processes that have imported what takes seconds, and have done nothing else
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['torch', 'torch._dynamo', 'numpy', 'tiktoken', 'tqdm',
                               'lm_eval.evaluator'])


def pytest_configure(config):
    # datasets keeps what it has read by its folder's name, whatever has changed in there: so an
    # earlier run of the tests would decide what this one reads
    os.environ['HF_HOME'] = tempfile.mkdtemp()
    # a shell's job in the background ignores Ctrl-C, and so would the processes of the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config):
    shutil.rmtree(os.environ['HF_HOME'], ignore_errors=True)


def be(argv, cwd, files, env=()):
    """Turn this process into `python *argv` with these files as stdin, stdout, stderr."""
    os.environ.update(env)
    for n, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR), n)
    sys.stdin, sys.argv, sys.path[0] = os.fdopen(0), argv, str(ROOT)
    os.chdir(cwd)
    if argv[0].endswith('.py'):
        runpy.run_path(argv[0], run_name='__main__')
    else:                                                        # as python -m does
        runpy.run_module(argv[0], run_name='__main__', alter_sys=True)


def run(script, *args, cwd=ROOT, stdin='', preexec_fn=None):
    """The finished process of `python script args`, or of `python -m lab.NAME args`, with text."""
    argv = [str(ROOT / script) if script.endswith('.py') else script, *map(str, args)]
    if preexec_fn:
        return subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False,
                              cwd=cwd, preexec_fn=preexec_fn)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ('stdin', 'stdout', 'stderr')]
        for file in files:
            file.write_text(stdin if file.name == 'stdin' else '')
        process = SERVER.Process(target=be, args=(argv, cwd, files))
        process.start()
        process.join()
        return subprocess.CompletedProcess(argv, process.exitcode,
                                           *(file.read_text() for file in files[1:]))


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def rank_env(rank, world, port):
    """What torchrun tells a rank by its environment."""
    return {'RANK': f'{rank}', 'LOCAL_RANK': f'{rank}', 'WORLD_SIZE': f'{world}',
            'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': f'{port}'}


def run_ranks(world, script, *args):
    """The finished processes of `torchrun --nproc_per_node=world script args`, by rank."""
    port = free_port()
    argv = [str(ROOT / script), *map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world):
            files = [Path(folder, f'{rank}{name}') for name in ('stdin', 'stdout', 'stderr')]
            for file in files:
                file.write_text('')
            processes.append((files, SERVER.Process(target=be, args=(
                argv, ROOT, files, rank_env(rank, world, port)))))
            processes[-1][1].start()
        for _, process in processes:
            process.join()
        return [subprocess.CompletedProcess(argv, process.exitcode,
                                            *(file.read_text() for file in files[1:]))
                for files, process in processes]


def refused(process):
    """The one line on stderr of a refused use, after checking that it was refused as it should."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2, process.stdout + process.stderr
    assert len(lines) == 1, process.stderr
    return lines[0]


def log(folder):
    """Lines of a run's log, without the fields that a clock decides."""
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    of_a_clock = {'tok_per_s', 'mfu', 'data_s'}
    return [{k: v for k, v in line.items() if k not in of_a_clock} for line in lines]


def same(a, b):
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def make_data(folder):
    """Make the data sets of TINY in a folder."""
    for name, option in (('stdlib', '--max_mb=0.5'), ('arith', '--num_docs=2000')):
        done = run('data_prep.py', name, option, '--vocab_size=512', f'--out_dir={folder / name}')
        assert done.returncode == 0, done.stderr
    return folder


def make_config(file, data_dir):
    """Arguments of train.py for the tiny curriculum on these data."""
    file.write_text(TINY + f'data_dir = {os.fspath(data_dir)!r}\n')
    return [str(file)]


def make_run(folder, tiny):
    """A finished, unbroken run of the tiny curriculum in a folder."""
    done = run('train.py', *tiny, f'--out_dir={folder}')
    assert done.returncode == 0, done.stderr
    return folder


def make_chain(folder, ids, vocab_size=512):
    """A run folder whose model answers each of `ids` by the next one, and the last by itself."""
    # not above: tests/faults.py, as a script, cannot find it when it imports this file
    from model import Xmodel, XmodelConfig
    c = XmodelConfig(n_layer=1, n_head=1, n_kv_head=1, n_embd=32, n_ffn=32, vocab_size=vocab_size,
                     block_size=256)
    state = {name: torch.zeros_like(p) if 'blocks' in name else p.detach()
             for name, p in Xmodel(c).named_parameters()}      # branches add nothing
    # Rows v_k = 3^k (e_k + e_k+1) of the matrix for input and output: v_k times itself is 2 · 9^k,
    # times the next 3 · 9^k, times the one before less, and times all others 0
    state['embed.weight'] = torch.zeros(vocab_size, 32)
    for k, i in enumerate(ids):
        state['embed.weight'][i, k:k + 2] = 3.0**k
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({'config': asdict(c), 'model': state}, folder / 'step_0.pt')
    return folder


def modules_of_a_run():
    """Names of our modules that train.py imports, by whatever way, itself included."""
    def imported(name):
        for node in ast.walk(ast.parse((ROOT / f'{name}.py').read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom):
                yield node.module
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)

    found, new = set(), {'train'}
    while new:
        found |= new
        named = {other for name in new for other in imported(name)}
        new = {name for name in named if (ROOT / f'{name}.py').exists()} - found
    return sorted(found)


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A folder with the data sets of TINY."""
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='session')
def tiny(tmp_path_factory, data_dir):
    """Arguments of train.py for the tiny curriculum."""
    return make_config(tmp_path_factory.mktemp('config') / 'tiny.py', data_dir)


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory, tiny):
    """The folder of a finished, unbroken run of the tiny curriculum."""
    return make_run(tmp_path_factory.mktemp('out') / 'tiny', tiny)
