"""A tiny ISIC 2018, task 1, as its publisher ships it: two archives; and PATNet's table of classes."""

from pathlib import Path

import numpy as np

from tests.data.folder import paint
from tests.data.pack import pack, save

SIZE = (72, 96)
NAMES = [f"ISIC_{i:07d}" for i in range(0, 72, 3)]
CLASSES = ("melanoma", "nevus", "seborrheic_keratosis")
IMAGES, MASKS = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"


def class_of(name: str) -> str:
    return CLASSES[NAMES.index(name) % 3]


def truth(name: str) -> np.ndarray:
    """(H, W) uint8: 1 = lesion, a disc."""
    y, x = np.ogrid[: SIZE[0], : SIZE[1]]
    return (np.hypot(y - 36, x - 40 - NAMES.index(name) % 7) < 27).astype(np.uint8)


def write(root: Path, archives: bool = True) -> Path:
    random = np.random.default_rng(0)
    for name in NAMES:
        value = truth(name) * (1 + CLASSES.index(class_of(name)))
        save(paint(value, random), root / IMAGES / IMAGES / f"{name}.jpg")
        save(255 * truth(name), root / MASKS / MASKS / f"{name}_segmentation.png")
    for part in (IMAGES, MASKS):
        for text in ("ATTRIBUTION.txt", "LICENSE.txt"):
            (root / part / part / text).write_text("text\n")
        if archives:
            pack(root / part, root / f"{part}.zip")
    return root


def write_lists(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{name},{class_of(name)}\n" for name in reversed(NAMES))
    (folder / "class_id.csv").write_text(f"ID,Class\n{rows}")
    return folder
