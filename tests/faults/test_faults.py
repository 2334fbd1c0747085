"""A sample of the faults that `make faults` injects, of the kinds whose end is settled; another one each time."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.__main__ import in_thread, plan
from tests.faults.check import Outcome
from tests.faults.faults import Fault
from tests.faults.runs import Lab

TRIES, SECONDS = 20, 150  # no injection begins later than this
SETTLED = "kill -9|SIGTERM|SIGINT|SIGHUP|truncated: (last|previous|results)|no HOME|umask|64 open files"


@pytest.mark.slow
def test_runs_survive_faults(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Repeat a failure with FAULTS_SEED=<the seed it names>."""
    seed = int(os.environ.get("FAULTS_SEED", random.randrange(10**6)))
    print(f"FAULTS_SEED={seed}")
    lab, deadline = Lab(tmp_path_factory.mktemp("faults")), time.monotonic() + SECONDS

    def inject(one: tuple[Fault, int]) -> list[Outcome]:
        return [in_thread(*one, lab)] if time.monotonic() < deadline else []

    with ThreadPoolExecutor(2) as pool:
        outcomes = [outcome for found in pool.map(inject, plan(TRIES, seed, SETTLED)) for outcome in found]
    print(*outcomes, sep="\n")
    wrong = [str(outcome) for outcome in outcomes if outcome.wrong]
    assert not wrong, f"FAULTS_SEED={seed}\n" + "\n".join(wrong)
