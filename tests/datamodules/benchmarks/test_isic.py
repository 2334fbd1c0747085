"""ISIC2018: its lists and its episodes, with one class or three."""

import numpy as np
import pytest

from datamodules.benchmarks.isic import ISICDataset
from datamodules.errors import DatasetError
from datamodules.prepare.ready import prepare
from tests.data import isic
from tests.datamodules.benchmarks.published_loop import rows, supports_as_published


@pytest.mark.slow
@pytest.mark.parametrize("classes, shot", [(1, 5), (3, 1)])
def test_episodes_are_as_the_published_loader_draws_them(shared, lists, classes, shot):
    table = [line.split(",") for line in (shared / "splits/isic/class_id.csv").read_text().split()[1:]]
    of_class = [sorted(i for i, k in table if classes == 1 or k == name) for name in isic.CLASSES[:classes]]
    np.random.seed(0)
    expected = []
    for i in range(600):
        query = np.random.choice(of_class[i % classes], 1, replace=False)[0]
        expected.append([str(query), supports_as_published(of_class[i % classes], query, shot), i % classes])
    data = ISICDataset("nowhere", lists, classes=classes)
    assert rows(data, range(classes), shot) == expected


def test_three_classes_need_the_published_table(published, prepared, tmp_path):
    with pytest.raises(DatasetError, match=r"PATNet's list.*--splits"):
        ISICDataset(str(prepared("isic")), classes=3).images_of(0, "test")
    isic.write_lists(tmp_path / "splits" / "isic")
    prepare(ISICDataset, [published("isic")], tmp_path / "data", tmp_path / "splits", download=False)
    dataset = ISICDataset(str(tmp_path / "data" / "isic"), classes=3)
    for c, name in enumerate(isic.CLASSES):
        assert list(dataset.images_of(c, "test")) == [n for n in isic.NAMES if isic.class_of(n) == name]
        image = dataset.images_of(c, "test")[0]
        assert np.array_equal(dataset.read_mask(image, c).numpy(), isic.mask(image))
        assert np.array_equal(dataset.read_index(image).numpy(), (c + 1) * isic.mask(image))
