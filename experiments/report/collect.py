"""Finds the runs below folders or in a W&B group, finished or not."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from experiments.errors import UserError
from experiments.files import read_json

UNSHAPING = {  # what a config may differ in and still be the same row of a table
    *("fold", "shot", "seed", "mode", "ckpt", "resume", "reuse", "trainings", "panels", "untrained", "data"),
    *("logger", "launcher", "hydra", "task", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
    *("trainer.strategy", "trainer.log_every_n_steps", "dataset.root", "target.root", "validation.root"),
    *("trainer.cache", "trainer.channels_last", "trainer.compile"),
    *("backbone.weights", "backbone.download", "episodes._target_", "episodes.dataset", "episodes.target"),
    *("episodes.validation", "episodes.task", "episodes.fold", "episodes.shot", "episodes.train_shot"),
    *("episodes.seed", "episodes.cache", "episodes.workers", "episodes.test_batch_size"),
}
OF_TRAINING = {  # what a test of trained weights has in its config, but not from them
    *("optimizer", "scheduler", "loss", "trainer", "train_shot", "validation", "model.dropout"),
    *("episodes.batch_size", "episodes.per_epoch", "episodes.val", "episodes.novel_pixels"),
}


@dataclass
class Job:
    """A run, planned or made.

    Attributes:
        folder: of the run; None of one that has not started.
        record: its results.json; empty unless it finished.
        error: why it failed, if it did.
        url: of its run in W&B, if it came from there.
        by_path: whether a dataset of one's own goes by its whole path, as another has the same name.
    """

    folder: Path | None
    overrides: list[str]
    record: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    name: str = ""
    url: str | None = None
    by_path: bool = False

    @property
    def state(self) -> str:
        if self.record:
            return "finished"
        if self.error:
            return "failed"
        return "not started" if self.folder is None else "unfinished"

    @property
    def setting(self) -> dict[str, Any]:
        return self.record.get("setting", {})

    @cached_property
    def benchmark(self) -> tuple[str, str, str, str]:
        """(task, dataset, target, backbone)."""
        s, config = self.setting, self.record.get("config", {})
        dataset, target = s["dataset"], s.get("target", s["dataset"])
        roots = [(config.get(k) or {}).get("root") for k in ("dataset", "target")]
        own = [f"folder {root if self.by_path else Path(root).name}" if root else "folder" for root in roots]
        return (
            s.get("task", "cross_category"),
            own[0] if dataset == "folder" else dataset,
            own[1 if roots[1] else 0] if target == "folder" else target,
            s.get("backbone", "?"),
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The values that shape its numbers, by dotted name."""
        values = {"model": self.setting.get("model", "pmnet"), "weights": self.weights}
        shaping = {k: v for k, v in flat(self.record.get("config", {})) if not within(k, UNSHAPING)}
        if self.record.get("mode") == "test":
            trained = read_json(self.trained_by / "results.json").get("config") if self.trained_by else None
            shaping = {k: v for k, v in shaping.items() if not within(k, OF_TRAINING)}
            if trained:
                shaping |= {k: v for k, v in flat(trained) if within(k, OF_TRAINING) and not within(k, UNSHAPING)}
            else:
                values["trained by"] = str(self.trained_by)
        checkpoint = self.record.get("checkpoint", {}).get("path")
        return values | {"checkpoint": Path(checkpoint).stem if checkpoint else "best"} | shaping

    @property
    def weights(self) -> str | None:
        """The backbone's; a file that was taught base classes is another in each fold, and yet the same choice."""
        backbone = self.record.get("backbone", {})
        weights, taught = backbone.get("weights"), (backbone.get("trained_on") or {}).get("dataset")
        return f"taught on {taught}" if taught and Path(weights).suffix else weights

    @cached_property
    def trained_by(self) -> Path | None:
        """The folder of the run that trained what it tests; after a move, the one of that name beside it."""
        run = self.record.get("training", {}).get("run")
        if not run or self.folder is None:
            return self.folder
        moved = self.folder.parent / Path(run).name
        return moved if moved.is_dir() and not Path(run).is_dir() else Path(run)


@dataclass
class Sweep:
    folder: Path
    command: list[str]
    started: str
    planned: list[list[str]]


@dataclass
class Found:
    """All runs, the sweeps that they are of, and what a reader should know of the search."""

    jobs: list[Job]
    sweeps: list[Sweep]
    notes: list[str]

    @property
    def finished(self) -> list[Job]:
        return [job for job in self.jobs if job.state == "finished"]

    @property
    def tested(self) -> list[Job]:
        """Those with numbers: a pretraining of a backbone has none."""
        return [job for job in self.finished if "test" in job.record]

    def name_of(self, folder: Path) -> str:
        names = (job.name for job in self.jobs if job.folder and job.folder.absolute() == folder.absolute())
        return next(names, "/".join(folder.parts[-2:]))


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def within(name: str, groups: Iterable[str]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def collect(folders: Sequence[Path]) -> Found:
    """The runs in these folders or anywhere below them. They may be written to meanwhile.

    Raises:
        UserError: a folder is missing, or there is no run in any.
    """
    found, seen = Found([], [], []), set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder.absolute()} to report on.")
        for place in sorted(places(folder), key=by_number):
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            if (place / "sweep.json").exists():
                found.sweeps.append(read_sweep(place, found.notes))
            if (job := read_job(place, found.notes)) is not None:
                found.jobs.append(job)
    give_names(found)
    tell_datasets_apart(found.tested)
    for sweep in found.sweeps:
        inside = sweep.folder.resolve()
        begun = [job.overrides for job in found.jobs if job.folder and job.folder.resolve().is_relative_to(inside)]
        for overrides in sweep.planned:
            if overrides in begun:
                begun.remove(overrides)
            else:
                short = " ".join(o for o in overrides if "." not in o.split("=")[0])
                found.jobs.append(Job(None, overrides, name=short or " ".join(overrides)))
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
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", str(path)) if part]


def read_sweep(folder: Path, notes: list[str]) -> Sweep:
    plan = read_json(folder / "sweep.json")
    if not plan:
        notes.append(f"{folder.name}: sweep.json cannot be read; which runs it planned is not known.")
    jobs, command = (value if isinstance(value := plan.get(key), list) else [] for key in ("jobs", "command"))
    planned = [list(map(str, job["overrides"])) for job in jobs if isinstance(job, dict) and job.get("overrides")]
    return Sweep(folder, list(map(str, command)), str(plan.get("started") or ""), planned)


def read_job(folder: Path, notes: list[str]) -> Job | None:
    """None where the folder is a sweep's."""
    overrides = folder / ".hydra" / "overrides.yaml"
    try:
        given = OmegaConf.to_container(OmegaConf.load(overrides)) if overrides.exists() else []
    except (YAMLError, OSError, UnicodeDecodeError):
        given = []  # half written
    job = Job(folder, [str(o) for o in given if not str(o).startswith("hydra.")] if isinstance(given, list) else [])
    record, job.error = read_json(folder / "results.json"), read_json(folder / "failure.json").get("error")
    job.error = str(job.error) if job.error is not None else None
    if job.error is None and (record.get("mode") == "pretrain" or is_whole(record)):
        job.record = record
    elif job.error is None and (folder / "results.json").exists():
        notes.append(f"{folder.name}: results.json cannot be read, or is none of a run; the run counts as unfinished.")
    return job if job.error or (folder / ".hydra").exists() or job.record else None


Number = int | float
SHAPE: dict[str, Any] = {  # of a record, as far as reports read it; what older versions lacked may be missing
    "test": {"miou": Number, "fb_iou": Number},
    "setting": {"dataset": str},
}
SHAPE_IF_THERE: dict[str, Any] = {
    "setting": {
        **dict.fromkeys(("task", "target", "backbone", "model"), str),
        "fold": int | str,
        "folds": int,
        "shot": int,
    },
    "baselines": {},
    "backbone": {"trained_on": dict | None},
    "training": {"run": str, "epochs": int},
    "checkpoint": {"path": str},
    "parameters": {"learnable": int},
    **{key: {} for key in ("episodes", "config", "versions")},
    "command": list,
}


def is_whole(record: dict[str, Any]) -> bool:
    """Whether a record has what every table needs, and nothing that no run has written."""
    if not (has(record, SHAPE, needed=True) and has(record, SHAPE_IF_THERE, needed=False)):
        return False
    if record.get("baselines") and not has(record["baselines"], {"all_foreground": SHAPE["test"]}, needed=True):
        return False
    tested = [record["test"], *record.get("baselines", {}).values()]
    classes = [scores.setdefault("iou_per_class", {}) for scores in tested if isinstance(scores, dict)]
    fold = record["setting"].get("fold", 0)
    return (
        len(classes) == len(tested)
        and all(isinstance(ious, dict) and all(isinstance(iou, Number) for iou in ious.values()) for ious in classes)
        and (isinstance(fold, int) or fold == "all")
    )


def has(value: Any, shape: Any, needed: bool) -> bool:
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    there = isinstance(value, dict) and (value.keys() >= shape.keys() or not needed)
    return there and all(has(value[key], inner, needed) for key, inner in shape.items() if key in value)


def give_names(found: Found) -> None:
    """Each run by its folder, as far as that tells it from the others."""
    folders = [job.folder.absolute() for job in found.jobs if job.folder]
    for job, folder in zip([job for job in found.jobs if job.folder], folders, strict=True):
        job.name = str(folder.relative_to(os.path.commonpath([f.parent for f in folders])))


def tell_datasets_apart(jobs: Sequence[Job]) -> None:
    """Folders of one name are one dataset, wherever they lie, as long as they have the same classes."""
    classes: dict[Any, set[Any]] = defaultdict(set)
    for job in jobs:
        classes[job.benchmark].add(classes_of(job))
    for job in jobs:
        if job.by_path is False and len(classes[job.benchmark]) > 1:
            job.by_path = True
            del job.benchmark  # is made anew


def classes_of(job: Job) -> frozenset[str]:
    """Of both sides: the same in every fold."""
    drawn = job.record.get("episodes", {})
    return frozenset([*drawn.get("base_classes", []), *drawn.get("novel_classes", [])])


def from_wandb(paths: Sequence[str], folder: Path) -> Found:
    """The runs of W&B groups, each by the results.json that it stored, fetched to `folder`.

    Args:
        paths: entity/project/group each.

    Raises:
        UserError: no such group, no key, no connection.
    """
    jobs = [job for path in dict.fromkeys(paths) for job in of_group(path, folder)]
    return Found(jobs, [], ["Pictures of predictions are not fetched from W&B; learning curves are those found here."])


def of_group(path: str, folder: Path) -> list[Job]:
    import wandb

    try:
        entity, project, group = path.split("/", 2)
    except ValueError:
        raise UserError(f"--wandb takes entity/project/group, not {path}.") from None
    jobs = []
    try:
        for run in wandb.Api().runs(f"{entity}/{project}", filters={"group": group}, order="+created_at"):
            if run.job_type == "summary":
                continue
            job = Job(folder / run.id, [], name=run.name, url=run.url)
            stored = {file.name: file for file in run.files()}
            if "results.json" in stored:
                stored["results.json"].download(root=str(job.folder), replace=True)
            record = read_json(folder / run.id / "results.json")
            if record.get("mode") == "pretrain" or is_whole(record):
                job.record = record
            elif run.state not in ("running", "pending"):
                job.error = f"W&B has no results of it, which is {run.state}"
            jobs.append(job)
    except (wandb.errors.Error, ValueError, OSError) as error:
        told = str(error).rstrip(".")
        raise UserError(f"W&B did not give the runs of {path}: {told}. Is there a key (wandb login)?") from error
    if not jobs:
        raise UserError(f"W&B has no run in the group {group} of {entity}/{project}.")
    return jobs


def all_equal(values: Iterable[Any]) -> bool:
    return len({str(v) for v in values}) <= 1
