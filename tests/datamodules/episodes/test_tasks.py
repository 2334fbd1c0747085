import pytest

from datamodules.episodes.module import FewShotDataModule
from datamodules.episodes.tasks import TASKS, check_pair, tasks_of
from datamodules.errors import DatasetError
from datamodules.own.folder import FolderDataset
from datamodules.registry import all_datasets
from tests.data.folder import write_by_class

KINDS = all_datasets()
NAMES = ["chest_xray", "coco", "deepglobe", "folder", "fss", "isic", "pascal", "suim", "synthetic"]


def pairs(task):
    return {(s, t) for s in NAMES for t in NAMES if task in tasks_of(KINDS[s], KINDS[t])}


def test_every_dataset_is_found():
    assert list(KINDS) == NAMES


def test_the_papers_pairs_are_possible():
    assert pairs("cross_category") == {(n, n) for n in ("coco", "folder", "fss", "pascal", "synthetic")}
    assert pairs("cross_dataset") >= {("coco", "pascal"), ("coco", "fss"), ("pascal", "fss")}
    assert pairs("cross_domain") >= {("pascal", t) for t in ("deepglobe", "isic", "chest_xray", "suim")}


def test_pairs_of_one_domain_are_only_the_published_ones():
    natural = {"coco", "pascal", "fss"}
    found = {(s, t) for s, t in pairs("cross_dataset") if {s, t} <= natural}
    assert found == {("coco", "pascal"), ("coco", "fss"), ("pascal", "fss")}
    assert not {(s, t) for s, t in pairs("cross_domain") if {s, t} <= natural}


def test_datasets_without_base_classes_are_never_trained_on():
    for task in TASKS:
        assert not {s for s, _ in pairs(task)} & {"deepglobe", "isic", "chest_xray", "suim"}


def test_own_images_go_with_every_dataset_that_trains():
    for task in ("cross_dataset", "cross_domain"):
        assert {s for s, t in pairs(task) if t == "folder" != s} == {"coco", "fss", "pascal", "synthetic"}
        assert {t for s, t in pairs(task) if s == "folder" != t} == set(NAMES) - {"folder"}


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
        ("cross_dataset", "pascal", "coco", "coco -> folder, fss, pascal"),
        ("cross_domain", "suim", "isic", "pascal -> chest_xray, deepglobe, folder, isic, suim"),
        ("cross_category", "isic", None, "pascal -> pascal"),
        ("cross_dataset", "coco", None, "coco -> folder, fss, pascal"),
        ("cross_country", "coco", None, "not one of cross_category, cross_dataset, cross_domain"),
    ],
)
def test_impossible_pairs_are_refused_with_the_possible_ones(task, source, target, words):
    with pytest.raises(DatasetError) as caught:
        check_pair(task, KINDS[source], target and KINDS[target])
    assert words in str(caught.value)
