"""lab/gpu.py: what a GPU kernel is for; parts that fail alone; figures that are written at once."""
import json
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import kills
import pytest
import torch
from conftest import SERVER, refused, run
from torch import nn
from torch.autograd import DeviceType

from lab import gpu
from lab.gpu import Part
from processes import is_alive

SHAPE = {'n_layer': 1, 'n_embd': 64, 'n_head': 4, 'n_kv_head': 2, 'n_ffn': 96, 'vocab_size': 96}
TINY = ['--device=cpu', '--compile=False', '--steps=[(2, 16)]', '--gemm_size=64', '--rounds=1',
        *[f'--shape.{key}={value}' for key, value in SHAPE.items()]]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """lab.gpu with knobs for a CPU."""
    knobs = {'device': 'cpu', 'compile': False, 'steps': [(2, 16)], 'gemm_size': 64, 'rounds': 1,
             'shape': SHAPE, 'proxy_step': (1, 16), 'json': str(tmp_path / 'gpu.json')}
    for name, value in knobs.items():
        monkeypatch.setattr(gpu, name, value)
    gpu.both_models.cache_clear()
    gpu.peak_flops.cache_clear()
    return gpu


# --- classes of kernels ---

@pytest.mark.parametrize('kind, kernel, ops', [
    ('GEMMs, bf16', 'nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT', ['aten::mm']),
    ('GEMMs, bf16', 'nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT', []),
    ('GEMMs, bf16', 'void cublasLt::splitKreduce_kernel<32, 16, int>', ['aten::mm']),
    ('GEMMs, bf16', 'triton_tem_fused_mm_t_3', ['triton_tem_fused_mm_t_3']),
    ('GEMMs, FP8', 'nvjet_qqtst_128x128_128x6_2x1_v_bz_coopA_TNT', ['aten::_scaled_mm']),
    ('GEMMs, FP8', 'nvjet_sm90_qqtst_128x128_128x6_2x1_v_bz_TNT', []),
    ('GEMMs, FP8', 'sm90_xmma_gemm_e4m3bf16_e5m2f32_f32_tn_n_tilesize64x64x128', []),
    ('GEMMs, FP8', 'cutlass::device_kernel<enable_3x_kernel_for_sm9x>', ['aten::_scaled_mm']),
    ('GEMMs, FP8', 'triton_tem_fused__scaled_mm_5', []),
    ('attention', 'void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>', []),
    ('attention', 'cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16', []),
    ('attention', 'void at::native::reduce_kernel<128, 4, ReduceOp<BFloat16>>',
     ['aten::sum', 'aten::_scaled_dot_product_flash_attention_backward']),
    ('rounding to FP8', 'triton_poi_fused__to_copy_clamp_mul_reciprocal_select_7', []),
    ('rounding to FP8', 'triton_red_fused_abs_amax_maximum_2', []),
    ('rounding to FP8', 'triton_poi_fused__scaled_mm_clone_transpose_4', ['triton_poi_fused']),
    ('rounding to FP8, fused with other work', 'triton_poi_fused__to_copy_clamp_mul_silu_1', []),
    ('rounding to FP8, fused with other work', 'triton_red_fused_abs_amax_mean_pow_rsqrt_0', []),
    ('other element-wise', 'triton_poi_fused_add_mul_split_sub_view_1', []),
    ('other element-wise', 'triton_red_fused__to_copy_mm_mean_pow_rsqrt_0', []),
    ('other element-wise', 'void at::native::vectorized_elementwise_kernel<4, AddFunctor>', []),
    ('logits and loss', 'nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN',
     ['aten::mm', '## Call CompiledFxGraph', 'logits and loss']),
    ('logits and loss', 'triton_red_fused_exp_logsumexp_clamp_1', ['x', 'logits and loss']),
    ('optimizer', 'void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>',
     ['aten::_fused_adamw_', 'Optimizer.step#AdamW.step', 'optimizer'])])
def test_the_class_of_a_kernel(kind, kernel, ops):
    assert gpu.kernel_class(kernel, ops) == kind


def test_a_kernel_is_told_with_what_launched_it_and_no_time_is_lost():
    outer = SimpleNamespace(name='logits and loss', cpu_parent=None, kernels=[],
                            device_type=DeviceType.CPU)
    inner = SimpleNamespace(name='aten::mm', cpu_parent=outer, device_type=DeviceType.CPU,
                            kernels=[SimpleNamespace(name='nvjet', duration=2000)])

    def on_gpu(name, microseconds, is_user_annotation=False):
        return SimpleNamespace(name=name, device_type=DeviceType.CUDA,
                               is_user_annotation=is_user_annotation,
                               time_range=SimpleNamespace(elapsed_us=lambda: microseconds))

    waiting = SimpleNamespace(name='Command Buffer Full', cpu_parent=outer, kernels=inner.kernels,
                              device_type=DeviceType.CPU)
    events = [outer, inner, waiting, on_gpu('nvjet', 2000), on_gpu('nvjet', 3000),
              on_gpu('copy', 500), on_gpu('logits and loss', 9000, is_user_annotation=True)]
    assert list(gpu.launched(events)) == [('nvjet', ['aten::mm', 'logits and loss'], 2.0),
                                          ('nvjet', [], 3.0), ('copy', [], 0.5)]


# --- parts, each in small on a CPU ---

def test_bf16_and_fp8_share_their_weights_and_gradients(tiny):
    models = tiny.both_models()
    plain, in_fp8 = models['bf16'], models['FP8']
    assert [id(p) for p in plain.parameters()] == [id(p) for p in in_fp8.parameters()]
    assert type(plain.blocks[0].attn.qkv) is nn.Linear
    assert type(in_fp8.blocks[0].attn.qkv) is gpu.fp8.Float8Linear


def test_a_report_has_each_round_and_what_follows(tiny, monkeypatch):
    monkeypatch.setattr(gpu, 'peak_flops', lambda: 1e6)
    model = SimpleNamespace(flops_per_token=lambda T: 100 * T)
    times = {'a': [1.0, 2.0, 4.0], 'b': [0.5, 2.0, 1.0]}
    (_, a), (_, b) = tiny.report(times, model, 3, 20)
    assert (a['ms'], a['tokens/s'], a['MFU %']) == (2000, 30, 6)
    assert b['times as fast as a'] == 2 and b['ms of rounds'] == [500, 2000, 1000]
    assert 'times as fast as a' not in a


def test_ways_take_turns(tiny, monkeypatch):
    monkeypatch.setattr(gpu, 'rounds', 2)
    calls = []
    seconds = tiny.take_turns({'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')},
                              passes=2, before=lambda: calls.append('-'))
    assert ''.join(calls) == 4 * '-aa-bb'
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_all_that_a_cpu_can_do(tiny):
    figures = {part.name: dict(part.function(*part.args)) for part in tiny.all_parts()
               if not part.needs_gpu}
    assert list(figures) == ['machine', 'step 2 x 16', 'optimizers', 'attention', 'accuracy',
                             'proxy']
    assert figures['machine']['GEMM FP8']['TFLOP/s'] > 0
    assert figures['step 2 x 16']['FP8']['times as fast as bf16'] > 0
    assert list(figures['optimizers']) == ['clipping', 'rounding weights', 'adamw', 'muon']
    assert figures['attention']['FLASH_ATTENTION 2 x 16']['TFLOP/s'] > 0
    assert 'No viable backend' in figures['attention']['CUDNN_ATTENTION 2 x 16']
    assert 'flash_attn_interface' in figures['attention']['FA3 2 x 16']
    assert len(figures['accuracy']) == 12
    for errors in figures['accuracy'].values():
        assert errors['float32 %'] < 1e-3 and 0.1 < errors['bfloat16 %'] < 0.3     # bf16's rounding
    assert figures['proxy']['1 x 16']['tokens/s'] > 0


def test_activations_that_do_not_fit_are_checkpointed(tiny, monkeypatch):
    calls = []

    def micro_batch(model, x):
        calls.append(model.activation_checkpointing)
        if not calls[-1]:
            raise torch.OutOfMemoryError

    models = tiny.both_models()
    monkeypatch.setattr(gpu, 'micro_batch', micro_batch)
    assert list(dict(tiny.time_steps(2, 16))) == ['activations', 'bf16', 'FP8']
    assert not any(model.activation_checkpointing for model in models.values())


def test_the_parts_that_need_a_gpu_run_through(tiny, monkeypatch):
    monkeypatch.setattr(gpu, 'captured', lambda function: SimpleNamespace(replay=function))
    modes = []
    monkeypatch.setattr(nn.Module, 'compile', lambda self, **knobs: modes.append(knobs['mode']))
    monkeypatch.setattr(gpu, 'launched', lambda events: [
        ('nvjet_tst', [], 3.0), *[('a', [], 1.0) for e in events if e.name == 'optimizer']])
    assert list(dict(tiny.time_graphs(2, 16))) == ['bf16', 'bf16, graph', 'FP8', 'FP8, graph']
    assert list(dict(tiny.time_autotuned(2, 16))) == ['default', 'autotuned']
    assert modes == ['max-autotune-no-cudagraphs']
    figures = dict(tiny.time_kernels(2, 16))
    assert figures['FP8, GEMMs, bf16'] == {'ms': 3.0, '%': 75.0}
    assert figures['FP8, other element-wise'] == {'ms': 1.0, '%': 25.0}


# --- processes ---

def tells_its_process():
    yield 'process', {'pid': os.getpid()}


def raises():
    yield 'before', {'x': 1}
    raise ValueError('a | b\nc')


def dies():
    os.kill(os.getpid(), signal.SIGKILL)
    yield 'not reached', 'text'


def hangs():
    threading.Event().wait()
    yield 'not reached', 'text'


def reads(file):
    """Ends only if what it yields is in the file before it ends."""
    yield 'one', {'x': 1}
    while 'one' not in json.loads(Path(file).read_text())['parts'].get('reads', {}):
        pass
    yield 'two', {'x': 2, 'all': [1, 2]}


def test_a_part_that_fails_is_a_line_and_the_others_run(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(multiprocessing, 'get_context', lambda method: SERVER)   # starts faster
    first = [Part(f'first {name}', name, 60, tells_its_process) for name in 'abc']
    found = tiny.run_parts([
        *first, Part('raises', 'a', 60, raises), Part('dies', 'b', 60, dies),
        Part('hangs', 'c', 1, hangs), Part('same', 'c', 60, tells_its_process),
        Part('again', 'c', 60, tells_its_process),
        Part('reads', 'c', 60, reads, (tiny.json,)), Part('not here', 'd', 60, dies, (), 'no GPU')])
    assert json.loads((tmp_path / 'gpu.json').read_text())['parts'] == found
    took = [figures.pop('took')['s'] for name, figures in found.items() if name != 'not here']
    assert len(took) == 9 and 1 <= took[5] < 60                  # hangs
    pids = {name: figures['process']['pid'] for name, figures in found.items()
            if 'process' in figures}
    assert len(set(pids.values())) == 4 and pids['same'] == pids['again'] != pids['first c']
    assert not any(map(is_alive, pids.values())) and not multiprocessing.active_children()
    assert found['raises'] == {'before': {'x': 1}, 'failed': 'ValueError: a | b c'}
    assert found['dies'] == {'failed': 'its process was killed, or crashed: exit code -9'}
    assert found['hangs'] == {'failed': 'ended after 1 s: it hung, or was too slow'}
    assert found['reads'] == {'one': {'x': 1}, 'two': {'x': 2, 'all': [1, 2]}}
    assert found['not here'] == {'left out': 'no GPU'}

    table = capsys.readouterr().out
    assert (tmp_path / 'gpu.md').read_text() == table.removesuffix('\n')
    assert '| raises | failed | ValueError: a / b c |\n' in table
    assert '| reads | two | x 2 |\n' in table


def test_after_its_minutes_it_starts_nothing(tiny, monkeypatch):
    monkeypatch.setattr(gpu, 'minutes', 0.0)
    monkeypatch.setattr(gpu, 'start_worker', None)
    assert tiny.run_parts([Part('a', 'a', 60, dies)]) == {
        'a': {'left out': 'the 0 minutes were over'}}


def test_a_worker_whose_parent_is_gone_ends_without_a_word(monkeypatch, capsys):
    monkeypatch.setattr(gpu, 'end_with_parent', lambda: None)
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    gpu.worker(theirs, {})
    told = capsys.readouterr()
    assert told.out == told.err == ''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('sign', [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_process(monkeypatch, tmp_path, sign):
    kills.make_text(tmp_path)
    monkeypatch.setitem(kills.PLACES, 'gpu', lambda folder: (
        ['-m', 'lab.bench', 'gpu', *TINY, '--rounds=1000000000', '--parts=machine'],
        kills.has(folder, 'gpu.json')))
    assert not kills.kill_once('gpu', 'parent', sign, tmp_path)


# --- as a user runs it ---

def test_a_run(tmp_path):
    done = run('lab.bench', 'gpu', *TINY, '--parts=machine,kernels', f'--json={tmp_path}/a.json')
    assert done.returncode == 0 and done.stderr == 'machine ...\nkernels ...\n'
    written = json.loads((tmp_path / 'a.json').read_text())
    assert list(written['parts']) == ['machine', 'kernels'] and written['knobs']['rounds'] == 1
    assert '| kernels | left out | the profiler sees none on a CPU |\n' in done.stdout


@pytest.mark.parametrize('flag, says', [
    ('--rounds=0', 'rounds=0 should be at least 1'),
    ('--parts=machine,stop', 'parts=machine,stop should be some of machine,step,kernels,'),
    ('--json=no/such/gpu.json', 'json=no/such/gpu.json should be a new file'),
    (f'--json={__file__}', 'should be a new file'),
    ('--device=cuda', 'gpu: torch finds no GPU here')])
def test_a_mistake_gets_one_line(flag, says):
    if flag == '--device=cuda' and torch.cuda.is_available():
        pytest.skip('there is one')
    assert says in refused(run('lab.bench', 'gpu', *TINY, flag))
