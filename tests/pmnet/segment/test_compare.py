"""Heads compared on one's own examples, against fitting and predicting with each of them left out."""

from pathlib import Path

import pytest
from PIL import Image

from pmnet.errors import SettingError
from pmnet.segment.compare import compare, crossed
from pmnet.segment.segmenter import Segmenter
from tests.pmnet.segment.test_folder import command
from tests.pmnet.segment.test_segmenter import HSNET, PMNET, PROTOTYPE, made, picture, write


@pytest.mark.parametrize("model", [PMNET, PROTOTYPE, HSNET], ids=["pmnet", "prototype", "hsnet"])
def test_score_is_that_of_predictions_by_the_other_examples(model: dict) -> None:
    built = made(model)
    pairs = [picture(seed, 64, 64) for seed in range(4)]
    both = either = 0
    for k, (image, mask) in enumerate(pairs):
        segmenter = Segmenter(built, "cpu").fit(pairs[:k] + pairs[k + 1 :])
        found = segmenter.predict(image, tile=None, gate=False).mask == 1
        both += (found & (mask.numpy() == 1)).sum()
        either += (found | (mask.numpy() == 1)).sum()
    assert crossed(Segmenter(built, "cpu"), "object", pairs) == both / either


def test_class_with_one_example_is_left_out() -> None:
    pairs = [picture(seed) for seed in range(2)]
    found = compare({"cat": pairs, "cow": pairs[:1]}, ["prototype"], "cpu")
    assert list(found["prototype"]) == ["cat"]
    with pytest.raises(SettingError, match="at least two examples"):
        compare({"cow": pairs[:1]}, ["prototype"], "cpu")


def folder(root: Path) -> Path:
    """Two examples of one class and one of another, as folders of images and masks."""
    for name, number in (("cat", 0), ("cat", 1), ("cow", 2)):
        image, mask = picture(number)
        write(root / name / f"{number}.jpg", image)
        Image.fromarray((mask * 255).numpy()).save(root / name / f"{number}.png")
    return root


@pytest.mark.slow
def test_command_names_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = folder(tmp_path / "examples")
    assert command("compare", "--support", examples, "--device", "cpu") == 0
    output = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line}
    scores = {head: float(lines[head][1]) for head in ("pmnet_lite", "prototype", "nearest")}
    assert f"Best: {max(scores, key=scores.get)}. Use it: pmnet segment --head" in output
    assert "Left out, as they have one example: cow." in output
    for words, message in ((("--heads", "cow"), "no file, folder or method 'cow'"), (("--support", "x"), "no folder")):
        assert command("compare", "--support", examples, *words) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ")
        assert error.count("\n") == 1
        assert message in error
