"""Processes that train together: one that is frozen ends the others, one that is only slow does not."""

import os
import signal
import subprocess
import time
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from experiments.run.failures import said_elsewhere, write_failure
from experiments.run.together import EACH, KeepPace, PatientDDP
from tests.conftest import ROOT, TINY, command


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_process_ends_the_run_with_one_message(tmp_path: Path, frozen: int) -> None:
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.timeout=20", "trainer.max_epochs=1000"]
    with (tmp_path / "output").open("w") as output:
        run = psutil.Popen(
            command(*TINY, *ddp, f"hydra.run.dir={tmp_path}/run"),
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "300"},
        )  # fmt: skip
    try:
        while not (tmp_path / "run/checkpoints/previous.ckpt").exists():
            assert run.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.1)
        processes = [run, *run.children()]
        assert len(processes) == 2
        processes[frozen].send_signal(signal.SIGSTOP)
        code, said = run.wait(120), (tmp_path / "output").read_text()
        psutil.wait_procs(processes, 10)
    finally:
        left = [
            p for p in psutil.process_iter(["cmdline"]) if f"hydra.run.dir={tmp_path}/run" in (p.info["cmdline"] or ())
        ]
        for process in left:
            process.kill()
    assert not left
    assert code != 0
    assert said.count("Error: ") == 1
    assert f"process {frozen} (pid {processes[frozen].pid}), stopped" in said
    assert "Run the same command again" in said
    assert "Traceback" not in said


def test_processes_wait_long_only_while_they_get_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[timedelta] = []

    def connect(strategy: DDPStrategy) -> None:
        waits.append(strategy._timeout)
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)

    def now() -> timedelta:
        return distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout

    monkeypatch.setattr(DDPStrategy, "setup_distributed", connect)
    strategy = PatientDDP(timeout=timedelta(seconds=7))
    try:
        for begin in (strategy.on_test_start, strategy.on_train_start):  # untrained=true tests first
            strategy.setup_distributed()
            assert now() == default_pg_timeout  # builds caches
            begin()
            assert now() == timedelta(seconds=7)
    finally:
        distributed.destroy_process_group()
    age = time.time() - psutil.Process().create_time()
    assert (
        timedelta(seconds=age) < waits[0] < timedelta(seconds=7 + 5 * age)
    )  # as long as this process took to come here


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_meet_equally_often_and_soon(processes: int, batch_size: int) -> None:
    for episodes in range(processes, 9 * EACH, 7):
        batches = [-(-len(range(rank, episodes, processes)) // batch_size) for rank in range(processes)]
        met = [meetings(own, min(batches)) for own in batches]
        assert all(each == met[0] for each in met)
        assert [b - a for a, b in pairwise([0, *met[0]])] == [EACH] * (min(batches) // EACH)


def meetings(own: int, fewest: int) -> list[int]:
    """After which batches a process waits for the others, one of which has the fewest batches."""
    met: list[int] = []
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda batches, reduce_op: torch.tensor(fewest))
    trainer, pace = SimpleNamespace(strategy=strategy, num_val_batches=[own]), KeepPace()
    pace.on_validation_start(trainer, None)
    for index in range(own):
        strategy.barrier = partial(met.append, index + 1)
        pace.on_validation_batch_end(trainer, None, None, None, index)
    return met


def test_another_process_has_said_it(tmp_path: Path) -> None:
    assert not said_elsewhere(tmp_path)
    write_failure(tmp_path, "The disk is full.")
    assert said_elsewhere(tmp_path)
