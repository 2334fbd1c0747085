"""Whole sweeps, started as a user starts them."""

import csv
import os
import signal
import statistics
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments.files import read_json, write_json
from experiments.sweep import jobs as sweep
from experiments.sweep import slurm
from tests.conftest import ROOT, TINY, command, results, run
from tests.wandb_files import runs_in

SETTING = [*TINY, "trainer.max_epochs=2", "backbone.weights=quickstart"]


def jobs_of(folder: Path) -> list[Path]:
    return sorted((p.parent for p in folder.glob("*/results.json")), key=lambda p: int(p.name.split("-")[0]))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds, one of which does not exist, and two shots; logged to W&B without an API key."""
    folder = tmp_path_factory.mktemp("sweep")
    done = run(
        "-m", *SETTING, "fold.index=0,9", "shot=1,5", "logger=wandb", "logger.checkpoint=true",
        f"trainings={folder}/trainings", f"hydra.sweep.dir={folder}",
        env={"HOME": str(folder), "NETRC": str(folder / "none"), "WANDB_API_KEY": ""},
    )  # fmt: skip
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    (folder / "code.txt").write_text(str(done.returncode))
    return folder


@pytest.mark.slow
def test_failing_jobs_are_told_once_and_take_no_other_down(swept: Path) -> None:
    output = (swept / "output.txt").read_text()
    assert (swept / "code.txt").read_text() == "1"
    assert len(jobs_of(swept)) == 2
    assert output.count("[bold red]") == 0
    assert output.count("Error: Dataset synthetic has folds 0 to 3, not 9") == 2
    assert "Traceback" not in output
    assert "2 finished, 2 failed of 4 runs" in output
    assert output.count("of 4 runs") == 1, "a job reported on its sweep"
    assert "folds 0 to 3" in read_json(swept / "2-synthetic-small-fold9-shot1" / "failure.json")["error"]


@pytest.mark.slow
def test_jobs_that_differ_in_what_is_tested_share_a_training(swept: Path, tmp_path: Path) -> None:
    one, five = (results(folder) for folder in jobs_of(swept))
    assert one["training"]["run"] == five["training"]["run"] == str(swept / "0-synthetic-small-fold0-shot1")
    assert not (jobs_of(swept)[1] / "checkpoints").exists()
    alone = run(*SETTING, "fold=0", "shot=5", f"hydra.run.dir={tmp_path}")
    assert alone.returncode == 0, alone.stderr
    assert results(tmp_path)["training"]["run"] == str(tmp_path)
    assert results(tmp_path)["test"] == five["test"] != one["test"]


@pytest.mark.slow
def test_wandb_has_a_run_for_each_job_and_one_for_the_sweep(swept: Path) -> None:
    runs = runs_in(swept)
    assert len(runs) == len({r.id for r in runs}) == 5
    assert all(r.exit_code is not None for r in runs), "a run was left open"
    first, second, summary = runs[0], runs[1], runs[4]
    assert [r.exit_code for r in runs] == [0, 0, 1, 1, 0]
    assert [r.group for r in runs] == ["synthetic-small-pmnet-shot1", "synthetic-small-pmnet-shot5"] * 2 + ["sweeps"]
    assert [r.job_type for r in runs] == ["cross_category"] * 4 + ["summary"]
    assert {r.project for r in runs} == {"pmnet"}
    for r, fold, shot in zip(runs, (0, 0, 9, 9), (1, 5, 1, 5), strict=False):
        told = {"dataset": "synthetic", "target": "synthetic", "backbone": "small", "weights": "quickstart"}
        told |= {"model": "pmnet", "task": "cross_category", "seed": 0, "fold": fold, "shot": shot, "sweep": swept.name}
        assert told.items() <= r.config.items()
    for r, folder in zip((first, second), jobs_of(swept), strict=True):
        test = results(folder)["test"]
        assert r.summary["test/miou"] == test["miou"]
        assert r.summary["test/fb_iou"] == test["fb_iou"]
        assert {c: r.summary[f"test/iou/{c}"] for c in test["iou_per_class"]} == test["iou_per_class"]
        for name, scores in results(folder)["baselines"].items():
            for key in ("miou", "fb_iou"):
                assert r.summary[f"test/baselines/{name}/{key}"] == scores[key]
        assert r.summary["predictions/count"] == 3
        assert "results.json" in r.files
        assert r.artifacts == [("model", f"checkpoint-{r.id}")]
    curve = [(row["epoch"], row["val/miou"]) for row in first.history if "val/miou" in row]
    written = [row for row in csv.DictReader((jobs_of(swept)[0] / "metrics.csv").open()) if row["val/miou"]]
    assert curve == [(int(row["epoch"]), pytest.approx(float(row["val/miou"]), abs=1e-4)) for row in written]
    assert len(curve) == 2
    assert first.axes["val/miou"] == "epoch"
    assert not any("fold" in name or "shot" in name for r in (first, second) for name in r.summary)
    assert "report.html" in summary.files
    assert summary.summary["folds/nrows"] == 2 * (1 + 3), "two shots: the method and three baselines"


@pytest.mark.slow
def test_sweep_over_methods_that_learn_nothing_ends_in_a_report(tmp_path: Path) -> None:
    """Their numbers are those of the training-free baselines of every run."""
    done = run(
        "-m", *SETTING, "model=prototype,nearest", "fold=0,1", f"hydra.sweep.dir={tmp_path}",
        "logger=wandb", "logger.offline=true", "logger.checkpoint=true",
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "W&B failed" not in output
    records = [results(folder) for folder in jobs_of(tmp_path)]
    assert [r["setting"]["method"] for r in records] == ["Prototype", "Prototype", "Nearest", "Nearest"]
    for record in records:
        assert record["training"] == record["checkpoint"] == {}
        assert record["test"] == record["baselines"][record["setting"]["model"]]
    with (tmp_path / "report" / "tables" / "miou-cross_category-synthetic-small.csv").open() as file:
        rows = {row[0]: row[1:] for row in csv.reader(file)}
    assert list(rows) == [
        "method", "Prototype, ours", "Nearest, ours",
        "everything marked as foreground", "prototype, training-free", "nearest, training-free",
    ]  # fmt: skip
    for name, pair in (("Prototype", records[:2]), ("Nearest", records[2:])):
        shown = [f"{record['test']['miou']:.1f}" for record in pair]
        assert rows[f"{name}, ours"][:2] == rows[f"{name.lower()}, training-free"][:2] == shown
    *runs, summary = runs_in(tmp_path)
    assert [r.summary["test/miou"] for r in runs] == [record["test"]["miou"] for record in records]
    assert not any("trained_by" in r.config or r.artifacts for r in runs)
    assert summary.summary["folds/nrows"] == 2 + 3, "two methods and three baselines"


@pytest.mark.slow
def test_sweep_reports_means_over_folds(tmp_path: Path) -> None:
    """Several jobs at the same time; the two shots of a fold share a training, and one waits for the other."""
    done = run(
        "-m", *SETTING, "fold=0,1,2,3", "trainer.max_epochs=1", "launcher=parallel", f"trainings={tmp_path}/trainings",
        f"hydra.sweep.dir={tmp_path}/sweep", "shot=1,5", "launcher.jobs=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = jobs_of(tmp_path / "sweep")
    assert len(folders) == 8
    assert len(list((tmp_path / "sweep").glob("*/checkpoints"))) == 4
    assert all((folder / "output.txt").exists() for folder in folders)
    rows = list(csv.DictReader((tmp_path / "sweep" / "report" / "report.csv").open()))
    for shot in (1, 5):
        mean = statistics.mean(float(r["miou"]) for r in rows if r["shot"] == str(shot))
        assert mean == pytest.approx(
            statistics.mean(r["test"]["miou"] for r in map(results, folders) if r["setting"]["shot"] == shot)
        )
        assert f"{mean:.1f}" in done.stdout
    assert (tmp_path / "sweep" / "report" / "report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_several_processes_a_job_in_a_sweep(tmp_path: Path) -> None:
    done = run("-m", *SETTING, "trainer=ddp", "trainer.accelerator=cpu", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert [results(folder)["processes"] for folder in jobs_of(tmp_path)] == [2, 2]
    heads = [torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in jobs_of(tmp_path)]
    assert any((heads[0][k] != heads[1][k]).any() for k in heads[0]), "the second job had the seed of the first"


@pytest.mark.slow
def test_killed_job_is_reported_and_the_sweep_started_again_finishes_it(tmp_path: Path) -> None:
    setting = [*SETTING, "trainer.max_epochs=4", "episodes.per_epoch=60", "seed=0,1"]
    whole = command("-m", *setting, f"trainings={tmp_path}/trainings", f"hydra.sweep.dir={tmp_path}/sweep")
    environment = os.environ | {"COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        whole, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    first = tmp_path / "sweep" / "0-synthetic-small-fold0-shot1"
    deadline = time.time() + 120
    while not (first / "checkpoints" / "last.ckpt").exists() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(child_of(process.pid), signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "Job 0 failed: The process was killed by SIGKILL" in output
    assert "1 finished, 1 failed of 2 runs" in output
    again = run("-m", *setting, f"trainings={tmp_path}/trainings", f"hydra.sweep.dir={tmp_path}/again")
    assert again.returncode == 0, again.stderr
    assert f"Resuming the training that was interrupted in {first}" in again.stdout + again.stderr
    assert f"Already trained in {tmp_path}/sweep/1-" in again.stdout + again.stderr
    alone = run(*setting[:-1], f"hydra.run.dir={tmp_path}/alone")
    assert alone.returncode == 0, alone.stderr
    assert results(tmp_path / "alone")["test"] == results(jobs_of(tmp_path / "again")[0])["test"]


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.mark.slow
def test_jobs_end_with_the_sweep_that_started_them(tmp_path: Path) -> None:
    setting = [*SETTING, "trainer.max_epochs=1000", f"hydra.sweep.dir={tmp_path}"]
    process = subprocess.Popen(command("-m", *setting), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(tmp_path.glob("*/checkpoints/last.ckpt")) and time.time() < deadline:
        time.sleep(0.05)
    child = child_of(process.pid)
    process.kill()
    process.wait()
    while Path(f"/proc/{child}").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.time() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_ctrl_c_ends_the_job_and_the_sweep_in_order(tmp_path: Path) -> None:
    """The terminal sends it to both."""
    setting = [*SETTING, "trainer.max_epochs=1000", f"hydra.sweep.dir={tmp_path}"]
    process = subprocess.Popen(
        command("-m", *setting), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while not list(tmp_path.glob("*/checkpoints/last.ckpt")) and time.time() < deadline:
        time.sleep(0.05)
    child = child_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert not Path(f"/proc/{child}").exists()
    assert "Traceback" not in output
    assert "race condition" not in output
    assert output.rstrip().endswith("it takes over the finished trainings.")


@pytest.mark.slow
def test_job_whose_sweep_was_killed_before_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it imports, it has not yet asked the kernel to end it with its parent."""
    monkeypatch.setenv("PMNET_PARENT", "1")
    done = run(*SETTING, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 143
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_search_finds_the_best_validation(tmp_path: Path) -> None:
    """Also if trials fail, here those with an unknown norm."""
    choice = "model.norm=choice(batch,none)"
    search = ["hparams_search=optuna", "hydra.sweeper.n_trials=4", choice]
    done = run("-m", *SETTING, *search, f"hydra.sweep.dir={tmp_path}")
    failed = [read_json(path)["error"] for path in tmp_path.glob("*/failure.json")]
    assert done.returncode == bool(failed), done.stderr
    assert all("batch, group" in error for error in failed)
    scores = [results(folder)["checkpoint"]["val_miou"] for folder in jobs_of(tmp_path)]
    assert len(scores) + len(failed) == 4
    assert scores
    best = float((tmp_path / "optimization_results.yaml").read_text().split("best_value:")[1])
    assert best == pytest.approx(max(scores), abs=1e-3)


@pytest.mark.slow
def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    done = run("-m", *TINY, "launcher=slurm", "fold=0,1", f"hydra.sweep.dir={tmp_path}", env={"PATH": "/nowhere"})
    assert done.returncode == 1
    assert "there is no sbatch on PATH" in done.stderr
    assert "launcher=parallel" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_slurm_is_for_sweeps(tmp_path: Path) -> None:
    done = run(*TINY, "launcher=slurm_cpu", f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 1
    assert "Add -m" in done.stderr
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
def test_wrong_override_is_told_without_a_report(tmp_path: Path) -> None:
    done = run("-m", *TINY, "fold=0,1", "shot=0", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 1
    assert "Could not find 'shot/0'" in done.stderr
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "devices, number", [(2, 2), ("2", 2), ("auto", 4), (-1, 4), ("-1", 4), ([1, 3], 2), ("1,3", 2), (0, 0)]
)
def test_number_of_devices_that_a_job_takes(devices: object, number: int) -> None:
    assert sweep.number_of(devices, 4) == number


def test_processes_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    """As they do if all processes of a job fail for the same reason."""
    errors: list[Exception] = []

    def write() -> None:
        try:
            for _ in range(200):
                write_json(tmp_path / "failure.json", {"error": "none"})
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert [p.name for p in tmp_path.iterdir()] == ["failure.json"]


def test_states_of_slurm_that_are_no_end(monkeypatch) -> None:
    """Jobs on nodes that are starting up, suspended jobs, a long list of waiting jobs."""
    watcher = slurm.QueueWatcher()
    for job in ("7_0", "7_1", "7_2", "7_3", "8"):
        watcher.register_job(job)
    said = "7_0|CONFIGURING|n1\n7_1|SUSPENDED|n1\n7_2|PENDING|\n7_3|FAILED|n1\n"
    states = {job: info["State"] for job, info in watcher.read_info(said).items()}
    assert states == {"7_0": "RUNNING", "7_1": "RUNNING", "7_2": "PENDING", "7_3": "FAILED", "8": "FORGOTTEN"}
    assert "--array" in (watcher._make_command() or [])


def test_jobs_never_have_the_same_gpus(tmp_path: Path) -> None:
    """Six jobs of two GPUs each on four GPUs: no GPU has two jobs, and at most two jobs run at the same time."""
    free, at_once, most = {"a", "b", "c", "d"}, 0, 0
    lock = threading.Lock()

    def job() -> None:
        nonlocal at_once, most
        with sweep.claimed(sorted("abcd"), 2, tmp_path) as mine:
            with lock:
                assert len(set(mine)) == 2
                assert set(mine) <= free, "taken already"
                free.difference_update(mine)
                at_once += 1
                most = max(most, at_once)
            time.sleep(0.4)
            with lock:
                free.update(mine)
                at_once -= 1

    threads = [threading.Thread(target=job) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert free == {"a", "b", "c", "d"}
    assert most == 2


def test_quoted_values_mean_themselves():
    """To Hydra and then to OmegaConf, whatever quotes, backslashes and interpolations are in them."""
    random, parser = np.random.default_rng(0), OverridesParser.create()
    for _ in range(500):
        value = "".join(random.choice(["a", "\\", "'", '"', "$", "{", "}", "${x}", "=", ",", "(", "é", " "], 8))
        parsed = parser.parse_override(f"key={sweep.quoted(value)}").value()
        assert OmegaConf.create({"key": parsed}).key == value
