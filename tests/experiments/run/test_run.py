"""Whole runs, started as a user starts them."""

import csv
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, TINY, command, results, run
from tests.data.folder import write_by_class, write_indexed

pytestmark = pytest.mark.slow


ABSENT = "episodes.absent=0.3"  # 5 episodes beside the 11 others


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training run of three epochs."""
    folder = tmp_path_factory.mktemp("trained")
    done = run(*TINY, ABSENT, "trainer.max_epochs=3", "untrained=true", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    return folder


def test_run_leaves_what_is_needed_to_trust_and_repeat_it(trained: Path) -> None:
    record = results(trained)
    assert record["setting"] | {"fold": 0, "shot": 1, "seed": 0, "dataset": "synthetic"} == record["setting"]
    assert set(record["baselines"]) == {"all_foreground", "prototype", "nearest", "untrained"}
    assert len(record["test"]["iou_per_class"]) == 5
    assert record["test"]["miou"] == pytest.approx(sum(record["test"]["iou_per_class"].values()) / 5, abs=1e-3)
    assert record["parameters"]["frozen"] == 907_256
    assert record["episodes"]["test_episodes"] == 11
    assert record["backbone"]["weights"] == "none"
    assert len(record["episodes"]["episode_list_sha256"]) == len(record["backbone"]["sha256"]) == 64
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["config"]["optimizer"]["_target_"] == "torch.optim.AdamW"
    assert record["training"]["steps"] == 2 * record["training"]["epochs"] <= 6
    assert record["training"]["seed"] == 0
    assert record["tested_classes_seen_in_training"] == []
    output = (trained / "output.txt").read_text()
    assert "learnable, 907,256 frozen" in output
    assert "all foreground" in output


def test_run_leaves_checkpoints_curves_and_pictures(trained: Path) -> None:
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    state = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    assert all(key.startswith("network.head.") for key in state["state_dict"])
    assert state["backbone"]["weights"] == "none"
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert sum(bool(row["val/miou"]) for row in rows) == 3
    assert sum(bool(row["train/loss"]) for row in rows) == 3
    pictures = sorted(p.name.split("-")[0] for p in (trained / "predictions").iterdir())
    assert pictures == ["best", "overview.png", "random", "worst"]
    assert Image.open(trained / "predictions" / "overview.png").width > 200
    episodes = list(csv.DictReader((trained / "episodes.csv").open()))
    assert [int(row["index"]) for row in episodes] == list(range(11 + 5))


@pytest.mark.parametrize(
    "how",
    [["episodes.workers=2"], ["episodes.test_batch_size=3"], ["trainer=ddp", "trainer.accelerator=cpu"]],
    ids=["two workers", "another batch size", "two processes"],
)
def test_same_numbers_however_it_is_tested(trained: Path, tmp_path: Path, how: list[str]) -> None:
    done = run(*TINY, ABSENT, *how, "mode=test", f"ckpt={trained}", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert set(results(trained)["test"]) == {"miou", "fb_iou", "iou_per_class", "absent"}
    assert results(tmp_path)["test"] == results(trained)["test"]
    assert results(tmp_path)["episodes"] == results(trained)["episodes"]
    assert (tmp_path / "episodes.csv").read_text() == (trained / "episodes.csv").read_text()


def test_two_processes_train_on_the_episodes_of_one(tmp_path: Path) -> None:
    """With group norm, because batch statistics are computed on each process's part of a batch."""
    setting = [*TINY, "model=pmnet_release", "optimizer=sgd", "trainer.max_epochs=1", "model.dropout=0.0"]
    one = run(*setting, f"hydra.run.dir={tmp_path}/1")
    two = run(*setting, "trainer=ddp", "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path}/2")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    heads = [torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in "12"]
    for name, weight in heads[0].items():
        torch.testing.assert_close(weight, heads[1][name], atol=1e-5, rtol=1e-4)
    assert results(tmp_path / "2")["processes"] == 2


def test_killed_training_resumes_to_the_same_result(trained: Path, tmp_path: Path) -> None:
    whole = [*TINY, ABSENT, "trainer.max_epochs=3", f"hydra.run.dir={tmp_path}"]
    process = subprocess.Popen(command(*whole), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = tmp_path / "checkpoints" / "last.ckpt"
    deadline = time.time() + 120
    while not last.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    assert not (tmp_path / "results.json").exists()
    done = run(*whole)
    assert done.returncode == 0, done.stderr
    assert f"Resuming from {last}" in done.stdout + done.stderr
    assert results(tmp_path)["test"] == results(trained)["test"]
    assert (tmp_path / "metrics-1.csv").exists() or "Epoch 1/3" not in done.stdout


def test_training_that_ends_before_its_first_validation_is_tested_as_it_is(tmp_path: Path) -> None:
    done = run(*TINY, "trainer.max_steps=1", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "before its first validation" in done.stdout + done.stderr
    record = results(tmp_path)
    assert (record["training"]["steps"], record["checkpoint"]["selection"]) == (1, None)
    assert record["checkpoint"]["path"].endswith("last.ckpt")


def test_going_on_from_another_folder(trained: Path, tmp_path: Path) -> None:
    done = run(*TINY, "trainer.max_epochs=4", f"ckpt={trained}", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "Epoch 4/4" in done.stdout + done.stderr
    assert "Epoch 3/4" not in done.stdout + done.stderr


def test_another_training_in_the_same_folder_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    setting = [*TINY, "trainer.max_epochs=3", f"hydra.run.dir={tmp_path}"]
    refused(run(*setting, "fold=1"), "another training", "base_classes", "resume=false")
    refused(run(*setting, "seed=1"), "another training", "seed")


def test_testing_on_classes_of_the_training_is_said(trained: Path, tmp_path: Path) -> None:
    done = run(*TINY, "mode=test", f"ckpt={trained}", "fold=1", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    record = results(tmp_path)
    assert record["tested_classes_seen_in_training"] == sorted(record["episodes"]["novel_classes"])
    assert "trained on:" in done.stdout
    assert record["training"]["epochs"] <= 3


def test_interrupted_run_is_gone_on_with_before_the_checkpoint_that_began_it(trained: Path, tmp_path: Path) -> None:
    setting = [*TINY, f"ckpt={trained}", f"hydra.run.dir={tmp_path}"]
    assert run(*setting, "trainer.max_epochs=4").returncode == 0
    done = run(*setting, "trainer.max_epochs=5")
    assert f"Resuming from {tmp_path}" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "setting, words",
    [
        ("model.norm=bacth", "batch, group"),
        ("episodes.novel_pixels=ignored", "background, ignore"),
        ("shot.k=0", "shot.k must be 1 or more"),
        ("episodes.image_size=100", "multiples of 32"),
        ("mode=tset", "train, test, pretrain"),
        ("trainer.precision=bf16-mixd", "bf16-mixed"),
    ],
)
def test_value_that_cannot_be_is_refused(tmp_path: Path, setting: str, words: str) -> None:
    refused(run(*TINY, setting, f"hydra.run.dir={tmp_path}"), words)


@pytest.mark.parametrize("layout", [write_indexed, write_by_class])
def test_folder_of_images_trains_and_tests(tmp_path: Path, layout) -> None:
    layout(tmp_path / "data")
    setting = [*TINY, "dataset=folder", f"dataset.root={tmp_path}/data", "dataset.folds=2", "shot.k=2"]
    done = run(*setting, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run")["setting"]["shot"] == 2


def test_backbone_is_pretrained_and_used(tmp_path: Path) -> None:
    write_indexed(tmp_path / "data")
    data = ["dataset=folder", f"dataset.root={tmp_path}/data", "dataset.folds=2", "episodes.image_size=64"]
    made = run(
        "experiment=pretrain_backbone", *data, "trainer=cpu", "trainer.max_epochs=1", "episodes.workers=0",
        "pretrain.batch_size=2", "pretrain.images_per_epoch=4", f"hydra.run.dir={tmp_path}/pre",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    file = tmp_path / "pre" / "backbone.safetensors"
    used = [*TINY, *data, f"backbone.weights={file}", "trainer.max_epochs=1"]
    done = run(*used, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "trained on novel classes" not in done.stdout
    record = results(tmp_path / "run")
    assert record["backbone"]["trained_on"]["classes"] == record["episodes"]["base_classes"]
    other = run(*used, "fold=1", f"hydra.run.dir={tmp_path}/run1")
    assert "trained on novel classes" in other.stdout


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One message, no traceback, exit code not 0."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("Error:") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoints_that_do_not_fit_are_refused(trained: Path, tmp_path: Path) -> None:
    test = [*TINY, "mode=test", f"hydra.run.dir={tmp_path}"]
    refused(run(*test), "mode=test needs", "ckpt=")
    refused(run(*test, f"ckpt={tmp_path}/none.ckpt"), "none.ckpt", "Check ckpt")
    refused(run(*test, f"ckpt={trained}", "backbone=resnet18", "backbone.weights=none"), "backbone=small")
    refused(run(*test, f"ckpt={trained}", "model.b3dconvs=false"), "another network", "b3dconvs")


def test_malicious_checkpoint_is_not_run(tmp_path: Path) -> None:
    with (tmp_path / "bad.ckpt").open("wb") as file:
        pickle.dump({"state_dict": Malice(tmp_path / "harm")}, file)
    torch.save({"state_dict": Malice(tmp_path / "harm")}, tmp_path / "worse.ckpt")
    for name in ("bad.ckpt", "worse.ckpt"):
        refused(run(*TINY, "mode=test", f"ckpt={tmp_path}/{name}", f"hydra.run.dir={tmp_path}/run"), name)
    assert not (tmp_path / "harm").exists()


def test_broken_image_in_a_worker_is_one_message(tmp_path: Path) -> None:
    """An image damaged after the folder was read ends the run with one message; the checkpoint stays."""
    write_indexed(tmp_path / "data")
    script = (
        "import sys, pmnet.segment.images as b; real = b.load_image\n"
        "def load(path):\n"
        "    import multiprocessing as m\n"
        "    if m.parent_process() is not None: path = path.with_name('gone.jpg')\n"
        "    return real(path)\n"
        "import pmnet.segment.formats.annotated as f; f.load_image = load\n"
        "import runpy; runpy.run_path('run.py', run_name='__main__')\n"
    )
    setting = [*TINY, "dataset=folder", f"dataset.root={tmp_path}/data", "dataset.folds=2", "episodes.workers=1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *setting, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}/run"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"}, timeout=300, check=False,
    )  # fmt: skip
    refused(done, "gone.jpg")


def test_diverging_training_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The rate is sane in the first epoch and absurd in the second."""
    explode = "scheduler={_target_: torch.optim.lr_scheduler.ExponentialLR, _partial_: true, gamma: 1e30}"
    done = run(*TINY, explode, "trainer.max_epochs=4", f"hydra.run.dir={tmp_path}")
    refused(done, "epoch", "optimizer.lr")
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0
    assert all(torch.isfinite(v).all() for v in kept["state_dict"].values())


def test_full_disk_keeps_the_checkpoint_before(trained: Path, tmp_path: Path) -> None:
    """The kernel lets no file grow beyond 100 kB, like a full disk."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    good = (trained / "checkpoints" / "last.ckpt").read_bytes()
    for name in ("best.ckpt", "last.ckpt"):
        (folder / name).write_bytes(good)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        command(*TINY, "trainer.max_epochs=5", f"hydra.run.dir={tmp_path}"),
        cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=300, check=False,
        env=os.environ | {"COLUMNS": "300"},
    )  # fmt: skip
    refused(done, "Could not write the checkpoint", "kept")
    assert (folder / "last.ckpt").read_bytes() == good
    assert not list(folder.glob("*.part"))


def test_output_that_shows_ascii_alone(tmp_path: Path) -> None:
    """Tables and progress bars have other characters."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(*TINY, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}", env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "mIoU" in done.stdout


def test_compiler_that_is_not_there(tmp_path: Path) -> None:
    places = {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(
        command(*TINY, "trainer.compile=true", f"hydra.run.dir={tmp_path}"),
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "300"} | places,
    )  # fmt: skip
    refused(done, "No working C++ compiler", "trainer.compile=false")


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    refused(run(*TINY, "trainer.accelerator=cuda", f"hydra.run.dir={tmp_path}"), "CUDA", "cpu")


@pytest.mark.slow
def test_options_of_speed_change_no_number(tmp_path: Path) -> None:
    """In training and test; a second run reuses the features that the first one cached on disk."""
    setting = [*TINY, "backbone.weights=quickstart", "trainer.max_epochs=2", "shot=5"]
    kept = [f"trainer.cache.folder={tmp_path}/features", "trainer.cache.host_gb=0"]
    options = {"none": ["trainer.cache=null"], "memory": [], "disk": kept, "again": kept}
    options |= {"compiled": ["trainer.compile=true"], "planes": ["trainer.channels_last=false"]}
    options |= {"low": ["trainer.precision=bf16-true"]}
    for name, chosen in options.items():
        done = run(*setting, *chosen, f"hydra.run.dir={tmp_path}/{name}")
        assert done.returncode == 0, done.stderr
        if name == "disk":
            files = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*")}
    assert len(files) > 20
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*")}
    assert results(tmp_path / "disk")["test"] == results(tmp_path / "again")["test"]
    for name in ("memory", "disk", "compiled", "planes"):
        assert results(tmp_path / name)["test"]["miou"] == pytest.approx(
            results(tmp_path / "none")["test"]["miou"], abs=0.05
        )
