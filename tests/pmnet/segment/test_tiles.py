"""Large images: tiles against a plain loop over all tiles, and memory watched from outside."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pmnet.errors import SettingError
from pmnet.segment.segmenter import Segmenter
from pmnet.segment.tiles import OVERLAP, extent, steps
from tests.conftest import ROOT
from tests.pmnet.segment.test_segmenter import PROTOTYPE, made, picture


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 128, 1000, 4001])
def test_steps_cover_each_pixel_once(length: int) -> None:
    owned = np.zeros(length, int)
    for start, end, first, last in steps(length, 64):
        assert 0 <= start <= first < last <= end <= length
        assert end - start == min(length, 64)
        owned[first:last] += 1
        inside = (first == 0 or first - start >= 64 * OVERLAP / 2 - 1) and (
            last == length or end - last >= 64 * OVERLAP / 2 - 1
        )
        assert inside  # each pixel is at least half an overlap away from a cut
    assert (owned == 1).all()


@pytest.mark.slow
def test_joined_tiles_are_those_of_a_plain_loop() -> None:
    segmenter = Segmenter.load("prototype", "cpu").fit({"a": [picture(0)], "b": [picture(1)]})
    image = torch.cat([torch.cat([picture(k)[0], picture(k + 1)[0]], 2) for k in (2, 4)], 1)
    result = segmenter.predict(image, tile=100, gate=False)
    for (top, bottom, upper, lower), (left, right, first, last) in (
        (rows, columns) for rows in steps(192, 100) for columns in steps(256, 100)
    ):
        piece = segmenter.predict(image[:, top:bottom, left:right], tile=None, gate=False)
        owned = np.s_[upper - top : lower - top, first - left : last - left]
        assert np.array_equal(result.mask[upper:lower, first:last], piece.mask[owned])
        assert np.array_equal(result.score[upper:lower, first:last], piece.score[owned])


def test_auto_cuts_images_more_than_twice_as_large_as_the_supports() -> None:
    segmenter = Segmenter.load("prototype", "cpu").fit([picture(0, 96, 128)])
    sides = {width: segmenter.tile_side(torch.zeros(3, 50, width), "auto") for width in (100, 256, 257, 1000)}
    assert sides == {100: None, 256: None, 257: 128, 1000: 128}
    assert segmenter.tile_side(torch.zeros(3, 50, 1000), None) is None
    assert segmenter.tile_side(torch.zeros(3, 50, 80), 100) is None
    for wrong in ("big", 5, -1, 2.5):
        with pytest.raises(SettingError, match="tile must be"):
            segmenter.predict(torch.zeros(3, 50, 80), wrong)  # type: ignore[arg-type]


def spots(size: tuple[int, int], places: list[tuple[int, int]], side: int) -> tuple[Tensor, Tensor]:
    """Noise with striped squares at places y, x, and their mask."""
    image = torch.randint(0, 90, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(size, dtype=torch.uint8)
    for y, x in places:
        mask[y : y + side, x : x + side] = 1
    stripes = (torch.arange(size[1]) // 4 % 2 * 120 + 130).to(torch.uint8)
    return torch.where(mask.bool(), stripes.expand(3, *size), image), mask


def test_small_objects_in_large_supports_are_shown_closely(tmp_path: Path) -> None:
    segmenter = Segmenter(made(PROTOTYPE, size=64), "cpu")  # an image is large from 256 pixels on
    image, mask = spots((400, 600), [(300, 500), (20, 40)], 40)
    shown = segmenter.fit([(image, mask)], negatives=[image[:, :200]]).shown["object"]
    assert shown.close
    assert shown.close.side == 3 * 40
    areas = shown.close.masks.flatten(1).float().mean(1)
    assert areas[0] == pytest.approx(1 / 9, rel=0.1)
    assert areas[1:].tolist() == [0, 0]  # a part of the support without it, and the negative
    query, true = spots((400, 600), [(100, 300)], 40)
    assert segmenter.tile_side(query, "auto") == 120
    closely, whole = (iou(segmenter.predict(query, tile, gate=False).mask, true) for tile in ("auto", None))
    assert closely > 0.25 > 10 * whole
    segmenter.save(tmp_path / "a.safetensors")
    again = Segmenter.load(tmp_path / "a.safetensors", "cpu")
    assert np.array_equal(again.predict(query).score, segmenter.predict(query).score)
    assert again.described() == segmenter.described()


def iou(mask: np.ndarray, true: Tensor) -> float:
    return float(((mask == 1) & (true.numpy() == 1)).sum() / ((mask == 1) | (true.numpy() == 1)).sum())


def test_supports_that_are_shown_whole() -> None:
    segmenter = Segmenter(made(PROTOTYPE, size=64), "cpu")
    for image, mask in (spots((200, 250), [(9, 9)], 20), spots((400, 600), [(9, 9)], 200)):  # small; large object
        assert segmenter.fit([(image, mask)]).shown["object"].close is None


def test_object_that_resizing_would_lose_is_kept() -> None:
    image, mask = spots((200, 250), [(50, 51)], 1)
    shown = Segmenter(made(PROTOTYPE, size=64), "cpu").fit([(image, mask)]).shown["object"]
    assert np.argwhere(shown.masks[0].numpy()).tolist() == [[16, 13]]  # 50 / 200 * 64, 51 / 250 * 64


@pytest.mark.parametrize("seed", range(5))
def test_extent_counts_runs(seed: int) -> None:
    mask = np.random.default_rng(seed).random((20, 30)) < 0.6
    means = []
    for lines in (mask, mask.T):
        runs = [len(run) for line in lines for run in "".join("x" if on else " " for on in line).split()]
        means.append(sum(n * n for n in runs) / sum(runs))
    assert extent(mask) == pytest.approx(max(means))


MEASURE = """
import resource, sys
from pmnet.segment.segmenter import Segmenter
from tests.pmnet.segment.test_segmenter import picture
segmenter = Segmenter.load("prototype", "cpu").fit([picture(0, 300, 400)])
segmenter.predict(picture(1, 300, 400)[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = segmenter.predict(sys.argv[1], tile=1000)
print(result.mask.shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_of_48_megapixels_is_that_of_the_image(tmp_path: Path) -> None:
    """The image itself takes 137 MB as it is read, once more as it is decoded; the results 137 MB."""
    values = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(values).resize((8000, 6000)).save(tmp_path / "a.jpg")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "a.jpg"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shape, megabytes = done.stdout.rsplit(maxsplit=1)
    assert shape == "(6000, 8000)"
    assert int(megabytes) < 700
