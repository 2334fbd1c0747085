"""A tiny Chest X-ray set as Kaggle ships it: archive.zip, grey images, masks named after either hospital's habit."""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.episodes.dataset import Split
from tests.data.pack import halves, pack, rgb, save

SIZE = (80, 96)
SHENZHEN = [f"CHNCXR_{i:04d}_0" for i in range(1, 9)]
MONTGOMERY = [f"MCUCXR_{i:04d}_0" for i in range(1, 7)]
ALONE = ["CHNCXR_0900_1", "MCUCXR_0901_0"]  # images without a mask
DEEP = MONTGOMERY[1]  # an image of 16 bits
NEEDED = "CXR_png"
PARTIAL = {"masks/*.png": "masks/"}
NOTES = [f"2 images without a mask left out: {', '.join(ALONE)}", "8 masks named X_mask.png, 6 X.png"]


def mask(name: str) -> np.ndarray:
    """(H, W) uint8: 1 = lung."""
    return np.roll(halves(1, 1, SIZE), int(name.split("_")[1]), axis=1) * (np.arange(SIZE[0])[:, None] > 20).astype(
        np.uint8
    )


def mask_name(name: str) -> str:
    return f"{name}_mask.png" if name in SHENZHEN else f"{name}.png"


@cache
def truth() -> dict[str, np.ndarray]:
    return {name: mask(name) for name in SHENZHEN + MONTGOMERY}


def images_of(class_id: int, split: Split) -> list[str]:
    return list(truth())


def file_of(source: Path, image: str) -> Path:
    return source / "archive" / "Lung Segmentation" / "CXR_png" / f"{image}.png"


def pixels(source: Path, image: str) -> np.ndarray:
    if image == DEEP:
        return np.stack([(np.array(Image.open(file_of(source, image))) // 257).astype(np.uint8)] * 3, axis=2)
    return rgb(file_of(source, image))


def write(root: Path, archives: bool = True) -> Path:
    random = np.random.default_rng(0)
    whole = root / "archive"
    lungs = whole / "Lung Segmentation"
    for name in [*SHENZHEN, *MONTGOMERY, *ALONE]:
        grey = (60 + 120 * mask(name) + random.integers(0, 30, SIZE)).astype(np.uint8)
        if name == SHENZHEN[1]:
            save(np.stack([grey] * 3, axis=2), lungs / "CXR_png" / f"{name}.png")
        elif name == DEEP:
            (lungs / "CXR_png").mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey.astype(np.uint16) * 257).save(lungs / "CXR_png" / f"{name}.png")
        else:
            save(grey, lungs / "CXR_png" / f"{name}.png")
        if name not in ALONE:
            save(255 * mask(name), lungs / "masks" / mask_name(name))
    save(np.zeros(SIZE, np.uint8), lungs / "test" / "CHNCXR_0999_0.png")
    (lungs / "ClinicalReadings").mkdir()
    (lungs / "ClinicalReadings" / f"{SHENZHEN[0]}.txt").write_text("normal\n")
    (lungs / "NLM-ChinaCXRSet-ReadMe.docx.txt").write_text("read me\n")
    shutil.copytree(lungs, whole / "data" / "Lung Segmentation")
    if archives:
        pack(whole, root / "archive.zip")
    return root
