"""Heads compared on one's own examples, against fitting and predicting with each of them left out."""

from pathlib import Path

import pytest
from PIL import Image

from pmnet.errors import SettingError
from pmnet.segment import compare as module
from pmnet.segment.compare import compare
from pmnet.segment.marks import Box
from pmnet.segment.segmenter import Segmenter
from tests.pmnet.segment.test_folder import command
from tests.pmnet.segment.test_segmenter import HSNET, PMNET, PROTOTYPE, made, picture, write


@pytest.mark.parametrize("model", [PMNET, PROTOTYPE, HSNET], ids=["pmnet", "prototype", "hsnet"])
def test_score_is_that_of_predictions_by_the_other_examples(model: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    built = made(model)
    monkeypatch.setattr(Segmenter, "load", lambda head, device, keep_aspect: Segmenter(built, "cpu", keep_aspect))
    pairs = [picture(seed) for seed in range(4)]
    for _, mask in pairs:
        mask[:10] = 255  # to be ignored
    for keep_aspect in (False, True):
        both = either = 0
        for k, (image, mask) in enumerate(pairs):
            segmenter = Segmenter(built, "cpu", keep_aspect).fit(pairs[:k] + pairs[k + 1 :])
            found = segmenter.predict(image, tile=None, gate=False).mask[10:] == 1
            true = mask.numpy()[10:] == 1
            both, either = both + (found & true).sum(), either + (found | true).sum()
        got = compare({"object": pairs}, ["any"], "cpu", keep_aspect)
        assert got == {"any": {"object": both / either}}


def test_first_eight_are_segmented_by_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(module, "overlap", lambda segmenter, name, pairs, k: asked.append((len(pairs), k)) or (1, 2))
    assert compare({"cat": [picture(0)] * 11}, ["prototype"], "cpu") == {"prototype": {"cat": 0.5}}
    assert asked == [(11, k) for k in range(8)]


def test_mark_is_refused() -> None:
    image, mask = picture(0)
    with pytest.raises(SettingError, match="give masks of 'cat', not boxes"):
        compare({"cat": [(image, Box(2, 2, 30, 30)), (image, mask)]}, ["prototype"], "cpu")


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


@pytest.mark.parametrize("scores", [(0.2, 0.4, 0.3), (0.4, 0.4, 0.1)])
def test_segment_takes_the_best_head_and_of_equal_ones_the_first(
    scores: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples, score_of, loaded = folder(tmp_path / "examples"), dict(zip(module.HEADS, scores, strict=True)), []
    monkeypatch.setattr(
        module, "compare", lambda supports, heads, *_: {head: {"cat": score_of[head]} for head in heads}
    )

    def load(head: str, *_: object) -> Segmenter:
        loaded.append(head)
        return Segmenter(made(PROTOTYPE), "cpu")

    monkeypatch.setattr(Segmenter, "load", load)
    words = ("--support", examples, "--images", examples, "--out", tmp_path / "out")
    assert command("segment", "--head", "best", *words) == 0
    assert loaded == [max(score_of, key=lambda head: score_of[head])]
    assert "Left out, as they have one example: cow." in capsys.readouterr().out


def test_best_of_single_examples_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = folder(tmp_path / "examples")
    (examples / "cat" / "1.jpg").unlink()
    (examples / "cat" / "1.png").unlink()
    words = ("--support", examples, "--images", examples, "--out", tmp_path / "x")
    assert command("segment", "--head", "best", *words) == 1
    assert capsys.readouterr().err == (
        "Error: To compare heads, give at least two examples of a class: each is segmented by the others.\n"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_command_names_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = folder(tmp_path / "my examples")
    assert command("compare", "--support", examples, "--device", "cpu") == 0
    output = capsys.readouterr().out
    names, scores = (
        next(line.split() for line in output.splitlines() if line.startswith(x)) for x in ("class", "mean")
    )
    best = max(zip(names[2:], map(float, scores[1:]), strict=True), key=lambda pair: pair[1])[0]
    assert names[2:] == ["pmnet_lite", "prototype", "nearest"]
    assert f"pmnet segment --head {best} --support '{examples}' --images" in output
    assert "Left out, as they have one example: cow." in output
    words = ("--support", examples, "--images", examples / "cow", "--out", tmp_path / "out")
    assert command("segment", "--head", "best", *words, "--device", "cpu") == 0
    assert f"negatives: 0; head: {best}." in capsys.readouterr().out
    for words, message in (
        (("--heads", "cow"), "no file, folder or method 'cow'"),
        (("--heads", "best", "nearest"), "A folder of that name is ./best"),
        (("--support", "x"), "no folder"),
    ):
        assert command("compare", "--support", examples, *words) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ")
        assert error.count("\n") == 1
        assert message in error
