"""A tiny FSS-1000 as its publisher ships it: fewshot_data.zip, ten pairs a class; and lists as HSNet has them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.data.folder import paint
from tests.data.pack import pack, save

SIZE = (48, 64)
LISTS = {"trn": ["taxi", "abacus", "comb", "radio"], "val": ["mortar", "handcuff"], "test": ["bus", "abe's_flyingfish"]}
NAMES = [name for names in LISTS.values() for name in names]


def truth(name: str, number: int) -> np.ndarray:
    """(H, W) uint8: 1 = the class."""
    mask = np.zeros(SIZE, np.uint8)
    mask[number : number + 30, 2 * number : 2 * number + 40] = 1
    return mask


def write(root: Path, names: Sequence[str] = NAMES, archives: bool = True) -> Path:
    random = np.random.default_rng(0)
    whole = root / "fewshot_data"
    for value, name in enumerate(names, start=1):
        folder = whole / "fewshot_data" / "fewshot_data" / name
        for number in range(1, 11):
            mask = truth(name, number)
            grey = np.where(mask, random.integers(128, 256, SIZE), random.integers(0, 128, SIZE)).astype(np.uint8)
            save(paint(mask * value, random), folder / f"{number}.jpg")
            save(grey if number % 2 else np.stack([grey] * 3, axis=2), folder / f"{number}.png")
    if archives:
        pack(whole, root / "fewshot_data.zip")
    return root


def write_lists(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, names in LISTS.items():
        (folder / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder
