"""kills.py: whoever is killed, nobody hangs, and nothing is left behind."""
import sys

import kills
import pytest

# by turns, so that each place has each signal and each target, which the script combines in full
CASES = [(place, target, kills.SIGNALS[(i + j) % 3])
         for i, place in enumerate(kills.PLACES) for j, target in enumerate(kills.TARGETS)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('kills')
    kills.make_text(folder)
    return folder


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('place, target, sign', CASES,
                         ids=[f'{place}-{target}-{sign.name}' for place, target, sign in CASES])
def test_nobody_hangs_and_nothing_is_left(folder, place, target, sign):
    assert not kills.kill_once(place, target, sign, folder)
