"""distributed.py, without ranks: what several of them do together is in test_ranks.py."""
import contextlib

import pytest
import torch

import distributed


def test_a_rank_takes_the_gpu_of_its_number_on_its_own_node(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', taken.append)
    monkeypatch.setattr(distributed, 'usable_device', torch.device)
    for number, value in {'RANK': 11, 'LOCAL_RANK': 3, 'WORLD_SIZE': 16}.items():
        monkeypatch.setenv(number, str(value))                   # the second node of eight GPUs
    for knob in ('auto', 'cuda'):
        assert distributed.pick_device(knob, 16) == torch.device('cuda:3')
    assert distributed.pick_device('cuda', 1) == torch.device('cuda')
    assert distributed.pick_device('cpu', 16) == torch.device('cpu')
    assert taken == [torch.device('cuda:3')] * 2 + [torch.device('cuda')]


TORCHRUNS = {'RANK': '0', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'x', 'MASTER_PORT': '1'}


@pytest.mark.parametrize('env, size', [
    ({}, 1), ({'WORLD_SIZE': ''}, 1), ({'WORLD_SIZE': '1'}, 1),
    (TORCHRUNS | {'WORLD_SIZE': '8'}, 8), (TORCHRUNS | {'WORLD_SIZE': 'x'}, None),
    ({'WORLD_SIZE': '2'}, 'where RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR should'),
    (TORCHRUNS | {'WORLD_SIZE': '2', 'RANK': ''}, 'where RANK should'),
    (TORCHRUNS | {'WORLD_SIZE': '2', 'MASTER_PORT': 'abc'}, 'where MASTER_PORT should'),
    (TORCHRUNS | {'WORLD_SIZE': '0'}, 'where it should')])
def test_the_number_of_ranks_is_torchruns_or_one(monkeypatch, capsys, env, size):
    for name in (*TORCHRUNS, 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if isinstance(size, int):
        assert distributed.world_size() == size
        return
    with pytest.raises(SystemExit):
        distributed.world_size()
    assert f"WORLD_SIZE='{env['WORLD_SIZE']}'" in (error := capsys.readouterr().err)
    assert (size or 'where WORLD_SIZE should be numbers that torchrun sets') in error
    assert error.count('\n') == 1


@pytest.mark.parametrize('error, exit_code', [
    (SystemExit(7), 7), (OSError(28, 'No space left'), 2), (KeyboardInterrupt(), 130)])
def test_what_ends_rank_0_ends_all(monkeypatch, error, exit_code):
    sent = []
    monkeypatch.setattr(distributed, 'ranks', lambda: (0, 2))
    monkeypatch.setattr(distributed, 'signs_of_life_from_rank_0', contextlib.nullcontext)
    monkeypatch.setattr(torch.distributed, 'broadcast_object_list', sent.extend)

    def work():
        raise error
    with pytest.raises(type(error)):
        distributed.rank_0_first(work)
    assert sent == [None, exit_code]

    def receive(message):
        message[:] = sent
    monkeypatch.setattr(distributed, 'ranks', lambda: (1, 2))
    monkeypatch.setattr(torch.distributed, 'broadcast_object_list', receive)
    with pytest.raises(SystemExit) as e:
        distributed.rank_0_first(None)
    assert e.value.code == exit_code


def test_where_torchrun_is_gone_rank_0_says_so(monkeypatch, capsys):
    class Gone:
        def set(self, *args):
            raise torch.distributed.DistNetworkError('Broken pipe')
        add = set
    monkeypatch.setattr(distributed, 'ranks', lambda: (0, 2))
    monkeypatch.setattr(distributed, 'PATIENCE', 0)
    monkeypatch.setattr(torch.distributed.distributed_c10d, '_get_default_store', Gone)
    with pytest.raises(SystemExit), distributed.signs_of_life_from_rank_0():
        pass
    error = capsys.readouterr().err
    assert error.endswith(': torchrun, which started the ranks, is gone\n')
    assert error.count('\n') == 1
