"""labelme's json: one file per image, with polygons, rectangles, circles, lines, points and masks.

root/NAME.json            its imagePath names the image, relative to the file or anywhere in the folder; or imageData
                          holds it
root/labels.txt           optional, the order of the classes; otherwise they are sorted by name
"""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from pmnet.errors import SettingError
from pmnet.segment.formats.annotated import (
    Annotated,
    Embedded,
    checked_size,
    classes_of,
    listed,
    numbered,
    size_of,
    valid,
)
from pmnet.segment.formats.raster import Rings, Shape, Stroke, painted, points_of
from pmnet.segment.images import SUFFIXES, opened

LINE = 5.0  # pixels to either side of a line and around a point, as labelme draws them


class Drawn(NamedTuple):
    """An entry of "shapes"."""

    label: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Crop:
    """A mask in a box, as a PNG in base64."""

    corner: tuple[int, int]  # x, y
    png: str

    def paint(self, index: np.ndarray, value: int) -> None:
        try:
            marked = np.asarray(opened(io.BytesIO(base64.b64decode(self.png))).convert("L")) > 0
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise ValueError("the PNG of a mask is damaged") from error
        x, y = self.corner
        part = index[max(y, 0) :, max(x, 0) :][: marked.shape[0] + min(y, 0), : marked.shape[1] + min(x, 0)]
        part[marked[max(-y, 0) :, max(-x, 0) :][: part.shape[0], : part.shape[1]]] = value


def compact(entry: dict[str, Any]) -> Any:
    """Replaces a shape, and the image that a file holds, while the file is parsed."""
    if "label" in entry and "points" in entry:
        try:
            return Drawn(str(entry["label"]), shape_of(entry))
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            return ValueError(f"a shape of {entry['label']}: {error}")  # raised if the file turns out to be labelme's
    if "shapes" in entry:
        return entry | {"imageData": bool(entry.get("imageData"))}
    return entry


def shape_of(entry: Mapping[str, Any]) -> Shape:
    """Raises ValueError if the kind is unknown or points are missing."""
    kind, points = entry.get("shape_type") or "polygon", points_of(entry["points"])
    least = {"polygon": 3, "rotation": 3, "point": 1, "points": 1}.get(kind, 2)
    if len(points) < least:
        raise ValueError(f"a {kind} needs {least} points, not {len(points)}")
    if kind == "mask":
        x, y = points.min(0).round().astype(int).tolist()
        return Crop((x, y), str(entry["mask"]))
    if kind == "circle":  # its centre, and a point on its edge
        return Stroke(points[:1], float(np.hypot(*(points[1] - points[0]))))
    if kind == "rectangle" and len(points) == 2:  # opposite corners
        (left, top), (right, bottom) = points
        return Rings([points_of([left, top, right, top, right, bottom, left, bottom])])
    if kind in ("polygon", "rectangle", "rotation", "oriented_rectangle"):
        return Rings([points])
    if kind in ("line", "linestrip", "point", "points"):
        return Stroke(points, LINE)
    raise ValueError(f"the shape_type {kind} is unknown")


def is_one(content: Any) -> bool:
    """Whether a parsed file is in labelme's format."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def read(root: Path, contents: Mapping[Path, Any], images: Mapping[str, Sequence[Path]]) -> list[Annotated]:
    """The images of all files.

    Args:
        root: the folder that is read.
        contents: file -> what `compact` left of it.
        images: name -> image files of the folder with this name.

    Raises:
        SettingError: a file is invalid, or its image is missing.
    """
    for path, content in contents.items():
        with valid(path, "the labelme file"):
            for each in content["shapes"]:
                if not isinstance(each, Drawn):
                    raise each if isinstance(each, ValueError) else ValueError("a shape has no label or no points")
    labels = {each.label for content in contents.values() for each in content["shapes"]}
    order = listed(root / "labels.txt") if (root / "labels.txt").is_file() else []
    values = numbered([*order, *sorted(labels)], root)
    found = []
    for path, content in contents.items():
        name = path.relative_to(root).with_suffix("").as_posix()
        shapes = [(values[each.label], each.shape) for each in content["shapes"]]
        image = image_of(path, content, images)
        size = content.get("imageHeight"), content.get("imageWidth")
        found.append(Annotated(name, image, path, partial(mask_of, path, image, size, shapes), classes_of(values)))
    return found


def image_of(path: Path, content: Mapping[str, Any], images: Mapping[str, Sequence[Path]]) -> Path | Embedded:
    """The image of a file: where the file says, beside it, in it, or the only one of this name in the folder.

    Raises:
        SettingError: there is none.
    """
    named = PurePosixPath(str(content["imagePath"]).replace("\\", "/"))
    if os.path.isfile(path.parent / named):  # Path.is_file raises for names that no disk has
        return path.parent / named
    for suffix in sorted(SUFFIXES):
        if path.with_suffix(suffix).is_file():
            return path.with_suffix(suffix)
    if content["imageData"]:
        return Embedded(path)
    if len(found := images.get(named.name, ())) == 1:
        return found[0]
    raise SettingError(
        f"{path} names the image {named}, which is not there, and holds no imageData. Put the image beside it."
    )


def mask_of(
    path: Path, image: Path | Embedded, size: tuple[Any, Any], shapes: Sequence[tuple[int, Shape]]
) -> np.ndarray:
    with valid(path, "the annotation"):
        return painted(size_of(image) if None in size else checked_size(*size), shapes)
