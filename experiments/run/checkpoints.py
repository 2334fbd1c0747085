"""Checkpoints: two files a run, written whole or not at all, read without unpickling objects."""

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from experiments.files import read_json
from pmnet.errors import CheckpointError


def checkpoint_callbacks(folder: Path) -> list[ModelCheckpoint]:
    """Keeps `checkpoints/best.ckpt`, of the best validation mIoU, and `checkpoints/last.ckpt`."""
    common: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    best = BestCheckpoint(filename="best", monitor="val/miou", mode="max", **common)
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common)
    return [best, last]


class BestCheckpoint(ModelCheckpoint):
    """Knows the score of its `best.ckpt` also where the training goes on in another folder, with a copy of it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath)) / "best.ckpt"
        if here.exists() and state_dict["best_model_path"]:
            path, score = str(here), state_dict["best_model_score"]
            state_dict = state_dict | {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            state_dict["best_k_models"] = {path: score}
        super().load_state_dict(state_dict)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes beside the old file and then takes its place, so that a full disk or a kill leaves the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
            part.unlink(missing_ok=True)
            kept = f"The checkpoint before it is kept: {path}." if path.exists() else "None was written before it."
            raise CheckpointError(
                f"Could not write the checkpoint {path}: {error}. Is the disk full? {kept} "
                "Make room and start again in the same folder to go on from there."
            ) from error


def start_of_training(ckpt: str | None, folder: Path, resume: bool) -> Path | None:
    """What to go on from: this folder's interrupted training before `ckpt`, which began it."""
    own = find_checkpoint(None, folder, "last") if resume else None
    return own or find_checkpoint(ckpt, None, "last")


def find_checkpoint(ckpt: str | None, folder: Path | None, which: str) -> Path | None:
    """The checkpoint to read: the file `ckpt`, the one in the run folder `ckpt`, or the one in `folder`, if any.

    Args:
        which: "best" or "last", where a folder is given.

    Raises:
        CheckpointError: `ckpt` is given and not there.
    """
    if ckpt is None:
        path = folder / "checkpoints" / f"{which}.ckpt" if folder else None
        return path if path and path.is_file() else None
    path = Path(ckpt).expanduser()
    if path.is_dir():
        path = training_folder(path) / "checkpoints" / f"{which}.ckpt"
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path.absolute()}: check ckpt.")
    return path


def training_folder(run: Path) -> Path:
    """Where the weights that a run tested were trained: its own folder, or that of the run it shares them with."""
    return run if (run / "checkpoints").is_dir() else Path(read_json(run / "training.json").get("run", run))


def put_aside(folder: Path) -> None:
    """Renames a run's checkpoints, which are not those of its training any more."""
    if (folder / "checkpoints").is_dir():
        names = (f"checkpoints-before-{number}" for number in itertools.count(1))
        (folder / "checkpoints").rename(next(folder / name for name in names if not (folder / name).exists()))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's plain values and tensors. Raises CheckpointError where it is damaged or unsafe."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or malicious file makes the reader raise
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: damaged, or it holds more than tensors and plain values "
            f"({type(error).__name__}). It was not run."
        ) from error
    return checkpoint if isinstance(checkpoint, dict) else {}


def check_same_training(path: Path, checkpoint: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises CheckpointError where an interrupted training is not the one that is asked for."""
    saved = checkpoint.get("record", {})
    differ = [f"{k} is {record[k]}, there {saved.get(k)}" for k in record if saved.get(k) != record[k]]
    if differ:
        raise CheckpointError(
            f"{path} is of another training: {differ[0]}. Choose another hydra.run.dir, "
            "or start afresh in this one with resume=false."
        )
