import subprocess
import sys

import pytest

from experiments.startup import PROGRAMS, measure, table_of
from tests.conftest import ROOT

COLLECTOR = """
import gc
from experiments.run.start import job
job()
assert gc.isenabled() and gc.get_freeze_count() > 10000
"""
DATA_COMMANDS = """
import sys
import datamodules.prepare.__main__, datamodules.show, datamodules.episodes.__main__
assert not {"lightning", "torchvision", "torchmetrics"} & sys.modules.keys()
"""


@pytest.mark.slow
def test_every_program_is_timed() -> None:
    measured = measure(1)
    assert measured.keys() == PROGRAMS.keys()
    assert measured["import pmnet"] < measured["import torch"] < measured["a job with one test episode"]
    assert table_of(measured).row_count == len(PROGRAMS)


@pytest.mark.slow
@pytest.mark.parametrize("code", [COLLECTOR, DATA_COMMANDS], ids=["collector", "data commands"])
def test_imports(code: str) -> None:
    """The garbage collector works again after a job's imports; preparing data, and help, do without Lightning."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
