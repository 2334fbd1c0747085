"""Audits of runs whose data have leaks that the test plants, and of the photos beside the checkout."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image, ImageOps

from datamodules.command import config
from experiments import prints
from experiments.audit import CHANGED, CLEAN, main
from experiments.prints import SAME, like, nearest, print_of
from experiments.report.collect import collect
from experiments.report.page import write
from pmnet.segment.images import as_image
from tests.conftest import TINY, results, run, run_module

CLASSES = ("ant", "bee", "cow", "tv")  # fold 0 of 2: ants and bees are novel
SELECTION = "the epoch with the best mIoU on 20 validation episodes of folder"


def photo(seed: int) -> Image.Image:
    """An image with detail of all sizes, as a photo has it."""
    small = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    return Image.fromarray(small).resize((128, 96), Image.Resampling.BICUBIC)


def write_photos(root: Path, seed: int = 0) -> Path:
    """Four photos of each class, one folder a class, and their masks."""
    for i, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for k in range(4):
            photo(100 * seed + 10 * i + k).save(root / name / f"{k}.jpg", quality=95)
            mask(i + k).save(root / name / f"{k}.png")
    return root


def mask(seed: int) -> Image.Image:
    values = np.zeros((96, 128), np.uint8)
    values[10 + seed : 60 + seed, 20:90] = 255
    return Image.fromarray(values)


def plant(root: Path, edit) -> None:
    """The edited photo cow/1, which is trained on, as another photo of an ant, which is tested."""
    edited = edit(Image.open(root / "cow" / "1.jpg"))
    if isinstance(edited, Image.Image):
        edited.save(root / "ant" / "9.bmp")
    else:
        (root / "ant" / "9.jpg").write_bytes(edited)
    size = Image.open(next(root.glob("ant/9.*"))).size
    mask(3).resize(size, Image.Resampling.NEAREST).save(root / "ant" / "9.png")


def saved(image: Image.Image, tmp_path: Path, quality: int) -> bytes:
    path = tmp_path / "saved.jpg"
    image.save(path, quality=quality)
    return path.read_bytes()


def write_run(folder: Path, root: Path, *overrides: str, **changes) -> Path:
    """The folder of a run, with the record that it would leave."""
    tiny = ["episodes.val=20", "episodes.test=60", "episodes.workers=0", "episodes.image_size=64"]
    cfg = config([f"dataset.root={root}", "dataset.folds=2", *tiny, *overrides])
    data = instantiate(cfg.episodes)
    parts = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("episodes", "dataset", "fold")}
    scores = {"miou": 50.0, "fb_iou": 60.0, "iou_per_class": {}}
    record = {
        "mode": "train",
        "setting": {"task": "cross_category", "dataset": "folder", "backbone": "small", "model": "pmnet", "fold": 0}
        | {"folds": 2, "shot": 1, "seed": 0},
        "test": scores,
        "baselines": {"all_foreground": scores, "prototype": scores},
        "episodes": data.provenance,
        "backbone": {"backbone": "resnet50", "weights": "a1h", "source": "timm", "trained_on": {}},
        "checkpoint": {"path": str(folder / "checkpoints" / "best.ckpt"), "selection": SELECTION},
        "training": {"run": str(folder), "epochs": 3, **data.training_record},
        "tuned_at_test": None,
        "config": {"mode": "train", "ckpt": None, **parts},
    } | changes
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def audited(*folders: Path) -> list[dict]:
    main([str(folder) for folder in folders])
    return [json.loads((folder / "audit.json").read_text()) for folder in folders]


# What is found


def test_a_clean_run_is_clean_and_says_how_its_epoch_was_chosen(tmp_path: Path, capsys) -> None:
    (answers,) = audited(write_run(tmp_path / "run", write_photos(tmp_path / "data")))
    assert answers["verdict"] == f"{CLEAN}; backbone: ImageNet, images not at hand"
    assert answers["test"] == {"dataset": "folder", "episodes": 60, "images": 8}
    assert (answers["head"][0]["images"], answers["head"][0]["masks"], answers["head"][0]["tested"]) == (8, 8, 0)
    assert re.match("the epoch was chosen on 2 of the 2 tested classes and on [2-6]. of the 60", answers["selection"])
    assert answers["epoch"][0]["tested"] > 0
    assert f"run: {answers['verdict']}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "how, edit",
    {
        "same pixels": lambda image, _: image,
        "mirrored": lambda image, _: ImageOps.mirror(image),
        "near-duplicate": lambda image, folder: saved(image, folder, quality=60),
        "mirrored ": lambda image, folder: saved(ImageOps.mirror(image), folder, quality=60),
        "near-duplicate ": lambda image, _: image.resize((96, 72), Image.Resampling.BILINEAR),
    }.items(),
)
def test_a_planted_image_is_found_and_nothing_else(how: str, edit, tmp_path: Path, capsys) -> None:
    root = write_photos(tmp_path / "data")
    plant(root, lambda image: edit(image, tmp_path))
    (answers,) = audited(write_run(tmp_path / "run", root))
    (example,) = answers["head"][0]["examples"]
    assert (example["tested"], example["used"], example["how"]) == ("ant/9", "cow/1", how.strip())
    assert example["correlation"] >= SAME
    assert not example["mask"]
    assert answers["verdict"].startswith(f"1 of 9 test images trained the head (1 {how.strip()}; none with a tested")
    assert "ant/9 = cow/1" in capsys.readouterr().out


def test_images_of_base_and_novel_classes_are_found_by_name(tmp_path: Path) -> None:
    """With fold=all, every test image was trained on, with its mask."""
    root = write_photos(tmp_path / "data")
    (answers,) = audited(write_run(tmp_path / "run", root, "fold=all"))
    head = answers["head"][0]
    assert head["how"] == {"same name": answers["test"]["images"]}
    assert head["with_tested_mask"] == answers["test"]["images"]
    assert answers["tested_classes_trained_on"]["head"] == {name: name for name in CLASSES}


def test_a_class_under_another_name_and_unknown_images_are_named(tmp_path: Path) -> None:
    trained_on = {"dataset": "pascal", "splits": "published lists", "fold": 0, "classes": ["cat", "tvmonitor"]}
    made = {"backbone": "resnet50", "weights": "w.safetensors", "source": "w.safetensors", "trained_on": trained_on}
    root = write_photos(tmp_path / "data")
    (answers,) = audited(write_run(tmp_path / "run", root, "fold=1", backbone=made))
    assert answers["tested_classes_trained_on"]["backbone"] == {"tv": "tvmonitor"}
    assert "1 tested classes trained the backbone: tv (as tvmonitor)" in answers["verdict"]
    assert "images not at hand" in answers["verdict"]
    assert CLEAN not in answers["verdict"]


def test_weights_of_another_run_are_looked_up_there(tmp_path: Path) -> None:
    """The weights were trained with fold 1, whose base classes are the tested ones."""
    root = write_photos(tmp_path / "data")
    trained = write_run(tmp_path / "trained", root, "fold=1")
    training = json.loads((trained / "results.json").read_text())["training"]
    (answers,) = audited(write_run(tmp_path / "run", root, mode="test", training=training))
    assert answers["head"][0]["tested"] == 8
    assert list(answers["tested_classes_trained_on"]["head"]) == ["ant", "bee"]


def test_head_of_authors_is_not_called_clean(tmp_path: Path) -> None:
    training = {"run": "/path/to/file.pt", "by": "the method's authors"}
    folder = write_run(tmp_path / "run", write_photos(tmp_path / "data"), mode="test", training=training, checkpoint={})
    (answers,) = audited(folder)
    assert CLEAN not in answers["verdict"]
    assert "head: weights of the method's authors, images not at hand" in answers["verdict"]


def test_tuning_at_test_and_a_query_among_its_supports_are_named(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "data")
    shutil.copy(root / "ant" / "0.jpg", root / "ant" / "9.jpg")
    mask(3).save(root / "ant" / "9.png")
    tuned = "each test episode: its supports with their masks, and its query without"
    (answers,) = audited(write_run(tmp_path / "run", root, tuned_at_test=tuned))
    pairs = {(match["tested"], match["used"]) for match in answers["queries_among_own_supports"]}
    assert pairs == {("ant/0", "ant/9"), ("ant/9", "ant/0")}
    assert f"tuned at test on {tuned}" in answers["verdict"]


# Data that are not those of the run


def test_changed_data_are_said(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "data")
    folder = write_run(tmp_path / "run", root)
    shutil.copy(root / "ant" / "0.jpg", root / "ant" / "7.jpg")
    shutil.copy(root / "ant" / "0.png", root / "ant" / "7.png")
    assert audited(folder)[0]["verdict"] == CHANGED


def test_missing_data_are_one_message_and_other_runs_are_done(tmp_path: Path, capsys) -> None:
    gone = write_run(tmp_path / "runs" / "1", write_photos(tmp_path / "gone"))
    there = write_run(tmp_path / "runs" / "2", write_photos(tmp_path / "data"))
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "runs")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"1 cannot be audited: There is no folder {tmp_path / 'gone'}" in line
    assert (there / "audit.json").exists()
    assert not (gone / "audit.json").exists()


def test_images_are_read_once_for_all_runs(tmp_path: Path, monkeypatch) -> None:
    root, count = write_photos(tmp_path / "data"), []
    monkeypatch.setattr(prints, "print_of", lambda image: count.append(1) or print_of(image))
    audited(*(write_run(tmp_path / f"run{fold}", root, f"fold={fold}") for fold in (0, 1)))
    assert len(count) == 16


# How images are compared


@pytest.mark.slow
def test_real_photos_and_their_edits_are_told_apart(shared: Path, tmp_path: Path) -> None:
    """Also photos of one kind: workpieces on the same tables. The gap is wide on both sides of the threshold."""
    for files in (
        sorted((shared / "data/voc/images").glob("*"))[::14],
        sorted((shared / "data/industrial").glob("*/*.jpg"))[::8],
    ):
        photos = [Image.open(file).convert("RGB") for file in files]
        prints = [print_of(as_image(each)) for each in photos]
        assert not any(like(a, b) for i, a in enumerate(prints) for b in prints[:i])
        detail_ND = np.stack([each.detail.ravel() for each in prints]).astype(np.float32)
        correlation_NN = detail_ND @ detail_ND.T - np.eye(len(prints))
        assert correlation_NN.max() < 0.8
        for each, own in list(zip(photos, prints, strict=True))[::8]:
            for quality in (60, 95):
                (tmp_path / "a.jpg").write_bytes(saved(each, tmp_path, quality))
                how, correlation = like(print_of(as_image(tmp_path / "a.jpg")), own)
                assert how == "near-duplicate"
                assert correlation > 0.97
            for factor in (0.6, 1.4):
                smaller = each.resize((int(each.width * factor), int(each.height * factor)))
                assert like(print_of(as_image(smaller)), own)[1] > 0.97
            assert like(print_of(as_image(ImageOps.mirror(each))), own)[0] == "mirrored"


def test_plain_images_do_not_match_one_another() -> None:
    plain = [torch.full((3, 48, 64), value, dtype=torch.uint8) for value in (0, 0, 128, 255)]
    dim = torch.full((3, 48, 64), 100, dtype=torch.uint8)
    dim[:, 20:, 30:] += 1
    prints = [print_of(each) for each in [*plain, dim, dim.flip(2)]]
    assert not any(like(a, b) for i, a in enumerate(prints) for b in prints[:i])


def test_blocks_change_nothing(monkeypatch) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(10, 6)), random.normal(size=(17, 6))
    monkeypatch.setattr(prints, "BLOCK", 4)
    best, where = nearest(a.astype(np.float16), b.astype(np.float16))
    assert where.tolist() == (a @ b.T).argmax(1).tolist()
    np.testing.assert_allclose(best, (a @ b.T).max(1), rtol=1e-2)


# The report


@pytest.mark.slow
def test_the_report_says_how_numbers_were_made(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "data")
    folder = write_run(tmp_path / "runs" / "run", root)
    pages = [tmp_path / "out" / name for name in ("report.html", "report.md")]

    def texts() -> list[str]:
        write(collect([tmp_path / "runs"]), tmp_path / "out")
        return [page.read_text().replace("\\", "") for page in pages]

    for text in texts():
        assert "How these numbers were made" in text
        assert f"not audited: python -m experiments.audit {folder}" in text
        for answer in (SELECTION, "ImageNet, images not at hand", "resized to 64x64, scored at this size"):
            assert answer in text
        assert "60 episodes of folder" in text
        assert "novel pixels are background in training" in text
    audited(folder)
    for text in texts():
        assert CLEAN in text
        assert "8 images" in text
        assert "not audited" not in text
    record = results(folder)
    (folder / "results.json").write_text(json.dumps(record | {"seconds": {}}))
    assert all("not audited" in text for text in texts())


@pytest.mark.slow
def test_a_real_run_is_audited(tmp_path: Path) -> None:
    root, folder = write_photos(tmp_path / "data"), tmp_path / "run"
    tiny = [each for each in TINY if not each.startswith("dataset=")]
    chosen = [f"dataset.root={root}", "dataset.folds=2", "model=prototype", f"hydra.run.dir={folder}"]
    done = run(*tiny, *chosen)
    assert done.returncode == 0, done.stderr
    done = run_module("experiments.audit", str(folder))
    assert done.returncode == 0, done.stderr
    answers = json.loads((folder / "audit.json").read_text())
    assert answers["verdict"] == CLEAN
    assert answers["head"] == []
