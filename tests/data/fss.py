"""A tiny FSS-1000 as its publisher ships it: fewshot_data.zip, ten pairs a class; and lists as HSNet has them."""

from functools import cache
from pathlib import Path

import numpy as np

from datamodules.episodes.dataset import Split
from tests.data.folder import paint
from tests.data.pack import pack, rgb, save

SIZE = (48, 64)
LISTS = {"trn": ["taxi", "abacus", "comb", "radio"], "val": ["mortar", "handcuff"], "test": ["bus", "abe's_flyingfish"]}
NAMES = [name for names in LISTS.values() for name in names]
NEEDED = "<class>/1.jpg"
PARTIAL = {"abacus/7.png": "abacus.* 7.png"}
NOTES = [f"{len(NAMES)} classes"]


def mask(number: int) -> np.ndarray:
    """(H, W) uint8: 1 = the class."""
    pixels = np.zeros(SIZE, np.uint8)
    pixels[number : number + 30, 2 * number : 2 * number + 40] = 1
    return pixels


@cache
def truth() -> dict[str, np.ndarray]:
    return {f"{name}/{number}.jpg": mask(number) for name in NAMES for number in range(1, 11)}


def images_of(class_id: int, split: Split) -> list[str]:
    return [f"{sorted(NAMES)[class_id]}/{number}.jpg" for number in range(1, 11)]


def file_of(source: Path, image: str) -> Path:
    return source / "fewshot_data" / "fewshot_data" / "fewshot_data" / image


def pixels(source: Path, image: str) -> np.ndarray:
    return rgb(file_of(source, image))


def write(root: Path, archives: bool = True) -> Path:
    random = np.random.default_rng(0)
    whole = root / "fewshot_data"
    for value, name in enumerate(NAMES, start=1):
        folder = whole / "fewshot_data" / "fewshot_data" / name
        for number in range(1, 11):
            shape = mask(number)
            grey = np.where(shape, random.integers(128, 256, SIZE), random.integers(0, 128, SIZE)).astype(np.uint8)
            save(paint(shape * value, random), folder / f"{number}.jpg")
            save(grey if number % 2 else np.stack([grey] * 3, axis=2), folder / f"{number}.png")
    if archives:
        pack(whole, root / "fewshot_data.zip")
    return root


def write_lists(folder: Path) -> Path:
    """Writes the lists into `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, names in LISTS.items():
        (folder / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder
