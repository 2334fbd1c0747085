"""Deepglobe: masks in colours."""

import numpy as np
import pytest
from PIL import Image

from datamodules.benchmarks.deepglobe import DeepglobeDataset
from tests.data import deepglobe


@pytest.mark.parametrize(
    "colour, says", [((10, 200, 30), r"\(10, 200, 30\) at row 5, column 9"), ((255, 0, 0), r"\(255, 0, 0\)")]
)
def test_unknown_colour_of_a_mask_is_shown(colour, says, refuses, tmp_path):
    source = deepglobe.write(tmp_path / "source", archives=False)
    path = next(source.rglob("855_mask.png"))
    mask = np.array(Image.open(path))
    mask[5, 9] = colour
    Image.fromarray(mask).save(path)
    refuses(DeepglobeDataset, source, f"855_mask.png has the colour {says}.*urban")
