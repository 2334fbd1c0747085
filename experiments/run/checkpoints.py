"""Checkpoints: which one a run starts from or tests, whether it matches, and how the files are written.

Each run has two files, `best.ckpt` and `last.ckpt`. They are written completely or not at all, and read without
unpickling objects.
"""

import itertools
import logging
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from datamodules import FewShotDataModule
from experiments.errors import UserError
from experiments.files import read_json
from experiments.run.processes import is_first
from pmnet.errors import CheckpointError, SettingError
from pmnet.files import check_size
from pmnet.methods import Head, Method, all_methods, from_release
from pmnet.training.module import check_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read.

    Attributes:
        path: its file.
        content: plain values and tensors.
    """

    path: Path
    content: dict[str, Any]

    @property
    def released(self) -> bool:
        """Whether it is from another program, such as that of a method's authors."""
        return not isinstance(self.content.get("backbone"), dict)

    @property
    def record(self) -> dict[str, Any]:
        """The setting of its training."""
        return self.content.get("record", {})

    @property
    def run(self) -> Path:
        """The folder of the run that trained it."""
        return self.path.absolute().parent.parent

    @property
    def val_miou(self) -> float:
        """The best validation mIoU in percent up to this checkpoint; NaN without validation."""
        states = [s for s in self.content.get("callbacks", {}).values() if s.get("monitor") == "val/miou"]
        best = states[0].get("best_model_score") if states else None
        return float("nan") if best is None else float(best)

    def check_network(self, network: Method) -> None:
        """Raises CheckpointError if it belongs to another backbone or network."""
        check_checkpoint(self.content, network)

    def check_training(self, record: dict[str, Any]) -> None:
        """Raises CheckpointError if the interrupted training is not the configured one."""
        differ = [
            f"{name} is {value} here, {self.record.get(name)} there"
            for name, value in record.items()
            if self.record.get(name) != value and name != "splits"  # a description; the lists have a hash
        ]
        if differ:
            raise CheckpointError(
                f"{self.path} belongs to another training: {differ[0]}. Choose another hydra.run.dir, or start a new "
                "training in this folder with resume=false."
            )

    def check_epochs(self, most: int | None) -> None:
        """Raises CheckpointError if it has trained more epochs than `trainer.max_epochs` allows."""
        if most and most > 0 and (epochs := self.content.get("epoch", 0)) > most:
            raise CheckpointError(
                f"{self.path} has trained {epochs} epochs, more than trainer.max_epochs={most}. Set trainer.max_epochs "
                f"above {epochs} to go on with it. To start a new training from its weights: pmnet export {self.path} "
                "--format safetensors --out FOLDER, then ckpt=FOLDER/model.safetensors."
            )

    def check_trained_on(self, data: FewShotDataModule) -> None:
        """Raises UserError if the target is another dataset and the training used other classes than configured."""
        trained = self.record
        if not data.same and (trained["dataset"], trained["base_classes"]) != (data.dataset.name, data.base_classes):
            raise UserError(
                f"The checkpoint was trained on {trained['dataset']}, {len(trained['base_classes'])} classes "
                f"({', '.join(trained['base_classes'][:5])}, ...), but dataset={data.dataset.name} fold={data.fold} "
                f"means {len(data.base_classes)} classes. Choose the dataset and fold that it was trained on."
            )


def lineage(record: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The record of a training, of the one whose weights it started from, and so on."""
    while record:
        yield record
        record = record.get("started_from")


# Which one


def to_start_from(ckpt: str | None, folder: Path, resume: bool) -> Checkpoint | None:
    """The checkpoint that a training starts from: that of an interrupted training in this folder, or else `ckpt`.

    Args:
        ckpt: a checkpoint, the folder of a run, or None.
        folder: this run's folder.
        resume: whether to resume; False renames the checkpoints of an earlier training in this folder.

    Raises:
        CheckpointError: `ckpt` does not exist, or the file cannot be read.
    """
    if not resume and is_first():
        put_aside(folder)
    start = first_readable(folder, "last", "previous", "best") if resume and in_run(folder, "last") else None
    if start is None and (path := given(ckpt, "last")):
        start = read(path)
    return start


def to_test(ckpt: str | None) -> Checkpoint:
    """The checkpoint that mode=test tests. Raises UserError or CheckpointError if there is none."""
    path = given(ckpt, "best")
    if path is None:
        raise UserError("mode=test needs a checkpoint: give ckpt=/path/to/best.ckpt or the folder of its run.")
    return read(path)


def trained_in(run: Path) -> Checkpoint:
    """The checkpoint of a finished training: the best one, or the last if it ended before its first validation.

    Raises:
        CheckpointError: the best one is damaged. Another one would give other numbers.
        UserError: there is none.
    """
    if best := in_run(run, "best"):
        try:
            return read(best)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} It was the best epoch, and the others have other scores. Train again with resume=false, or "
                f"test the last epoch with mode=test ckpt={best.with_stem('last')}."
            ) from error
    checkpoint = first_readable(run, "last", "previous")
    if checkpoint is None:
        raise UserError("The training ended within its first epoch: there is no checkpoint to test. Train longer.")
    return checkpoint


def in_run(run: Path, which: str) -> Path | None:
    """A run's own checkpoint, if it exists.

    Args:
        which: "best"; "last", or the one before it if the process was killed while it replaced that; or "previous".
    """
    names = ("last", "previous") if which == "last" else (which,)
    paths = (run / "checkpoints" / f"{name}.ckpt" for name in names)
    return next((path for path in paths if path.is_file()), None)


def first_readable(run: Path, *names: str) -> Checkpoint | None:
    """The first of a run's checkpoints that can be read; says which ones are damaged and what is used instead.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    damaged: list[CheckpointError] = []
    for path in (run / "checkpoints" / f"{name}.ckpt" for name in names):
        if not path.is_file():
            continue
        try:
            checkpoint = read(path)
        except CheckpointError as error:
            damaged.append(error)
            continue
        if damaged:
            epochs = checkpoint.content.get("epoch", -1) + 1
            log.warning("%s Using %s instead, saved in epoch %d.", damaged[0], path, epochs)
        return checkpoint
    if damaged:
        raise damaged[0]
    return None


def given(ckpt: str | None, which: str) -> Path | None:
    """The file `ckpt`, or the checkpoint "best" or "last" of the run folder `ckpt`; None without `ckpt`."""
    if ckpt is None:
        return None
    path = Path(ckpt).expanduser()
    if path.is_dir():
        path = training_folder(path) / "checkpoints" / f"{which}.ckpt"
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path.absolute()}. Check ckpt.")
    return path


def training_folder(run: Path) -> Path:
    """The folder of the run that trained what `run` tested: itself, or the run whose weights it reused."""
    return run if (run / "checkpoints").is_dir() else Path(read_json(run / "training.json").get("run", run))


def put_aside(folder: Path) -> None:
    """Renames the folder of a run's checkpoints, so that a new training does not mix with them."""
    if (folder / "checkpoints").is_dir():
        names = (f"checkpoints-before-{number}" for number in itertools.count(1))
        (folder / "checkpoints").rename(next(folder / name for name in names if not (folder / name).exists()))


# Checkpoints of the methods' authors


def load_released(checkpoint: Checkpoint, network: Method) -> None:
    """Loads a checkpoint of the method's authors into `network`.

    Raises:
        CheckpointError: it is of another method, of other options or of another backbone; the message says which.
    """
    path, name = checkpoint.path, next(n for n, kind in all_methods().items() if kind is type(network))
    content: Any = checkpoint.content
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} is not a checkpoint: it holds no dictionary of tensors. Check ckpt.")
    released = release_of(name, content)
    if isinstance(released, CheckpointError):
        others = [n for n in all_methods() if not isinstance(release_of(n, content), CheckpointError)]
        whose = f"It fits model={' or model='.join(others)}." if others else "It fits no other method either."
        raise CheckpointError(f"{path} does not fit model={name}. {released} {whose}") from released
    if isinstance(released, Method):  # its backbone was trained, and is in the file
        state, network.backbone.provenance = released.state_dict(), released.backbone.provenance
    else:
        state = {f"head.{key}": value for key, value in released.head.state_dict().items()}
    own = network.state_dict()
    differ = sorted(k for k in own if k.startswith("head.") and k not in state)
    differ += sorted(k for k, v in state.items() if k not in own or own[k].shape != v.shape)
    if differ:
        raise CheckpointError(
            f"{path} fits {type(network).__name__} with other options or another backbone: '{differ[0]}' is "
            f"{tuple(state[differ[0]].shape) if differ[0] in state else 'absent'} in the file, "
            f"{tuple(own[differ[0]].shape) if differ[0] in own else 'absent'} here. Choose model.<option> and backbone."
        )
    network.load_state_dict(state, strict=False)
    if not isinstance(released, Method):
        check_trunk(path, content, network, name)


def release_of(name: str, state: dict[str, Tensor]) -> Head | Method | CheckpointError:
    """What a method's `from_release` makes of the tensors, or why it refuses them."""
    try:
        return from_release(name, state)
    except SettingError as error:  # a method without published weights
        return CheckpointError(str(error))
    except CheckpointError as error:
        return error


def check_trunk(path: Path, state: dict[str, Tensor], network: Method, name: str) -> None:
    """Raises CheckpointError if the file contains another backbone than that of `network`; warns if it has none."""
    own, made = network.backbone.trunk.state_dict(), network.backbone.provenance
    probe = next((key for key in own if key.startswith("layer1.") and key.endswith("weight")), "")
    prefix = next((key.removesuffix(probe) for key in state if probe and key.endswith(probe)), None)
    known = {} if prefix is None else {key: state[prefix + key] for key in own if prefix + key in state}
    differ = [key for key, value in known.items() if value.is_floating_point() and not same(value, own[key])]
    card = f"docs/methods/{name}.md"
    if differ:
        raise CheckpointError(
            f"{path} contains another backbone than {made.backbone} with weights '{made.weights}': {len(differ)} of "
            f"{len(known)} tensors differ (for example '{differ[0]}'). Choose the authors' backbone, see {card}, or "
            f"the one in the file: backbone.weights={path}."
        )
    if not known and not network.learned_layers:
        log.warning(
            "%s contains no backbone to compare with %s, weights '%s'. Make sure that it is the authors', see %s.",
            *(path, made.backbone, made.weights, card),
        )


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b.cpu())


# Files


def read(path: Path) -> Checkpoint:
    """Raises CheckpointError if the file is damaged or contains anything but tensors and plain values."""
    try:
        check_size(path)
        check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or malicious file can raise anything
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it is damaged, or it contains more than tensors and plain values "
            f"({type(error).__name__}). Nothing in it was executed."
        ) from error
    content = content if isinstance(content, dict) else {}
    if {"backbone", "record"} & content.keys() and not is_sound(content):
        raise CheckpointError(f"{path} is damaged, or another program wrote it: its parts have unexpected types.")
    return Checkpoint(path, content)


def is_sound(content: dict[Any, Any]) -> bool:
    """Whether the parts that a run uses, as far as they are there, have the types that a run saves."""
    kinds = {"state_dict": dict, "record": dict, "backbone": dict, "callbacks": dict, "epoch": int, "global_step": int}
    state, _, backbone, states, *_ = parts = [content.get(name, kind()) for name, kind in kinds.items()]
    return (
        all(isinstance(part, kind) for part, kind in zip(parts, kinds.values(), strict=True))
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items())
        and all(isinstance(text, str) for name, text in backbone.items() if name != "trained_on")
        and all(isinstance(state, dict) and is_score(state.get("best_model_score")) for state in states.values())
    )


def is_score(value: Any) -> bool:
    return value is None or isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def check_sums(path: Path) -> None:
    """Raises BadZipFile if a bit of the file was changed: torch.load would take damaged weights for whole ones."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if (damaged := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")


def callbacks(folder: Path) -> list[ModelCheckpoint]:
    """Callbacks that keep `checkpoints/best.ckpt`, by validation mIoU, and `checkpoints/last.ckpt`."""
    common: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    best = BestCheckpoint(filename="best", monitor="val/miou", mode="max", **common)
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common)
    return [best, last]


class BestCheckpoint(ModelCheckpoint):
    """Keeps the score of `best.ckpt` when a training is resumed in another folder that has a copy of the file."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath)) / "best.ckpt"
        if here.exists() and state_dict["best_model_path"]:
            path, score = str(here), state_dict["best_model_score"]
            state_dict = state_dict | {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            state_dict["best_k_models"] = {path: score}
        super().load_state_dict(state_dict)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a new file and then replaces the old one, so that a full disk or a kill cannot damage the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.stem == "last" and path.exists():  # kept, so that one damaged file does not cost a training
                os.replace(path, path.with_stem("previous"))
            os.replace(part, path)
        except SystemExit:  # asked to end in the middle of it
            part.unlink(missing_ok=True)
            raise
        except (OSError, RuntimeError) as error:  # torch.save turns what stops a write into a RuntimeError
            part.unlink(missing_ok=True)
            if isinstance(error.__context__, SystemExit):
                raise error.__context__ from None
            if "killed by signal" in str(error):  # of a worker, told at any moment
                raise
            kept = f"The previous checkpoint is kept: {path}." if path.exists() else "There is no earlier one."
            raise CheckpointError(
                f"Could not write the checkpoint {path}: {error}. Is the disk full? {kept} Free some space and run the "
                "same command in the same folder to resume."
            ) from error
