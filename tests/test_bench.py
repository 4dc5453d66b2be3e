"""bench.py: one network on both sides, memory that is a variant's own, one line a mistake."""
import json
import multiprocessing
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import granite as oracle

import bench
from model import Xmodel, XmodelConfig

C = XmodelConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_ffn=96, vocab_size=96, block_size=8)
SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=64', '--n_ffn=96', '--vocab_size=96',
         '--full_vocab_size=0', '--batch_size=2', '--block_size=8', '--rounds=3']


def run(*flags):
    return subprocess.run([sys.executable, Path(bench.__file__), *SMALL, *flags], check=False,
                          capture_output=True, text=True)


def test_granite_is_the_network_that_test_model_holds_against_ours():
    pytest.importorskip('transformers')
    free = {'max_position_embeddings', 'use_cache'}              # decide nothing in training
    ours, theirs = (m.config.to_dict() for m in (bench.granite(C), oracle(Xmodel(C))[0]))
    assert {k: v for k, v in ours.items() if k not in free} == \
        {k: v for k, v in theirs.items() if k not in free}


def test_peak_memory_is_the_process_own():
    ballast = torch.ones(2**28)                                  # 1 GiB that no child may count
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        before = pool.apply(bench.peak_memory, ['cpu'])
        pool.apply(torch.ones, [2**26])                          # 256 MiB
        after = pool.apply(bench.peak_memory, ['cpu'])
    assert before < ballast.nbytes and 2**28 <= after - before < 2**30


def test_run(tmp_path):
    pytest.importorskip('transformers')
    done = run('--variants=ours-eager,granite-eager', f'--json={tmp_path / "bench.json"}')
    assert (done.returncode, done.stderr) == (0, '')
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == \
        ['ours-eager', 'granite-eager']
    told = json.loads((tmp_path / 'bench.json').read_text())
    ours, theirs = told['variants']['ours-eager'], told['variants']['granite-eager']
    ratios = [a / b for a, b in zip(ours['tok_per_s'], theirs['tok_per_s'], strict=True)]
    assert len(ratios) == 3
    assert ours['ratio'] == [statistics.median(ratios), min(ratios), max(ratios)]
    assert 0 < ours['gemm_share'] < 1 and theirs['ratio'] == [1, 1, 1]


@pytest.mark.parametrize('flag, says', [
    ('--variants=ours-eager,theirs', "variants: 'theirs' should be one of ours-eager"),
    ('--rounds=0', 'rounds=0 should be at least 1'),
    ('--n_head=3', 'n_head=3 does not divide n_embd=64'),
    ('--json=no/such/bench.json', 'json=no/such/bench.json: there is no such folder'),
])
def test_a_mistake_gets_one_line(flag, says):
    done = run(flag)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.startswith(f'bench.py: {says}') and done.stderr.count('\n') == 1


def test_a_worker_that_dies_ends_the_run_in_one_line(capsys):
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(SystemExit):
        bench.ask('ours-eager', ours)
    assert 'ours-eager: its process was killed' in capsys.readouterr().err
