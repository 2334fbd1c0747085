"""Class files: a method, and what it was shown of some classes, in one .safetensors file.

The tensors are those of the method, and of each class the supports' images and masks at the network's size. The
metadata's "pmnet" holds the recipe, see `recipe.py`, with the classes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor

from pmnet.errors import CheckpointError, SettingError, WeightsError
from pmnet.files import read_file
from pmnet.replacing import replacing
from pmnet.segment.presence import Presence
from pmnet.segment.recipe import Built, assembled
from pmnet.version import VERSION

if TYPE_CHECKING:
    from pmnet.segment.segmenter import Shown


def is_one(source: str | Path) -> bool:
    """Whether a source is the path of a class file."""
    path = Path(source)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return "classes" in described(path)


def described(path: Path) -> dict[str, Any]:
    """What the metadata of a safetensors file say; empty if they say nothing of pmnet.

    Raises:
        WeightsError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            recipe = json.loads((file.metadata() or {}).get("pmnet", "{}"))
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise WeightsError(f"{path} is not a readable file of weights: {error}") from error
    return recipe if isinstance(recipe, dict) else {}


def check_name(path: Path) -> None:
    """Raises SettingError if a file of this name could not be read back."""
    if path.suffix != ".safetensors":
        raise SettingError(f"The name of a class file ends in .safetensors; choose {path.with_suffix('.safetensors')}.")


def write(path: Path, built: Built, keep_aspect: bool, shown: Mapping[str, "Shown"]) -> None:
    """Writes a class file; see `Segmenter.save`."""
    state = built.method.state_dict()
    tensors = {f"method.{name}": state[name].cpu().contiguous() for name in built.method.saved()}
    classes = []
    for number, (name, each) in enumerate(shown.items()):
        classes.append({"name": name} | noted(each, f"class.{number}", tensors))
        if each.close:
            classes[-1]["close"] = noted(each.close, f"class.{number}.close", tensors)
    recipe = built.recipe | {"classes": classes, "keep_aspect": keep_aspect, "version": VERSION}
    with replacing(path) as part:  # save_file would hide the file from other users
        part.write_bytes(safetensors.torch.save(tensors, {"pmnet": json.dumps(recipe)}))


def noted(shown: "Shown", prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Adds the tensors of what was shown; returns its plain values."""
    tensors |= {f"{prefix}.images": shown.images, f"{prefix}.masks": shown.masks}
    presence = asdict(shown.presence) if shown.presence else None
    return {"side": shown.side, "negatives": shown.negatives, "presence": presence}


def parts(noted: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `Shown` that `noted` wrote; those of its `close` too."""
    found = {
        "images": tensors[f"{prefix}.images"],
        "masks": tensors[f"{prefix}.masks"],
        "side": int(noted["side"]),
        "negatives": int(noted["negatives"]),
        "presence": Presence(**noted["presence"]) if noted["presence"] else None,
    }
    return found | ({"close": parts(noted["close"], f"{prefix}.close", tensors)} if "close" in noted else {})


def read(path: Path) -> tuple[Built, bool, dict[str, dict[str, Any]]]:
    """The method of a class file, whether it keeps the aspect, and by class the arguments of `Shown`.

    Raises:
        WeightsError: the file is damaged, or the backbone's weights are not here.
        CheckpointError: the parts do not fit together.
    """
    tensors, recipe = read_file(path)[0], described(path)
    try:
        classes = recipe.pop("classes")
        state = {n.removeprefix("method."): t for n, t in tensors.items() if n.startswith("method.")}
        shown = {each["name"]: parts(each, f"class.{number}", tensors) for number, each in enumerate(classes)}
        built = assembled(recipe, state)
        sides = list(recipe["image_size"])
        every = [*shown.values(), *(each["close"] for each in shown.values() if "close" in each)]
        if any([*each["images"].shape[-2:], *each["masks"].shape[-2:]] != sides * 2 for each in every):
            raise ValueError("the supports have other sides than the network")
        if any(not 0 <= each["negatives"] < len(each["images"]) for each in every):
            raise ValueError("a class has no supports")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged, or another program wrote it: {error}.") from error
    return built, bool(recipe.get("keep_aspect", False)), shown
