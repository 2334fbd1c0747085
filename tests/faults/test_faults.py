"""A sample of the faults that `make faults` injects; another one each time."""

import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.__main__ import in_thread, plan
from tests.faults.check import Outcome
from tests.faults.faults import Fault
from tests.faults.runs import Lab

TRIES, SECONDS = 20, 300  # no injection begins later than this
QUICK = "^(?!Slurm|W&B: never|second process frozen)"


@pytest.mark.slow
def test_runs_survive_faults(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Repeat a failure with FAULTS_SEED=<the seed it names>.

    Other tests run beside this one, and may slow a run beyond its bound: what fails is tried again, alone.
    """
    seed = int(os.environ.get("FAULTS_SEED", random.randrange(10**6)))
    print(f"FAULTS_SEED={seed}")
    lab, deadline = Lab(tmp_path_factory.mktemp("faults")), time.monotonic() + SECONDS

    def inject(one: tuple[Fault, int]) -> list[Outcome]:
        return [in_thread(*one, lab)] if time.monotonic() < deadline else []

    with ThreadPoolExecutor(2) as pool:
        outcomes = [outcome for found in pool.map(inject, plan(TRIES, seed, QUICK)) for outcome in found]
    print(*outcomes, sep="\n")
    wrong = []
    for outcome in outcomes:
        if outcome.wrong:
            shutil.rmtree(lab.folder / f"{outcome.seed}")
            again = in_thread(outcome.fault, outcome.seed, lab)
            print(f"again: {again}")
            wrong += [str(again)] if again.wrong else []
    assert not wrong, f"FAULTS_SEED={seed}\n" + "\n".join(wrong)
