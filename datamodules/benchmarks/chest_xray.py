"""Chest X-ray: lungs in the Montgomery and Shenzhen sets; tested on only.

Home: https://www.ncbi.nlm.nih.gov/pmc/articles/PMC4256233/; files:
https://www.kaggle.com/datasets/nikhilpandey360/chest-xray-masks-and-labels (login). Licence: the two sets' own, for
research with citation. Classes: lung. 138 images of Montgomery and 662 of Shenzhen; 138 and 566 of them have masks, so
that the paper's 566 images must be Shenzhen's: `prefix=CHNCXR`.

As published: Lung Segmentation/CXR_png/X.png and masks/X_mask.png (Shenzhen) or masks/X.png (Montgomery).
Prepared: CXR_png/ and masks/, the pairs alone; splits/test.json.

Jaeger, Karargyris, Candemir, Folio, Siegelman, Callaghan, ...: Automatic Tuberculosis Screening Using Chest
Radiographs. IEEE Transactions on Medical Imaging 2014.
Candemir, Jaeger, Palaniappan, ...: Lung Segmentation in Chest Radiographs. IEEE Transactions on Medical Imaging 2014.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.benchmarks.base import Areas, Benchmark, binary_mask, stems
from datamodules.prepare.source import Source, place_all


class ChestXrayDataset(Benchmark):
    """
    Args:
        prefix: only images whose names begin so; "CHNCXR" is Shenzhen alone.
    """

    name = "chest_xray"
    title = "Chest X-ray"
    domain = "x-ray"
    classes = ("lung",)
    obtain = (
        "archive.zip from https://www.kaggle.com/datasets/nikhilpandey360/chest-xray-masks-and-labels (needs a free "
        "account): Lung Segmentation/CXR_png and Lung Segmentation/masks are used."
    )
    list_rule = "every pair, in the order of the masks' file names"
    wanted = ("*CXR_png/*.png", "*masks/*.png")

    def __init__(self, root: str, splits: str | None = None, prefix: str = "") -> None:
        super().__init__(root, splits)
        self.prefix = prefix

    @cached_property
    def lists(self) -> Any:
        return {
            c: [n for n in names if n.startswith(self.prefix)] for c, names in self.read_lists(self.list_folder).items()
        }

    def build_lists(self, areas: Areas) -> Any:
        return {"lung": list(areas)}

    @cached_property
    def masks(self) -> dict[str, str]:
        """Image -> its mask's file name."""
        return pairs(self.root / "CXR_png", self.root / "masks")

    def image_path(self, name: str) -> Path:
        return self.root / "CXR_png" / f"{name}.png"

    def mask_path(self, name: str) -> Path:
        return self.root / "masks" / self.masks.get(name, f"{name}_mask.png")

    def found(self) -> list[str]:
        return list(self.masks)

    def read_index(self, name: str) -> Tensor:
        return binary_mask(self.mask_path(name))

    @classmethod
    def fill(cls, source: Source, ready: Path) -> list[str]:
        images, masks = (source.need(name, ".png", of="archive.zip") for name in ("CXR_png", "masks"))
        found = pairs(images, masks)
        place_all((images / f"{name}.png" for name in found), ready / "CXR_png", "images")
        place_all((masks / mask for mask in found.values()), ready / "masks", "masks")
        alone = sorted(set(stems(images, ".png")) - found.keys())
        shenzhen = sum(mask.endswith("_mask.png") for mask in found.values())
        return [
            f"{len(found)} pairs ({shenzhen} masks named X_mask.png, {len(found) - shenzhen} X.png); the paper: 566",
            f"{len(alone)} images without a mask left out: {', '.join(alone) or 'none'}",
        ]


def pairs(images: Path, masks: Path) -> dict[str, str]:
    """Image name -> its mask's file name, in the order of the masks' names."""
    have = set(stems(images, ".png"))
    by_mask = {mask: mask.removesuffix("_mask") for mask in stems(masks, ".png")}
    return {image: f"{mask}.png" for mask, image in sorted(by_mask.items()) if image in have}
