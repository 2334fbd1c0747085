"""Folders of images: files written, interrupted runs, broken images; COCO masks as pycocotools reads them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from pmnet.cli import main
from pmnet.errors import SettingError
from pmnet.segment.folder import overlay, palette, segment_folder
from pmnet.segment.segmenter import Segmenter
from tests.conftest import ROOT
from tests.pmnet.segment.test_segmenter import picture, write

SHOWN = {"cat": [picture(0)], "dog": [picture(1)]}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos in two folders, one broken file among them."""
    for name, seed in (("a.png", 2), ("deep/a.jpg", 3), ("deep/b.png", 4)):
        write(tmp_path / "photos" / name, picture(seed)[0])
    (tmp_path / "photos" / "broken.jpg").write_text("no image")
    return tmp_path / "photos"


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter.load("prototype", "cpu").fit(SHOWN)


def rows(out: Path) -> dict[str, list[list[str]]]:
    with (out / "results.csv").open(newline="") as file:
        found: dict[str, list[list[str]]] = {}
        for row in list(csv.reader(file))[1:]:
            found.setdefault(row[0], []).append(row)
    return found


def test_masks_table_and_overlays(photos: Path, segmenter: Segmenter, capsys: pytest.CaptureFixture[str]) -> None:
    out = photos.parent / "out"
    assert segment_folder(segmenter, photos, out, gate=False) == 1
    found = rows(out)
    assert found.keys() == {"a", "deep/a", "deep/b", "broken"}
    assert "broken.jpg cannot be read" in found.pop("broken")[0][-1]
    assert capsys.readouterr().err.count("broken.jpg cannot be read") == 1
    for name, lines in found.items():
        mask = np.asarray(Image.open(out / f"{name}.png"))
        (photo,) = photos.glob(f"{name}.*")
        result = segmenter.predict(photo, gate=False)
        assert np.array_equal(mask, result.mask)
        assert [line[1] for line in lines] == ["cat", "dog"]
        assert [int(line[2]) for line in lines] == [(mask == k).sum() for k in (1, 2)]
        assert [float(line[3]) for line in lines] == pytest.approx([(mask == k).mean() for k in (1, 2)], abs=1e-6)
        assert [float(line[4]) for line in lines] == pytest.approx(list(result.presences.values()), abs=1e-4)
        assert Image.open(out / "overlays" / f"{name}.jpg").size == Image.open(photo).size


def test_repeated_run_goes_on(photos: Path, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    out = photos.parent / "out"
    assert segment_folder(segmenter, photos, out) == 1
    before = rows(out)
    write(photos / "broken.jpg", picture(5)[0])
    (out / "deep" / "b.png").unlink()
    asked: list[int] = []
    whole = segmenter.predict
    monkeypatch.setattr(segmenter, "predict", lambda *a: asked.append(1) or whole(*a))
    assert segment_folder(segmenter, photos, out) == 0
    assert len(asked) == 2  # the one that was broken and the one whose mask is gone
    after = rows(out)
    assert len(after["broken"]) == 2
    assert after["a"] == before["a"]
    assert [path for path in out.rglob("*") if ".part" in path.name] == []


def test_line_that_an_interruption_has_cut_is_written_again(photos: Path, segmenter: Segmenter) -> None:
    """The first line of an image with two classes is whole, the second is not."""
    out = photos.parent / "out"
    segment_folder(segmenter, photos, out)
    whole = rows(out)
    table = (out / "results.csv").read_text()
    (out / "results.csv").write_text(table[: table.index("deep/b,dog") + 8])
    segment_folder(segmenter, photos, out)
    assert {name: [row[:5] for row in rows(out)[name]] for name in whole} == {
        name: [row[:5] for row in found] for name, found in whole.items()
    }


def test_another_setting_needs_another_folder(photos: Path, segmenter: Segmenter) -> None:
    out = photos.parent / "out"
    segment_folder(segmenter, photos, out)
    with pytest.raises(SettingError, match="made with another setting"):
        segment_folder(Segmenter.load("prototype", "cpu").fit({"cat": [picture(7)]}), photos, out)


def test_equal_names_with_other_suffixes_keep_them(tmp_path: Path, segmenter: Segmenter) -> None:
    for name in ("a.png", "a.jpg", "b.png"):
        write(tmp_path / "photos" / name, picture(0)[0])
    segment_folder(segmenter, tmp_path / "photos", tmp_path / "photos" / "out", overlays=False)
    assert {p.name for p in (tmp_path / "photos" / "out").glob("*.png")} == {"a.png.png", "a.jpg.png", "b.png"}
    segment_folder(segmenter, tmp_path / "photos", tmp_path / "photos" / "out", overlays=False)  # not its own masks
    assert len(rows(tmp_path / "photos" / "out")) == 3


def test_folder_without_images(tmp_path: Path, segmenter: Segmenter) -> None:
    with pytest.raises(SettingError, match="There is no image in"):
        segment_folder(segmenter, tmp_path, tmp_path / "out")


def test_coco_masks_are_those_of_the_files(photos: Path, segmenter: Segmenter) -> None:
    out = photos.parent / "out"
    segment_folder(segmenter, photos, out, gate=False, coco=True)
    coco = COCO(str(out / "annotations.json"))
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    assert names == {1: "cat", 2: "dog"}
    assert len(coco.getImgIds()) == 3
    for entry in coco.loadImgs(coco.getImgIds()):
        mask = np.asarray(Image.open((out / entry["file_name"]).with_suffix(".png")))
        assert (entry["height"], entry["width"]) == mask.shape
        for one in coco.loadAnns(coco.getAnnIds(entry["id"])):
            assert np.array_equal(coco.annToMask(one), mask == one["category_id"])
            y, x = np.nonzero(mask == one["category_id"])
            assert one["bbox"] == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
            assert one["area"] == len(y)


def test_palette_is_that_of_pascal_voc(shared: Path) -> None:
    files = sorted((shared / "data" / "import_formats").rglob("*.png"))
    palettes = [image.getpalette() for image in map(Image.open, files) if image.mode == "P"]
    assert any(p[:63] == palette().ravel().tolist()[:63] for p in palettes if p)


def test_overlay_leaves_the_background_as_it_is() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 30:50] = 1
    drawn = np.asarray(overlay(photo, mask, 1600))
    outside = np.ones((60, 80), bool)
    outside[19:41, 29:51] = False
    assert np.array_equal(drawn[outside], np.asarray(photo)[outside])
    assert (drawn[25:35, 35:45] != np.asarray(photo)[25:35, 35:45]).mean() > 0.9
    assert overlay(photo, mask, 40).size == (40, 30)


# The command


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def examples(folder: Path) -> Path:
    """One class, as images and masks of equal names."""
    for k in range(2):
        image, mask = picture(k)
        write(folder / "images" / f"{k}.png", image)
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray((mask * 255).numpy()).save(folder / "masks" / f"{k}.png")
    return folder


@pytest.mark.slow
def test_command(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--support", examples(photos.parent / "examples"), "--head", "prototype", "--device", "cpu")
    out, saved = photos.parent / "out", photos.parent / "x.safetensors"
    assert command("segment", *given, "--images", photos, "--out", out, "--save", saved) == 1
    assert "1 images failed" in capsys.readouterr().err
    (photos / "broken.jpg").unlink()
    assert command("segment", "--classes", saved, "--images", photos, "--out", photos.parent / "again") == 0
    for path in out.rglob("*.png"):
        assert path.read_bytes() == (photos.parent / "again" / path.relative_to(out)).read_bytes()
    assert command("segment", *given, "--images", photos / "a.png", "--out", photos.parent / "one") == 0
    assert (photos.parent / "one" / "a.png").is_file()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--tile", "big"), "--tile must be auto"),
        (("--tile", "10"), "a side of at least 64 pixels, not 10"),
        (("--device", "banana"), "There is no device 'banana'"),
        (("--head", "cow"), "There is no file, folder or method 'cow'"),
        (("--images", "nowhere"), "There is no image or folder"),
        (("--negatives", "nowhere"), "There is no image in"),
        (("--support", "nowhere"), "nowhere"),
        (("--save", "cow.pmnet"), "choose cow.safetensors"),
    ],
)
def test_wrong_words_are_one_message(
    words: tuple[str, str], message: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = {"--support": examples(photos.parent / "examples"), "--images": photos, "--out": photos.parent / "out",
             "--head": "prototype"}  # fmt: skip
    assert command("segment", *(word for pair in (usual | {words[0]: words[1]}).items() for word in pair)) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert message in error


def test_head_in_place_of_a_class_file_is_one_message(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = ROOT / "pmnet" / "weights" / "pmnet_lite.safetensors"
    assert command("segment", "--classes", head, "--images", photos, "--out", photos.parent / "out") == 1
    assert "holds a head, but no classes: pass it as --head" in capsys.readouterr().err
    assert not (photos.parent / "out").exists()


def test_setting_says_what_the_masks_depend_on(photos: Path, segmenter: Segmenter) -> None:
    segment_folder(segmenter, photos, photos.parent / "out", tile=None)
    setting = json.loads((photos.parent / "out" / "setting.json").read_text())
    assert setting["classes"] == ["cat", "dog"]
    assert setting["tile"] is None
    assert setting["backbone"] == "efficientnet_lite0"
    other = Segmenter.load("prototype", "cpu").fit(SHOWN | {"dog": [picture(8)]})
    assert other.described()["supports_sha256"] != setting["supports_sha256"]
    assert torch.equal(other.shown["cat"].images, segmenter.shown["cat"].images)
