"""PASCAL-5i: its lists, its episodes, its folds after COCO-20i, and damaged sources."""

import numpy as np
import pytest
from PIL import Image

from datamodules.benchmarks.coco import CocoDataset
from datamodules.benchmarks.pascal import PascalDataset
from datamodules.errors import DatasetError
from tests.data import pascal
from tests.datamodules.benchmarks.published_loop import golden, rows, supports_as_published

# Episodes


@pytest.mark.parametrize("shot", [1, 5])
def test_episodes_are_the_golden_list(shared, lists, shot):
    data = PascalDataset("nowhere", lists)
    assert rows(data, data.novel_classes(0), shot) == golden(shared, f"pascal_fold0_{shot}shot")


@pytest.mark.parametrize("fold, shot", [(1, 1), (3, 5)])
def test_episodes_are_as_the_published_loader_draws_them(shared, lists, fold, shot):
    lines = [line.split("__") for line in (shared / f"splits/pascal/val/fold{fold}.txt").read_text().split()]
    of_class = {c: [name for name, k in lines if k == c] for _, c in lines}
    np.random.seed(0)
    expected = []
    for i in range(1000):
        query, c = lines[i % len(lines)]
        expected.append([query, supports_as_published(of_class[c], query, shot), int(c) - 1])
    data = PascalDataset("nowhere", lists)
    assert rows(data, data.novel_classes(fold), shot) == expected


def test_episodes_without_repeats_skip_the_repeats_of_the_published_draw(lists):
    data = PascalDataset("nowhere", lists)
    published, apart = (rows(data, data.novel_classes(0), 5, repeats=r) for r in (True, False))
    assert any(len(set(supports)) < 5 for _, supports, _ in published)
    assert all(len({query, *supports}) == 6 for query, supports, _ in apart)
    assert [r[0] for r in apart] == [r[0] for r in published]
    first = next(i for i, (_, supports, _) in enumerate(published) if len(set(supports)) < 5)
    assert apart[:first] == published[:first]


# Lists and folds


def test_counts_of_the_published_lists(lists):
    data = PascalDataset("nowhere", lists)
    assert sum(len(data.images_of(c, "train")) for c in range(20)) == 13680
    assert sum(len(data.images_of(c, "test")) for c in range(20)) == 1868


def test_folds_hold_out_the_published_classes(lists):
    data = PascalDataset("nowhere", lists)
    assert data.novel_classes(2) == [10, 11, 12, 13, 14]
    assert set(data.base_classes(2)) | set(data.novel_classes(2)) == set(range(20))
    assert data.base_classes("all") == list(range(20))


REPRI = [  # published: the PASCAL classes whose counterparts COCO's fold held out
    "aeroplane boat chair diningtable dog person",
    "bicycle bus horse sofa",
    "bird car pottedplant sheep train tvmonitor",
    "bottle cat cow motorbike",
]


@pytest.mark.parametrize("fold", range(4))
def test_after_coco_the_classes_that_its_fold_held_out_are_tested_or_the_standard_fold(lists, fold):
    coco, data = CocoDataset("nowhere", lists), PascalDataset("nowhere", lists)
    tested = [data.classes[c] for c in data.target_classes(coco, fold)]
    assert tested == REPRI[fold].split()
    trained = {coco.common_name(coco.classes[c]) for c in coco.base_classes(fold)}
    assert not {data.common_name(name) for name in tested} & trained
    standard = PascalDataset("nowhere", lists, coco_folds="standard")
    assert standard.target_classes(coco, fold) == data.novel_classes(fold)
    assert {data.common_name(name) for name in data.classes} <= {coco.common_name(n) for n in coco.classes}


@pytest.mark.parametrize("line", ["2007_000033", "2007_000033__21", "2007_000033__xx", "__01"])
def test_damaged_line_of_a_list_is_shown(tmp_path, lists, line):
    data = PascalDataset("nowhere", lists)
    data.write_lists(data.lists, tmp_path / "pascal")
    (tmp_path / "pascal/val/fold1.txt").write_text(f"2007_000061__06\n{line}\n")
    with pytest.raises(DatasetError, match="IMAGE__CC") as error:
        _ = PascalDataset("nowhere", str(tmp_path)).pairs
    assert line in str(error.value)


def test_missing_list_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"fold0.txt.*datamodules.prepare pascal"):
        _ = PascalDataset("nowhere", str(tmp_path)).lists


# Damaged sources


def test_unknown_value_of_a_mask_is_shown(refuses, tmp_path):
    source = pascal.write(tmp_path / "source", archives=False)
    path = next(source.rglob("SegmentationClass/2007_000103.png"))
    mask = np.array(Image.open(path))
    mask[5, 9] = 77
    Image.fromarray(mask).save(path)
    refuses(PascalDataset, source, "2007_000103.png has the value 77")


def test_mask_of_another_size_is_refused(refuses, tmp_path):
    source = pascal.write(tmp_path / "source", archives=False)
    path = next(source.rglob("SegmentationClass/2007_000103.png"))
    Image.open(path).resize((20, 20)).save(path)
    refuses(PascalDataset, source, "2007_000103.jpg and .*2007_000103.png differ in size")


def test_damaged_matlab_file_is_named(refuses, tmp_path):
    source = pascal.write(tmp_path / "source", archives=False)
    next(source.rglob(f"{pascal.SBD_ONLY[3]}.mat")).write_bytes(b"MATLAB no more")
    refuses(PascalDataset, source, f"{pascal.SBD_ONLY[3]}.mat")
