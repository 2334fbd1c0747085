"""The mixture of datasets: names, numbers and pixels are those of its sources."""

import pytest
import torch

from datamodules.errors import DatasetError
from datamodules.own.mixture import MixtureDataset
from datamodules.own.synthetic import SyntheticDataset


@pytest.fixture
def sources():
    return {name: SyntheticDataset(size=48, images_per_class=3, seed=seed) for seed, name in enumerate(["a", "b", "c"])}


def test_masks_are_those_of_the_sources(sources):
    mixture = MixtureDataset(sources)
    for name, source in sources.items():
        for class_id, title in enumerate(source.classes):
            own = mixture.classes.index(f"{name}/{title}")
            images = mixture.images_of(own, "train")
            assert images == [f"{name}:{image}" for image in source.images_of(class_id, "train")]
            assert torch.equal(mixture.read_mask(images[0], own), source.read_mask(images[0][2:], class_id))
            assert torch.equal(mixture.read_image(images[0]), source.read_image(images[0][2:]))


def test_255_and_0_stay(sources, monkeypatch):
    mask = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    monkeypatch.setattr(sources["c"], "read_index", lambda name: mask)
    assert MixtureDataset(sources).read_index("c:x").tolist() == [[0, 41, 255]]


def test_pixels_of_masks_are_those_of_the_masks(sources):
    mixture = MixtureDataset(sources)
    names = ["a:" + sources["a"].images_of(3, "train")[0], "c:" + sources["c"].images_of(19, "train")[0]]
    for name, counts in mixture.pixels(names).items():
        values, numbers = mixture.read_index(name).unique(return_counts=True)
        assert counts == dict(zip(values.tolist(), numbers.tolist(), strict=True))


def test_a_fold_is_that_of_every_source(sources):
    mixture = MixtureDataset(sources)
    novel = {mixture.classes[c] for c in mixture.novel_classes(2)}
    assert novel == {f"{name}/{s.classes[c]}" for name, s in sources.items() for c in s.novel_classes(2)}
    assert MixtureDataset.common_name("a/Striped Disc") == "striped disc"


def test_too_many_classes_are_refused(sources):
    with pytest.raises(DatasetError, match="at most 254 classes, not 260"):
        MixtureDataset({str(i): sources["a"] for i in range(13)})
    with pytest.raises(DatasetError, match="needs datasets"):
        MixtureDataset({})
