"""ISIC 2018, task 1: outlines of skin lesions in dermatoscopic images; for testing only.

Home: https://challenge.isic-archive.com/data/#2018. Licence: CC BY-NC 4.0, see the archives' LICENSE.txt.
Classes: one, as in the paper; or the three of PATNet, whose list has 2,594 images: `classes=3`.

As published: ISIC2018_Task1-2_Training_Input.zip (ISIC_0000000.jpg), ISIC2018_Task1_Training_GroundTruth.zip
(ISIC_0000000_segmentation.png, black and white).
Prepared: the two folders; splits/class_id.csv with a line ID,Class for each image (Class is empty if the list was
built without --download or --splits).

Codella et al.: Skin Lesion Analysis Toward Melanoma Detection 2018. arXiv:1902.03368.
Tschandl, Rosendahl, Kittler: The HAM10000 dataset. Scientific Data 2018.
"""

import csv
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.benchmarks.base import Areas, Benchmark, binary_mask, stems
from datamodules.episodes.dataset import Split
from datamodules.episodes.sampler import Names
from datamodules.errors import DatasetError
from datamodules.prepare.lists import patnet
from datamodules.prepare.source import Source, place_all, visible

IMAGES, MASKS = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
DIAGNOSES = ("melanoma", "nevus", "seborrheic_keratosis")


class ISICDataset(Benchmark):
    """Skin lesions; for testing only.

    Args:
        root: the prepared folder.
        splits: folder with lists to use instead of the prepared ones.
        classes: 1, as in the paper, or 3, as in PATNet.

    Raises:
        DatasetError: `classes` is neither 1 nor 3.
    """

    name = "isic"
    title = "ISIC2018"
    domain = "skin"
    obtain = (
        f"{IMAGES}.zip and {MASKS}.zip from https://challenge.isic-archive.com/data/#2018 (task 1, training data). "
        "--download fetches the list of classes."
    )
    wanted = ("*ISIC_*.jpg", "*_segmentation.png")
    list_rule = "all images, without their classes, which the files do not contain"
    list_downloads = {"class_id.csv": patnet("isic/class_id.csv")}
    published = "114e2ad838e99026d307b04ee7787710d97cc85de485364724c2db37d17e3146"

    def __init__(self, root: str, splits: str | None = None, classes: int = 1) -> None:
        super().__init__(root, splits)
        if classes not in (1, 3):
            raise DatasetError(f"classes of {self.title} must be 1 or 3 (as in PATNet), not {classes}.")
        self.classes = DIAGNOSES if classes == 3 else ("lesion",)

    @cached_property
    def by_class(self) -> list[Names]:
        """Sorted names of the images of each class."""
        if len(self.classes) == 1:
            return [Names(sorted(image for image, _ in self.lists))]
        unknown = [image for image, name in self.lists if name not in DIAGNOSES]
        if unknown:
            raise DatasetError(
                f"{self.list_folder}/class_id.csv gives {unknown[0]} none of the classes {', '.join(DIAGNOSES)} "
                f"({len(unknown)} such images). The three classes need PATNet's list: prepare with --download or "
                "--splits."
            )
        return [Names(sorted(image for image, name in self.lists if name == c)) for c in DIAGNOSES]

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        return self.by_class[class_id]

    @cached_property
    def class_of(self) -> dict[bytes, int]:
        """Encoded image name -> class id."""
        return {image.encode(): c for c, names in enumerate(self.by_class) for image in names}

    def read_lists(self, folder: Path) -> Any:
        path = folder / "class_id.csv"
        try:
            rows = list(csv.reader(self.list_text(path).splitlines()))
        except csv.Error as error:
            raise self.invalid(path, error) from error
        if not rows or any(len(row) != 2 for row in rows):
            raise DatasetError(f"{path} is not a table of ID,Class. Download it again.")
        return rows[1:]

    def write_lists(self, lists: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "class_id.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["ID", "Class"], *lists])

    def build_lists(self, areas: Areas) -> Any:
        return [[image, ""] for image in areas]

    def image_path(self, name: str) -> Path:
        return self.root / IMAGES / f"{name}.jpg"

    def mask_path(self, name: str) -> Path:
        return self.root / MASKS / f"{name}_segmentation.png"

    def found(self) -> list[str]:
        return stems(self.root / MASKS, "_segmentation.png")

    def read_index(self, name: str) -> Tensor:
        mask = binary_mask(self.mask_path(name))
        return mask if len(self.classes) == 1 else mask * (1 + self.class_of[name.encode()])

    @classmethod
    def fill(cls, source: Source, ready: Path) -> list[str]:
        images = place_all(visible(source.need(IMAGES, ".jpg", of=f"{IMAGES}.zip"), ".jpg"), ready / IMAGES, "images")
        masks = place_all(visible(source.need(MASKS, ".png", of=f"{MASKS}.zip"), ".png"), ready / MASKS, "masks")
        return [f"{images} images, {masks} masks; the paper counts 2,596 images, PATNet's list 2,594"]
