"""Heads in .safetensors files, such as the shipped one: `ckpt=pmnet_lite` tests it, or fine-tunes from its weights."""

import json
from pathlib import Path
from typing import Any

from experiments.run.checkpoints import Checkpoint
from pmnet.errors import CheckpointError
from pmnet.files import read_file
from pmnet.methods import Method
from pmnet.segment.recipe import PREFIX, SHIPPED
from pmnet.training.module import check_checkpoint


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


def started_from(ckpt: str | None) -> dict[str, Any]:
    """The entry `started_from` of a training's record: what the head had learned that it starts from, if it has one."""
    path = named(ckpt)
    return {"started_from": {"head": path.stem} | training_of(recipe_in(path))} if path else {}


def recipe_in(path: Path) -> dict[str, Any]:
    """What a file says of its head: how it is built, and how it was trained."""
    _, metadata = read_file(path)
    try:
        return dict(json.loads(metadata["pmnet"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say of which method its tensors are (metadata 'pmnet').") from error


def training_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """How a head was trained, if its file says it soundly; else nothing."""
    training = recipe.get("training")
    if not isinstance(training, dict):
        return {}
    classes, dataset = training.get("base_classes"), training.get("dataset")
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return training if names and isinstance(dataset, str) else {}
