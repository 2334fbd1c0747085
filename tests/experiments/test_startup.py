import pytest

from experiments.startup import PROGRAMS, measure, table_of


@pytest.mark.slow
def test_every_program_is_timed() -> None:
    measured = measure(1)
    assert measured.keys() == PROGRAMS.keys()
    assert measured["import pmnet"] < measured["import torch"] < measured["a job with one test episode"]
    assert table_of(measured).row_count == len(PROGRAMS)
