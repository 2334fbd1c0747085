"""Classes with too few images, folds without classes, and what the messages advise."""

import csv
import logging
import re

import pytest

from datamodules.benchmarks.pascal import PascalDataset
from datamodules.episodes.module import FewShotDataModule
from datamodules.episodes.pixels import BasePixels
from datamodules.errors import DatasetError
from datamodules.own.folder import FolderDataset
from tests.conftest import results, run
from tests.data.folder import write_by_class

IMAGES = {"ant": 9, "bee": 1, "cow": 4, "dog": 1, "elk": 2, "fox": 9}  # 2 folds: ant, bee, cow; dog, elk, fox
SETTING = {"fold": 0, "shot": 1, "train_shot": 1, "image_size": 32, "batch_size": 2, "test_batch_size": 2}
SETTING |= {"per_epoch": 4, "val": 9, "test": 9, "novel_pixels": "background", "workers": 0, "seed": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("rare")
    for name, count in IMAGES.items():
        write_by_class(root, classes=[name], images_per_class=count)
    return root


def folder(root, folds=2, **options):
    return FolderDataset(str(root), folds=folds, min_area=0.01, **options)


def make(dataset, **options):
    return FewShotDataModule(dataset, **(SETTING | options))


def rows(*names):
    return [{"class": name, "images": IMAGES[name]} for name in names]


def left_out(train=(), val=(), test=()):
    return {"train": rows(*train), "val": rows(*val), "test": rows(*test)}


@pytest.mark.parametrize(
    "options, train, test, expected",
    [
        ({}, ["elk", "fox"], ["ant", "cow"], left_out(["dog"], ["bee"], ["bee"])),
        ({"fold": 1}, ["ant", "cow"], ["elk", "fox"], left_out(["bee"], ["dog"], ["dog"])),
        ({"shot": 3}, ["elk", "fox"], ["ant", "cow"], left_out(["dog"], ["bee"], ["bee"])),
        ({"shot": 4}, ["elk", "fox"], ["ant"], left_out(["dog"], ["bee"], ["bee", "cow"])),
        ({"shot": 4, "repeats": True}, ["elk", "fox"], ["ant", "cow"], left_out(["dog"], ["bee"], ["bee"])),
        ({"train_shot": 2}, ["fox"], ["ant", "cow"], left_out(["dog", "elk"], ["bee"], ["bee"])),
        (
            {"fold": "all"},
            ["ant", "cow", "elk", "fox"],
            ["ant", "cow", "elk", "fox"],
            left_out(*[["bee", "dog"]] * 3),
        ),
    ],
)
def test_classes_with_too_few_images_are_left_out(root, options, train, test, expected):
    data = make(folder(root), **options)
    data.setup("fit")
    assert data.base_classes == train
    assert data.test_classes == test
    names = data.dataset.classes
    assert {names[spec.class_id] for spec in data.test_specs} == set(test)
    assert {names[data.train_specs[0, i].class_id] for i in range(40)} == set(train)
    assert {spec.class_id for spec in data.val_specs} == set(data.val_class_ids)
    assert data.provenance["classes_left_out"] == expected
    assert data.training_record["classes_left_out"] == {part: expected[part] for part in ("train", "val")}


def test_the_tested_number_of_shots_does_not_change_the_training(root):
    assert make(folder(root), shot=1).training_record == make(folder(root), shot=4).training_record


def test_one_line_warns_of_all_classes_left_out(root, caplog):
    data = make(folder(root), shot=4)
    for stage in ("fit", "fit", "test"):
        data.setup(stage)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert "left out of training: an episode needs 2 images of its class, but 'dog' has 1;" in lines[0]
    assert "of validation: an episode needs 2 images of its class, but 'bee' has 1;" in lines[0]
    assert "of test: an episode needs 5 images of its class, but 'bee' has 1, 'cow' has 4." in lines[0]
    assert lines[0].count("min_area") == 1


def test_nothing_is_recorded_or_logged_if_every_class_has_enough_images(tmp_path, caplog):
    data = make(folder(write_by_class(tmp_path, classes=4, images_per_class=2)))
    data.setup("fit")
    assert not caplog.records
    assert "classes_left_out" not in data.provenance
    assert "classes_left_out" not in data.training_record


def test_each_split_counts_its_own_images(root):
    data = make(folder(root, test_fraction=0.5), fold="all")  # elk: 1 image to train on, 1 to test on
    assert data.base_classes == data.test_classes == ["ant", "cow", "fox"]
    data = make(folder(root, test_fraction=0.25), fold="all")  # cow: 3 and 1; elk: 1 and 1
    assert (data.base_classes, data.test_classes) == (["ant", "cow", "fox"], ["ant", "fox"])


def test_rare_classes_of_another_folder_that_is_tested_are_left_out(root, tmp_path, caplog):
    source = folder(write_by_class(tmp_path, classes=4, images_per_class=3))
    data = make(source, task="cross_dataset", target=folder(root), shot=4)
    data.setup("fit")
    assert data.test_classes == ["ant", "fox"]
    assert data.provenance["classes_left_out"] == left_out(test=["bee", "cow", "dog", "elk"])
    assert "classes_left_out" not in data.training_record
    assert len(caplog.records) == 1


def test_backbones_are_pretrained_on_folders_with_rare_classes(tmp_path):
    write_by_class(tmp_path, classes=3, images_per_class=3)
    write_by_class(tmp_path, classes=["empty"], images_per_class=3, foreground=0)
    data = folder(tmp_path)
    assert [data.classes[c] for c in data.base_classes(0)] == ["class02", "empty"]
    pixels = BasePixels(data, fold=0, size=(32, 32), smallest_crop=0.3, seed=0)
    assert pixels.names == ["class02/1", "class02/2", "class02/3"]


# A fold that nothing is left of


def test_error_if_every_class_of_a_fold_is_rare(root):
    data = make(folder(root, folds=[["bee", "dog"], ["ant"]]))
    words = r"1-shot episode to test on needs 2 images of its class, but 'bee' has 1, 'dog' has 1\. .*min_area"
    with pytest.raises(DatasetError, match=words) as error:
        data.setup("fit")
    assert "fewer shots" not in str(error.value)  # one shot is the fewest
    with pytest.raises(DatasetError, match=r"9-shot episode to test on needs 10 images .* Use fewer shots\."):
        make(folder(root), shot=9).setup("test")


@pytest.mark.parametrize(
    "folds, fold, split, works",
    [
        (7, 6, "test", ["fold.index=0|2|4|5", "fold=all"]),
        (1, 0, "train", ["dataset.folds=6", "fold=all", "model=nearest"]),
        ([["ant", "bee", "cow", "dog", "elk", "fox"], ["ant"]], 0, "train", ["fold.index=1", "fold=all"]),
    ],
)
def test_fold_without_classes_names_what_works(root, folds, fold, split, works):
    with pytest.raises(DatasetError, match=f"no class to {split} on") as error:
        make(folder(root, folds), fold=fold).setup("fit")
    for remedy in works:
        assert remedy in str(error.value)
    assert ("mode=test" in str(error.value)) == (split == "train")
    make(folder(root, folds), fold="all").setup("fit")
    for index in re.findall(r"\d", (re.findall(r"fold\.index=([\d|]+)", str(error.value)) or [""])[0]):
        make(folder(root, folds), fold=int(index)).setup("fit")
    for number in re.findall(r"dataset\.folds=(\d+)", str(error.value)):
        make(folder(root, int(number))).setup("fit")


def test_one_class_alone_names_what_works(tmp_path):
    one = folder(write_by_class(tmp_path, classes=["cat"]), folds=4)
    with pytest.raises(DatasetError) as error:
        make(one).setup("fit")
    message = str(error.value)
    assert "no class to train on (classes: 1, folds: 4)" in message
    assert "fold.index" not in message  # no fold works
    assert "dataset.folds" not in message  # nor does another number of folds
    assert "fold=all" in message
    make(one, fold="all").setup("fit")
    assert "mode=test with model=nearest or model=prototype" in message
    make(one).setup("test")
    assert "add classes" in message
    write_by_class(tmp_path, classes=["dog"])
    make(folder(tmp_path, folds=4)).setup("fit")
    with pytest.raises(DatasetError, match=r"no class to test on .* Set fold=all"):
        make(one, fold=1).setup("fit")


def test_one_class_beside_a_rare_one_names_what_works(tmp_path):
    write_by_class(tmp_path, classes=["cat"])
    write_by_class(tmp_path, classes=["dog"], images_per_class=1)
    with pytest.raises(DatasetError, match=r"no class to train on .* Set fold=all") as error:
        make(folder(tmp_path, folds=1)).setup("fit")
    assert "dataset.folds" not in str(error.value)
    make(folder(tmp_path, folds=1), fold="all").setup("fit")


def test_no_fold_is_advised_if_every_class_is_rare(tmp_path):
    with pytest.raises(DatasetError, match=r"no class to train on .*\. Images in which .* or add images\.$"):
        _ = make(folder(write_by_class(tmp_path, classes=["cat"], images_per_class=1), folds=1)).train_specs


@pytest.mark.slow
@pytest.mark.parametrize(
    "remedy", ["fold=all trainer.max_epochs=1", "mode=test model=nearest", "mode=test model=prototype"]
)
def test_runs_with_one_class(tmp_path, remedy):
    write_by_class(tmp_path / "data", classes=["cat"])
    setting = (
        f"dataset=folder dataset.root={tmp_path}/data backbone=small trainer=cpu episodes.image_size=64 "
        "episodes.batch_size=2 episodes.per_epoch=2 episodes.val=2 episodes.test=4 episodes.workers=0 panels=0 "
        f"hydra.run.dir={tmp_path}/run"
    )
    done = run(*setting.split(), *remedy.split())
    assert done.returncode == 0, done.stderr
    assert list(results(tmp_path / "run")["test"]["iou_per_class"]) == ["cat"]


@pytest.mark.slow
def test_mean_is_over_the_classes_that_remain(shared, tmp_path):
    """Real photos of 58 clothes, some of which nobody wears."""
    done = run(
        *f"dataset=folder dataset.root={shared}/data/clothing model=nearest backbone=efficientnet_lite0".split(),
        *f"trainer=cpu episodes.image_size=128 episodes.test=22 episodes.workers=0 hydra.run.dir={tmp_path}".split(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out of") + done.stderr.count("left out of") == 1
    record = results(tmp_path)
    ious = record["test"]["iou_per_class"]
    assert len(ious) == 11
    assert record["test"]["miou"] == pytest.approx(sum(ious.values()) / 11, abs=1e-3)
    assert [row["class"] for row in record["episodes"]["classes_left_out"]["test"]] == [
        "bra",
        "bracelet",
        "clogs",
        "earrings",
    ]
    with (tmp_path / "episodes.csv").open() as file:
        assert {row["class"] for row in csv.DictReader(file)} == set(ious)


# Benchmarks


def test_rare_class_of_a_benchmark_stays_an_error(tmp_path):
    """Class aeroplane has one image: the lists or the download are incomplete."""
    for part in ("trn", "val"):
        (tmp_path / part).mkdir()
        for fold in range(4):
            lines = [
                f"2007_{i:06d}__{c + 1:02d}" for c in range(5 * fold, 5 * fold + 5) for i in range(1 if c == 0 else 3)
            ]
            (tmp_path / part / f"fold{fold}.txt").write_text("".join(f"{line}\n" for line in lines))
    data = make(PascalDataset("nowhere", str(tmp_path)))
    assert data.test_classes[0] == "aeroplane"
    with pytest.raises(DatasetError, match=r"to test on needs 2 images of its class, but 'aeroplane' has 1\."):
        _ = data.test_specs
    with pytest.raises(DatasetError, match=r"to train on needs 2 images of its class, but 'aeroplane' has 1\."):
        _ = make(PascalDataset("nowhere", str(tmp_path)), fold=1).train_specs
