"""distributed.py, without ranks: what several of them do together is in test_ranks.py."""
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
