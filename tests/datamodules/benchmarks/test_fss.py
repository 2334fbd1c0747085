"""FSS-1000: its lists and its episodes."""

import numpy as np
import pytest

from datamodules.benchmarks.fss import FSSDataset
from datamodules.errors import DatasetError
from datamodules.prepare.ready import prepare
from tests.data import fss
from tests.datamodules.benchmarks.published_loop import rows, supports_as_published


@pytest.mark.parametrize("part, first, shot", [("test", 760, 1), ("val", 520, 5)])
def test_episodes_are_as_the_published_loader_draws_them(shared, lists, part, first, shot):
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


def test_counts_of_the_published_lists(lists):
    data = FSSDataset("nowhere", lists)
    parts = (data.base_classes(0), data.validation_classes(0), data.novel_classes(0))
    assert [len(ids) for ids in parts] == [520, 240, 240]
    assert data.novel_classes(0)[0] == 760


def test_sorted_lists_are_not_taken_for_the_published_ones(shared, tmp_path):
    for part in ("trn", "val", "test"):
        names = (shared / f"splits/fss/{part}.txt").read_text().split("\n")[:-1]
        (tmp_path / f"{part}.txt").write_text("\n".join(sorted(names)) + "\n")
    assert FSSDataset("nowhere", str(tmp_path)).splits.startswith("lists given (sha256 ")


def test_given_lists_are_preferred_to_built_ones(published, tmp_path):
    fss.write_lists(tmp_path / "splits" / "fss")
    manifest = prepare(FSSDataset, [published("fss")], tmp_path / "data", tmp_path / "splits", download=False)
    assert "given" in manifest["lists"]["origin"]
    dataset = FSSDataset(str(tmp_path / "data" / "fss"))
    assert dataset.classes == ("abacus", "comb", "radio", "taxi", "handcuff", "mortar", "abe's_flyingfish", "bus")
    assert len(dataset.base_classes(0)) == 4
    assert len(dataset.validation_classes(0)) == 2
    assert dataset.novel_classes(0) == [6, 7]


def test_list_with_a_missing_image_is_refused(published, tmp_path):
    fss.write_lists(tmp_path / "fss")
    (tmp_path / "fss" / "test.txt").write_text("bus\nunicorn\n")
    with pytest.raises(DatasetError, match=r"given .*'unicorn/1.jpg'.* 1.jpg .*published_fss"):
        prepare(FSSDataset, [published("fss")], tmp_path / "data", tmp_path / "fss", download=False)
    assert not (tmp_path / "data" / "fss").exists()
