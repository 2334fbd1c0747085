"""COCO-20i: its lists, its episodes, and damaged annotations."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from datamodules.benchmarks.coco import CocoDataset
from datamodules.errors import DatasetError
from datamodules.prepare.ready import prepare
from tests.data import coco
from tests.datamodules.benchmarks.published_loop import golden, rows, supports_as_published


def test_episodes_are_the_golden_list(shared, lists):
    data = CocoDataset("nowhere", lists)
    assert rows(data, data.novel_classes(0), 1) == golden(shared, "coco_fold0_1shot")


@pytest.mark.parametrize("fold, shot", [(2, 5)])
def test_episodes_are_as_the_published_loader_draws_them(shared, lists, fold, shot):
    numbers = json.loads(gzip.decompress((shared / "splits/coco/coco20i.json.gz").read_bytes()))["val"]
    np.random.seed(0)
    expected = []
    for _ in range(300):
        c = np.random.choice([fold + 4 * i for i in range(20)], 1, replace=False)[0]
        names = [f"val2014/COCO_val2014_{n:012d}.jpg" for n in numbers[str(c)]]
        query = np.random.choice(names, 1, replace=False)[0]
        expected.append([str(query), supports_as_published(names, query, shot), int(c)])
    data = CocoDataset("nowhere", lists)
    assert rows(data, data.novel_classes(fold), shot, 300) == expected


def test_counts_of_the_published_lists(lists):
    data = CocoDataset("nowhere", lists)
    assert [len(data.novel_classes(f)) for f in range(4)] == [20] * 4
    assert sum(len(data.images_of(c, s)) for c in range(80) for s in ("train", "test")) == 253064


def test_folds_hold_out_the_published_classes(lists):
    assert CocoDataset("nowhere", lists).novel_classes(1)[:3] == [1, 5, 9]


def test_pickled_lists_are_read_or_refused(published, tmp_path):
    for part, year in (("trn", "train2014"), ("val", "val2014")):
        (tmp_path / "coco" / part).mkdir(parents=True)
        for fold in range(4):
            ids = [c for c in range(80) if (c % 4 == fold) == (part == "val")]
            images = {c: [f"{year}/{coco.file_name(year, coco.number_of(i))}" for i in (9, 2, 5)] for c in ids}
            (tmp_path / "coco" / part / f"fold{fold}.pkl").write_bytes(pickle.dumps(images))
    prepare(CocoDataset, [published("coco")], tmp_path / "data", tmp_path, download=False)
    dataset = CocoDataset(str(tmp_path / "data" / "coco"))
    assert list(dataset.images_of(7, "test")) == [
        f"val2014/{coco.file_name('val2014', coco.number_of(i))}" for i in (9, 2, 5)
    ]
    (tmp_path / "coco" / "trn" / "fold2.pkl").write_bytes(pickle.dumps({0: Path("x")}))
    with pytest.raises(DatasetError, match=r"fold2.pkl.*pathlib"):
        prepare(CocoDataset, [published("coco")], tmp_path / "other", tmp_path, download=False)


def test_damaged_annotations_are_named(refuses, tmp_path):
    source = coco.write(tmp_path / "source", archives=False)
    path = next(source.rglob("instances_train2014.json"))
    path.write_text(path.read_text()[:5000])
    refuses(CocoDataset, source, "instances_train2014.json")
