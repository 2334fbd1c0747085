"""YOLO's polygons: one text file per image, with a line `class x1 y1 x2 y2 ...` per object, in shares of the sides.

root/images/NAME.jpg      and root/labels/NAME.txt, both with the same sub-folders; or
root/NAME.jpg             and NAME.txt beside it; an image without a text file shows no class
root/data.yaml            names: a list, or number -> name; or classes.txt or obj.names, one name per line
"""

import os
from collections.abc import Callable, Sequence, Set
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from pmnet.errors import SettingError
from pmnet.segment.formats.annotated import Annotated, lines_of, name_of, size_of, valid
from pmnet.segment.formats.raster import Rings, painted

NAMES = ("data.yaml", "dataset.yaml", "data.yml", "classes.txt", "obj.names", "classes.names")
YAML = (".yaml", ".yml")


def label_of(image: Path, holds: Callable[[Path], Set[str]]) -> Path | None:
    """The text file of an image: beside it, or in labels/ where the image is in images/; None if there is none.

    Args:
        holds: the names in a folder.
    """
    beside = image.with_suffix(".txt")
    parts = list(beside.parts)
    at = [number for number, part in enumerate(parts) if part.lower() == "images"]
    if at:
        parts[at[-1]] = "labels"
    return next((path for path in (beside, Path(*parts)) if path.name in holds(path.parent)), None)


def pairs(images: Sequence[Path]) -> dict[Path, Path | None]:
    """Image -> its text file; empty if none of the images has one with an object in it."""
    holds = cache(listed)
    found = {image: label_of(image, holds) for image in images}
    labels = [path for path in found.values() if path]
    return found if any(holds_objects(path) for path in labels[:100]) else {}


def listed(folder: Path) -> set[str]:
    """The names of a folder's files; none if there is no such folder."""
    return {entry.name for entry in os.scandir(folder) if entry.is_file()} if folder.is_dir() else set()


def holds_objects(path: Path) -> bool:
    """Whether a text file begins with a line of numbers, the first of which is a whole one."""
    with path.open(encoding="utf-8", errors="replace") as file:
        words = file.readline(4096).split()
    try:
        return len(words) >= 5 and int(words[0]) >= 0 and bool([float(word) for word in words[1:-1]])
    except ValueError:
        return False


def read(root: Path, found: dict[Path, Path | None]) -> list[Annotated]:
    """The images of `pairs`. Raises SettingError if there are no names of the classes."""
    classes = class_names(root, {label.parent for label in found.values() if label})
    return [
        Annotated(
            name_of(image, root),
            image,
            label or image,
            partial(mask_of, image, label, len(classes)),
            classes,
        )
        for image, label in found.items()
    ]


def class_names(root: Path, labels: set[Path]) -> tuple[str, ...]:
    """The names in the first file of NAMES, of the folder, of the one above or of those of the labels; or in the only
    yaml file of the folder.

    Raises:
        SettingError: there is no such file, or it is invalid.
    """
    named = (folder / name for folder in (root, root.parent, *sorted(labels)) for name in NAMES)
    path = next((path for path in named if path.is_file()), None)
    if path is None and len(others := [path for path in root.iterdir() if path.suffix in YAML]) == 1:
        path = others[0]
    if path is None:
        raise SettingError(
            f"{root} has YOLO labels, but none of {', '.join(NAMES[:5])} names the classes. Add classes.txt with one "
            "name per line; the first line names class 0."
        )
    names = yaml_names(path) if path.suffix in YAML else lines_of(path)
    if not 0 < len(names) < 255 or len(set(names)) < len(names) or "" in names:
        raise SettingError(f"{path} must name 1 to 254 different classes.")
    return tuple(names)


def yaml_names(path: Path) -> list[str]:
    import yaml  # type: ignore[import-untyped]  # only here, as few folders need it

    with valid(path, "the list of names"):
        try:
            names: Any = yaml.safe_load(path.read_text(encoding="utf-8-sig"))["names"]
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
        if isinstance(names, dict):
            if sorted(names) != list(range(len(names))):
                raise ValueError("the numbers of the classes are not 0, 1, 2, ...")
            names = [names[number] for number in range(len(names))]
        return [str(name) for name in names]


def mask_of(image: Path, label: Path | None, classes: int) -> np.ndarray:
    height, width = size = size_of(image)
    if label is None:
        return np.zeros(size, np.uint8)
    shapes = []
    for number, line in enumerate(lines_of(label), start=1):
        words = line.split()
        with valid(label, f"line {number}"):
            if not words:
                continue
            if len(words) == 5:
                raise ValueError("it is a box, `class x y width height`. Export polygons: `class x1 y1 x2 y2 ...`")
            class_id, points = int(words[0]), np.array(words[1:], np.float64)
            if not 0 <= class_id < classes:
                raise ValueError(f"class {class_id} has no name; the names are those of 0 to {classes - 1}")
            if len(points) % 2 or len(points) < 6:
                raise ValueError(f"it has {len(points)} numbers after the class; a polygon has 6, 8, 10, ...")
            if not (np.abs(points - 0.5) <= 0.51).all():
                raise ValueError("a coordinate is not between 0 and 1; they are shares of the image's sides")
            shapes.append((class_id + 1, Rings([points.reshape(-1, 2) * (width, height)])))
    return painted(size, shapes)
