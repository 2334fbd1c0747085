"""Reads images with annotations as people's tools write them. The format is detected by content.

| format | module |
| --- | --- |
| one mask for all classes: index masks, VOC's palette, colours with a label map, black and white | `masks.py` |
| one folder per class, with black and white masks | `masks.py` |
| COCO json: polygons and run lengths | `coco.py` |
| labelme json | `labelme.py` |
| YOLO polygons | `yolo.py` |

Masks are made when they are asked for; only json files and lists of names are read at once.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from pmnet.errors import SettingError
from pmnet.segment.formats import coco, labelme, masks, yolo
from pmnet.segment.formats.annotated import Annotated, Embedded, valid
from pmnet.segment.formats.pairs import (
    NAMES,
    image_files,
    is_image,
    mask_folders,
    pairs_by_class,
    pairs_of_folders,
    pairs_of_one,
    walk,
)
from pmnet.segment.images import IGNORE

SPLITS = {"train", "val", "valid", "validation", "test"}
UNDERSTOOD = (
    "Known formats: images/ and masks/ (or JPEGImages/ and SegmentationClass/) with index masks and classes.txt, with "
    "masks in colours and labelmap.txt, or with black and white masks; one folder per class; COCO json; labelme json; "
    f"YOLO polygons with data.yaml or classes.txt. {NAMES}"
)
Support = tuple[Path | Image.Image, np.ndarray]


def read_folder(folder: str | Path, count: Callable[[Path], np.ndarray] = masks.counted) -> list[Annotated]:
    """The images of a folder and their lazy index masks, in any format of the list above.

    Args:
        folder: path of the folder.
        count: how many pixels of a mask's file have each value, (256,); for whoever keeps these numbers.

    Returns:
        The images, sorted by name within the format's files. All share the same `classes`.

    Raises:
        SettingError: the format is unknown, the folder holds several, or a file is invalid.
        ImageError: a mask cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     (Path(folder) / "cat").mkdir()
        ...     Image.new("RGB", (64, 48)).save(f"{folder}/cat/1.jpg")
        ...     Image.new("L", (64, 48), 255).save(f"{folder}/cat/1.png")
        ...     (image,) = read_folder(folder)
        ...     mask = image.masks()
        >>> image.name, image.classes, mask.shape, mask.max()
        ('cat/1', ('cat',), (48, 64), np.uint8(1))
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise SettingError(f"There is no folder {root.absolute()}.")
    readers = readers_of(root, count)
    if len(readers) > 1:
        raise SettingError(
            f"{root.absolute()} holds annotations in several formats: {' and '.join(readers)}. Keep one of them. "
            f"{UNDERSTOOD}"
        )
    found = next(iter(readers.values()))() if readers else by_class(root)
    if not found:
        raise SettingError(f"{root.absolute()} holds no annotated images: {contents(root)}. {UNDERSTOOD}")
    name, times = Counter(each.name for each in found).most_common(1)[0]
    if times > 1:
        first, second = [each for each in found if each.name == name][:2]
        raise SettingError(
            f"The image {name} occurs twice: {first.image} in {first.source}, {second.image} in {second.source}. "
            "Remove one of them."
        )
    return found


def readers_of(root: Path, count: Callable[[Path], np.ndarray]) -> dict[str, Callable[[], list[Annotated]]]:
    """What a folder holds, in words -> its reader. Folders per class are not among them."""
    files = walk(root)
    images = [path for path in files if is_image(path)]
    documents = {path: parsed(path) for path in files if path.suffix.lower() == ".json"}
    of_coco = {path: content for path, content in documents.items() if coco.is_one(content)}
    of_labelme = {path: content for path, content in documents.items() if labelme.is_one(content)}
    readers: dict[str, Callable[[], list[Annotated]]] = {}
    by_file_name = defaultdict[str, list[Path]](list)
    for path in images:
        by_file_name[path.name].append(path)
    if of_coco:
        readers[f"COCO json ({named(of_coco, root)})"] = partial(coco.read, root, of_coco, by_file_name)
    if of_labelme:
        readers[f"labelme json ({named(of_labelme, root)})"] = partial(labelme.read, root, of_labelme, by_file_name)
    if labels := yolo.pairs(images):
        readers[f"YOLO labels ({named([p for p in labels.values() if p], root)})"] = partial(yolo.read, root, labels)
    if (folders := mask_folders(root)) is not None:
        words = f"masks ({folders[1].name}/)"
        readers[words] = lambda: masks.read_indexed({root: pairs_of_folders(*folders)}, root, count)
    elif (splits := splits_of(root)) and not readers:
        words = f"masks ({', '.join(f'{split.name}/' for split in splits)})"
        readers[words] = lambda: masks.read_indexed({split: together(split) for split in splits}, root, count)
    elif not readers and image_files(root) and not any(image_files(p) for p in root.iterdir() if is_other(p)):
        readers["masks"] = lambda: masks.read_indexed({root: pairs_of_one(root)}, root, count)
    return readers


def is_other(path: Path) -> bool:
    """Whether a path is a folder that may hold a class."""
    return path.is_dir() and not path.name.startswith(".") and path.name != "masks"


def splits_of(root: Path) -> list[Path]:
    """The folders train/, valid/, ... of a folder that holds nothing else, each with masks and the names of classes."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not all(p.name.lower() in SPLITS for p in folders):
        return []
    return folders if all(mask_folders(p) or masks.legend_of(p) for p in folders) else []


def together(split: Path) -> dict[str, Any]:
    """The pairs of train/, valid/ or test/."""
    folders = mask_folders(split)
    return pairs_of_folders(*folders) if folders else pairs_of_one(split)


def by_class(root: Path) -> list[Annotated]:
    """The images of folders per class."""
    pairs = pairs_by_class(root)
    classes = tuple(sorted({name.split("/")[0] for name in pairs}))
    if len(classes) >= IGNORE:
        raise SettingError(f"{root} holds {len(classes)} classes; an index mask holds at most {IGNORE - 1}.")
    value = {name: number for number, name in enumerate(classes, start=1)}
    return [
        Annotated(name, pair.image, pair.mask, partial(masks.of_class, pair.mask, value[name.split("/")[0]]), classes)
        for name, pair in pairs.items()
    ]


def parsed(path: Path) -> Any:
    """The contents of a json file, of which COCO's and labelme's parts are made compact while it is parsed."""
    with valid(path, "the json file"):
        return json.loads(path.read_bytes(), object_hook=lambda entry: compact(entry))


def compact(entry: dict[str, Any]) -> Any:
    return labelme.compact(entry) if "points" in entry or "shapes" in entry else coco.compact(entry)


def named(files: Sequence[Path] | dict[Path, Any], root: Path) -> str:
    """The first of some files, and how many more there are."""
    first, *others = files
    return f"{first.relative_to(root)}" + (f" and {len(others)} more" if others else "")


def contents(root: Path) -> str:
    """What a folder holds instead, in a few words."""
    counts = Counter(path.suffix.lower() or "without suffix" for path in walk(root))
    return ", ".join(f"{number} {suffix}" for suffix, number in counts.most_common(4)) or "it is empty"


# Supports


class Supports(Sequence[Support]):
    """The supports of one class: pairs of an image and its mask (H, W) uint8, made when they are asked for.

    In a mask, 1 is the class and 255 is ignored.
    """

    def __init__(self, images: Sequence[Annotated], value: int) -> None:
        self.images, self.value = images, value

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, at: int) -> Support: ...

    @overload
    def __getitem__(self, at: slice) -> "Supports": ...

    def __getitem__(self, at: int | slice) -> "Support | Supports":
        if isinstance(at, slice):
            return Supports(self.images[at], self.value)
        each = self.images[at]
        index = each.masks()
        mask = np.where(index == IGNORE, IGNORE, index == self.value).astype(np.uint8)
        return each.image.read() if isinstance(each.image, Embedded) else each.image, mask


def supports_of(folder: str | Path) -> dict[str, Supports]:
    """The examples in a folder, for `Segmenter.fit`.

    Args:
        folder: path of a folder in any format of the list above.

    Returns:
        Class -> its images with masks, see `Supports`, in the order of the classes. Classes without any are left out.

    Raises:
        SettingError: the format is unknown, a file is invalid, or nothing is marked.
        ImageError: a file cannot be read.
    """
    images = read_folder(folder)
    shown = defaultdict[int, list[Annotated]](list)
    for each in images:
        for value in np.flatnonzero(np.bincount(each.masks().ravel(), minlength=IGNORE + 1)[1:IGNORE]).tolist():
            shown[value + 1].append(each)
    if not shown:
        raise SettingError(f"No mask in {os.path.abspath(folder)} marks anything.")
    return {
        name: Supports(shown[value], value) for value, name in enumerate(images[0].classes, start=1) if value in shown
    }
