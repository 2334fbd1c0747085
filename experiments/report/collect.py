"""Finds runs, finished or not, in folders or in W&B groups."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from experiments.errors import UserError
from experiments.files import read_json

UNSHAPING = {  # config values that may differ between runs of one table row
    *("fold", "shot", "seed", "mode", "ckpt", "resume", "reuse", "trainings", "panels", "untrained", "floors", "data"),
    *("logger", "launcher", "hydra", "task", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
    *("trainer.strategy", "trainer.log_every_n_steps", "dataset.root", "target.root", "validation.root"),
    *("trainer.cache", "trainer.channels_last", "trainer.compile", "trainer.timeout"),
    *("backbone.weights", "backbone.download", "episodes._target_", "episodes.dataset", "episodes.target"),
    *("episodes.validation", "episodes.task", "episodes.fold", "episodes.shot", "episodes.train_shot"),
    *("episodes.seed", "episodes.cache", "episodes.augment", "episodes.workers", "episodes.timeout"),
    *("episodes.test_batch_size", "episodes.protocol", "episodes.test_seeds", "protocol", "test_seeds"),
}
PROTOCOLS = Path(__file__).parents[2] / "conf" / "protocol"
OF_TRAINING = {  # config values that affect training only; a test of trained weights takes them from the training run
    *("optimizer", "scheduler", "loss", "augment", "trainer", "train_shot", "validation", "model.dropout"),
    *("episodes.batch_size", "episodes.per_epoch", "episodes.val", "episodes.novel_pixels"),
}
OF_MODEL = {"model", "backbone", "optimizer", "scheduler", "loss", "augment"}  # groups from which a model chooses
METHOD_OF_MODEL = {"pmnet": "PMNet", "pmnet_release": "PMNet"}  # for records that do not name their method


@dataclass
class Job:
    """A run, started or only planned.

    Attributes:
        folder: the run's folder; None if the run has not started.
        record: the content of its results.json; empty unless the run finished.
        error: the message of a failed run.
        url: its page in W&B, if it was fetched from there.
        by_path: whether its own-images dataset is named by its whole path, because another one has the same name.
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

    @property
    def method(self) -> str:
        """The method's name as published, e.g. "HSNet-HM"."""
        model = self.setting.get("model", "pmnet")
        return self.setting.get("method") or METHOD_OF_MODEL.get(model, model)

    @property
    def training_free(self) -> bool:
        """Whether the method learns nothing: its record has an empty "training"."""
        return self.record.get("training") == {}

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
        """The values that affect the run's numbers, by dotted name."""
        values = {"model": self.setting.get("model", "pmnet"), "weights": self.weights}
        values["protocol"] = protocol_of(self.record)
        shaping = {k: v for k, v in flat(self.record.get("config", {})) if not within(k, UNSHAPING)}
        if self.training_free:
            return values | {k: v for k, v in shaping.items() if not within(k, OF_TRAINING)}
        if self.record.get("mode") == "test":
            trained = read_json(self.trained_by / "results.json").get("config") if self.trained_by else None
            shaping = {k: v for k, v in shaping.items() if not within(k, OF_TRAINING)}
            if trained:
                shaping |= {k: v for k, v in flat(trained) if within(k, OF_TRAINING) and not within(k, UNSHAPING)}
            else:
                values["trained by"] = str(self.trained_by)
        checkpoint = self.record.get("checkpoint", {}).get("path")
        return values | {"checkpoint": Path(checkpoint).stem if checkpoint else "best"} | shaping

    def has_option(self, name: str) -> bool:
        """Whether a value of `config` can apply to this run: those of training do not apply to a training-free one."""
        return not (self.training_free and within(name, OF_TRAINING | {"checkpoint", "trained by"}))

    @property
    def weights(self) -> str | None:
        """The backbone's weights. Files pretrained on the base classes differ between folds but are one choice."""
        backbone = self.record.get("backbone", {})
        weights, pretrained = backbone.get("weights"), (backbone.get("trained_on") or {}).get("dataset")
        return f"pretrained on {pretrained}" if pretrained and Path(weights).suffix else weights

    @cached_property
    def trained_by(self) -> Path | None:
        """The folder of the run that trained the tested weights; None if nothing was trained.

        If the runs were moved, it is the folder of that name beside this run.
        """
        if self.training_free:
            return None
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
    """All runs, their sweeps, and notes on files that could not be used."""

    jobs: list[Job]
    sweeps: list[Sweep]
    notes: list[str]

    @property
    def finished(self) -> list[Job]:
        return [job for job in self.jobs if job.state == "finished"]

    @property
    def tested(self) -> list[Job]:
        """The runs with test scores, i.e. all finished ones except those of UNTESTED."""
        return [job for job in self.finished if "test" in job.record]

    def name_of(self, folder: Path) -> str:
        names = (job.name for job in self.jobs if job.folder and job.folder.absolute() == folder.absolute())
        return next(names, "/".join(folder.parts[-2:]))


UNTESTED = ("pretrain", "predict")  # modes that give no scores


def protocol_of(record: dict[str, Any]) -> str:
    """The protocol of a run's test, and what differs from its file; records without one are older than the choice.

    Example:
        >>> protocol_of({"episodes": {"protocol": {"name": "ssp", "fit": "squeeze", "scored": "network"}}})
        'ssp, scored=network'
    """
    used = record.get("episodes", {}).get("protocol", {"name": "hsnet"})
    published = standard(used["name"])
    changed = [f"{key}={value}" for key, value in used.items() if key in published and value != published[key]]
    return ", ".join([used["name"], *changed])


@cache
def standard(name: str) -> dict[str, Any]:
    """The values of a protocol's file, as a record has them; empty if there is no such file."""
    path = PROTOCOLS / f"{name}.yaml"
    values: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    return values | {"seeds": list(range(values["seed"], values["seed"] + values["lists"]))} if values else {}


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of a nested dictionary."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def within(name: str, groups: Iterable[str]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def collect(folders: Sequence[Path]) -> Found:
    """Finds all runs in these folders or below them. Runs may still be in progress.

    Raises:
        UserError: a folder is missing, or none of them contains a run.
    """
    found, seen = Found([], [], []), set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder.absolute()}. Give the folder of a run or of a sweep.")
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
        started = [job.overrides for job in found.jobs if job.folder and job.folder.resolve().is_relative_to(inside)]
        for overrides in sweep.planned:
            if overrides in started:
                started.remove(overrides)
            else:
                short = " ".join(o for o in overrides if "." not in o.split("=")[0])
                found.jobs.append(Job(None, overrides, name=short or " ".join(overrides)))
    if not found.jobs:
        where = ", ".join(str(f.absolute()) for f in folders)
        raise UserError(f"No run found in {where}. Give the folder of a run or of a sweep, with results.json below it.")
    return found


def places(folder: Path) -> Iterator[Path]:
    """Folders of runs and of sweeps. Does not descend into the folder of a run."""
    for path, inside, files in os.walk(folder):
        inside[:] = sorted(name for name in inside if name not in ("wandb", "checkpoints", "predictions", ".submitit"))
        run = ".hydra" in inside or "results.json" in files
        if run or "sweep.json" in files:
            yield Path(path)
        if run:
            inside.clear()


def by_number(path: Path) -> list[Any]:
    """Sort key that orders 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", str(path)) if part]


def read_sweep(folder: Path, notes: list[str]) -> Sweep:
    plan = read_json(folder / "sweep.json")
    if not plan:
        notes.append(f"{folder.name}: sweep.json cannot be read, so runs that have not started are not listed.")
    jobs, command = (value if isinstance(value := plan.get(key), list) else [] for key in ("jobs", "command"))
    planned = [list(map(str, job["overrides"])) for job in jobs if isinstance(job, dict) and job.get("overrides")]
    return Sweep(folder, list(map(str, command)), str(plan.get("started") or ""), planned)


def read_job(folder: Path, notes: list[str]) -> Job | None:
    """The run in a folder; None if the folder only belongs to a sweep."""
    overrides = folder / ".hydra" / "overrides.yaml"
    try:
        given = OmegaConf.to_container(OmegaConf.load(overrides)) if overrides.exists() else []
    except (YAMLError, OSError, UnicodeDecodeError):
        given = []  # only partly written yet
    job = Job(folder, [str(o) for o in given if not str(o).startswith("hydra.")] if isinstance(given, list) else [])
    record, job.error = read_json(folder / "results.json"), read_json(folder / "failure.json").get("error")
    job.error = str(job.error) if job.error is not None else None
    if job.error is None and (record.get("mode") in UNTESTED or is_whole(record)):
        job.record = record
    elif job.error is None and (folder / "results.json").exists():
        notes.append(
            f"{folder.name}: results.json cannot be read or is not the record of a run; the run counts as unfinished."
        )
    return job if job.error or (folder / ".hydra").exists() or job.record else None


Number = int | float
SHAPE: dict[str, Any] = {  # what every record has; keys that older versions did not write are below
    "test": {"miou": Number, "fb_iou": Number},
    "setting": {"dataset": str},
}
SHAPE_IF_THERE: dict[str, Any] = {
    "setting": {
        **dict.fromkeys(("task", "target", "backbone", "model", "method"), str),
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
    """Whether a record has everything a table needs, in the types that runs write."""
    if not (has(record, SHAPE, needed=True) and has(record, SHAPE_IF_THERE, needed=False)):
        return False
    tested = [record["test"], *record.get("baselines", {}).values()]
    if not all(has(scores, SHAPE["test"], needed=True) for scores in tested):
        return False
    fold = record["setting"].get("fold", 0)
    if not (isinstance(fold, int) or fold == "all"):
        return False
    classes = [scores.setdefault("iou_per_class", {}) for scores in tested]
    return all(isinstance(ious, dict) and all(isinstance(iou, Number) for iou in ious.values()) for ious in classes)


def has(value: Any, shape: Any, needed: bool) -> bool:
    """Whether a value has the types of `shape`; `needed`: whether all its keys must be present."""
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    present = isinstance(value, dict) and (value.keys() >= shape.keys() or not needed)
    return present and all(has(value[key], inner, needed) for key, inner in shape.items() if key in value)


def give_names(found: Found) -> None:
    """Names each run by its folder, relative to the folder that all of them share."""
    folders = [job.folder.absolute() for job in found.jobs if job.folder]
    for job, folder in zip([job for job in found.jobs if job.folder], folders, strict=True):
        job.name = str(folder.relative_to(os.path.commonpath([f.parent for f in folders])))


def tell_datasets_apart(jobs: Sequence[Job]) -> None:
    """Own-images folders of the same name are one dataset, wherever they lie, if they have the same classes."""
    classes: dict[Any, set[Any]] = defaultdict(set)
    for job in jobs:
        classes[job.benchmark].add(classes_of(job))
    for job in jobs:
        if job.by_path is False and len(classes[job.benchmark]) > 1:
            job.by_path = True
            del job.benchmark  # a cached property: computed again


def classes_of(job: Job) -> frozenset[str]:
    """Base and novel classes and those left out together, which are the same in every fold."""
    episodes = job.record.get("episodes", {})
    left_out = [rare["class"] for split in episodes.get("classes_left_out", {}).values() for rare in split]
    return frozenset([*episodes.get("base_classes", []), *episodes.get("novel_classes", []), *left_out])


def from_wandb(paths: Sequence[str], folder: Path) -> Found:
    """Finds the runs of W&B groups and downloads their results.json to `folder`.

    Args:
        paths: one entity/project/group each.

    Raises:
        UserError: the group does not exist, there is no API key, or there is no connection.
    """
    jobs = [job for path in dict.fromkeys(paths) for job in of_group(path, folder)]
    return Found(
        jobs, [], ["Pictures of predictions are not fetched from W&B; learning curves only if the runs are here too."]
    )


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
            if record.get("mode") in UNTESTED or is_whole(record):
                job.record = record
            elif run.state not in ("running", "pending"):
                job.error = f"W&B has no results of this run (state: {run.state})"
            jobs.append(job)
    except (wandb.errors.Error, ValueError, OSError) as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"Could not fetch the runs of {path} from W&B: {reason}. Check the name and your API key (wandb login)."
        ) from error
    if not jobs:
        raise UserError(f"W&B has no run in the group {group} of {entity}/{project}.")
    return jobs


def all_equal(values: Iterable[Any]) -> bool:
    return len({str(v) for v in values}) <= 1
