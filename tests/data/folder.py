"""Tiny folders of images and masks, in the two layouts of datamodules/own/folder.py."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_indexed(
    root: Path,
    classes: int | Sequence[str] = 6,
    images_per_class: int = 4,
    size: tuple[int, int] = (48, 64),
    neighbours: bool = True,
    suffix: str = ".jpg",
    seed: int = 0,
) -> Path:
    """Writes images/NNN.jpg, masks/NNN.png (mode L) and classes.txt; returns root.

    Image i shows class i mod n as a box of its colour, ringed by 255 in the mask, on a ground that belongs to no class.

    Args:
        classes: their number, or their names.
        images_per_class: how many images show a class as their box.
        size: (height, width) of every image.
        neighbours: image i shows class i + 1 mod n too, in a corner, so that each class is in twice as many images.
        suffix: of the images; ".png" keeps their pixels exactly.
    """
    names = class_names(classes)
    random = np.random.default_rng(seed)
    height, width = size
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for i in range(len(names) * images_per_class):
        mask = np.zeros(size, np.uint8)
        top, left = random.integers(1, height // 4), random.integers(1, width // 4)
        bottom, right = top + height // 2, left + width // 2
        mask[top - 1 : bottom + 1, left - 1 : right + 1] = 255
        mask[top:bottom, left:right] = i % len(names) + 1
        if neighbours:
            mask[-height // 5 :, -width // 5 :] = (i + 1) % len(names) + 1
        Image.fromarray(paint(mask, random)).save(root / "images" / f"{i:03d}{suffix}")
        Image.fromarray(mask).save(root / "masks" / f"{i:03d}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def write_by_class(
    root: Path,
    classes: int | Sequence[str] = 6,
    images_per_class: int = 4,
    size: tuple[int, int] = (48, 64),
    foreground: int = 255,
    seed: int = 0,
    image: str = "{}.jpg",
    mask: str = "{}.png",
) -> Path:
    """Writes CLASS/1.jpg, CLASS/1.png, ... as FSS-1000 has them; returns root.

    Args:
        classes: their number, or their names.
        size: (height, width) of every image.
        foreground: the masks' value where the class is; 0 elsewhere.
        image: file of an image in the class folder, with {} for its number.
        mask: file of a mask in the class folder, with {} for its number.
    """
    random = np.random.default_rng(seed)
    height, width = size
    for value, name in enumerate(class_names(classes), start=1):
        (root / name / mask).parent.mkdir(parents=True, exist_ok=True)
        for i in range(1, images_per_class + 1):
            values = np.zeros(size, np.uint8)
            top, left = random.integers(0, height // 2), random.integers(0, width // 2)
            values[top : top + height // 2, left : left + width // 2] = value
            Image.fromarray(paint(values, random)).save(root / name / image.format(i))
            Image.fromarray(np.where(values, foreground, 0).astype(np.uint8)).save(root / name / mask.format(i))
    return root


def class_names(classes: int | Sequence[str]) -> list[str]:
    return [f"class{i:02d}" for i in range(classes)] if isinstance(classes, int) else list(classes)


def paint(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(H, W) index mask -> (H, W, 3) image: a colour a value, with noise."""
    colours = np.random.default_rng(7).integers(40, 216, (256, 3))
    return (colours[mask] + random.integers(-30, 31, (*mask.shape, 3))).astype(np.uint8)
