"""The Segmenter against the method itself, against plain loops, and against what it was before it was saved."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from datamodules.episodes.dataset import Episodes
from datamodules.episodes.episode import EpisodeSpec
from datamodules.own.synthetic import SyntheticDataset
from pmnet.errors import CheckpointError, ImageError, PMNetError, SettingError
from pmnet.methods import Method
from pmnet.segment import presence
from pmnet.segment.images import Frame, as_image, as_mask, load_image
from pmnet.segment.marks import Box, Points, Scribble
from pmnet.segment.recipe import Built, assembled, build
from pmnet.segment.segmenter import Segmenter

SMALL = {"_target_": "pmnet.SmallBackbone", "weights": "quickstart"}
PMNET = {"_target_": "pmnet.PMNet"}
HSNET = {"_target_": "pmnet.methods.hsnet.HSNet"}
PROTOTYPE = {"_target_": "pmnet.Prototype"}


def made(model: dict, backbone: dict = SMALL, size: int = 64) -> Built:
    """A method with random weights of its head."""
    recipe = {"model": model, "backbone": backbone, "image_size": [size, size], "name": "test"}
    torch.manual_seed(0)
    from pmnet.segment import recipe as module

    method = module.made(model, Method, module.made(backbone, module.Backbone))
    return assembled(recipe, {name: method.state_dict()[name] for name in method.saved()})


def picture(seed: int, height: int = 96, width: int = 128) -> tuple[Tensor, Tensor]:
    """Noise with a bright striped rectangle, and the rectangle's mask."""
    source = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 90, (3, height, width), dtype=torch.uint8, generator=source)
    top, left = (int(torch.randint(0, side // 2, (), generator=source)) for side in (height, width))
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[top : top + height // 2, left : left + width // 2] = 1
    stripes = (torch.arange(width) // 4 % 2 * 120 + 130).to(torch.uint8)
    return torch.where(mask.bool(), stripes.expand(3, height, width), image), mask


@pytest.mark.parametrize("model", [PMNET, PROTOTYPE, HSNET], ids=["pmnet", "prototype", "hsnet"])
@pytest.mark.parametrize("shots", [1, 3])
def test_mask_is_the_prediction_of_a_test_episode(model: dict, shots: int, tmp_path: Path) -> None:
    """Read from files, at the network's size: pixel for pixel what a test predicts."""
    dataset = SyntheticDataset(size=64, images_per_class=8, seed=0)
    names = dataset.images(dataset.novel_classes(0), "test", 0)
    built = made(model)
    for class_id, of_class in list(names.items())[:3]:
        spec = EpisodeSpec(of_class[0], tuple(of_class[1 : 1 + shots]), class_id)
        episode = Episodes(dataset, [spec], (64, 64))[0]
        files = [write(tmp_path / f"{n}.png", dataset.read_image(n)) for n in (spec.query, *spec.supports)]
        with torch.no_grad():
            parts = (episode.query, episode.support, episode.support_masks)
            expected = built.method.predict(*(part[None] for part in parts))[0]
        segmenter = Segmenter(built, "cpu").fit(list(zip(files[1:], episode.support_masks, strict=True)))
        result = segmenter.predict(files[0], gate=False)
        assert np.array_equal(result.mask == 1, expected.numpy())


def write(path: Path, image: Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


def test_mask_has_the_size_of_the_photo_and_the_score_decides() -> None:
    image, mask = picture(0, 97, 131)
    result = Segmenter.load("prototype", "cpu").fit([(image, mask)]).predict(image, gate=False)
    assert result.mask.shape == result.score.shape == (97, 131)
    assert np.array_equal(result.mask == 1, result.score > 0.5)
    found, true = result.mask == 1, mask.numpy() == 1
    assert (found & true).sum() / (found | true).sum() > 0.6


def test_several_classes_take_the_most_probable_and_the_query_passes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = Segmenter(made(PMNET), "cpu").fit({name: [picture(k)] for k, name in enumerate("abc")})
    scores = []
    for k in range(3):
        one = Segmenter(made(PMNET), "cpu").fit([picture(k)])
        score = one.score(one.features(one.frame.image(picture(9)[0])), one.shown["object"].seen)
        scores.append(one.at(score[None], (96, 128))[0])
    passes, whole = [], segmenter.method.backbone_pass
    monkeypatch.setattr(segmenter.method, "backbone_pass", lambda *a: passes.append(1) or whole(*a))
    result = segmenter.predict(picture(9)[0], gate=False)
    assert len(passes) == 1
    best, label = torch.stack(scores).max(0)
    expected = torch.where(best > 0.5, 1 + label, 0).detach().numpy()
    assert (result.mask == expected).mean() > 0.999  # ties are decided by rounding
    assert np.allclose(result.score, best.detach().numpy(), atol=1e-3)
    assert result.classes == ("a", "b", "c")


def test_negatives_change_the_threshold_and_no_score() -> None:
    (image, mask), other, query = picture(0), picture(1)[0], picture(2)[0]
    alone = Segmenter(made(PMNET), "cpu").fit([(image, mask)])
    beside = Segmenter(made(PMNET), "cpu").fit([(image, mask)], negatives=[other])
    before, after = (segmenter.predict(query, gate=False) for segmenter in (alone, beside))
    assert np.array_equal(before.score, after.score)
    assert 0 < after.presence < before.presence < 1


@pytest.mark.parametrize("of_negatives, threshold", [([], 0.36), ([0.1], 0.36), ([0.5, 0.7], 0.6)])
def test_negatives_raise_the_threshold_of_a_single_example_and_never_lower_it(
    of_negatives: list[float], threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example's own evidence is 0.8, of which 45% suffice."""
    evidence = iter([*of_negatives, 0.8])  # in the order in which they are looked at
    monkeypatch.setattr(presence, "of", lambda *_: next(evidence))
    negatives = [picture(1 + k)[0] for k in range(len(of_negatives))]
    segmenter = Segmenter(made(PMNET), "cpu").fit([picture(0)], negatives=negatives)
    found = segmenter.shown["object"].presence
    assert found.threshold == pytest.approx(threshold)
    assert found(threshold) == pytest.approx(0.5)
    assert found(0.8) == pytest.approx(0.8)


def test_class_file_gives_back_the_same(tmp_path: Path) -> None:
    segmenter = Segmenter(made(PMNET), "cpu", keep_aspect=True)
    segmenter.fit({"a": [picture(0), picture(1)], "b": [picture(2)]}, {"a": [picture(3)[0]]})
    segmenter.save(tmp_path / "ab.safetensors")
    again = Segmenter.load(tmp_path / "ab.safetensors", "cpu")
    for seed in (5, 6):
        before, after = (s.predict(picture(seed)[0]) for s in (segmenter, again))
        assert np.array_equal(before.mask, after.mask)
        assert np.array_equal(before.score, after.score)
        assert before.presences == after.presences
    assert again.described() == segmenter.described()


def test_damaged_class_files_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Segmenter(made(PROTOTYPE), "cpu").fit([picture(0)]).save(path)
    whole = path.read_bytes()
    source = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in source.integers(0, min(len(whole), 2000), 3):
            damaged[place] = source.integers(256)
        path.write_bytes(damaged[: source.integers(8, len(whole))] if source.random() < 0.5 else damaged)
        with suppress(PMNetError):
            Segmenter.load(path, "cpu")


def test_recipes_build_nothing_but_methods_of_this_package(tmp_path: Path) -> None:
    for target in ("os.system", "pmnet.cli.main", "pmnet.errors.PMNetError", "pmnet", ""):
        recipe = {"model": {"_target_": target}, "backbone": SMALL, "image_size": [64, 64]}
        safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"pmnet": json.dumps(recipe)})
        with pytest.raises(CheckpointError, match="is not a method of this version"):
            build(tmp_path / "x.safetensors")


def test_sources_that_are_not_there() -> None:
    with pytest.raises(SettingError, match=r"There is no file, folder or method 'cow'.*nearest"):
        build("cow")


def test_tensors_of_another_method(tmp_path: Path) -> None:
    recipe = {"model": PMNET, "backbone": SMALL, "image_size": [64, 64]}
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"pmnet": json.dumps(recipe)})
    with pytest.raises(CheckpointError, match="does not fit PMNet"):
        build(tmp_path / "x.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="does not say of which method"):
        build(tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    "supports, words",
    [
        ([], "at least one pair"),
        ({}, "at least one pair"),
        ([(picture(0)[0], torch.zeros(96, 128))], "number 1 of 'object' marks nothing"),
        ([(picture(0)[0], torch.ones(96, 127))], "96 x 127 pixels, its image 96 x 128"),
        ([(torch.zeros(4, 9, 9), torch.ones(9, 9))], "An image is"),
        ([(torch.full((3, 9, 9), 7.0), torch.ones(9, 9))], "Pixels are uint8"),
        ([(picture(0)[0], Box(200, 0, 300, 50))], "holds no pixel"),
        ([(picture(0)[0], Points([(500, 3)]))], "outside the image"),
    ],
)
def test_supports_that_cannot_be_used(supports: list, words: str) -> None:
    segmenter = Segmenter.load("prototype", "cpu").fit([picture(0)])
    with pytest.raises(SettingError, match=words):
        segmenter.fit(supports)
    assert segmenter.classes == ("object",)  # what was shown before stays


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    segmenter = Segmenter.load("prototype", "cpu")
    with pytest.raises(SettingError, match="No class was shown"):
        segmenter.predict(picture(0)[0])
    with pytest.raises(ImageError, match=r"a\.jpg"):
        segmenter.fit([(tmp_path / "a.jpg", picture(0)[1])])


def test_folders_are_read_one_by_one(tmp_path: Path) -> None:
    for k in range(3):
        write(tmp_path / "deep" / f"{k}.png", picture(k)[0])
    (tmp_path / "deep" / "3.png").write_text("no image")
    results = Segmenter.load("prototype", "cpu").fit([picture(9)]).predict(tmp_path)
    assert [next(results).mask.shape for _ in range(3)] == [(96, 128)] * 3
    with pytest.raises(ImageError, match=r"3\.png"):
        next(results)


@pytest.mark.parametrize("keep_aspect", [False, True])
def test_keep_aspect_fits_in(keep_aspect: bool) -> None:
    """A square stays a square only if the aspect is kept."""
    image = torch.zeros(3, 60, 120, dtype=torch.uint8)
    image[:, 10:40, 20:50] = 255
    seen = Frame((64, 64), keep_aspect).image(image)[0] > 190
    rows, columns = int(seen.any(1).sum()), int(seen.any(0).sum())
    assert (rows == columns) == keep_aspect
    assert Frame((64, 64), keep_aspect).inside((60, 120)) == ((32, 64) if keep_aspect else (64, 64))
    masked = Frame((64, 64), keep_aspect).mask((image[0] > 0).to(torch.uint8)) == 1
    assert (masked & seen).sum() / (masked | seen).sum() > 0.8  # the mask lies on the image


# What callers hand over


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_images_of_every_kind_are_read_as_from_a_file(mode: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = (
        Image.fromarray(values[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(values).convert(mode)
    )
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert torch.equal(as_image(image), load_image(path))
    assert torch.equal(as_image(str(path)), load_image(path))


def test_arrays_and_tensors() -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = torch.from_numpy(values).permute(2, 0, 1)
    assert torch.equal(as_image(values), expected)
    assert torch.equal(as_image(np.dstack([values, values[..., :1]])), expected)  # with transparency
    assert torch.equal(as_image(expected), expected)
    assert torch.equal(as_image(expected.float() / 255), expected)
    assert torch.equal(as_image(values.astype(np.uint16) * 256), expected)
    assert torch.equal(as_image(values[..., 0]), expected[:1].expand(3, -1, -1))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_deep_greyscale_fills_eight_bits(bits: int, tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) << (bits - 8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png")[0].numpy(), np.arange(256).reshape(16, 16))
    Image.fromarray((values / values.max()).astype(np.float32)).save(tmp_path / "a.tif")
    assert np.array_equal(load_image(tmp_path / "a.tif")[0].numpy(), np.arange(256).reshape(16, 16))


def test_turned_photos_are_turned(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        for read in (as_image(tmp_path / "a.png"), as_image(image)):
            assert torch.equal(read, torch.from_numpy(np.rot90(values, -1).copy()).permute(2, 0, 1))
        assert image.size == (30, 20)  # the caller's image stays as it is


def test_masks_of_every_kind(tmp_path: Path) -> None:
    truth = np.zeros((6, 8), np.uint8)
    truth[2:4, 3:6] = 1
    colours = np.zeros((6, 8, 4), np.uint8)
    colours[truth == 1] = (0, 90, 200, 255)
    for mask in (
        truth, truth.astype(bool), truth * 255, truth.astype(float), truth.astype(np.uint16) * 300, truth[..., None],
        Image.fromarray(truth * 255), Image.fromarray(truth * 255).convert("1"), Image.fromarray(colours, "RGBA"),
        Image.fromarray(colours[..., :3]), Image.fromarray(truth * 7).convert("P"), torch.from_numpy(truth)[None],
    ):  # fmt: skip
        assert np.array_equal(as_mask(mask, (6, 8)).numpy(), truth)
    white_first = Image.fromarray(1 - truth)
    white_first.putpalette([255] * 3 + [0] * 3)
    grey = truth.astype(np.uint8) * 250  # as JPEG leaves black and white
    grey[0], grey[3, 3] = 3, 255
    for mask in (white_first, grey, truth * 0.8 + 0.1):
        assert np.array_equal(as_mask(mask, (6, 8)).numpy(), truth)
    truth[0] = 255
    assert np.array_equal(as_mask(truth, (6, 8)).numpy(), truth)  # 1 and 255: ignore


# Marks


def test_box_grows_to_the_object() -> None:
    image, mask = picture(3)
    y, x = (index.float() for index in torch.nonzero(mask, as_tuple=True))
    box = Box(float(x.min()) - 9, float(y.min()) - 9, float(x.max()) + 10, float(y.max()) + 10)
    segmenter = Segmenter.load("prototype", "cpu").fit([(image, box)])
    grown, true = segmenter.shown["object"].masks[0], segmenter.frame.mask(mask)
    whole = segmenter.frame.mask((box.seeds((96, 128)) > 0).to(torch.uint8))
    assert iou(grown, true) > max(0.6, iou(whole, true))


def iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.slow
@pytest.mark.parametrize("on", ["points", "scribble"])
def test_points_and_scribbles_on_real_photos(on: str, shared: Path) -> None:
    """Better than marking everything, and the marks themselves keep their side."""
    segmenter, gained = Segmenter.load("prototype", "cpu"), []
    for path in sorted((shared / "data" / "voc" / "masks").glob("*.png"))[:60:6]:
        index = np.asarray(Image.open(path))
        name = np.bincount(index[(index > 0) & (index < 255)]).argmax()
        mask = index == name
        y, x = np.nonzero(mask)
        off_y, off_x = np.nonzero(~mask)
        picked, off = np.linspace(0, len(x) - 1, 5).astype(int)[1:4], np.linspace(0, len(off_x) - 1, 5).astype(int)
        points = Points(list(zip(x[picked], y[picked], strict=True)), list(zip(off_x[off], off_y[off], strict=True)))
        mark = points
        if on == "scribble":
            painted = np.zeros(mask.shape, np.uint8)
            painted[y[picked], x[picked]], painted[off_y[off], off_x[off]] = 1, 2
            mark = Scribble(painted)
        segmenter.fit([(path.parents[1] / "images" / f"{path.stem}.jpg", mark)])
        true = segmenter.frame.mask(torch.from_numpy(mask.astype(np.uint8)))
        gained.append(iou(segmenter.shown["object"].masks[0], true) - float(true.float().mean()))
    assert np.mean(gained) > 0.1
