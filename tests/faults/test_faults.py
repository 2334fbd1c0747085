"""A sample of the faults that `make faults` injects; another one each time."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.__main__ import in_thread, plan
from tests.faults.runs import Lab

TRIES, SECONDS = 20, 170  # no injection begins later than this


@pytest.mark.slow
def test_runs_survive_faults(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Repeat a failure with FAULTS_SEED=<the seed it names>."""
    seed = int(os.environ.get("FAULTS_SEED", random.randrange(10**6)))
    print(f"FAULTS_SEED={seed}")
    lab, deadline = Lab(tmp_path_factory.mktemp("faults")), time.monotonic() + SECONDS
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(
            lambda one: in_thread(*one, lab) if time.monotonic() < deadline else None, plan(TRIES, seed, "")
        )
    wrong = [f"{o.fault.name} in {'/'.join(o.place)}: {'; '.join(o.wrong)}" for o in outcomes if o and o.wrong]
    assert not wrong, f"FAULTS_SEED={seed}\n" + "\n".join(wrong)
