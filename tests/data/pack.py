"""Helpers of the tiny benchmarks: images, masks, archives, the rule of the lists."""

import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def save(array: np.ndarray, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def halves(left: int, right: int, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 index mask: one value to the left, another to the right, 0 around both."""
    width = size[1]
    mask = np.zeros(size, np.uint8)
    mask[4:-4, 4 : width // 2] = left
    mask[4:-4, width // 2 : -4] = right
    return mask


def rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 of an image file."""
    return np.array(Image.open(path).convert("RGB"))


def covering(masks: dict[str, np.ndarray], class_id: int, pixels: int = 2 * 32 * 32) -> list[str]:
    """Names of the images whose mask shows a class on at least so many pixels."""
    return [name for name, mask in masks.items() if (mask == class_id + 1).sum() >= pixels]


def pack(folder: Path, archive: Path) -> None:
    """Packs the contents of `folder` into `archive` and deletes the folder."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as file:
            for path in sorted(folder.iterdir()):
                file.add(path, path.name)
    shutil.rmtree(folder)
