"""Training on several ranks: as on one, with the optimizer's state spread over them."""
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SERVER, free_port, log, refused, run_ranks, same
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import muon
from checkpoint import checkpoints, read_checkpoint
from configurator import run_config
from distributed import gather_state, load_state
from model import Xmodel, XmodelConfig

# 60 steps over the change to Muon, at step 24, and of the length, at step 48
CURRICULUM = ['--dtype=float32', '--steps_scale=3', '--eval_interval=1000', '--n_kv_head=2',
              '--checkpoint_interval=36', '--keep=9', '--eval_rows=7']


@pytest.fixture(scope='module')
def trained(tiny, tmp_path_factory):
    """A function (ranks, more arguments) -> folder of a run, which is made once."""
    @functools.cache
    def trained(world, *more):
        folder = tmp_path_factory.mktemp('ranks') / 'run'
        done = run_ranks(world, 'train.py', *tiny, *CURRICULUM, *more,
                         f'--out_dir={folder}')
        assert [process.returncode for process in done] == [0] * world, done[0].stderr
        assert not any(process.stdout for process in done[1:])    # but the first they are quiet
        return folder
    return trained


WAIT = """
import sys, threading, torch, distributed
distributed.PATIENCE = 1
if 'hangs' in sys.argv:
    distributed.threading.Thread.start = lambda _: None          # no sign comes
    distributed.threading.Thread.join = lambda _: None
distributed.join_ranks(torch.device('cpu'), timeout=2)

def work():
    if 'fails' in sys.argv:
        sys.exit(2)
    threading.Event().wait(5)                                    # where a step has 2 seconds
    return 'made'

print(distributed.rank_0_first(work))
"""


@pytest.mark.parametrize('how', ['works', 'fails', 'hangs'])
def test_ranks_wait_for_rank_0_longer_than_for_a_step(tmp_path, how):
    (tmp_path / 'wait.py').write_text(WAIT)
    first, second = run_ranks(2, tmp_path / 'wait.py', how)
    if how == 'works':
        assert first.stdout == second.stdout == 'made\n', first.stderr + second.stderr
        assert first.returncode == second.returncode == 0
    elif how == 'fails':
        assert first.returncode == second.returncode == 2 and second.stderr == ''
    else:
        assert 'waited for rank 0, which prepares data' in refused(second)


def agree(folder, right, first=0):
    # AdamW's steps are blind to a factor on all gradients: so their norms count as well
    for key, tolerance in (('loss', 1e-5), ('grad_norm', 1e-3)):
        found, wanted = ([line[key] for line in log(run)] for run in (folder, right))
        assert found == pytest.approx(wanted[first:], rel=tolerance), key
    ours, theirs = (read_checkpoint(folder) for folder in (folder, right))
    assert ours['step'] == theirs['step'] == 60
    assert ours['model'].keys() == theirs['model'].keys()
    for name, w in theirs['model'].items():
        assert (ours['model'][name] - w).norm() <= 1e-4 * w.norm(), name
    moments_agree(ours, theirs)


def moments_agree(ours, theirs):
    assert ours['optimizer_state'].keys() == theirs['optimizer_state'].keys()
    for name, state in theirs['optimizer_state'].items():
        assert ours['optimizer_state'][name].keys() == state.keys() and len(state) in (1, 3)
        for key, t in state.items():
            assert (ours['optimizer_state'][name][key] - t).norm() <= 1e-3 * t.norm(), (name, key)


@pytest.mark.parametrize('world, more', [(2, ()), (4, ()), (2, ('--micro_batch_tokens=64',))])
def test_ranks_train_as_one(trained, world, more):
    agree(trained(world, *more), trained(1))
    ours, theirs = ([line['val_losses'] for line in log(trained(*run)) if 'val_losses' in line]
                    for run in ((world, *more), (1,)))
    assert len(theirs) == 3 and ours == [pytest.approx(losses, rel=1e-4) for losses in theirs]
    moments_agree(*(read_checkpoint(trained(n, *m) / 'step_24.pt')       # AdamW's of all
                    for n, m in ((world, more), (1, ()))))


@pytest.mark.parametrize('before, after', [(4, 2), (1, 4)])
def test_a_run_goes_on_with_another_number_of_ranks(trained, before, after):
    at = trained(before) / 'step_36.pt'                          # in the midst of Muon's phase
    agree(trained(after, f'--init_from={at}'), trained(1), first=36)


def test_the_paper_run_starts_on_eight_ranks_and_goes_through_its_phases(data_dir, tmp_path):
    names = {'sft-mixed', *run_config(str(ROOT / 'config/xmodel25.py'), {})[0]['_stable']}
    for name in names:
        (tmp_path / name).symlink_to(data_dir / 'stdlib')
    small = [f'--phases.{name}.{key}={value}' for name, batch, T in (
        ('stable1', 8, 64), ('stable2', 16, 64), ('decay', 16, 80), ('long', 8, 256))
        for key, value in (('batch', batch), ('block_size', T))]
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=8',
         'train.py', 'config/xmodel25.py', *small, '--n_layer=2', '--n_head=6', '--n_kv_head=2',
         '--n_embd=96', '--n_ffn=240', '--vocab_size=512', '--steps_scale=1e-5', '--eval_rows=1',
         f'--data_dir={tmp_path}', f'--out_dir={tmp_path / "run"}'],
        cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = log(tmp_path / 'run')
    assert [line['phase'] for line in lines] == \
        ['stable1'] * 3 + ['stable2'] * 3 + ['decay', 'long']
    assert [line['tokens'] for line in lines][2:] == [1536, 2560, 3584, 4608, 5888, 7936]
    assert lines[-1]['loss'] < lines[0]['loss'] and not any('skipped' in line for line in lines)
    assert lines[6]['note'] == 'optimizer adamw -> muon, with fresh state'
    assert [f.name for f in checkpoints(tmp_path / 'run')] == [f'step_{n}.pt' for n in (3, 6, 7, 8)]
    assert json.loads((tmp_path / 'run/run.json').read_text())['ranks'] == 8
    assert done.stdout.count('step 6: phase decay') == 1


def test_a_mistake_is_told_once(tiny, tiny_run, tmp_path):
    for flag, line in (
            ('--phases.stable.batch=3', 'batch=3 cannot be shared out evenly among 2 ranks'),
            (f'--data_dir={tmp_path}', 'stdlib is missing: python data_prep.py'),
            (f'--out_dir={tiny_run}', 'holds a run already'),
            (f'--init_from={tiny_run}', 'nothing is left to do'),
            (f'--out_dir={ROOT / "train.py"}', 'train.py: File exists'),
            (f'--reference={tmp_path}', 'log.jsonl: No such file')):
        told = run_ranks(2, 'train.py', *tiny, f'--out_dir={tmp_path / "run"}', flag)
        assert [process.returncode for process in told] == [2, 2] and told[1].stderr == ''
        assert line in refused(told[0]) and not (tmp_path / 'run').exists()


def stop(command, told, number):
    """(exit code, output) of a process that gets a signal once a line that begins so is told."""
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE,
                               text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(told):
            process.send_signal(number)
    return process.wait(), ''.join(lines)


@pytest.mark.parametrize('sign', [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_torchrun_ends_all_ranks_after_a_checkpoint(tiny, trained, tmp_path, sign):
    args = [*tiny, *CURRICULUM, f'--out_dir={tmp_path / "run"}']
    code, told = stop(['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                       ROOT / 'train.py', *args], 'step 30/60', sign)
    step = len(log(tmp_path / 'run'))
    assert code and 30 <= step < 60 and f'at step {step}, which is saved' in told
    done = run_ranks(2, 'train.py', *args, '--resume')
    assert all(process.returncode == 0 for process in done), done[0].stderr
    agree(tmp_path / 'run', trained(1))


def test_a_rank_that_gets_a_signal_waits_until_the_checkpoint_is_written(tiny, tmp_path):
    config = tmp_path / 'slow.py'
    config.write_text("""
import os, signal, sys, time
import torch.distributed as _dist
_main, _run = sys.modules['__main__'], sys.modules['run']
_get_batch, _write = _main.get_batch, _run.write_checkpoint
def _signalled(data, weights, rows, *rest):
    if os.environ['RANK'] == '1' and rows[0] == 22:
        signal.raise_signal(signal.SIGTERM)       # to this thread: at once
    return _get_batch(data, weights, rows, *rest)
def _slow(path, state):
    time.sleep(0.5)
    _write(path, state)
    open(path.parent / 'written', 'w').close()
_main.get_batch, _run.write_checkpoint = _signalled, _slow
_group = _dist.destroy_process_group
def _leave():
    print(os.path.exists(os.path.join(_main.out_dir, 'written')), file=sys.stderr)
    _group()
_dist.destroy_process_group = _leave
""")
    done = run_ranks(2, 'train.py', *tiny, config, *CURRICULUM, f'--out_dir={tmp_path / "run"}')
    assert [process.returncode for process in done] == [143, 143], done[0].stderr
    assert done[1].stderr.endswith('True\n')
    assert [f.name for f in checkpoints(tmp_path / 'run')] == ['step_5.pt']


def test_a_rank_that_hangs_ends_with_its_stack(tiny, tmp_path):
    config = tmp_path / 'hang.py'
    config.write_text("""
import os, sys, threading
_main = sys.modules['__main__']
_get_batch = _main.get_batch
def _hang(data, weights, rows, *rest):
    if os.environ['RANK'] == '1' and rows[0] == 22:
        threading.Event().wait()
    return _get_batch(data, weights, rows, *rest)
_main.get_batch = _hang
""")
    done = run_ranks(2, 'train.py', *tiny, config, *CURRICULUM, '--hang_seconds=5',
                     f'--out_dir={tmp_path / "run"}')
    assert done[0].returncode and done[1].returncode
    assert 'Timeout' in done[1].stderr and 'in _hang' in done[1].stderr
    assert 'Timeout' not in done[0].stderr                       # it waits longer
    assert len(log(tmp_path / 'run')) == 5
    beats = [(tmp_path / 'run' / f'heartbeat_{rank}').read_text() for rank in range(2)]
    assert [beat.split(',')[0] for beat in beats] == ['step 5', 'step 4']


@pytest.mark.skipif(sys.platform != 'linux', reason='finds the ranks in /proc')
def test_a_rank_that_is_killed_ends_the_job_and_is_named(tiny, trained, tmp_path):
    args = [*tiny, *CURRICULUM, '--checkpoint_interval=10', f'--out_dir={tmp_path / "run"}']
    process = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
         str(ROOT / 'train.py'), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('step 30/60'):
            break
    for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split():
        if b'\0RANK=1\0' in Path(f'/proc/{pid}/environ').read_bytes():
            os.kill(int(pid), signal.SIGKILL)
    told = process.communicate()[1]
    assert process.returncode and re.search(r'rank +: 1 .*\n *exitcode +: -9', told)
    done = run_ranks(2, 'train.py', *args, '--resume')
    assert all(process.returncode == 0 for process in done), done[0].stderr
    agree(tmp_path / 'run', trained(1))


def test_ranks_with_fp8_train_as_one_until_a_number_is_rounded_the_other_way(trained):
    # The first step goes by each micro-batch's own amax; so both begin at a later one. Sums in
    # another order differ by 1e-7, until one of them crosses the middle between two 8-bit numbers.
    at = trained(1, '--fp8') / 'step_36.pt'
    one, two = ([line['loss'] for line in log(trained(n, '--fp8', f'--init_from={at}'))]
                for n in (1, 2))
    assert two[:3] == pytest.approx(one[:3], rel=1e-5)           # the fourth crosses it
    assert two == pytest.approx(one, rel=1e-2)


def test_gradients_can_be_added_up_in_bf16(trained):
    one, two = ([line['loss'] for line in log(folder)]
                for folder in (trained(1), trained(2, '--reduce_dtype=bfloat16',
                                                   '--phases.long.steps=0')))
    one = one[:len(two)]
    assert two != pytest.approx(one, rel=1e-5)
    assert two == pytest.approx(one, rel=0.03)


# --- the state of the optimizers, spread over ranks ---

SHAPE = XmodelConfig(n_layer=8, n_head=2, n_kv_head=1, n_embd=64, n_ffn=160, vocab_size=512,
                     block_size=64)


def measure(rank, world, port, file):
    """One step of either kind on this rank; writes {kind: bytes of state that it keeps}."""
    torch.distributed.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank,
                                         world_size=world)
    torch.manual_seed(0)
    found, model = {}, Xmodel(SHAPE)
    for kind in ('adamw', 'muon'):
        optimizers = muon.make_optimizers(kind, model.param_groups())
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        muon.step_all(optimizers, {'learning_rate': 0.01, 'embedding_lr': 0.01})
        found[kind] = sum(t.nbytes for optimizer in optimizers for state in optimizer.state.values()
                          for t in state.values() if t.dim())
    found['weights'] = float(sum(p.detach().double().norm() for p in model.parameters()))
    file.write_text(json.dumps(found))


def test_a_rank_keeps_its_share_of_the_state_alone(tmp_path):
    n, embedding = Xmodel(SHAPE).num_params(), 512 * 64
    gains = (2 * 8 + 1) * 64
    whole = {'adamw': 8 * n, 'muon': 4 * n + 4 * (embedding + gains)}
    weights = set()
    for world in (1, 2, 4):
        port = free_port()
        files = [tmp_path / f'{world}_{rank}' for rank in range(world)]
        ranks = [SERVER.Process(target=measure, args=(rank, world, port, file))
                 for rank, file in enumerate(files)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        found = [json.loads(file.read_text()) for file in files]
        for kind, right in whole.items():
            assert sum(f[kind] for f in found) == right
            assert max(f[kind] for f in found) <= 1.1 * right / world, (kind, world)
        weights |= {round(f['weights'], 3) for f in found}
    assert len(weights) == 1                                      # all have the same ones


@pytest.mark.parametrize('world, most', [(8, 1.01), (64, 1.1)])
def test_the_13b_models_matrices_are_shared_out_by_flops(monkeypatch, world, most):
    with torch.device('meta'):
        model = Xmodel(XmodelConfig())
    monkeypatch.setattr(muon, 'ranks', lambda: (0, world))
    optimizer = muon.make_optimizers('muon', model.param_groups())[0]
    flops, loads = {}, [0] * world
    for p, rank in optimizer.owner.items():
        if p.shape not in flops:                                 # as torch counts them
            with FlopCounterMode(display=False) as counter:
                muon.zeropower_via_newtonschulz5(p.detach())
            flops[p.shape] = counter.get_total_flops()
            assert muon.newton_schulz_flops(p.shape) == flops[p.shape]
        loads[rank] += flops[p.shape]
    assert max(loads) <= most * sum(loads) / world


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_gradients_stay_in_the_buckets_that_ranks_add_up(kind):
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Xmodel(XmodelConfig(2, 2, 1, 32, 80, 64))
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizers = muon.make_optimizers(kind, model.param_groups())
        x, places = torch.arange(32).view(2, 16), []
        for _ in range(4):
            with net.no_sync():
                net(x, x)[1].backward()
            net(x, x)[1].backward()
            muon.step_all(optimizers, {'learning_rate': 0.01, 'embedding_lr': 0.01})
            assert not any(p.grad.any() for p in model.parameters())
            places.append([p.grad.data_ptr() for p in model.parameters()])
        # (DDP orders its buckets anew after the first step)
        assert places[1] == places[2] == places[3]               # else there would be two of each
        assert max(places[3]) - min(places[3]) < 4 * model.num_params() + 64 * len(places[3])
    finally:
        dist.destroy_process_group()


def test_gathered_state_is_a_copy_and_what_was_never_stepped_is_left_fresh():
    model = Xmodel(SHAPE)
    optimizers = muon.make_optimizers('muon', model.param_groups())

    def step():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        muon.step_all(optimizers, {'learning_rate': 0.01, 'embedding_lr': 0.01})

    before = gather_state(optimizers)
    load_state(optimizers, before)
    step()                                                       # as if nothing had been loaded
    state = gather_state(optimizers)
    kept = {name: {k: t.clone() for k, t in s.items()} for name, s in state.items()}
    step()
    assert same(kept, state) and state['embed.weight']['step'] == 1
