"""Chest X-ray: lungs in the Montgomery and Shenzhen sets; for testing only.

Home: https://www.ncbi.nlm.nih.gov/pmc/articles/PMC4256233/; files:
https://www.kaggle.com/datasets/nikhilpandey360/chest-xray-masks-and-labels (needs a login).
Licence: the licences of the two sets, for research with citation.
Classes: lung. Montgomery has 138 images, all with masks; Shenzhen has 662 images, 566 with masks. The 566 images of the
paper must therefore be those of Shenzhen: `prefix=CHNCXR`.

As published: Lung Segmentation/CXR_png/X.png, with masks/X_mask.png (Shenzhen) or masks/X.png (Montgomery).
Prepared: CXR_png/ and masks/, only images with masks; splits/test.json.

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
    """Lungs in chest X-rays; for testing only.

    Args:
        root: the prepared folder.
        splits: folder with lists to use instead of the prepared ones.
        prefix: use only images whose names start with this; "CHNCXR" selects Shenzhen.
    """

    name = "chest_xray"
    title = "Chest X-ray"
    domain = "x-ray"
    classes = ("lung",)
    obtain = (
        "archive.zip from https://www.kaggle.com/datasets/nikhilpandey360/chest-xray-masks-and-labels (needs a free "
        "account). Needed inside: Lung Segmentation/CXR_png and Lung Segmentation/masks."
    )
    list_rule = "all images with a mask, in the order of the masks' file names"
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
        """Image name -> file name of its mask."""
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
    """Image name -> file name of its mask, in the order of the masks' names."""
    have = set(stems(images, ".png"))
    by_mask = {mask: mask.removesuffix("_mask") for mask in stems(masks, ".png")}
    return {image: f"{mask}.png" for mask, image in sorted(by_mask.items()) if image in have}
