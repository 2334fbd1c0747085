"""A tiny SUIM as its publisher ships it: train_val.zip and TEST.zip, RGB masks with a bit a channel."""

from functools import cache
from pathlib import Path

import numpy as np

from datamodules.episodes.dataset import Split
from tests.data.folder import paint
from tests.data.pack import covering, halves, pack, rgb, save

SIZE = (96, 128)
PARTS = {"train_val": 16, "TEST": 6}  # images
HALVED = 3  # an image whose mask has half its size, as a few of the real set do
NEEDED = "images/*.jpg"
PARTIAL = {"masks/*.bmp": "masks/"}
NOTES = ["train_val: 16 pairs", "lonely_train_val_", "TEST: 6 pairs", "lonely_TEST_", "another size than their image"]


def name_of(i: int) -> str:
    return f"d_r_{i + 1}_"


def code(i: int) -> np.ndarray:
    """(H, W) uint8, the bits of the colour: half the image shows class i mod 8, half the class after it."""
    mask = halves(i % 8, (i + 1) % 8, SIZE)
    mask[mask == 0] = i % 8
    mask[:10, :10] = (i + 5) % 8  # 100 pixels: too few to count
    return mask


@cache
def truth() -> dict[str, np.ndarray]:
    masks = {name_of(i): code(i) + 1 for i in range(sum(PARTS.values()))}
    return masks | {name_of(HALVED): masks[name_of(HALVED)][::2, ::2]}


def images_of(class_id: int, split: Split) -> list[str]:
    return covering(truth(), class_id)


def file_of(source: Path, image: str) -> Path:
    part = "train_val" if int(image.split("_")[2]) <= PARTS["train_val"] else "TEST"
    return source / part / part / "images" / f"{image}.jpg"


def pixels(source: Path, image: str) -> np.ndarray:
    return rgb(file_of(source, image))


def write(root: Path, archives: bool = True) -> Path:
    random = np.random.default_rng(0)
    first = 0
    for part, count in PARTS.items():
        for i in range(first, first + count):
            bits = (code(i)[..., None] >> np.array([2, 1, 0])) & 1
            colours = np.where(bits, random.integers(240, 256, bits.shape), random.integers(0, 16, bits.shape))
            if i == HALVED:
                colours = colours[::2, ::2]
            save(paint(code(i), random), root / part / part / "images" / f"{name_of(i)}.jpg")
            save(colours.astype(np.uint8), root / part / part / "masks" / f"{name_of(i)}.bmp")
        if part == "TEST":
            save(np.zeros(SIZE, np.uint8), root / part / part / "masks" / "saliency" / "d_r_1_.bmp")
        save(paint(code(0), random), root / part / part / "images" / f"lonely_{part}_.jpg")
        first += count
        if archives:
            pack(root / part, root / f"{part}.zip")
    return root
