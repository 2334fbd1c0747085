"""Segments the images of a folder, and goes on where an interrupted run ended."""

import csv
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pmnet.errors import ImageError, SettingError
from pmnet.replacing import replacing
from pmnet.segment import tiles
from pmnet.segment.images import as_image, image_files

if TYPE_CHECKING:
    from torch import Tensor

    from pmnet.segment.segmenter import Result, Segmenter

COLUMNS = ("image", "class", "pixels", "share", "presence", "seconds", "error")
LONGEST = 1600  # pixels of an overlay's side


def segment_folder(
    segmenter: "Segmenter",
    images: Path,
    out: Path,
    tile: int | str | None = "auto",
    gate: bool = True,
    overlays: bool = True,
    coco: bool = False,
) -> int:
    """Segments an image, or all images of a folder and of those below it.

    Writes to `out`: NAME.png, a mask of the photo's size (0 = none, k = the k-th class) in the colours of PASCAL VOC;
    overlays/NAME.jpg; results.csv with a line of each image and class; setting.json.

    Args:
        tile: see `Segmenter.predict`.
        gate: see `Segmenter.predict`.
        overlays: whether to write the overlays.
        coco: write annotations.json too, in COCO's format, with masks as run lengths.

    Returns:
        How many images failed; each is named in a message and in results.csv.

    Raises:
        SettingError: there is no image, `tile` is invalid, or `out` holds masks made with another setting.
    """
    tiles.check(tile)
    names = names_of(images, out)
    setting = segmenter.described() | {"tile": tile, "gate": gate}
    done = continued(out, setting)
    todo = [path for path, name in names.items() if name not in done]
    if len(todo) < len(names):
        print(f"{len(names) - len(todo)} of {len(names)} images are done already.")
    failed, begun = 0, time.monotonic()
    with (out / "results.csv").open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        for path in tqdm(todo, unit="image", disable=None):
            try:
                image = as_image(path)
                result = segmenter.predict(image, tile, gate)
                if overlays:
                    write_overlay(out / "overlays" / f"{names[path]}.jpg", image, result)
                write_mask(out / f"{names[path]}.png", result.mask)
                rows.writerows(lines(names[path], result))
            except ImageError as error:
                failed += 1
                rows.writerow([names[path], "", "", "", "", "", str(error)])
                tqdm.write(f"Error: {error}", file=sys.stderr)
            file.flush()
    if coco:
        write_coco(out, images, names, segmenter.classes)
    print(f"{len(todo) - failed} images in {time.monotonic() - begun:.0f} s: masks, overlays and results.csv in {out}")
    if failed:
        print(f"{failed} images failed: repair or remove them and repeat the command.", file=sys.stderr)
    return failed


def names_of(images: Path, out: Path) -> dict[Path, str]:
    """Image file -> the name of its mask, without suffix; with the image's suffix where two would be equal.

    Raises:
        SettingError: there is no image.
    """
    root = images.parent if images.is_file() else images
    found = (
        [images] if images.is_file() else [p for p in image_files(images) if out.resolve() not in p.resolve().parents]
    )
    if not found:
        raise SettingError(f"There is no image in {images.absolute()}.")
    relative = {path: path.relative_to(root) for path in found}
    times = Counter(name.with_suffix("") for name in relative.values())
    return {
        path: (name if times[name.with_suffix("")] > 1 else name.with_suffix("")).as_posix()
        for path, name in relative.items()
    }


def continued(out: Path, setting: Mapping[str, Any]) -> set[str]:
    """Prepares the folder; returns the names that are done, with a line for each class.

    Other lines are removed: those of images that failed, and those that an interrupted run has written in part.

    Raises:
        SettingError: the folder holds masks made with another setting.
    """
    out.mkdir(parents=True, exist_ok=True)
    before, table = out / "setting.json", out / "results.csv"
    text = json.dumps(setting, indent=2, ensure_ascii=False)
    if before.is_file() and before.read_text(encoding="utf-8") != text:
        raise SettingError(f"{out} holds masks that were made with another setting ({before}). Choose another folder.")
    kept: list[list[str]] = []
    if before.is_file() and table.is_file():
        with table.open(newline="", encoding="utf-8") as file:
            kept = [row for row in list(csv.reader(file))[1:] if len(row) == len(COLUMNS) and not row[-1]]
    times = Counter(row[0] for row in kept)
    kept = [row for row in kept if times[row[0]] == len(setting["classes"]) and (out / f"{row[0]}.png").is_file()]
    with replacing(table) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *kept])
    with replacing(before) as part:
        part.write_text(text, encoding="utf-8")
    return {row[0] for row in kept}


def lines(name: str, result: "Result") -> list[list[Any]]:
    """One line of results.csv for each class."""
    counts = np.bincount(result.mask.ravel(), minlength=1 + len(result.classes))
    return [
        [name, title, int(counts[k]), f"{counts[k] / result.mask.size:.6f}", f"{result.presences[title]:.4f}",
         f"{result.seconds:.3f}", ""]
        for k, title in enumerate(result.classes, start=1)
    ]  # fmt: skip


def write_mask(path: Path, mask: np.ndarray) -> None:
    """A PNG of (H, W) uint8 with the palette of PASCAL VOC."""
    image = Image.fromarray(mask)
    image.putpalette(palette().ravel().tolist())
    with replacing(path) as part:
        image.save(part, "PNG")


def palette() -> np.ndarray:
    """(256, 3) uint8: the colours of PASCAL VOC, in which the bits of the number stand for bits of the colour.

    Example:
        >>> palette()[:3].tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    number = np.arange(256)
    bits = [(number >> (3 * i + c) & 1) << (7 - i) for c in range(3) for i in range(3)]
    return np.stack([sum(bits[3 * c : 3 * c + 3]) for c in range(3)], axis=1).astype(np.uint8)


def write_overlay(path: Path, image: "Tensor", result: "Result") -> None:
    """A JPEG of the photo, at most 1600 pixels wide and high, with what was found in colour."""
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    drawn = overlay(photo, result.mask, LONGEST)
    with replacing(path) as part:
        drawn.save(part, "JPEG", quality=90)


def overlay(photo: Image.Image, mask: np.ndarray, longest: int) -> Image.Image:
    """The photo, reduced to `longest` pixels, with each class tinted and outlined."""
    scale = min(1.0, longest / max(photo.size))
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    pixels = np.asarray(photo.resize(size, Image.Resampling.BILINEAR)).astype(np.float32)
    small = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    colour = tints()[small]
    inside = (small > 0)[..., None]
    tinted = np.where(inside, 0.6 * pixels + 0.4 * colour, pixels)
    edge = np.zeros_like(small)
    edge[:-1] = np.where(small[:-1] != small[1:], np.maximum(small[:-1], small[1:]), 0)
    edge[:, :-1] = np.where(small[:, :-1] != small[:, 1:], np.maximum(small[:, :-1], small[:, 1:]), edge[:, :-1])
    return Image.fromarray(np.where(edge[..., None] > 0, tints()[edge], tinted).astype(np.uint8))


def tints() -> np.ndarray:
    """(256, 3) float32: bright colours of the classes, far apart for the first ones."""
    first = [(0, 0, 0), (255, 40, 40), (40, 140, 255), (255, 200, 0), (30, 200, 80), (220, 60, 255), (0, 210, 210)]
    rest = palette()[len(first) :] // 2 + 96
    return np.concatenate([np.array(first), rest]).astype(np.float32)


def write_coco(out: Path, images: Path, names: Mapping[Path, str], classes: tuple[str, ...]) -> None:
    """annotations.json: one annotation of each image and class found, its mask as run lengths."""
    root = images.parent if images.is_file() else images
    entries: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, (path, name) in enumerate(names.items(), start=1):
        if not (out / f"{name}.png").is_file():
            continue
        mask = np.asarray(Image.open(out / f"{name}.png"))
        height, width = mask.shape
        file = path.relative_to(root).as_posix()
        entries.append({"id": number, "file_name": file, "height": height, "width": width})
        for k in np.unique(mask[mask > 0]).tolist():
            found.append({"id": len(found) + 1, "image_id": number, "category_id": k, **annotation(mask == k)})
    categories = [{"id": k, "name": name} for k, name in enumerate(classes, start=1)]
    with replacing(out / "annotations.json") as part:
        part.write_text(json.dumps({"images": entries, "annotations": found, "categories": categories}))


def annotation(mask: np.ndarray) -> dict[str, Any]:
    """COCO's fields of a mask (H, W) bool, which holds at least one pixel."""
    flat = mask.ravel(order="F")
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *borders, flat.size]).tolist()
    y, x = np.nonzero(mask)
    box = [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]
    lengths = counts if not flat[0] else [0, *counts]  # they begin with a run of zeros
    return {"segmentation": {"size": list(mask.shape), "counts": lengths}, "area": int(mask.sum()), "bbox": box,
            "iscrowd": 1}  # fmt: skip
