"""Heads in .safetensors files, such as the shipped one: `ckpt=pmnet_lite` tests it, or fine-tunes from its weights."""

import json
from pathlib import Path
from typing import Any

from experiments.run.checkpoints import Checkpoint, lineage
from pmnet.errors import CheckpointError
from pmnet.files import file_hash, read_file
from pmnet.methods import Method
from pmnet.segment.recipe import PREFIX, SHIPPED
from pmnet.training.module import check_checkpoint

KINDS: dict[str, type] = dict.fromkeys(("dataset", "splits", "novel_pixels"), str)
KINDS |= dict.fromkeys(("base_classes", "image_size"), list) | {"started_from": dict}
KINDS |= dict.fromkeys(("images", "train_shot", "batch_size", "seed", "steps", "epochs"), int)


def named(ckpt: str | None) -> Path | None:
    """The file that `ckpt` means: the name of a shipped head, or a .safetensors file; None if it means neither."""
    path = Path(ckpt or "").expanduser()
    if path.suffix == ".safetensors":
        return path
    shipped = SHIPPED / f"{ckpt}.safetensors"
    return shipped if shipped.is_file() and not path.exists() else None


def load(path: Path, network: Method) -> Checkpoint:
    """Loads a head into `network`.

    Returns:
        What the results say of it.

    Raises:
        WeightsError: the file is missing or damaged.
        CheckpointError: it does not say what it is, or is of another network or backbone.
    """
    state, _ = read_file(path)
    recipe = recipe_in(path)
    tensors = {PREFIX + name: value for name, value in state.items()}
    check_checkpoint({"backbone": recipe.get("needs"), "state_dict": tensors}, network)
    network.load_state_dict(state, strict=False)
    return Checkpoint(path, {"by": "this project", "record": training_of(recipe)})


def started_from(ckpt: str | None, start: Checkpoint | None, folder: Path) -> dict[str, Any]:
    """The entry `started_from` of a training's record: what its first weights were trained on; empty if nothing.

    Args:
        ckpt: a head or a checkpoint to start from, or None.
        start: the checkpoint to start from, if it is no head.
        folder: the run's own; an interrupted training keeps its entry.
    """
    if start and start.run == folder.absolute():
        return {name: entry for name, entry in start.record.items() if name == "started_from"}
    path, earlier = (start.path, start.record) if start else (named(ckpt), {})
    if path is None:
        return {}
    if start is None:
        earlier = training_of(recipe_in(path))
    return {"started_from": earlier | {"file": path.name, "sha256": file_hash(path)}}


def recipe_in(path: Path) -> dict[str, Any]:
    """What a file says of its head: how it is built, and how it was trained."""
    _, metadata = read_file(path)
    try:
        return dict(json.loads(metadata["pmnet"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say of which method its tensors are (metadata 'pmnet').") from error


def training_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """How a head was trained, and what it started from, if its file says it soundly; else nothing."""
    training = recipe.get("training")
    if not isinstance(training, dict) or not all(map(is_sound, lineage(training))):
        return {}
    return training


def is_sound(record: Any) -> bool:
    """Whether a record names its dataset and classes, and its entries have the types that a run writes."""
    if not isinstance(record, dict) or not {"dataset", "base_classes"} <= record.keys():
        return False
    classes = record["base_classes"]
    known = all(isinstance(record[name], kind) for name, kind in KINDS.items() if name in record)
    return known and all(isinstance(name, str) for name in classes)
