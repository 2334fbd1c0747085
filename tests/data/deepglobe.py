"""A tiny Deepglobe as Kaggle ships it: archive.zip, colours as masks; here images of 6x6 tiles of 34x34."""

from functools import cache
from pathlib import Path

import numpy as np

from datamodules.episodes.dataset import Split
from tests.data.folder import paint
from tests.data.pack import covering, pack, rgb, save

TILE = 34
NUMBERS = [119, 2334, 100694, 6399, 855]
NEEDED = "<id>_mask.png"
PARTIAL = {"2334_sat.jpg": "2334_sat.jpg"}
COLOURS = np.array(  # unknown, urban, agriculture, rangeland, forest, water, barren
    [[0, 0, 0], [0, 255, 255], [255, 255, 0], [255, 0, 255], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8
)


def tile(number: int, i: int, j: int) -> np.ndarray:
    """(34, 34) uint8 index mask of a tile: of one class, of two, with a corner of a third, or with unknown land."""
    kind, first = (number + i + j) % 4, (number + 2 * i + j) % 6 + 1
    mask = np.full((TILE, TILE), first, np.uint8)
    if kind:
        mask[:, TILE // 2 :] = first % 6 + 1
    if kind == 2:
        mask[:7, :7] = (first + 1) % 6 + 1  # 49 of 1,156 pixels: 4.2%
    if kind == 3:
        mask[-12:] = 0
    return mask


def kept(number: int, i: int, j: int) -> bool:
    """The rule, counted plainly: more than one colour, none under 4.8%."""
    counts = [int((tile(number, i, j) == v).sum()) for v in range(7)]
    return sum(c > 0 for c in counts) > 1 and all(c > 0.048 * TILE**2 for c in counts if c)


@cache
def truth() -> dict[str, np.ndarray]:
    places = [(n, i, j) for n in NUMBERS for i in range(6) for j in range(6)]
    return {f"{n}_{i}{j}": tile(n, i, j) for n, i, j in places if kept(n, i, j)}


NOTES = [f"{len(truth())} tiles kept of 180", "PATNet's paper: 5,666"]


def images_of(class_id: int, split: Split) -> list[str]:
    return covering(truth(), class_id, pixels=1)


def file_of(source: Path, image: str) -> Path:
    return source / "archive" / "train" / f"{image.split('_')[0]}_sat.jpg"


def pixels(source: Path, image: str) -> np.ndarray:
    row, column = (TILE * int(place) for place in image[-2:])
    return rgb(file_of(source, image))[row : row + TILE, column : column + TILE]


def write(root: Path, archives: bool = True) -> Path:
    random = np.random.default_rng(0)
    whole = root / "archive"
    for number in NUMBERS:
        mask = np.block([[tile(number, i, j) for j in range(6)] for i in range(6)])
        save(paint(mask, random), whole / "train" / f"{number}_sat.jpg", quality=95)
        save(COLOURS[mask], whole / "train" / f"{number}_mask.png")
    save(np.zeros((60, 60, 3), np.uint8), whole / "valid" / "77_sat.jpg")
    (whole / "class_dict.csv").write_text("name,r,g,b\nurban_land,0,255,255\n")
    (whole / "metadata.csv").write_text("image_id,split,sat_image_path,mask_path\n")
    if archives:
        pack(whole, root / "archive.zip")
    return root
