"""From a name, a file or the folder of a run to a method with its weights.

A recipe says how a method is built, in plain values:

    {"model": {"_target_": "pmnet.PMNet", "norm": "batch"},
     "backbone": {"_target_": "pmnet.backbones.EfficientNetLiteBackbone", "weights": "imagenet"},
     "image_size": [384, 384]}

Checkpoints hold one; files of safetensors hold one in their metadata, as JSON under "pmnet".
"""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pmnet.backbones.base import Backbone
from pmnet.errors import CheckpointError, PMNetError, SettingError
from pmnet.files import read_file
from pmnet.methods.base import Method

LITE = {"_target_": "pmnet.backbones.EfficientNetLiteBackbone", "weights": "imagenet"}
SIZE = [384, 384]
FLOORS = {
    name: {"model": {"_target_": target}, "backbone": LITE, "image_size": SIZE}
    for name, target in {"prototype": "pmnet.Prototype", "nearest": "pmnet.Nearest"}.items()
}
SHIPPED = Path(__file__).parents[1] / "weights"
DEFAULT = "pmnet_lite"
NEEDS = {"backbone", "weights", "source", "sha256"}  # what is said of the backbone that the tensors were trained on
PREFIX = "network."  # of a method's tensors in checkpoints of trainings


class Built(NamedTuple):
    """A method with its weights, and how it was made.

    Attributes:
        method: in eval mode.
        recipe: see the module's docstring, with further facts: "name", and "needs", the backbone's provenance.
    """

    method: Method
    recipe: dict[str, Any]


def build(source: str | Path) -> Built:
    """Builds a method and loads its weights.

    Args:
        source: the folder of a run, a checkpoint, a .safetensors file, the name of a shipped head ("pmnet_lite"), or of
            a training-free method ("prototype", "nearest").

    Raises:
        SettingError: there is no such name, file or folder.
        WeightsError: a file is damaged, or the weights of the backbone are not here.
        CheckpointError: the file does not say how its method is built, or does not fit.
    """
    if source in FLOORS:
        return assembled(FLOORS[str(source)] | {"name": str(source)}, {})
    path = located(source)
    content, metadata = read_file(path)
    if path.suffix == ".safetensors":
        return from_metadata(path, content, metadata)
    recipe = content.get("recipe") or of_run(path)
    if not isinstance(recipe, dict) or not isinstance(content.get("backbone"), dict):
        raise CheckpointError(
            f"{path} does not say how its method is built. Use the checkpoint of a run that has ended, in its folder; "
            "for a file of a method's authors, call pmnet.methods.from_release(name, state_dict)."
        )
    check(recipe | {"needs": content["backbone"]}, path)
    tensors = content.get("state_dict")
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} is damaged, or another program wrote it: it holds no tensors.")
    state = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    name = path.parents[1].name if path.parent.name == "checkpoints" else path.stem
    return assembled(recipe | {"name": name, "needs": content["backbone"]}, state)


def from_metadata(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Built:
    """Builds the method that a safetensors file describes. Raises CheckpointError if it describes none."""
    try:
        recipe = json.loads(metadata["pmnet"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds tensors, but does not say of which method (metadata 'pmnet').") from error
    check(recipe, path)
    return assembled({"name": path.stem} | recipe, state)


def check(recipe: Any, path: Path) -> None:
    """Raises CheckpointError if a file's recipe does not say how a method is built."""
    entries = recipe if isinstance(recipe, dict) else {}
    sides, needs = entries.get("image_size"), entries.get("needs")
    if (
        not all(isinstance(entries.get(part), dict) for part in ("model", "backbone"))
        or not (isinstance(sides, (list, tuple)) and [type(side) for side in sides] == [int, int] and min(sides) > 0)
        or not (needs is None or (isinstance(needs, dict) and needs.keys() >= NEEDS))
    ):
        raise CheckpointError(
            f"{path} is damaged, or another program wrote it: it does not say how its method is built (metadata with "
            "model, backbone and image_size)."
        )


def located(source: str | Path) -> Path:
    """The file that a source means. Raises SettingError if there is none."""
    path = Path(source)
    shipped = SHIPPED / f"{source}.safetensors"
    if path.is_file():
        return path
    if path.is_dir():
        inside = path if path.name == "checkpoints" else path / "checkpoints"
        for name in ("best.ckpt", "last.ckpt"):
            if (inside / name).is_file():
                return inside / name
        raise SettingError(f"There is no checkpoints/best.ckpt or last.ckpt in {path}.")
    if shipped.is_file():
        return shipped
    names = [*FLOORS, *sorted(file.stem for file in SHIPPED.glob("*.safetensors") if is_head(file))]
    raise SettingError(
        f"There is no file, folder or method {str(source)!r}. Choose the folder of a run, a checkpoint, a .safetensors "
        f"file, or one of {', '.join(names)}."
    )


def is_head(path: Path) -> bool:
    return "pmnet" in read_file(path)[1]


def of_run(checkpoint: Path) -> dict[str, Any] | None:
    """The recipe in the results of the run that wrote a checkpoint, for checkpoints that hold none."""
    results = checkpoint.parents[1] / "results.json"
    if checkpoint.parent.name != "checkpoints" or not results.is_file():
        return None
    try:
        record = json.loads(results.read_text(encoding="utf-8"))
        parts = {name: record["config"][name] for name in ("model", "backbone")}
        return parts | {"image_size": record.get("training", {}).get("image_size") or SIZE}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def assembled(recipe: dict[str, Any], state: Mapping[str, Tensor]) -> Built:
    """Builds the method of a recipe and loads its tensors.

    Raises:
        CheckpointError: the tensors are not those of the method, or the backbone has other weights than it needs.
    """
    backbone = made(recipe["backbone"], Backbone)
    needs, have = recipe.get("needs"), backbone.provenance
    if needs and needs["sha256"] != have.sha256:
        raise CheckpointError(
            f"{recipe['name']} needs backbone {needs['backbone']} with weights '{needs['weights']}' "
            f"({needs['source']}, sha256 {needs['sha256'][:8]}), but those found are {have.source}, "
            f"sha256 {have.sha256[:8]}."
        )
    method = made(recipe["model"], Method, backbone).eval()
    own = method.state_dict()
    wanted = {name: tuple(own[name].shape) for name in method.saved()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != given:
        differ = sorted(k for k in wanted.keys() | given.keys() if wanted.get(k) != given.get(k))
        raise CheckpointError(
            f"{recipe['name']} does not fit {type(method).__name__}: {len(differ)} tensors differ, for example "
            f"'{differ[0]}': {given.get(differ[0], 'absent')} in the file, {wanted.get(differ[0], 'absent')} needed."
        )
    method.load_state_dict(own | dict(state))
    return Built(method, recipe | {"needs": have.as_dict()})


def made(config: Mapping[str, Any], kind: type, *arguments: Any) -> Any:
    """Builds a class of this package from a config with `_target_`.

    Raises:
        CheckpointError: it is not a `kind` of this package, or does not take these options.
    """
    # not "download": no file can start one
    options = {name: value for name, value in config.items() if not name.startswith("_") and name != "download"}
    target = str(config.get("_target_", ""))
    home, _, name = target.rpartition(".")
    try:
        if home.split(".")[0] != "pmnet":
            raise AttributeError
        built = getattr(import_module(home), name)
        if not issubclass(built, kind):
            raise AttributeError
    except (AttributeError, ImportError, TypeError) as error:
        raise CheckpointError(f"'{target}' is not a {kind.__name__.lower()} of this version of pmnet.") from error
    try:
        return built(*arguments, **options)
    except PMNetError:
        raise
    except Exception as error:  # a file can hold any option
        raise CheckpointError(f"{target} does not take these options: {error}.") from error
