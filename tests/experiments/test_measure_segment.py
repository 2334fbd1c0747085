"""Figures of the Segmenter: which photos are drawn, and the measures against plain loops."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import measure_segment
from experiments.measure_segment import Seen, auroc, iou, summary, tasks
from tests.pmnet.segment.test_segmenter import picture, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 photos, of which those of even number show class 1, and those that 4 divides class 2 too."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for k in range(20):
        image, mask = picture(k)
        index = mask.int().numpy() * (k % 2 == 0)
        index[:20] += 2 * (index[:20] == 0) * (k % 4 == 0)
        write(tmp_path / "images" / f"{k}.png", image)
        Image.fromarray(index.astype(np.uint8)).save(tmp_path / "masks" / f"{k}.png")
    return tmp_path


def test_each_photo_is_drawn_once_and_shows_what_it_should(folder: Path) -> None:
    drawn = list(tasks(folder, classes=5, photos=2, shots=3, seed=0))
    assert [task.value for task in drawn] == [1, 2]
    for task in drawn:
        assert [len(part) for part in task[1:]] == [3, 2, 2, measure_segment.NEGATIVES]
        names = [each.name for part in task[1:] for each in part]
        assert len(set(names)) == len(names)
        for part, shows in zip(task[1:], (True, True, False, False), strict=True):
            assert all((each.masks() == task.value).any() == shows for each in part)


@pytest.mark.parametrize("seed", range(5))
def test_measures_are_those_of_plain_loops(seed: int) -> None:
    random = np.random.default_rng(seed)
    masks, truths = random.random((2, 12, 50)) < 0.4
    truths[6:] = False
    scores = random.integers(0, 8, 12) / 8
    seen = [
        Seen(k < 6, float(score), int(mask.sum()), int(truth.sum()), int((mask & truth).sum()))
        for k, (score, mask, truth) in enumerate(zip(scores, masks, truths, strict=True))
    ]
    assert iou(seen, gate=False) == pytest.approx((masks & truths).sum() / (masks | truths).sum())
    gated = masks & (scores >= 0.5)[:, None]
    assert iou(seen, gate=True) == pytest.approx((gated & truths).sum() / (gated | truths).sum())
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(scores[:6], scores[6:])]
    assert auroc(seen) == pytest.approx(np.mean(wins))
    told = [f"{np.mean(scores[:6] >= 0.5):.0%}", f"{np.mean(scores[6:] < 0.5):.0%}"]
    assert summary([seen])[:2] == told


@pytest.mark.slow
def test_command_prints_its_tables(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_segment, "SETTINGS", [(1, 0, False)])
    words = [str(folder), "--head", "nearest", "--classes", "1", "--photos", "2"]
    monkeypatch.setattr(sys, "argv", ["measure_segment", *words])
    measure_segment.main()
    printed = capsys.readouterr().out
    assert printed.startswith("a; 2 photos with and without each")
    assert "| 1 | 0 | squeezed |" in printed
    assert "| box |" in printed
    compared = [line.split("|")[1].strip() for line in printed.split("| head, 3 examples")[1].splitlines()[2:]]
    assert compared == ["pmnet_lite", "prototype", "nearest"]
