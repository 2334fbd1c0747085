"""Which jobs share a training, and how they wait for each other."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.errors import UserError
from experiments.files import read_json, write_json
from experiments.run.checkpoints import given
from experiments.sweep import trainings
from tests.conftest import ROOT, TINY

SHAPE = {"dataset": "pascal", "base_classes": ["cat"], "seed": 0}


def fingerprint(*overrides: str, processes: int = 1) -> str:
    setting = [o for o in TINY if not o.startswith(tuple(f"{o.split('=')[0]}=" for o in overrides))]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*setting, *overrides])
    cfg.task.pair = "synthetic"
    data = instantiate(cfg.episodes)
    network = instantiate(cfg.model, backbone=instantiate(cfg.backbone))
    return trainings.json_hash(trainings.shape(cfg, data, network, processes))


@pytest.fixture(scope="module")
def plain() -> str:
    return fingerprint()


@pytest.mark.parametrize(
    "override",
    "shot=5 shot.k=3 episodes.test=7 episodes.workers=3 episodes.test_batch_size=2 panels=2 untrained=true "
    "trainer.accelerator=auto trainer.cache=null trainer.log_every_n_steps=3 logger=wandb launcher=slurm_cpu "
    "reuse=false episodes.repeats=true data=/elsewhere".split(),
)
def test_what_is_only_tested_and_where_shares_a_training(plain: str, override: str) -> None:
    assert fingerprint(override) == plain


@pytest.mark.parametrize(
    "override",
    "fold=1 seed=1 train_shot=2 optimizer=sgd optimizer.lr=0.1 model=dam model.dropout=0.1 model.norm=group "
    "episodes.image_size=96 episodes.batch_size=2 episodes.per_epoch=12 episodes.val=5 trainer.max_epochs=3 "
    "trainer.precision=bf16-mixed trainer.gradient_clip_val=1.0 backbone.weights=quickstart dataset.seed=1 "
    "loss.ignore_index=7 episodes.novel_pixels=ignore".split(),
)
def test_what_shapes_the_weights_does_not(plain: str, override: str) -> None:
    assert fingerprint(override) != plain


def test_number_of_processes_shapes_the_weights(plain: str) -> None:
    """Each process normalises its own part of a batch."""
    assert fingerprint(processes=2) != plain


def train(store: Path, folder: Path, shape=SHAPE, resume=True, fail=False) -> Path | None:
    """Trains like a job, with checkpoints of a few bytes; returns the folder of reused weights, None if it trained."""
    folder.mkdir(parents=True, exist_ok=True)
    with trainings.claim(store, folder, shape, resume) as done:
        if done is None:
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / "checkpoints" / "last.ckpt").write_text(f"of {folder.name}")
            if fail:
                raise RuntimeError("the power is gone")
            (folder / "checkpoints" / "best.ckpt").write_text(f"of {folder.name}")
    return done


def test_second_job_finds_the_training_of_the_first(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert train(tmp_path / "store", a) is None
    assert train(tmp_path / "store", b) == a.absolute()
    assert not (b / "checkpoints").exists()
    assert given(str(b), "best") == a / "checkpoints" / "best.ckpt"
    assert read_json(b / "training.json")["run"] == str(a)


def test_another_shape_no_store_or_no_resume_trains_anew(tmp_path: Path) -> None:
    train(tmp_path / "store", tmp_path / "a")
    assert train(tmp_path / "store", tmp_path / "b", SHAPE | {"seed": 1}) is None
    assert train(None, tmp_path / "c") is None
    assert train(tmp_path / "store", tmp_path / "d", resume=False) is None


def test_interrupted_training_is_gone_on_with_elsewhere(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    (a / "metrics.csv").write_text("epoch\n0\n")
    with pytest.raises(RuntimeError):
        train(tmp_path / "store", a, fail=True)
    b.mkdir()
    with trainings.claim(tmp_path / "store", b, SHAPE, True) as done:
        assert done is None
        assert (b / "checkpoints" / "last.ckpt").read_text() == "of a"
        assert (b / "metrics-of-a.csv").exists()


def test_training_whose_folder_is_gone_or_is_another_by_now_is_not_used(tmp_path: Path) -> None:
    a = tmp_path / "a"
    train(tmp_path / "store", a)
    (a / "checkpoints" / "best.ckpt").unlink()
    (a / "checkpoints" / "last.ckpt").unlink()
    assert train(tmp_path / "store", tmp_path / "b") is None
    write_json(tmp_path / "b" / "training.json", read_json(tmp_path / "b" / "training.json") | {"fingerprint": "other"})
    assert train(tmp_path / "store", tmp_path / "c") is None


def test_training_whose_record_is_damaged_is_not_used(tmp_path: Path) -> None:
    """One flipped bit: "finished" reads "fanished"."""
    train(tmp_path / "store", tmp_path / "a")
    record = tmp_path / "a" / "training.json"
    record.write_text(record.read_text().replace("finished", "fanished"))
    trainings.keep_training(tmp_path / "a")
    assert train(tmp_path / "store", tmp_path / "b") is None


def test_training_that_goes_on_from_another_shape_is_not_shared(tmp_path: Path) -> None:
    """E.g. a training of fewer epochs: the result belongs to neither shape."""
    a = tmp_path / "a"
    train(tmp_path / "store", a)
    assert train(tmp_path / "store", a, SHAPE | {"epochs": 5}) is None
    assert read_json(a / "training.json")["fingerprint"] is None
    assert train(tmp_path / "store", tmp_path / "b", SHAPE | {"epochs": 5}) is None
    assert train(tmp_path / "store", tmp_path / "c") is None


@pytest.mark.slow
def test_concurrent_jobs_train_once(tmp_path: Path) -> None:
    trained, results = [], []

    def job(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        with trainings.claim(tmp_path / "store", folder, SHAPE, True) as done:
            if done is None:
                trained.append(name)
                time.sleep(0.3)
                (folder / "checkpoints").mkdir()
                (folder / "checkpoints" / "best.ckpt").write_text("")
        results.append(done)

    jobs = [threading.Thread(target=job, args=(str(i),)) for i in range(5)]
    for t in jobs:
        t.start()
    for t in jobs:
        t.join()
    assert len(trained) == 1
    assert sorted(map(str, results)) == sorted(["None", *[str(tmp_path / trained[0])] * 4])


def hold(store: Path, folder: Path) -> None:
    with trainings.claim(store, folder, SHAPE, True):
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").write_text("half")
        time.sleep(600)


@pytest.mark.slow
def test_lock_of_a_killed_job_is_free(tmp_path: Path) -> None:
    a = tmp_path / "a"
    a.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path / "store", a))
    process.start()
    deadline = time.time() + 60
    while not (a / "checkpoints" / "last.ckpt").exists() and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not read_json(a / "training.json")["finished"]
    assert train(tmp_path / "store", tmp_path / "b") is None
    assert (tmp_path / "b" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_training_is_kept_for_a_job_that_slurm_starts_again(tmp_path: Path, monkeypatch) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with pytest.raises(RuntimeError):
        train(tmp_path / "store", a, fail=True)
    monkeypatch.setattr(trainings, "ABSENCE", 3)
    trainings.keep_training(a)
    waited: list[float] = []
    with trainings.claim(tmp_path / "store", a, SHAPE, True) as done:  # it is back: its own it may take at once
        assert done is None
        trainings.keep_training(a)
    b.mkdir()
    trainings.keep_training(a)
    write_json(a / "training.json", read_json(a / "training.json") | {"finished": False, "back_by": time.time() + 3})
    with trainings.claim(tmp_path / "store", b, SHAPE, True, lambda: waited.append(time.time())) as done:
        assert done is None
    assert len(waited) >= 2
    assert (b / "checkpoints" / "last.ckpt").read_text() == "of a"


def test_job_that_waits_can_be_called_away(tmp_path: Path) -> None:
    store, a = tmp_path / "store", tmp_path / "a"
    a.mkdir()
    with trainings.claim(store, a, SHAPE, True):

        def follow() -> None:
            with trainings.claim(store, tmp_path / "b", SHAPE, True, called_away):
                pass

        def called_away() -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            follow()


def test_checkpoints_of_a_training_that_went_on_elsewhere_are_put_aside(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with pytest.raises(RuntimeError):
        train(tmp_path / "store", a, fail=True)
    assert train(tmp_path / "store", b) is None
    assert train(tmp_path / "store", a) == b
    assert given(str(a), "best") == b / "checkpoints" / "best.ckpt"
    assert (a / "checkpoints-before-1" / "last.ckpt").read_text() == "of a"


def test_other_processes_of_a_job_read_the_decision_of_the_first(tmp_path: Path, monkeypatch) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    train(tmp_path / "store", a)
    b.mkdir()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_RESTART_COUNT": "1"}
    for variable, value in slurm.items():
        monkeypatch.setenv(variable, value)
    write_json(b / "training.json", {"attempt": "slurm 7 0 0", "run": "/stale", "finished": True})  # before the requeue
    seen = []
    monkeypatch.setattr(trainings, "is_first", lambda: threading.current_thread() is threading.main_thread())

    def follow() -> None:
        with trainings.claim(tmp_path / "store", b, SHAPE, True) as done:
            seen.append(done)

    follower = threading.Thread(target=follow)
    follower.start()
    time.sleep(0.5)
    assert seen == []
    assert train(tmp_path / "store", b) == a
    follower.join(10)
    assert seen == [a]


def test_other_processes_of_a_job_end_with_the_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainings, "is_first", lambda: False)
    write_json(tmp_path / "failure.json", {"error": "the store is on a full disk", "attempt": "an earlier start"})
    write_json(tmp_path / "failure.json", {"error": "the store is on a full disk", "attempt": trainings.attempt()})
    with pytest.raises(UserError, match="full disk"), trainings.claim(tmp_path / "store", tmp_path, SHAPE, True):
        pass
