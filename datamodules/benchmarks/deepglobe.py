"""Deepglobe: land cover in satellite images, cut into tiles as in PATNet; for testing only.

Home: http://deepglobe.org; files: https://www.kaggle.com/datasets/balraj98/deepglobe-land-cover-classification-dataset
(needs a login). Licence: DigitalGlobe's, for research. Classes: 6; unknown land belongs to none of them.

As published: train/<id>_sat.jpg and <id>_mask.png, 803 images of 2448x2448 with coloured masks (valid/ and test/ have
no masks).
Prepared: images/<id>_<row><column>.png, the tiles of a 6x6 grid with unchanged pixels; masks/<same>.png, index masks;
splits/test.json, the tiles of each class.

Rule: a tile is dropped if its mask has only one colour, or if any of its colours covers 4.8% of it or less. Unknown
land counts as a colour, as in PATNet's script. PATNet's paper reports 5,666 tiles; its script is said to give 9,175.

Demir, Koperski, Lindenbaum, Pang, Huang, Basu, Hughes, Tuia, Raskar: DeepGlobe 2018. CVPR Workshops 2018.
Lei, Zhang, He, Chen, Du, Lu: Cross-Domain Few-Shot Semantic Segmentation. ECCV 2022 (the tiles).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.benchmarks.base import Areas, Benchmark, stems, write_png
from datamodules.errors import DatasetError
from datamodules.prepare.source import Source
from datamodules.progress import track
from pmnet.segment.images import decode, rgb_array

GRID = 6
SMALLEST_SHARE = 0.048
COLOURS = {
    "unknown": (0, 0, 0),
    "urban": (0, 255, 255),
    "agriculture": (255, 255, 0),
    "rangeland": (255, 0, 255),
    "forest": (0, 255, 0),
    "water": (0, 0, 255),
    "barren": (255, 255, 255),
}
TOLERANCE = 16  # largest distance of a mask channel from 0 or 255


class DeepglobeDataset(Benchmark):
    """Deepglobe tiles; for testing only.

    Args:
        root: the prepared folder.
        splits: folder with lists to use instead of the prepared ones.
    """

    name = "deepglobe"
    title = "Deepglobe"
    domain = "satellite"
    classes = tuple(COLOURS)[1:]
    obtain = (
        "archive.zip from https://www.kaggle.com/datasets/balraj98/deepglobe-land-cover-classification-dataset (needs "
        "a free account). Needed inside: train/<id>_sat.jpg and <id>_mask.png."
    )
    list_rule = "every tile that shows the class"
    wanted = ("*_sat.jpg", "*_mask.png")

    def build_lists(self, areas: Areas) -> Any:
        return {name: [tile for tile, found in areas.items() if c in found] for c, name in enumerate(self.classes)}

    def image_path(self, name: str) -> Path:
        return self.root / "images" / f"{name}.png"

    def mask_path(self, name: str) -> Path:
        return self.root / "masks" / f"{name}.png"

    def found(self) -> list[str]:
        return stems(self.root / "masks", ".png")

    @classmethod
    def fill(cls, source: Source, ready: Path) -> list[str]:
        masks = {p.name.removesuffix("_mask.png"): p for p in sorted(source.files("_mask.png"))}
        if not masks:
            raise DatasetError(f"No <id>_mask.png in {', '.join(map(str, source.paths))}. Download {cls.obtain}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = pool.map(partial(cut, ready), *zip(*sorted(masks.items()), strict=True))
            kept = sum(track(jobs, "Cutting tiles", len(masks)))
        return [
            f"{len(masks)} images cut into {GRID}x{GRID} tiles",
            f"tiles with one colour, or with a colour of {SMALLEST_SHARE:.1%} or less, dropped (unknown is a colour)",
            f"{kept} tiles kept of {len(masks) * GRID**2}; PATNet's paper: 5,666",
        ]


def cut(ready: Path, number: str, mask_path: Path) -> int:
    """Cuts an image and its mask into tiles and writes those that pass the rule.

    Args:
        ready: the folder to fill.
        number: id of the image.
        mask_path: the image's mask; the image is beside it.

    Returns:
        Number of tiles written.

    Raises:
        DatasetError: image and mask differ in size, or the mask has an unknown colour.
        ImageError: a file cannot be read.
    """
    image_path = mask_path.with_name(f"{number}_sat.jpg")
    image, index = rgb_array(decode(image_path)), index_of(mask_path)
    if image.shape[:2] != index.shape:
        raise DatasetError(
            f"{image_path} and {mask_path} differ in size: {image.shape[:2]} and {index.shape}. Download them again."
        )
    height, width = index.shape
    rows, columns = [[i * side // GRID for i in range(GRID + 1)] for side in (height, width)]
    kept = 0
    for i in range(GRID):
        for j in range(GRID):
            tile = np.s_[rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
            shares = np.bincount(index[tile].ravel()) / index[tile].size
            shares = shares[shares > 0]
            if len(shares) > 1 and shares.min() > SMALLEST_SHARE:
                write_png(image[tile], ready / "images" / f"{number}_{i}{j}.png")
                write_png(index[tile], ready / "masks" / f"{number}_{i}{j}.png")
                kept += 1
    return kept


def index_of(path: Path) -> np.ndarray:
    """Reads a coloured mask: (H, W) uint8, class id + 1, 0 = unknown land. Raises DatasetError for any other colour."""
    rgb = rgb_array(decode(path))
    high = rgb >= 128
    code = high @ np.array([4, 2, 1], np.uint8)
    place = np.full(8, 255, np.uint8)
    for value, colour in enumerate(COLOURS.values()):
        place[(np.array(colour) >= 128) @ np.array([4, 2, 1])] = value
    index = place[code]
    strange = (index == 255) | (np.where(high, 255 - rgb, rgb).max(axis=2) > TOLERANCE)
    if strange.any():
        y, x = np.argwhere(strange)[0]
        raise DatasetError(
            f"{path} has the colour {tuple(rgb[y, x].tolist())} at row {y}, column {x} ({strange.sum()} such pixels). "
            f"Download it again. Known colours: {', '.join(f'{name} {colour}' for name, colour in COLOURS.items())}."
        )
    return index
