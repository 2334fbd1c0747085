"""A tiny PASCAL VOC 2012 and SBD as their publishers ship them: two archives, palette masks, MATLAB files."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from datamodules.episodes.dataset import Split
from tests.data.folder import paint
from tests.data.pack import covering, halves, pack, rgb, save

SIZE = (84, 112)
VOC_VAL = [f"2007_{i:06d}" for i in range(100, 160)]
VOC_TRAIN = [f"2008_{i:06d}" for i in range(200, 220)]
SBD_ONLY = [f"2009_{i:06d}" for i in range(300, 340)]
SBD_TOO = [VOC_TRAIN[0], VOC_VAL[0]]  # annotated by both, differently
UNLABELLED = ["2010_000001", "2010_000002"]
IMAGES = Path("VOCtrainval_11-May-2012", "VOCdevkit", "VOC2012", "JPEGImages")
NEEDED = "JPEGImages"
PARTIAL = {"2007_000100.jpg": "2007_000100.jpg", "val.txt": "val.txt"}
NOTES = ["80 masks of VOC 2012", "40 masks of SBD, where VOC has none"]


def mask(name: str) -> np.ndarray:
    """(H, W) uint8 index mask: two classes side by side, VOC's with a border of 255, one in ten with a tiny third."""
    i = int(name[-6:])
    index = halves(i % 20 + 1, (i + 1) % 20 + 1, SIZE)
    if i % 10 == 3:
        index[:, :4] = (i + 7) % 20 + 1  # 336 pixels: too few to count
    if name not in SBD_ONLY:
        index[2:4, 2:-2] = index[-4:-2, 2:-2] = 255
    return index


@cache
def truth() -> dict[str, np.ndarray]:
    return {name: mask(name) for name in VOC_VAL + VOC_TRAIN + SBD_ONLY}


def images_of(class_id: int, split: Split) -> list[str]:
    return [name for name in covering(truth(), class_id) if (name in VOC_VAL) == (split == "test")]


def file_of(source: Path, image: str) -> Path:
    return source / IMAGES / f"{image}.jpg"


def pixels(source: Path, image: str) -> np.ndarray:
    return rgb(file_of(source, image))


def palette() -> list[int]:
    """VOC's colours: the bits of a value go to red, green, blue in turn, from the top bit down."""
    value, colours = np.arange(256), np.zeros((256, 3), int)
    for bit in range(8):
        colours |= ((value[:, None] >> (3 * bit + np.arange(3))) & 1) << (7 - bit)
    return colours.ravel().tolist()


def write(root: Path, archives: bool = True) -> Path:
    random = np.random.default_rng(0)
    images, sbd = root / IMAGES, root / "benchmark"
    year = images.parent
    dataset = sbd / "benchmark_RELEASE" / "dataset"
    for name in [*VOC_VAL, *VOC_TRAIN, *SBD_ONLY]:
        save(paint(mask(name), random), images / f"{name}.jpg")
    for name in UNLABELLED:
        save(paint(np.zeros(SIZE, np.uint8), random), images / f"{name}.jpg")
    for name in [*VOC_VAL, *VOC_TRAIN]:
        indexed = Image.fromarray(mask(name)).convert("P")
        indexed.putdata(mask(name).ravel().tolist())
        indexed.putpalette(palette())
        (year / "SegmentationClass").mkdir(exist_ok=True)
        indexed.save(year / "SegmentationClass" / f"{name}.png")
    lists = year / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part, names in (("train", VOC_TRAIN), ("val", VOC_VAL), ("trainval", sorted(VOC_TRAIN + VOC_VAL))):
        (lists / f"{part}.txt").write_text("".join(f"{n}\n" for n in names))
    (year / "Annotations").mkdir()
    (year / "Annotations" / f"{VOC_VAL[0]}.xml").write_text("<annotation/>\n")
    (dataset / "cls").mkdir(parents=True)
    for name in [*SBD_ONLY, *SBD_TOO]:
        index = mask(name) if name in SBD_ONLY else np.full(SIZE, 9, np.uint8)
        truths = {"Segmentation": index, "Boundaries": np.zeros((20, 1)), "CategoriesPresent": np.unique(index)}
        savemat(dataset / "cls" / f"{name}.mat", {"GTcls": truths}, do_compression=True)
    (dataset / "train.txt").write_text("".join(f"{n}\n" for n in [*SBD_ONLY, SBD_TOO[0]]))
    (dataset / "val.txt").write_text(f"{SBD_TOO[1]}\n")
    if archives:
        pack(root / IMAGES.parts[0], root / f"{IMAGES.parts[0]}.tar")
        pack(sbd, root / "benchmark.tgz")
    return root
