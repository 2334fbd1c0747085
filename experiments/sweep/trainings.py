"""Shared trainings: jobs that differ only in what they test train once.

`trainings/<fingerprint>.json` names the run that trains, or has trained, a setting. A lock file beside it makes other
jobs with the same setting wait. The checkpoints stay in that run's folder, whose `training.json` says whether the
training has finished.
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
from pmnet.replacing import replacing

log = logging.getLogger(__name__)
ABSENCE = 600  # seconds for which a training is reserved for its job that Slurm is going to restart
MACHINE = {  # options of the trainer that do not affect the weights
    *("_target_", "accelerator", "devices", "num_nodes", "strategy", "log_every_n_steps"),
    *("cache", "channels_last", "compile", "timeout"),
}
PLACES = {"root", "splits"}  # paths of a dataset: only the content of its files affects the weights


def shape(cfg: DictConfig, data: FewShotDataModule, network: Method, processes: int) -> dict[str, Any]:
    """Everything that affects the trained weights, as plain values; not what is tested or the machine.

    The number of processes is included because batch normalisation is computed by each process on its part of a batch.
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
    """sha256 of the source files of the packages `pmnet` and `datamodules`."""
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
    """Yields the folder of a run that has finished the same training, or None if this job has to train.

    If another job is training the same setting, this one waits. While this job trains, it holds the lock; its training
    counts as finished when the block ends without an error. A training that was interrupted in another folder is copied
    to this one and resumed. The first process of a job decides; the others read its decision in `folder/training.json`.

    Args:
        store: folder of the lock files and run names; None shares no training.
        folder: this run's folder.
        shape: what affects the weights, from `shape`.
        resume: whether earlier trainings may be resumed or reused.
        waiting: called once a second while another job trains.
    """
    if not is_first():
        yield decision_of_first(folder)
        return
    fingerprint = json_hash(shape)
    record = {"attempt": attempt(), "run": str(folder.absolute()), "fingerprint": fingerprint, "commit": commit()}
    if store is None or (resume and continues_another(folder, fingerprint)):
        with marked(folder, record | {"fingerprint": None, "shape": shape}):
            yield None
        return
    entry = store / f"{fingerprint}.json"
    with locked(entry, folder, waiting):
        run = Path(read_json(entry).get("run", folder))
        done = resume and is_finished(run, fingerprint)
        if done:
            if run != folder.absolute():
                put_aside(folder)  # this job's own part of the training, which another job has finished
            write_json(folder / "training.json", read_json(run / "training.json") | {"attempt": attempt()})
        else:
            if resume and not in_run(folder, "last"):
                copy_interrupted(run, folder, fingerprint)
            write_json(entry, {"run": str(folder.absolute())})
            with marked(folder, record | {"shape": shape}):
                yield None
    if done:
        yield run


@contextmanager
def locked(entry: Path, folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file beside `entry`. The kernel releases it at once if the job is killed."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(entry.with_suffix(".lock"))
    logged = False
    while not acquired(lock, entry, folder):
        if not logged:
            run = read_json(entry).get("run", "another job")
            log.info("Waiting for the same training, which is running in %s", run)
        logged = True
        waiting()
        time.sleep(1)
    try:
        yield
    finally:
        lock.release()


def acquired(lock: BaseFileLock, entry: Path, folder: Path) -> bool:
    """Acquires the lock; False if another job holds it or the training is reserved for a job that Slurm restarts."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    run = Path(read_json(entry).get("run", folder))
    if run != folder.absolute() and read_json(run / "training.json").get("back_by", 0) > time.time():
        lock.release()
        return False
    return True


def keep_training(folder: Path) -> None:
    """Reserves the training in this folder for its own job, which Slurm is going to restart, for `ABSENCE` seconds."""
    training = read_json(folder / "training.json")
    if training.get("run") == str(folder.absolute()) and training.get("finished") is False:
        write_json(folder / "training.json", training | {"back_by": time.time() + ABSENCE})


@contextmanager
def marked(folder: Path, record: dict[str, Any]) -> Iterator[None]:
    """Writes `training.json`: not finished at the start of the block, finished at its end."""
    write_json(folder / "training.json", record | {"finished": False})
    yield
    write_json(folder / "training.json", record | {"finished": True})


def is_finished(run: Path, fingerprint: str) -> bool:
    training = read_json(run / "training.json")
    kept = in_run(run, "best") or in_run(run, "last")
    return training.get("fingerprint") == fingerprint and training.get("finished") is True and kept is not None


def continues_another(folder: Path, fingerprint: str) -> bool:
    """Whether this folder resumes a training of another shape, e.g. of fewer epochs; the result is of neither shape."""
    last = in_run(folder, "last")
    return last is not None and read_json(folder / "training.json").get("fingerprint") != fingerprint


def copy_interrupted(run: Path, folder: Path, fingerprint: str) -> None:
    """Copies checkpoints and metrics of the same training from the folder `run`, where it was interrupted."""
    if read_json(run / "training.json").get("fingerprint") != fingerprint or not in_run(run, "last"):
        return
    log.info("Resuming the training that was interrupted in %s", run)
    for path in sorted(run.glob("checkpoints/*.ckpt")):  # last.ckpt is copied last, as resuming needs it
        with replacing(folder / "checkpoints" / path.name) as part:
            shutil.copy(path, part)
    for path in run.glob("metrics*.csv"):
        shutil.copy(path, folder / f"metrics-of-{run.name}{path.stem.removeprefix('metrics')}.csv")


def decision_of_first(folder: Path) -> Path | None:
    """Waits for the decision of the job's first process in this attempt; that may take as long as another training."""
    while (training := read_json(folder / "training.json")).get("attempt") != attempt():
        failure = read_json(folder / "failure.json")
        if failure.get("attempt") == attempt():
            raise UserError(failure["error"])
        time.sleep(0.2)
    return Path(training["run"]) if training["finished"] else None


def attempt() -> str:
    """An id of this start of the job: the same in all its processes, another after a requeue."""
    get = os.environ.get
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid() if get("GROUP_WORLD_SIZE") == "1" else ""  # each node has its own parent process
        return f"torchrun {get('TORCHELASTIC_RUN_ID')} {launcher} {get('TORCHELASTIC_RESTART_COUNT')}"
    if processes_of_slurm() > 1:
        return f"slurm {get('SLURM_JOB_ID')} {get('SLURM_STEP_ID')} {get('SLURM_RESTART_COUNT', 0)}"
    return f"process {os.getpid() if is_first() else os.getppid()}"  # the first process starts the others
