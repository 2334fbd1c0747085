"""Published lists and the episodes drawn from them, beside golden lists and the published loops."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datamodules.benchmarks.coco import CocoDataset
from datamodules.benchmarks.fss import FSSDataset
from datamodules.benchmarks.isic import ISICDataset
from datamodules.benchmarks.pascal import PascalDataset
from datamodules.errors import DatasetError
from tests.conftest import ROOT, run_module


@pytest.fixture
def lists(shared):
    return str(shared / "splits")


def rows(dataset, class_ids, shot, count=None, **options):
    return [e.row() for e in dataset.test_episodes(class_ids, count or dataset.test_length, shot, **options)]


def golden(shared, name):
    return json.loads(gzip.decompress((shared / "golden" / f"episodes_{name}.json.gz").read_bytes()))


# Equal to the published draws


@pytest.mark.parametrize("shot", [1, 5])
def test_pascal_is_the_golden_list(shared, lists, shot):
    data = PascalDataset("nowhere", lists)
    assert rows(data, data.novel_classes(0), shot) == golden(shared, f"pascal_fold0_{shot}shot")


def test_coco_is_the_golden_list(shared, lists):
    data = CocoDataset("nowhere", lists)
    assert rows(data, data.novel_classes(0), 1) == golden(shared, "coco_fold0_1shot")


def supports_as_published(names, query, shot):
    """The loop of the published loaders, on numpy's global generator."""
    found = []
    while len(found) < shot:
        name = np.random.choice(names, 1, replace=False)[0]
        if name != query:
            found.append(str(name))
    return found


@pytest.mark.parametrize("fold, shot", [(1, 1), (3, 5)])
def test_pascal_is_as_the_published_loader_draws(shared, lists, fold, shot):
    lines = [line.split("__") for line in (shared / f"splits/pascal/val/fold{fold}.txt").read_text().split()]
    of_class = {c: [name for name, k in lines if k == c] for _, c in lines}
    np.random.seed(0)
    expected = []
    for i in range(1000):
        query, c = lines[i % len(lines)]
        expected.append([query, supports_as_published(of_class[c], query, shot), int(c) - 1])
    data = PascalDataset("nowhere", lists)
    assert rows(data, data.novel_classes(fold), shot) == expected


@pytest.mark.parametrize("fold, shot", [(2, 5)])
def test_coco_is_as_the_published_loader_draws(shared, lists, fold, shot):
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


@pytest.mark.parametrize("part, first, shot", [("test", 760, 1), ("val", 520, 5)])
def test_fss_is_as_the_published_loader_draws(shared, lists, part, first, shot):
    classes = sorted((shared / f"splits/fss/{part}.txt").read_text().split("\n")[:-1])
    np.random.seed(0)
    expected = []
    for i, name in enumerate(classes):
        for number in sorted(map(str, range(1, 11)), key=lambda n: f"{n}.jpg"):
            numbers = supports_as_published(range(1, 11), int(number), shot)
            expected.append([f"{name}/{number}.jpg", [f"{name}/{n}.jpg" for n in numbers], first + i])
    data = FSSDataset("nowhere", lists)
    ids = data.novel_classes(0) if part == "test" else data.validation_classes(0)
    assert rows(data, ids, shot) == expected
    assert len(expected) == 2400


@pytest.mark.parametrize("classes, shot", [(1, 5), (3, 1)])
def test_isic_is_as_the_published_loader_draws(shared, lists, classes, shot):
    table = [line.split(",") for line in (shared / "splits/isic/class_id.csv").read_text().split()[1:]]
    names = ["melanoma", "nevus", "seborrheic_keratosis"]
    of_class = [sorted(i for i, k in table if classes == 1 or k == name) for name in names[:classes]]
    np.random.seed(0)
    expected = []
    for i in range(600):
        query = np.random.choice(of_class[i % classes], 1, replace=False)[0]
        expected.append([str(query), supports_as_published(of_class[i % classes], query, shot), i % classes])
    data = ISICDataset("nowhere", lists, classes=classes)
    assert rows(data, range(classes), shot) == expected


def test_draw_without_repeats_is_the_published_one_with_repeats_passed_over(shared, lists):
    data = PascalDataset("nowhere", lists)
    published, apart = (rows(data, data.novel_classes(0), 5, repeats=r) for r in (True, False))
    assert any(len(set(supports)) < 5 for _, supports, _ in published)
    assert all(len({query, *supports}) == 6 for query, supports, _ in apart)
    assert [r[0] for r in apart] == [r[0] for r in published]
    first = next(i for i, (_, supports, _) in enumerate(published) if len(set(supports)) < 5)
    assert apart[:first] == published[:first]


# What the lists say


def test_lists_are_known_as_the_published_ones(lists, tmp_path, shared):
    for kind in (PascalDataset, CocoDataset, FSSDataset, ISICDataset):
        assert kind("nowhere", lists).splits == "published lists"
    other = tmp_path / "fss"
    other.mkdir()
    for part in ("trn", "val", "test"):
        names = (shared / f"splits/fss/{part}.txt").read_text().split("\n")[:-1]
        (other / f"{part}.txt").write_text("\n".join(sorted(names)) + "\n")
    assert FSSDataset("nowhere", str(other)).splits.startswith("lists given (sha256 ")


def test_counts_of_the_published_lists(lists):
    pascal, coco, fss = (kind("nowhere", lists) for kind in (PascalDataset, CocoDataset, FSSDataset))
    assert sum(len(pascal.images_of(c, "train")) for c in range(20)) == 13680
    assert sum(len(pascal.images_of(c, "test")) for c in range(20)) == 1868
    assert [len(coco.novel_classes(f)) for f in range(4)] == [20] * 4
    assert sum(len(coco.images_of(c, s)) for c in range(80) for s in ("train", "test")) == 253064
    assert [len(ids) for ids in (fss.base_classes(0), fss.validation_classes(0), fss.novel_classes(0))] == [
        520,
        240,
        240,
    ]
    assert fss.novel_classes(0)[0] == 760


def test_folds_hold_out_the_published_classes(lists):
    coco, pascal = CocoDataset("nowhere", lists), PascalDataset("nowhere", lists)
    assert coco.novel_classes(1)[:3] == [1, 5, 9]
    assert pascal.novel_classes(2) == [10, 11, 12, 13, 14]
    assert set(pascal.base_classes(2)) | set(pascal.novel_classes(2)) == set(range(20))
    assert pascal.base_classes("all") == list(range(20))


REPRI = [  # published: the PASCAL classes whose twins COCO's fold held out
    "aeroplane boat chair diningtable dog person",
    "bicycle bus horse sofa",
    "bird car pottedplant sheep train tvmonitor",
    "bottle cat cow motorbike",
]


@pytest.mark.parametrize("fold", range(4))
def test_pascal_after_coco_tests_what_the_fold_held_out_or_the_standard_fold(lists, fold):
    coco, pascal = CocoDataset("nowhere", lists), PascalDataset("nowhere", lists)
    tested = [pascal.classes[c] for c in pascal.target_classes(coco, fold)]
    assert tested == REPRI[fold].split()
    trained = {coco.common_name(coco.classes[c]) for c in coco.base_classes(fold)}
    assert not {pascal.common_name(name) for name in tested} & trained
    standard = PascalDataset("nowhere", lists, coco_folds="standard")
    assert standard.target_classes(coco, fold) == pascal.novel_classes(fold)
    assert {pascal.common_name(name) for name in pascal.classes} <= {coco.common_name(n) for n in coco.classes}


def test_names_are_a_list_of_strings(lists):
    names = CocoDataset("nowhere", lists).images_of(0, "test")
    some = random.Random(0).sample(range(len(names)), 20)
    assert all(names[i] == list(names)[i] for i in some)
    assert list(names[2:4]) == [names[2], names[3]]


PRIVATE_MEMORY = """
import gc, sys
from datamodules.episodes.sampler import Names

def private() -> int:
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

names = [f"train2014/COCO_train2014_{i:012d}.jpg" for i in range(250_000)]
names = Names(names) if sys.argv[1] == "Names" else names
gc.collect()
import os
if os.fork() == 0:  # as a worker is started
    before = private()
    for i in range(0, len(names), 3):
        name = names[i]
    print(private() - before, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_a_worker_that_reads_coco_sized_lists_copies_nothing():
    """Kilobytes that a forked process comes to own, beside a list of strings."""

    def grown(kind: str) -> int:
        words = [sys.executable, "-c", PRIVATE_MEMORY, kind]
        return int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert grown("Names") < 1000 < 10_000 < grown("list")


# The command


def test_command_writes_the_golden_list_and_opens_no_image(shared):
    done = run_module("datamodules.episodes", "dataset=pascal", "fold=0", "shot=5", "dataset.splits=../shared/splits")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == golden(shared, "pascal_fold0_5shot")
    assert "published lists" in done.stderr


@pytest.mark.parametrize(
    "overrides, first",
    [
        ("dataset=isic shot=5 dataset.splits=../shared/splits", "ISIC_00"),
        ("task=cross_dataset target=fss fold=2 target.splits=../shared/splits", "abe's_flyingfish/1.jpg"),
        ("dataset=fss dataset.splits=../shared/splits", "abe's_flyingfish/1.jpg"),
    ],
)
def test_command_knows_every_setting(shared, overrides, first):
    done = run_module("datamodules.episodes", *overrides.split())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0][0].startswith(first)


def test_command_says_what_is_missing(tmp_path):
    done = run_module("datamodules.episodes", "dataset=deepglobe", f"data={tmp_path}")
    assert done.returncode == 1
    assert "python -m datamodules.prepare deepglobe" in done.stderr
    assert "Traceback" not in done.stderr


# Damaged lists


@pytest.mark.parametrize("line", ["2007_000033", "2007_000033__21", "2007_000033__xx", "__01"])
def test_damaged_line_is_shown(tmp_path, lists, line):
    data = PascalDataset("nowhere", lists)
    data.write_lists(data.lists, tmp_path / "pascal")
    path = tmp_path / "pascal/val/fold1.txt"
    path.write_text(f"2007_000061__06\n{line}\n")
    with pytest.raises(DatasetError, match="IMAGE__CC"):
        _ = PascalDataset("nowhere", str(tmp_path)).pairs


def test_missing_list_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"has no list .*fold0.txt.*datamodules.prepare pascal"):
        _ = PascalDataset("nowhere", str(tmp_path)).lists
