"""bench.py: one network on both sides, memory that is a variant's own, one line a mistake."""
import json
import multiprocessing
import statistics
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import run
from test_model import granite as oracle

from lab import bench
from model import Xmodel, XmodelConfig

C = XmodelConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_ffn=96, vocab_size=96, block_size=8)
SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=64', '--n_ffn=96', '--vocab_size=96',
         '--full_vocab_size=0', '--batch_size=2', '--block_size=8', '--rounds=3']


def bench_run(*flags):
    return run('lab.bench', *SMALL, *flags)


def test_granite_is_the_network_that_test_model_holds_against_ours():
    pytest.importorskip('transformers')
    free = {'max_position_embeddings', 'use_cache', 'architectures', 'initializer_range',
            'bos_token_id', 'eos_token_id', 'pad_token_id'}      # decide nothing in training
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


def test_of_the_peak_all_is_told_apart_that_outlives_a_step(monkeypatch):
    told, asked = [], iter([True, False])
    monkeypatch.setattr(bench, 'peak_memory', lambda device: 0)
    pipe = SimpleNamespace(recv=lambda: next(asked), send=told.append)
    bench.worker(pipe, 'ours-eager', C, 1, 'cpu', 'float32')
    model = Xmodel(C)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.long))[0].sum().backward()
    optimizer.step()
    kept = [t for p in model.parameters() for t in (p, p.grad)] + [
        t for state in optimizer.state.values() for t in state.values() if t.dim()]
    (_, (whole, rest)), = told
    assert whole - rest == pytest.approx(sum(t.nbytes for t in kept) / 1e6)


def test_run(tmp_path):
    pytest.importorskip('transformers')
    done = bench_run('--variants=ours-eager,granite-eager', f'--json={tmp_path / "bench.json"}')
    assert (done.returncode, done.stderr) == (0, '')
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == \
        ['ours-eager', 'granite-eager']
    told = json.loads((tmp_path / 'bench.json').read_text())
    ours, theirs = told['variants']['ours-eager'], told['variants']['granite-eager']
    ratios = [a / b for a, b in zip(ours['tok_per_s'], theirs['tok_per_s'], strict=True)]
    assert len(ratios) == 3
    assert ours['ratio'] == [statistics.median(ratios), min(ratios), max(ratios)]
    assert 0 < ours['gemm_share'] < 1 and theirs['ratio'] == [1, 1, 1]


def test_fp8_variants_run():
    done = bench_run('--variants=fp8-eager,dynamic-eager', '--rounds=1')
    assert (done.returncode, done.stderr) == (0, '')
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == \
        ['fp8-eager', 'dynamic-eager']


# --- --fp8: what a GPU could gain ---

def test_fp8_keeps_a_byte_a_value_of_the_linears_inputs(monkeypatch):
    monkeypatch.setattr('kernels.MATMUL_MAX_T', 0)      # the fused attention, as of longer texts
    c, B = replace(C, block_size=64), 2
    M, C_, F, kv = B * 64, c.n_embd, c.n_ffn, c.n_kv_head * c.hd
    weights = C_ * (C_ + 2 * kv) + C_ * C_ + C_ * 2 * F + F * C_
    # of qkv, gate_up, down one byte in place of two; of the output projection one more, as
    # attention keeps its output for itself; no bf16 copies of the weights; 14 numbers of scaling
    assert bench.kept_bytes(c, B, False) - bench.kept_bytes(c, B, True) == \
        M * (2 * C_ + F) - M * C_ + 2 * weights - 4 * 56


def test_without_a_gpu_fp8_prints_the_estimate_and_says_so(tmp_path):
    done = run('lab.bench', '--fp8', '--device=cpu', f'--json={tmp_path / "fp8.json"}')
    assert (done.returncode, done.stderr) == (0, '')
    assert '14848 x 1536 x 7680' in done.stdout and 'There is no GPU here' in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 150
    told = json.loads((tmp_path / 'fp8.json').read_text())
    seconds = told['fp8']['estimated_s']
    gain = f'{seconds["bf16"] / seconds["delayed"]:.2f}'
    assert told['knobs']['n_embd'] == 1536 and f'{gain} ' in done.stdout.split('48 blocks')[1]
    assert seconds['bf16'] > seconds['dynamic'] > seconds['delayed']


@pytest.mark.parametrize('flag, says', [
    ('--variants=ours-eager,theirs', "variants: 'theirs' should be one of ours-eager"),
    ('--rounds=0', 'rounds=0 should be at least 1'),
    ('--n_head=3', 'n_head=3 does not divide n_embd=64'),
    ('--fp8 --n_kv_head=1 --n_ffn=72', 'fp8: blocks.0.ffn.down is (64, 72)'),
    ('--json=no/such/bench.json', 'json=no/such/bench.json: there is no such folder'),
])
def test_a_mistake_gets_one_line(flag, says):
    done = bench_run(*flag.split())
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.startswith(f'bench.py: {says}') and done.stderr.count('\n') == 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(bench, 'device', 'cuda')
    with pytest.raises(SystemExit):
        bench.main()
    told = capsys.readouterr()
    assert "device='cuda' cannot be used here: torch finds no GPU" in told.err and told.out == ''


def test_a_worker_that_dies_ends_the_run_in_one_line(capsys):
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(SystemExit):
        bench.ask('ours-eager', ours)
    assert 'ours-eager: its process was killed' in capsys.readouterr().err


def test_generation_is_compared_on_equal_answers(monkeypatch, capsys):
    pytest.importorskip('lm_eval')
    pytest.importorskip('accelerate')
    monkeypatch.setattr(bench, 'rounds', 1)
    told = bench.compare_generation(replace(C, n_layer=1, n_kv_head=2, vocab_size=512), 'cpu', [2])
    assert set(told['2 x 128 tokens']) == {'transformers', 'eager', 'compiled'}
    assert sum('lm-eval, hf' in seconds for seconds in told.values()) == 3
    assert capsys.readouterr().out.count('    ours ') == 3


def test_take_turns_refuses_different_answers(monkeypatch, capsys):
    monkeypatch.setattr(bench, 'rounds', 2)
    times = bench.take_turns({'a': lambda: 1, 'b': lambda: 1})
    assert [len(seconds) for seconds in times.values()] == [2, 2]
    with pytest.raises(SystemExit):
        bench.take_turns({'a': lambda: 1, 'b': lambda: 2})
    assert 'b does not give what a gives' in capsys.readouterr().err


def test_a_worker_tells_what_went_wrong(capsys):
    ours, theirs = multiprocessing.Pipe()
    bench.worker(theirs, 'ours-eager', C, 'many', 'cpu', 'float32')
    with pytest.raises(SystemExit):
        bench.ask('ours-eager', ours)
    assert 'ours-eager: TypeError: ' in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(bench, 'generate', True)
    monkeypatch.setitem(sys.modules, 'lm_eval.models.huggingface', None)
    with pytest.raises(SystemExit):
        bench.main()
    assert 'is missing: pip install lm_eval' in capsys.readouterr().err
