"""What the tiny benchmarks share: drawn images, and the archives that publishers ship."""

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


def pack(folder: Path, archive: Path) -> None:
    """Packs what is in `folder` into `archive`, and takes the folder away."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as file:
            for path in sorted(folder.iterdir()):
                file.add(path, path.name)
    shutil.rmtree(folder)
