"""SUIM: masks in RGB bits, some of another size than their image."""

import json

import numpy as np
from PIL import Image

from datamodules.benchmarks.suim import SUIMDataset
from datamodules.prepare.ready import prepare
from tests.data import suim


def test_mask_of_another_size_is_noted(prepared):
    rules = json.loads((prepared("suim") / "manifest.json").read_text())["rules"]
    noted = [rule for rule in rules if "another size" in rule]
    assert len(noted) == 1
    assert noted[0].startswith("1 masks")
    assert noted[0].endswith(f": {suim.name_of(suim.HALVED)}")


def test_real_images_are_prepared_and_read(shared, tmp_path):
    prepare(SUIMDataset, [shared / "data" / "suim"], tmp_path, None, download=False)
    dataset = SUIMDataset(str(tmp_path / "suim"))
    assert len(dataset.found()) == 8
    for name in dataset.found():
        rgb = np.array(Image.open(shared / "data" / "suim" / "masks" / f"{name}.bmp").convert("RGB")) > 127
        code = 4 * rgb[..., 0] + 2 * rgb[..., 1] + rgb[..., 2]
        assert np.array_equal(dataset.read_index(name).numpy(), code + 1)
    assert dataset.target_classes(dataset, "all") == [0, 1, 3, 4, 5, 6]
