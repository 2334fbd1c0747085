"""A tiny ISIC 2018, task 1, as its publisher ships it: two archives; and PATNet's table of classes."""

from functools import cache
from pathlib import Path

import numpy as np

from datamodules.episodes.dataset import Split
from tests.data.folder import paint
from tests.data.pack import pack, rgb, save

SIZE = (72, 96)
NAMES = [f"ISIC_{i:07d}" for i in range(0, 72, 3)]
CLASSES = ("melanoma", "nevus", "seborrheic_keratosis")
IMAGES, MASKS = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
NEEDED = IMAGES
PARTIAL = {"ISIC_0000006.jpg": "ISIC_0000006.jpg"}
NOTES = [f"{len(NAMES)} images, {len(NAMES)} masks"]


def class_of(name: str) -> str:
    return CLASSES[NAMES.index(name) % 3]


def mask(name: str) -> np.ndarray:
    """(H, W) uint8: 1 = lesion, a disc."""
    y, x = np.ogrid[: SIZE[0], : SIZE[1]]
    return (np.hypot(y - 36, x - 40 - NAMES.index(name) % 7) < 27).astype(np.uint8)


@cache
def truth() -> dict[str, np.ndarray]:
    return {name: mask(name) for name in NAMES}


def images_of(class_id: int, split: Split) -> list[str]:
    return NAMES


def file_of(source: Path, image: str) -> Path:
    return source / IMAGES / IMAGES / f"{image}.jpg"


def pixels(source: Path, image: str) -> np.ndarray:
    return rgb(file_of(source, image))


def write(root: Path, archives: bool = True) -> Path:
    random = np.random.default_rng(0)
    for name in NAMES:
        value = mask(name) * (1 + CLASSES.index(class_of(name)))
        save(paint(value, random), root / IMAGES / IMAGES / f"{name}.jpg")
        save(255 * mask(name), root / MASKS / MASKS / f"{name}_segmentation.png")
    for part in (IMAGES, MASKS):
        for text in ("ATTRIBUTION.txt", "LICENSE.txt"):
            (root / part / part / text).write_text("text\n")
        if archives:
            pack(root / part, root / f"{part}.zip")
    return root


def write_lists(folder: Path) -> Path:
    """Writes the table of classes into `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{name},{class_of(name)}\n" for name in reversed(NAMES))
    (folder / "class_id.csv").write_text(f"ID,Class\n{rows}")
    return folder
