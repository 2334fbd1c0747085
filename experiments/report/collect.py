"""Finds the runs below folders or in a W&B group, finished or not."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.files import read_json

UNSHAPING = {  # what a config may differ in and still be the same row of a table
    *("fold", "shot", "seed", "mode", "ckpt", "resume", "reuse", "trainings", "panels", "untrained", "data"),
    *("logger", "launcher", "hydra", "task", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
    *("trainer.strategy", "trainer.log_every_n_steps", "dataset.root", "target.root", "validation.root"),
    *("backbone.download", "episodes._target_", "episodes.dataset", "episodes.target", "episodes.validation"),
    *("episodes.task", "episodes.fold", "episodes.shot", "episodes.train_shot", "episodes.seed", "episodes.cache"),
    *("episodes.workers", "episodes.test_batch_size"),
}


@dataclass
class Job:
    """A run, planned or made.

    Attributes:
        folder: of the run; None of one that has not started.
        record: its results.json; empty unless it finished.
        error: why it failed, if it did.
    """

    folder: Path | None
    overrides: list[str]
    record: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def state(self) -> str:
        if self.record:
            return "finished"
        if self.error:
            return "failed"
        return "not started" if self.folder is None else "unfinished"

    @property
    def name(self) -> str:
        return self.folder.name if self.folder else " ".join(o for o in self.overrides if "." not in o.split("=")[0])

    @cached_property
    def setting(self) -> dict[str, Any]:
        return self.record.get("setting", {})

    @cached_property
    def benchmark(self) -> tuple[str, str, str, str]:
        """(task, dataset, target, backbone)."""
        s = self.setting
        return (s.get("task", "cross_category"), s["dataset"], s.get("target", s["dataset"]), s.get("backbone", "?"))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The values that shape its numbers, by dotted name."""
        values = {
            "model": self.setting.get("model", "pmnet"),
            "weights": self.record.get("backbone", {}).get("weights"),
        }
        for name, value in flat(self.record.get("config", {})):
            if not any(name == u or name.startswith(f"{u}.") for u in UNSHAPING):
                values[name] = value
        return values

    @property
    def trained_by(self) -> Path | None:
        run = self.record.get("training", {}).get("run")
        return Path(run) if run else self.folder


@dataclass
class Sweep:
    folder: Path
    command: list[str]
    started: str


@dataclass
class Found:
    """All runs, the sweeps that they are of, and what a reader should know of the search."""

    jobs: list[Job]
    sweeps: list[Sweep]
    notes: list[str]

    @property
    def finished(self) -> list[Job]:
        return [job for job in self.jobs if job.state == "finished"]


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def collect(folders: Sequence[Path]) -> Found:
    """The runs in these folders or anywhere below them. They may be written to meanwhile.

    Raises:
        UserError: a folder is missing, or there is no run in any.
    """
    found = Found([], [], [])
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder.absolute()} to report on.")
        for place in sorted(places(folder), key=by_number):
            if (place / "sweep.json").exists():
                plan = read_json(place / "sweep.json")
                found.sweeps.append(Sweep(place, plan.get("command", []), plan.get("started", "")))
            if (job := read_job(place, found.notes)) is not None:
                found.jobs.append(job)
    for sweep in found.sweeps:
        begun = [job.overrides for job in found.jobs if job.folder and job.folder.is_relative_to(sweep.folder)]
        for plan in read_json(sweep.folder / "sweep.json").get("jobs") or []:
            if plan["overrides"] in begun:
                begun.remove(plan["overrides"])
            else:
                found.jobs.append(Job(None, plan["overrides"]))
    if not found.jobs:
        where = ", ".join(str(f.absolute()) for f in folders)
        raise UserError(f"No run in {where}: give the folder of a run or of a sweep, which has results.json below it.")
    return found


def places(folder: Path) -> Iterator[Path]:
    """Folders of runs and of sweeps; what lies in a run's folder is its own."""
    for path, inside, files in os.walk(folder):
        inside[:] = sorted(name for name in inside if name not in ("wandb", "checkpoints", "predictions", ".submitit"))
        run = ".hydra" in inside or "results.json" in files
        if run or "sweep.json" in files:
            yield Path(path)
        if run:
            inside.clear()


def by_number(path: Path) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path)) if part]


def read_job(folder: Path, notes: list[str]) -> Job | None:
    """None where the folder is a sweep's, or a run's that tests nothing."""
    overrides = folder / ".hydra" / "overrides.yaml"
    given = OmegaConf.to_container(OmegaConf.load(overrides)) if overrides.exists() else []
    job = Job(folder, [str(o) for o in given] if isinstance(given, list) else [])
    job.overrides = [o for o in job.overrides if not o.startswith("hydra.")]
    record, error = read_json(folder / "results.json"), read_json(folder / "failure.json").get("error")
    if record.get("mode") == "pretrain" or "mode=pretrain" in job.overrides:
        return None
    if (folder / "results.json").exists() and not {"setting", "test"} <= record.keys():
        notes.append(f"{folder.name}: results.json cannot be read; the run counts as unfinished.")
    elif record and not error:
        job.record = record
    job.error = error
    return job if job.record or error or overrides.exists() or (folder / "results.json").exists() else None


def from_wandb(path: str, folder: Path) -> Found:
    """The runs of a W&B group, each by the results.json that it stored, fetched to `folder`.

    Args:
        path: entity/project/group.

    Raises:
        UserError: no such group, no key, no connection.
    """
    import wandb

    try:
        entity, project, group = path.split("/", 2)
    except ValueError:
        raise UserError(f"--wandb takes entity/project/group, not {path}.") from None
    jobs = []
    try:
        for run in wandb.Api().runs(f"{entity}/{project}", filters={"group": group}):
            if run.job_type == "summary":
                continue
            place = folder / run.id
            stored = {file.name: file for file in run.files()}
            if "results.json" in stored:
                stored["results.json"].download(root=str(place), replace=True)
            record = read_json(place / "results.json")
            jobs.append(Job(place, [run.name], record, None if record else f"W&B has no results of it: {run.state}"))
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"W&B did not give the runs of {path}: {error}. Is there a key (wandb login)?") from error
    if not jobs:
        raise UserError(f"W&B has no run in the group {group} of {entity}/{project}.")
    return Found(jobs, [], [])


def all_equal(values: Iterable[Any]) -> bool:
    return len({str(v) for v in values}) <= 1
