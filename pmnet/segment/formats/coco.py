"""COCO's json: polygons or run lengths of objects, for all images of a folder in one file.

root/annotations.json, _annotations.coco.json, annotations/instances_default.json, ...: of any name
root/NAME.jpg, root/images/NAME.jpg, ...: wherever `file_name` or its last part is found
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pmnet.errors import SettingError
from pmnet.segment.formats.annotated import Annotated, checked_size, classes_of, name_of, numbered, size_of, valid
from pmnet.segment.formats.raster import Rings, Runs, Shape, Size, painted, points_of


class Photo(NamedTuple):
    """An entry of "images"."""

    id: Any
    file_name: str
    size: Size | None  # None: that of the file


class Object(NamedTuple):
    """An entry of "annotations"."""

    image: Any
    category: Any
    shape: Shape


def compact(entry: dict[str, Any]) -> Any:
    """Replaces an entry of "images" or "annotations" while the file is parsed, so that large files fit into memory."""
    if "image_id" in entry and "category_id" in entry:
        try:
            return Object(entry["image_id"], entry["category_id"], shape_of(entry.get("segmentation")))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            return ValueError(f"annotation {entry.get('id')}: {error}")  # raised if the file turns out to be COCO's
    if "file_name" in entry and "id" in entry:
        name = str(entry["file_name"]).replace("\\", "/")
        height, width = entry.get("height"), entry.get("width")
        try:
            return Photo(entry["id"], name, None if height is width is None else checked_size(height, width))
        except ValueError as error:
            return ValueError(f"{name}: {error}")
    return entry


def shape_of(segmentation: Any) -> Shape:
    """Raises ValueError if there is none."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        height, width = segmentation["size"]
        lengths = counts if isinstance(counts, str) else np.array(counts, np.uint32)
        return Runs(lengths, checked_size(height, width))
    if not segmentation:
        raise ValueError("it has no segmentation, only a box. Export polygons or masks")
    rings = segmentation if isinstance(segmentation[0], list) else [segmentation]
    return Rings([points_of(ring) for ring in rings if ring])


def is_one(content: Any) -> bool:
    """Whether a parsed file is in COCO's format."""
    return isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    )


def read(root: Path, contents: Mapping[Path, Any], images: Mapping[str, Sequence[Path]]) -> list[Annotated]:
    """The images of all files. Categories of one name are one class.

    Args:
        root: the folder that is read.
        contents: file -> what `compact` left of it.
        images: name -> image files of the folder with this name.

    Raises:
        SettingError: a file is invalid, or an image is missing.
    """
    names: dict[Path, dict[Any, str]] = {}
    for path, content in contents.items():
        with valid(path, "the COCO file"):
            categories = sorted(content["categories"], key=lambda category: category["id"])
            names[path] = {category["id"]: str(category["name"]) for category in categories}
    values = numbered((name for of_file in names.values() for name in of_file.values()), next(iter(contents)))
    found = []
    for path, content in contents.items():
        with valid(path, "the COCO file"):
            shapes = shapes_by_image(content, {number: values[name] for number, name in names[path].items()})
        bases = (path.parent, path.parent / "images", root, root / "images")
        for photo in content["images"]:
            image = find(photo.file_name, path, bases, images)
            read_mask = partial(mask_of, path, photo, image, shapes.get(photo.id, ()))
            found.append(Annotated(name_of(image, root), image, path, read_mask, classes_of(values)))
    return found


def shapes_by_image(content: Any, values: Mapping[Any, int]) -> dict[Any, list[tuple[int, Shape]]]:
    """Image id -> value and shape of its objects. Raises ValueError if the parts of a file do not fit together."""
    for each in (*content["images"], *content["annotations"]):
        if isinstance(each, ValueError):
            raise each
    if not all(isinstance(photo, Photo) for photo in content["images"]):
        raise ValueError("an image has no id or no file_name")
    shapes = defaultdict[Any, list[tuple[int, Shape]]](list)
    known = {photo.id for photo in content["images"]}
    for each in content["annotations"]:
        if not isinstance(each, Object):
            raise ValueError("an annotation has no image_id or no category_id")
        if each.category not in values:
            raise ValueError(f"an annotation has category_id {each.category}, which is not among the categories")
        if each.image not in known:
            raise ValueError(f"an annotation has image_id {each.image}, which is not among the images")
        shapes[each.image].append((values[each.category], each.shape))
    return shapes


def find(name: str, path: Path, bases: Sequence[Path], images: Mapping[str, Sequence[Path]]) -> Path:
    """The file of an image that an annotation file names. Raises SettingError if there is not exactly one."""
    for base in bases:
        if os.path.isfile(base / name):  # Path.is_file raises for names that no disk has
            return base / name
    found = images.get(name.rpartition("/")[2], ())
    if len(found) != 1:
        what = f"which is in several folders: {found[0]}, {found[1]}" if found else "which is not in the folder"
        raise SettingError(f"{path} names the image {name}, {what}. Put the images into {path.parent / 'images'}.")
    return found[0]


def mask_of(path: Path, photo: Photo, image: Path, shapes: Sequence[tuple[int, Shape]]) -> np.ndarray:
    with valid(path, f"the annotation of {photo.file_name}"):
        return painted(photo.size or size_of(image), shapes)
