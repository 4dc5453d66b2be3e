"""What faults.py injects comes out as its list says, and as the table in results says."""
import functools
import re
from types import SimpleNamespace

import faults
import pytest


@pytest.fixture(scope='module')
def of_two_ranks(tiny, tmp_path_factory):
    """A function () -> folder of an unbroken run on two ranks, which is made once."""
    return functools.cache(lambda: faults.make_two_ranks(tmp_path_factory.mktemp('two') / 'run',
                                                         tiny))


@pytest.mark.parametrize('name', faults.FAULTS)
def test_a_fault_loses_no_more_than_the_table_says(name, tiny, tiny_run, data_dir, of_two_ranks,
                                                   tmp_path):
    at = SimpleNamespace(folder=tmp_path, data=data_dir, tiny=tiny, unbroken=tiny_run,
                         of_two_ranks=of_two_ranks)
    _, right_code, right_told, right_lost = faults.FAULTS[name]
    try:
        lost, code, told = faults.row(name, at)
    except NotImplementedError as e:
        pytest.skip(f'{e}')
    assert (lost, code) == (right_lost, right_code), told
    assert re.search(right_told, told) if right_told else not told, told
    assert len(told.splitlines()) <= 1
    if code == 2:
        assert told.startswith(('train.py: ', 'data_prep.py: '))


def test_the_table_is_of_these_faults():
    lines = faults.TABLE.read_text().split('| --- | --- | --- | --- |\n')[1].splitlines()
    rows = [line.removeprefix('| ').removesuffix(' |').split(' | ') for line in lines]
    assert {name: (lost, code) for name, lost, _, code in rows} == {
        name: (lost, f'{code}') for name, (_, code, _, lost) in faults.FAULTS.items()}
    assert all(re.search(faults.FAULTS[name][2], told) for name, _, told, _ in rows)
