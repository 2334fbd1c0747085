"""A tiny COCO 2014 as its publisher ships it: three archives; 80 classes, polygons, crowds, overlaps."""

import json
from functools import cache
from pathlib import Path

import numpy as np

from datamodules.benchmarks.coco import CLASSES
from datamodules.episodes.dataset import Split
from tests.data.folder import paint
from tests.data.pack import covering, pack, rgb, save

SIZE = (136, 144)
MISSING = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # category ids that COCO leaves out
CATEGORIES = [i for i in range(1, 91) if i not in MISSING]
IMAGES = 60  # of each part; image i shows classes 4i .. 4i+3 (mod 80) in its quarters
YEARS = ("train2014", "val2014")
EMPTY = 900  # number of an image without an annotation


def number_of(i: int) -> int:
    return 9 + 7 * i


def file_name(year: str, number: int) -> str:
    return f"COCO_{year}_{number:012d}.jpg"


NEEDED = "train2014"
PARTIAL = {
    "instances_val2014.json": "instances_val2014.json",
    file_name("val2014", number_of(3)): file_name("val2014", number_of(3)),
}
NOTES = [f"{year}: {IMAGES + 1} images, {IMAGES} with annotations" for year in YEARS]


def mask(i: int) -> np.ndarray:
    """(H, W) uint8 index mask of image i."""
    index = np.zeros(SIZE, np.uint8)
    for quarter, (top, left) in enumerate([(0, 0), (0, 72), (68, 0), (68, 72)]):
        index[top : top + 64, left : left + 64] = (4 * i + quarter) % 80 + 1
    if i % 5 == 0:
        index[50:90, 40:60] = (4 * i + 9) % 80 + 1  # a crowd over the rest: 800 pixels, too few to count
    if i % 5 == 1:
        index[10:20, 10:50] = (4 * i + 2) % 80 + 1  # a second part of another object
    return index


@cache
def truth() -> dict[str, np.ndarray]:
    return {f"{year}/{file_name(year, number_of(i))}": mask(i) for year in YEARS for i in range(IMAGES)}


def images_of(class_id: int, split: Split) -> list[str]:
    return [name for name in covering(truth(), class_id) if name.startswith("val" if split == "test" else "train")]


def file_of(source: Path, image: str) -> Path:
    return source / image.split("/")[0] / image


def pixels(source: Path, image: str) -> np.ndarray:
    return rgb(file_of(source, image))


def box(top: int, left: int, height: int, width: int) -> list[int]:
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def annotations(i: int) -> list[dict]:
    """In the order in which they cover one another."""
    quarters = [[box(0, 0, 64, 64)], [box(0, 72, 64, 64)], [box(68, 0, 64, 64)], [box(68, 72, 64, 64)]]
    of_class = [(4 * i + q) % 80 for q in range(4)]
    if i % 5 == 1:
        quarters[2].append(box(10, 10, 10, 40))
    found = [{"segmentation": s, "class": c, "iscrowd": 0} for s, c in zip(quarters, of_class, strict=True)]
    if i % 5 == 0:
        crowd = np.zeros(SIZE, np.uint8)
        crowd[50:90, 40:60] = 1
        counts = np.diff(np.r_[0, np.flatnonzero(np.diff(crowd.T.ravel())) + 1, crowd.size]).tolist()
        found.append({"segmentation": {"counts": counts, "size": list(SIZE)}, "class": (4 * i + 9) % 80, "iscrowd": 1})
    return found


def write(root: Path, archives: bool = True) -> Path:
    random = np.random.default_rng(0)
    for year in YEARS:
        images, objects = [], []
        for i in range(IMAGES):
            image = paint(mask(i), random)
            save(image[..., 0] if i == 7 else image, root / year / year / file_name(year, number_of(i)))
            images.append(
                {"id": number_of(i), "file_name": file_name(year, number_of(i)), "height": SIZE[0], "width": SIZE[1]}
            )
            for a in annotations(i):
                category = CATEGORIES[a.pop("class")]
                objects.append(
                    {"id": len(objects) + 1, "image_id": number_of(i), "category_id": category, "area": 1.0, **a}
                )
        save(paint(np.zeros(SIZE, np.uint8), random), root / year / year / file_name(year, EMPTY))
        images.append({"id": EMPTY, "file_name": file_name(year, EMPTY), "height": SIZE[0], "width": SIZE[1]})
        categories = [{"id": i, "name": n, "supercategory": "thing"} for i, n in zip(CATEGORIES, CLASSES, strict=True)]
        content = {"info": {}, "images": images, "annotations": objects, "categories": categories}
        folder = root / "annotations_trainval2014" / "annotations"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"instances_{year}.json").write_text(json.dumps(content))
        (folder / f"captions_{year}.json").write_text("{}")
        if archives:
            pack(root / year, root / f"{year}.zip")
    if archives:
        pack(root / "annotations_trainval2014", root / "annotations_trainval2014.zip")
    return root
