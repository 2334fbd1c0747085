"""Sweeps on a real Slurm cluster, which these tests start on this machine."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from experiments.files import read_json
from tests import slurm
from tests.conftest import ROOT, TINY, command, results, run
from tests.wandb_files import runs_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not())),
]
# Settings in which several processes train like one: no dropout and no batch statistics.
ALIKE = [*TINY, "backbone.weights=quickstart", "model=pmnet_release", "model.dropout=0.0", "optimizer=sgd"]
TWO = ["launcher=slurm_cpu", "launcher.devices=2"]


@pytest.fixture(scope="module", autouse=True)
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm.running(folder):
        yield folder


def jobs_of(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.glob("*/results.json"))


def test_sweep_gives_the_numbers_of_single_processes(tmp_path: Path) -> None:
    """Two folds, two shots, two processes for each job; W&B has one run for each job."""
    setting = [*ALIKE, "trainer.max_epochs=2", "fold=0,1", "shot=1,5", "logger=wandb", "logger.offline=true"]
    alone = run("-m", *setting, f"trainings={tmp_path}/t1", f"hydra.sweep.dir={tmp_path}/alone")
    assert alone.returncode == 0, alone.stderr
    done = run("-m", *setting, *TWO, f"trainings={tmp_path}/t2", f"hydra.sweep.dir={tmp_path}/slurm")
    assert done.returncode == 0, done.stdout + done.stderr
    pairs = list(zip(jobs_of(tmp_path / "alone"), jobs_of(tmp_path / "slurm"), strict=True))
    assert len(pairs) == 4
    for one, two in pairs:
        assert one.name == two.name
        assert (results(one)["processes"], results(two)["processes"]) == (1, 2)
        assert results(two)["test"]["miou"] == pytest.approx(results(one)["test"]["miou"], abs=0.05)
        assert results(two)["episodes"] == results(one)["episodes"]
    trained = list((tmp_path / "slurm").glob("*/checkpoints"))
    assert len(trained) == 2, "the two shots of a fold did not share their training"
    for folder in trained:
        weights = [
            torch.load(tmp_path / where / folder.parent.name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for where in ("alone", "slurm")
        ]
        for name, weight in weights[0].items():
            torch.testing.assert_close(weight, weights[1][name], atol=1e-5, rtol=1e-4)
    logged = {where: runs_in(tmp_path / where) for where in ("alone", "slurm")}
    for runs in logged.values():
        assert len(runs) == 5
        assert sorted(r.group for r in runs) == sorted(
            [f"synthetic-small-pmnet_release-shot{k}" for k in (1, 5)] * 2 + ["sweeps"]
        )
        assert all(r.exit_code == 0 for r in runs)
    by_name = {r.name: r for r in logged["slurm"]}
    for _, folder in pairs:
        setting = results(folder)["setting"]
        r = by_name[f"synthetic-small-pmnet_release-fold{setting['fold']}-shot{setting['shot']}"]
        assert r.summary["test/miou"] == results(folder)["test"]["miou"]
    means = [v for r in logged["slurm"] for k, v in r.summary.items() if k.startswith("mean/")]
    assert means == [], "two of four folds are no mean"


def test_two_nodes_train_as_one(tmp_path: Path) -> None:
    setting = [*ALIKE, "trainer.max_epochs=2", "fold=0"]
    one = run(*setting, f"hydra.run.dir={tmp_path}/one")
    two = run("-m", *setting, "launcher=slurm_cpu", "launcher.nodes=2", f"hydra.sweep.dir={tmp_path}/two")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    (folder,) = jobs_of(tmp_path / "two")
    assert results(folder)["processes"] == 2
    weights = [
        torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (tmp_path / "one", folder)
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-5, rtol=1e-4)
    assert results(folder)["test"]["miou"] == pytest.approx(results(tmp_path / "one")["test"]["miou"], abs=0.05)


@pytest.mark.parametrize(
    "ask",
    [["scancel", "--signal=USR1"], ["scontrol", "requeue"]],
    ids=["warned", "preempted without a warning"],
)
def test_preempted_job_ends_as_one_left_alone(tmp_path: Path, left_alone: Path, ask: list[str]) -> None:
    process = subprocess.Popen(
        command("-m", *LONG, f"hydra.sweep.dir={tmp_path}"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    folder = tmp_path / "0-synthetic-small-fold0-shot1"
    log, last = folder / "run.log", folder / "checkpoints" / "last.ckpt"
    wait_for(lambda: log.exists() and "Epoch 1/3" in log.read_text(), "a first epoch")
    time.sleep(1)  # into the second
    job = slurm.output("squeue", "-h", "-o", "%i").split()[0]
    subprocess.run([*ask, job], check=True)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    said = log.read_text()
    assert re.search(r"Slurm is ending this job: saved after batch \d+ of epoch [23]", said), said
    assert f"Resuming from {last}" in said
    (folder,), (other,) = jobs_of(tmp_path), jobs_of(left_alone)
    assert results(folder)["test"] == results(other)["test"]
    ours, theirs = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (folder, other))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    parts = runs_in(folder)
    assert len(parts) == 2
    warned = ask[0] == "scancel"  # SIGTERM ends W&B's own process before it has written a run so short
    assert len({r.id for r in parts if warned or r.id}) == 1, "went on in another W&B run"
    assert parts[-1].summary["test/miou"] == results(folder)["test"]["miou"]


def test_cancelled_job_is_one_message_and_the_sweep_resumes(tmp_path: Path, left_alone: Path) -> None:
    words = ["-m", *LONG, f"hydra.sweep.dir={tmp_path}"]
    process = subprocess.Popen(command(*words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "0-synthetic-small-fold0-shot1" / "run.log"
    wait_for(lambda: log.exists() and "Epoch 1/3" in log.read_text(), "a first epoch")
    job = slurm.output("squeue", "-h", "-o", "%i").split()[0]
    subprocess.run(["scancel", job], check=True)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 1, output
    assert f"Error: Job {job} ended without a result (CANCELLED)" in output
    assert "Traceback" not in output
    assert "1 unfinished of 1 runs" in output
    assert run(*words).returncode == 0
    (folder,), (other,) = jobs_of(tmp_path), jobs_of(left_alone)
    assert results(folder)["test"] == results(other)["test"]


LONG = [
    *TINY,
    *TWO,
    "backbone.weights=quickstart",
    "trainer.max_epochs=3",
    "episodes.per_epoch=160",
    "episodes.workers=1",
]
LONG += ["logger=wandb", "logger.offline=true"]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    done = run("-m", *LONG, f"hydra.sweep.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.1)


def test_failing_and_killed_jobs_are_reported_and_take_no_other_down(tmp_path: Path) -> None:
    """One job fails, one is killed as if it ran out of memory, and one succeeds."""
    setting = [*TINY, "launcher=slurm_cpu", "fold.index=9,0,1", "episodes.per_epoch=80", "trainer.max_epochs=2"]
    process = subprocess.Popen(
        command("-m", *setting, "launcher.at_once=1", f"hydra.sweep.dir={tmp_path}"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for((tmp_path / "1-synthetic-small-fold0-shot1" / "checkpoints" / "last.ckpt").exists, "second job")
    running = slurm.output("squeue", "-h", "-t", "running", "-o", "%i").split()[0]
    subprocess.run(["scancel", "--signal=KILL", running], check=True)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    assert "folds 0 to 3" in read_json(tmp_path / "0-synthetic-small-fold9-shot1" / "failure.json")["error"]
    assert "1 finished" in output, output
    assert "unfinished: 1-synthetic-small-fold0-shot1" in output
    assert jobs_of(tmp_path) == [tmp_path / "2-synthetic-small-fold1-shot1"]


def test_process_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    """The first process cannot write to the folder of trainings; the second would wait for its decision."""
    (tmp_path / "file").touch()
    start = time.time()
    done = run("-m", *TINY, *TWO, "fold=0", f"trainings={tmp_path}/file", f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 1
    assert time.time() - start < 120
    (failed,) = (tmp_path / "sweep").glob("*/failure.json")
    assert "File exists" in read_json(failed)["error"] or "Not a directory" in read_json(failed)["error"]
    assert "1 failed of 1 run" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "setting, words",
    [
        (["launcher=slurm_cpu", "launcher.partition=gpu"], ["nvalid partition", "main*", "launcher.partition"]),
        (["launcher=slurm", "launcher.devices=8", "trainer.accelerator=gpu"], ["generic resource", "launcher.devices"]),
        (["launcher=slurm_cpu", "launcher.nodes=7"], ["launcher.devices", "--nodes=7"]),
    ],
    ids=["partition", "GPUs", "nodes"],
)
def test_what_slurm_does_not_take_is_one_message(tmp_path: Path, setting: list[str], words: list[str]) -> None:
    done = run("-m", *TINY, *setting, "fold=0,1", f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 1
    assert done.stderr.count("Error:") == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not (tmp_path / "sweep").exists()


def test_processes_that_slurm_starts_and_the_trainer_wants_must_be_as_many(tmp_path: Path) -> None:
    done = run(
        "-m", *TINY, "launcher=slurm_cpu", "trainer.devices=1,2", "trainer.max_epochs=1", f"hydra.sweep.dir={tmp_path}"
    )
    assert done.returncode == 1
    assert len(jobs_of(tmp_path)) == 1
    (failed,) = tmp_path.glob("*/failure.json")
    assert "launcher.devices" in read_json(failed)["error"]
