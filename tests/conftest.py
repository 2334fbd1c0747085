"""What the tests share: the reference data beside the checkout, and whole runs as a user starts them."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

from experiments.sweep.warm import become

ROOT = Path(__file__).parents[1]
TINY = (
    "dataset=synthetic backbone=small backbone.weights=none trainer=cpu optimizer=adamw episodes.image_size=64 "
    "episodes.batch_size=4 episodes.per_epoch=8 episodes.val=6 episodes.test=11 episodes.workers=0 panels=1"
).split()


MANY = 5  # cases of one test; of more, the default run takes three
LONGEST = ("test_slurm.py", "test_sweep.py", "test_run.py", "test_tables.py", "test_faults.py", "test_export.py")


CACHE = tempfile.TemporaryDirectory(prefix="pmnet-cache-")  # no test may use another's
os.environ["PMNET_CACHE"] = CACHE.name
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the server below, and thus every run, reads it
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preload"])
SET_BY_IMPORTS = ("PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, the programs that tests start would ignore it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that a file a core ends early; few of many cases unless all are wanted."""
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    for each in cases.values():
        for i, item in enumerate(each):
            if len(each) > MANY and i not in (0, len(each) // 2, len(each) - 1):
                item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def shared() -> Path:
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("the reference data (../shared) is not here")
    return path


def command(*overrides: str) -> list[str]:
    """Trains anew unless told otherwise: no test is to find the training of another, or of yesterday."""
    reuse = [] if any(o.startswith(("reuse=", "trainings=")) for o in overrides) else ["reuse=false"]
    flags_first = overrides[:1] and overrides[0].startswith("-")  # either way, overrides have to stand together
    return [sys.executable, "run.py", *(() if flags_first else reuse), *overrides, *(reuse if flags_first else ())]


def run(*overrides: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python run.py <overrides>` from the project's root; wide, so that no message is broken.

    Without variables of its own it is a fork of a server that has imported everything; see `experiments/sweep/warm.py`.
    """
    words, environment = command(*overrides), os.environ | {"COLUMNS": "300", "OMP_NUM_THREADS": "1"} | (env or {})
    if env:
        return subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600, check=False
        )
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / "stdout", Path(folder) / "stderr"]
        job = SERVER.Process(target=become_run, args=(words[2:], environment, printed))
        job.start()
        job.join(600)
        if job.exitcode is None:
            job.kill()
            raise subprocess.TimeoutExpired(words, 600)
        return subprocess.CompletedProcess(words, job.exitcode, *(path.read_text() for path in printed))


def become_run(words: list[str], environment: dict[str, str], printed: list[Path]) -> None:
    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    become(words, {name: os.environ[name] for name in SET_BY_IMPORTS if name in os.environ} | environment)


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m <module> <arguments>` from the project's root."""
    environment = os.environ | {"COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())
