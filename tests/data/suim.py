"""A tiny SUIM as its publisher ships it: train_val.zip and TEST.zip, RGB masks with a bit a channel."""

from pathlib import Path

import numpy as np

from tests.data.folder import paint
from tests.data.pack import halves, pack, save

SIZE = (96, 128)
PARTS = {"train_val": 16, "TEST": 6}  # images


def name_of(i: int) -> str:
    return f"d_r_{i + 1}_"


def truth(i: int) -> np.ndarray:
    """(H, W) uint8: code of the colour; half the image shows class i mod 8, half the class after it."""
    mask = halves(i % 8, (i + 1) % 8, SIZE)
    mask[mask == 0] = i % 8
    mask[:10, :10] = (i + 5) % 8  # 100 pixels: too few to count
    return mask


def write(root: Path, archives: bool = True) -> Path:
    random = np.random.default_rng(0)
    first = 0
    for part, count in PARTS.items():
        for i in range(first, first + count):
            bits = (truth(i)[..., None] >> np.array([2, 1, 0])) & 1
            rgb = np.where(bits, random.integers(240, 256, bits.shape), random.integers(0, 16, bits.shape))
            if i == 3:
                rgb = rgb[::2, ::2]  # a few masks of the real set have another size than their image
            save(paint(truth(i), random), root / part / part / "images" / f"{name_of(i)}.jpg")
            save(rgb.astype(np.uint8), root / part / part / "masks" / f"{name_of(i)}.bmp")
        if part == "TEST":
            save(np.zeros(SIZE, np.uint8), root / part / part / "masks" / "saliency" / "d_r_1_.bmp")
        save(paint(truth(0), random), root / part / part / "images" / f"lonely_{part}_.jpg")
        first += count
        if archives:
            pack(root / part, root / f"{part}.zip")
    return root
