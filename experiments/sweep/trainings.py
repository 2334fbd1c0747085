"""Train once: jobs that differ only in what they test share one training.

`trainings/<fingerprint>.json` names the run that trains, or trained, a setting; a lock beside it makes every other
job of that setting wait. The checkpoints stay in that run's folder, whose `training.json` says whether it finished.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

import datamodules
import pmnet
from datamodules import FewShotDataModule
from datamodules.episodes.sampler import json_hash
from experiments.errors import UserError
from experiments.files import read_json, write_json
from experiments.run.checkpoints import in_run, put_aside
from experiments.run.processes import is_first, processes_of_slurm
from experiments.run.results import commit
from pmnet.methods import Method

log = logging.getLogger(__name__)
ABSENCE = 600  # seconds for which a training is kept for the job that Slurm is about to start again
MACHINE = {  # of trainer
    *("_target_", "accelerator", "devices", "num_nodes", "strategy", "log_every_n_steps"),
    *("cache", "channels_last", "compile"),
}
PLACES = {"root", "splits"}  # of a dataset: its files' content counts, not where they lie


def shape(cfg: DictConfig, data: FewShotDataModule, network: Method, processes: int) -> dict[str, Any]:
    """All that shapes the weights a training ends with, as plain values; not what is tested, nor on what machine.

    The number of processes is in it, as each normalises its own part of a batch.
    """

    def plain(node: str, without: set[str] | None = None) -> Any:
        value: Any = OmegaConf.to_container(cfg[node], resolve=True) if cfg[node] is not None else None
        return {k: v for k, v in value.items() if k not in without} if without and value else value

    return {
        **data.training_record,
        "per_epoch": cfg.episodes.per_epoch,
        "files": sorted({data.dataset.fingerprint(), data.validation.fingerprint()}),
        "datasets": [plain("dataset", PLACES), plain("validation", PLACES)],
        "backbone": network.backbone.provenance.sha256,
        **{node: plain(node) for node in ("model", "loss", "optimizer", "scheduler")},
        "trainer": plain("trainer", MACHINE),
        "processes": processes,
        "code": code(),
    }


def code() -> str:
    """sha256 of the sources of the network and of the episodes."""
    total = hashlib.sha256()
    for package in (pmnet, datamodules):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return total.hexdigest()


@contextmanager
def claim(
    store: Path | None, folder: Path, shape: dict[str, Any], resume: bool, waiting: Callable[[], None] = lambda: None
) -> Iterator[Path | None]:
    """Yields the run whose finished training of this shape is to be tested, or None where this job is to train.

    While this job trains it holds the shape's lock, and its training counts as finished when the block ends without
    an error. A training of this shape that was interrupted in another folder is gone on with in this one. Of the
    processes of one job the first decides; the others read its decision in `folder/training.json`.

    Args:
        store: folder of the locks and names; None shares nothing.
        folder: of this run.
        resume: whether anything earlier is looked at.
        waiting: called once a second while another job trains.
    """
    if not is_first():
        yield decision_of_the_first(folder)
        return
    fingerprint = json_hash(shape)
    record = {"attempt": attempt(), "run": str(folder.absolute()), "fingerprint": fingerprint, "commit": commit()}
    if store is None or (resume and holds_another(folder, fingerprint)):
        with marked(folder, record | {"fingerprint": None, "shape": shape}):
            yield None
        return
    entry = store / f"{fingerprint}.json"
    with locked(entry, folder, waiting):
        run = Path(read_json(entry).get("run", folder))
        done = resume and is_finished(run, fingerprint)
        if done:
            if run != folder.absolute():
                put_aside(folder)  # what this job had itself trained of it before another went on with that
            write_json(folder / "training.json", read_json(run / "training.json") | {"attempt": attempt()})
        else:
            if resume and not in_run(folder, "last"):
                take_over(run, folder, fingerprint)
            write_json(entry, {"run": str(folder.absolute())})
            with marked(folder, record | {"shape": shape}):
                yield None
    if done:
        yield run


@contextmanager
def locked(entry: Path, folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock beside `entry`; it is the kernel's, so that a killed job's is free at once."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(entry.with_suffix(".lock"))
    told = False
    while not acquired(lock, entry, folder):
        if not told:
            run = read_json(entry).get("run", "another job")
            log.info("Waiting for the same training, which is under way in %s", run)
        told = True
        waiting()
        time.sleep(1)
    try:
        yield
    finally:
        lock.release()


def acquired(lock: BaseFileLock, entry: Path, folder: Path) -> bool:
    """Takes the lock, unless it is another's or kept for one that will be back."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    run = Path(read_json(entry).get("run", folder))
    if run != folder.absolute() and read_json(run / "training.json").get("back_by", 0) > time.time():
        lock.release()
        return False
    return True


def will_be_back(folder: Path) -> None:
    """Keeps the training of a job that Slurm starts again from those that wait for it."""
    training = read_json(folder / "training.json")
    if training.get("run") == str(folder.absolute()) and not training["finished"]:
        write_json(folder / "training.json", training | {"back_by": time.time() + ABSENCE})


@contextmanager
def marked(folder: Path, record: dict[str, Any]) -> Iterator[None]:
    """Says in `training.json` that this folder trains, and at the end that it is done."""
    write_json(folder / "training.json", record | {"finished": False})
    yield
    write_json(folder / "training.json", record | {"finished": True})


def is_finished(run: Path, fingerprint: str) -> bool:
    training = read_json(run / "training.json")
    kept = in_run(run, "best") or in_run(run, "last")
    return training.get("fingerprint") == fingerprint and training["finished"] and kept is not None


def holds_another(folder: Path, fingerprint: str) -> bool:
    """Whether a training of another shape is gone on with, say one of fewer epochs: its end is of neither shape."""
    begun = in_run(folder, "last")
    return begun is not None and read_json(folder / "training.json").get("fingerprint") != fingerprint


def take_over(run: Path, folder: Path, fingerprint: str) -> None:
    """Copies the checkpoints and curves of a training that was interrupted in the folder `run`."""
    if read_json(run / "training.json").get("fingerprint") != fingerprint or not in_run(run, "last"):
        return
    log.info("Going on with the training that was interrupted in %s", run)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for path in sorted(run.glob("checkpoints/*.ckpt")):  # last.ckpt comes last: without it nothing is gone on with
        part = folder / "checkpoints" / f"{path.name}.part"
        shutil.copy(path, part)
        os.replace(part, folder / "checkpoints" / path.name)
    for path in run.glob("metrics*.csv"):
        shutil.copy(path, folder / f"metrics-of-{run.name}{path.stem.removeprefix('metrics')}.csv")


def decision_of_the_first(folder: Path) -> Path | None:
    """What the job's first process decided in this attempt, once it has; it may wait long for another's training."""
    while (training := read_json(folder / "training.json")).get("attempt") != attempt():
        failure = read_json(folder / "failure.json")
        if failure.get("attempt") == attempt():
            raise UserError(failure["error"])
        time.sleep(0.2)
    return Path(training["run"]) if training["finished"] else None


def attempt() -> str:
    """Names this start of the job, the same in all its processes and another after a requeue."""
    get = os.environ.get
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid() if get("GROUP_WORLD_SIZE") == "1" else ""  # a process of each node
        return f"torchrun {get('TORCHELASTIC_RUN_ID')} {launcher} {get('TORCHELASTIC_RESTART_COUNT')}"
    if processes_of_slurm() > 1:
        return f"slurm {get('SLURM_JOB_ID')} {get('SLURM_STEP_ID')} {get('SLURM_RESTART_COUNT', 0)}"
    return f"process {os.getpid() if is_first() else os.getppid()}"  # the first starts the others
