"""Checkpoints: which one a run starts from or tests, whether it fits, and how the files are written.

Two files a run, `best.ckpt` and `last.ckpt`, written whole or not at all, and read without unpickling objects.
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import FewShotDataModule
from experiments.errors import UserError
from experiments.files import read_json
from experiments.run.processes import is_first
from pmnet.errors import CheckpointError
from pmnet.methods import Method
from pmnet.training.module import check_checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and read.

    Attributes:
        path: of its file.
        content: plain values and tensors.
    """

    path: Path
    content: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """What its training was made of."""
        return self.content.get("record", {})

    @property
    def run(self) -> Path:
        """The folder of the run that trained it."""
        return self.path.absolute().parent.parent

    @property
    def val_miou(self) -> float:
        """The best validation mIoU in percent up to this checkpoint; NaN without a validation."""
        states = [s for s in self.content["callbacks"].values() if s.get("monitor") == "val/miou"]
        best = states[0]["best_model_score"] if states else None
        return float("nan") if best is None else float(best)

    def check_network(self, network: Method) -> None:
        """Raises CheckpointError where it is of another backbone or another network."""
        check_checkpoint(self.content, network)

    def check_training(self, record: dict[str, Any]) -> None:
        """Raises CheckpointError where an interrupted training is not the one that the config asks for."""
        differ = [
            f"{name} is {value}, there {self.record.get(name)}"
            for name, value in record.items()
            if self.record.get(name) != value and name != "splits"  # a description; the lists have their hash
        ]
        if differ:
            raise CheckpointError(
                f"{self.path} is of another training: {differ[0]}. Choose another hydra.run.dir, or start a new "
                "training in this one with resume=false."
            )

    def check_trained_on(self, data: FewShotDataModule) -> None:
        """Raises UserError where it is tested on another dataset and was not trained on the one in the config."""
        trained = self.record
        if not data.same and (trained["dataset"], trained["base_classes"]) != (data.dataset.name, data.base_classes):
            raise UserError(
                f"The checkpoint was trained on {trained['dataset']}, {len(trained['base_classes'])} classes "
                f"({', '.join(trained['base_classes'][:5])}, ...), but dataset={data.dataset.name} fold={data.fold} "
                f"stands for {len(data.base_classes)} classes. Choose the dataset and the fold that it was trained on."
            )


# Which one


def to_start_from(ckpt: str | None, folder: Path, resume: bool) -> Checkpoint | None:
    """The checkpoint that a training starts from: of the interrupted training in this folder, else `ckpt`, if any.

    Args:
        resume: False puts the checkpoints of an earlier training in this folder aside.

    Raises:
        CheckpointError: `ckpt` does not exist, or the file cannot be read.
    """
    if not resume and is_first():
        put_aside(folder)
    path = (in_run(folder, "last") if resume else None) or given(ckpt, "last")
    return read(path) if path else None


def to_test(ckpt: str | None) -> Checkpoint:
    """The checkpoint that mode=test tests. Raises UserError or CheckpointError where there is none."""
    path = given(ckpt, "best")
    if path is None:
        raise UserError("mode=test needs the checkpoint to test: ckpt=/path/to/best.ckpt, or its run's folder.")
    return read(path)


def trained_in(run: Path) -> Checkpoint:
    """What a finished training left: its best epoch, or the last state where it ended before its first validation."""
    path = in_run(run, "best") or in_run(run, "last")
    if path is None:
        raise UserError("The training ended before its first epoch did: there is no checkpoint to test.")
    return read(path)


def in_run(run: Path, which: str) -> Path | None:
    """A run's own checkpoint "best" or "last", if it exists."""
    path = run / "checkpoints" / f"{which}.ckpt"
    return path if path.is_file() else None


def given(ckpt: str | None, which: str) -> Path | None:
    """The file that `ckpt` names: itself, or "best" or "last" of the run folder `ckpt`."""
    if ckpt is None:
        return None
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
    """Renames a folder's checkpoints, so that they do not mix with those of a new training."""
    if (folder / "checkpoints").is_dir():
        names = (f"checkpoints-before-{number}" for number in itertools.count(1))
        (folder / "checkpoints").rename(next(folder / name for name in names if not (folder / name).exists()))


# Files


def read(path: Path) -> Checkpoint:
    """Raises CheckpointError where the file is damaged or holds anything but tensors and plain values."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or malicious file makes the reader raise
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it is damaged, or it holds more than tensors and plain values "
            f"({type(error).__name__}). Nothing in it was executed."
        ) from error
    return Checkpoint(path, content if isinstance(content, dict) else {})


def callbacks(folder: Path) -> list[ModelCheckpoint]:
    """Keep `checkpoints/best.ckpt`, of the best validation mIoU, and `checkpoints/last.ckpt`."""
    common: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    best = BestCheckpoint(filename="best", monitor="val/miou", mode="max", **common)
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common)
    return [best, last]


class BestCheckpoint(ModelCheckpoint):
    """Keeps the score of its `best.ckpt` also where a training is resumed in another folder, with a copy of it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath)) / "best.ckpt"
        if here.exists() and state_dict["best_model_path"]:
            path, score = str(here), state_dict["best_model_score"]
            state_dict = state_dict | {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            state_dict["best_k_models"] = {path: score}
        super().load_state_dict(state_dict)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a new file and then replaces the old one, so that a full disk or a kill leaves the old one."""

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
                f"Could not write the checkpoint {path}: {error}. Is the disk full? {kept} Free some space and start "
                "the same command in the same folder to resume from there."
            ) from error
