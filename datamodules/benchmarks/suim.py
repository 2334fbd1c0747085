"""SUIM: underwater scenes; for testing only.

Home: https://irvlab.cs.umn.edu/resources/suim-dataset. Licence: none was found; for research.
Classes: 8, one of which is the water itself. 1,525 images for training and validation, 110 for testing; all images in
the source are used.

As published: train_val/images/*.jpg, train_val/masks/*.bmp; TEST/images, TEST/masks. In a mask, each colour channel is
one bit of the class id.
Prepared: images/*.jpg, masks/*.bmp; splits/test.json, for each class the images in which it covers at least 2,048
pixels.

Islam, Edge, Xiao, Luo, Mehtaz, Morse, Enan, Sattar: Semantic Segmentation of Underwater Imagery. IROS 2020.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.benchmarks.base import Benchmark, stems
from datamodules.errors import DatasetError
from datamodules.prepare.source import Source, place_all
from pmnet.segment.images import decode, rgb_array

# Class id in bits: red, green, blue
CLASSES = "background|divers|plants|wrecks|robots|reefs|fish|sea-floor".split("|")


class SUIMDataset(Benchmark):
    """SUIM; for testing only.

    Args:
        root: the prepared folder.
        splits: folder with lists to use instead of the prepared ones.
    """

    name = "suim"
    title = "SUIM"
    domain = "underwater"
    classes = tuple(CLASSES)
    obtain = "train_val.zip and TEST.zip, linked at https://irvlab.cs.umn.edu/resources/suim-dataset."
    wanted = ("*images/*.jpg", "*masks/*.bmp")

    def image_path(self, name: str) -> Path:
        return self.root / "images" / f"{name}.jpg"

    def mask_path(self, name: str) -> Path:
        return self.root / "masks" / f"{name}.bmp"

    def found(self) -> list[str]:
        return stems(self.root / "masks", ".bmp")

    def read_index(self, name: str) -> Tensor:
        rgb = rgb_array(decode(self.mask_path(name)))
        return torch.from_numpy((rgb >= 128) @ np.array([4, 2, 1], np.uint8) + 1)

    @classmethod
    def fill(cls, source: Source, ready: Path) -> list[str]:
        notes = []
        for images in source.folders("images", ".jpg"):
            masks = images.with_name("masks")
            names = [name for name in stems(images, ".jpg") if (masks / f"{name}.bmp").is_file()]
            place_all((images / f"{name}.jpg" for name in names), ready / "images", "images")
            place_all((masks / f"{name}.bmp" for name in names), ready / "masks", "masks")
            alone = sorted(set(stems(images, ".jpg")) - set(names))
            notes.append(
                f"{images.parent.name}: {len(names)} pairs" + (f"; without a mask: {', '.join(alone)}" if alone else "")
            )
        if not any((ready / "masks").glob("*.bmp")):
            raise DatasetError(
                f"No images/*.jpg with masks/*.bmp in {', '.join(map(str, source.paths))}. Download {cls.obtain}"
            )
        return notes
