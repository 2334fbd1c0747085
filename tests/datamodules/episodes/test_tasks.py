from itertools import permutations

import pytest

from datamodules.episodes.module import FewShotDataModule
from datamodules.episodes.tasks import TASKS, check_pair, tasks_of
from datamodules.errors import DatasetError
from datamodules.own.folder import FolderDataset
from datamodules.registry import all_datasets
from tests.conftest import ROOT
from tests.data.fixture import KINDS as BENCHMARKS
from tests.data.folder import write_by_class

KINDS = all_datasets()
TRAINABLE = {name for name, kind in KINDS.items() if not kind.test_only}


def pairs(task):
    return {(s, t) for s in KINDS for t in KINDS if task in tasks_of(KINDS[s], KINDS[t])}


def test_every_dataset_is_found():
    assert list(KINDS) == sorted(path.stem for path in (ROOT / "conf" / "dataset").glob("*.yaml"))
    assert set(BENCHMARKS) == set(KINDS) - {"folder", "materials", "mixture", "synthetic"}


def test_the_papers_pairs_are_possible():
    assert {"coco", "folder", "fss", "pascal", "synthetic"} <= TRAINABLE
    assert pairs("cross_category") == {(n, n) for n in TRAINABLE}
    assert pairs("cross_dataset") >= {("coco", "pascal"), ("coco", "fss"), ("pascal", "fss")}
    assert pairs("cross_domain") >= {("pascal", t) for t in ("deepglobe", "isic", "chest_xray", "suim")}


def test_pairs_of_one_domain_are_only_the_published_ones():
    of_one_domain = {(s, t) for s, t in permutations(BENCHMARKS, 2) if KINDS[s].domain == KINDS[t].domain}
    assert of_one_domain >= set(permutations(["coco", "pascal", "fss"], 2))
    assert pairs("cross_dataset") & of_one_domain == {(s, t) for s, t in of_one_domain if s in KINDS[t].tested_after}
    assert not pairs("cross_domain") & of_one_domain
    assert (KINDS["pascal"].tested_after, KINDS["fss"].tested_after) == (("coco",), ("coco", "pascal"))


def test_datasets_without_base_classes_are_never_trained_on():
    assert TRAINABLE.isdisjoint({"deepglobe", "isic", "chest_xray", "suim"})
    for task in TASKS:
        assert {s for s, _ in pairs(task)} <= TRAINABLE


def test_own_images_go_with_every_dataset_that_trains():
    for task in ("cross_dataset", "cross_domain"):
        assert {s for s, t in pairs(task) if t == "folder" != s} == TRAINABLE - {"folder"}
        assert {t for s, t in pairs(task) if s == "folder" != t} == KINDS.keys() - {"folder"}


def test_two_folders_are_two_datasets(tmp_path):
    roots = [
        write_by_class(tmp_path / n, classes=c, images_per_class=3)
        for n, c in (("a", ["cat", "dog"]), ("b", ["bus", "cat"]))
    ]
    a, b = (FolderDataset(str(root), folds=2, min_area=0.01) for root in roots)
    setting = {
        "fold": 0,
        "shot": 1,
        "train_shot": 1,
        "image_size": 32,
        "batch_size": 2,
        "test_batch_size": 2,
        "workers": 0,
    }
    setting |= {"per_epoch": 4, "val": 4, "test": 4, "novel_pixels": "background", "seed": 0}
    data = FewShotDataModule(a, **setting, target=b, task="cross_dataset")
    assert (data.base_classes, data.test_classes) == (["dog"], ["bus", "cat"])
    assert data.test_dataset().dataset is b
    assert [data.validation.classes[c] for c in data.val_class_ids] == ["cat"]
    data = FewShotDataModule(a, **setting, validation=b)
    assert [data.validation.classes[c] for c in data.val_class_ids] == ["bus", "cat"]
    assert data.test_classes == ["cat"]
    with pytest.raises(DatasetError, match="For that pair, set task=cross_dataset"):
        FewShotDataModule(a, **setting, target=b)


@pytest.mark.parametrize(
    "task, source, target, words",
    [
        ("cross_domain", "pascal", "fss", "For that pair, set task=cross_dataset"),
        ("cross_category", "pascal", "isic", "For that pair, set task=cross_domain"),
        ("cross_dataset", "pascal", "coco", "coco -> .*folder, .*fss, .*pascal"),
        ("cross_domain", "suim", "isic", "pascal -> .*chest_xray, .*deepglobe, .*folder, .*isic, .*suim"),
        ("cross_category", "isic", None, "pascal -> pascal"),
        ("cross_dataset", "coco", None, "coco -> .*folder, .*fss, .*pascal"),
        ("cross_country", "coco", None, "not one of cross_category, cross_dataset, cross_domain"),
    ],
)
def test_impossible_pairs_are_refused_with_the_possible_ones(task, source, target, words):
    with pytest.raises(DatasetError, match=words):
        check_pair(task, KINDS[source], target and KINDS[target])
