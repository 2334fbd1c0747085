"""Test episodes whose query does not show the class: how they are sampled and read."""

import pytest
import torch

from datamodules.episodes.absent import count_absent, draw_absent
from datamodules.episodes.dataset import FewShotDataset
from datamodules.episodes.episode import EpisodeSpec
from datamodules.errors import DatasetError
from datamodules.own.synthetic import SyntheticDataset
from tests.datamodules.episodes.test_episodes import make, one_by_one, same


class Pairs(FewShotDataset):
    """Images "01" show the classes 0 and 1. The lists leave out a class whose object is a single pixel: "1-0"."""

    name, splits, classes, folds = "pairs", "written here", ("a", "b", "c"), ((0, 1, 2),)

    def __init__(self, **images):
        self.images_by_class = [images.get(name, []) for name in self.classes]
        self.read = []

    def images_of(self, class_id, split):
        return self.images_by_class[class_id]

    def read_image(self, name):
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    def read_index(self, name):
        self.read.append(name)
        shown, _, small = name.partition(".")[0].partition("-")
        index = torch.zeros(8, 8, dtype=torch.uint8)
        for row, class_id in enumerate(shown):
            index[row] = int(class_id) + 1
        if small:
            index[7, 7] = int(small) + 1
        return index


def drawn(dataset, specs, count=20, seed=0):
    images = {c: dataset.images_of(c, "test") for c in range(3) if dataset.images_of(c, "test")}
    return draw_absent(dataset, images, specs, count, seed)


SPECS = [EpisodeSpec("0.q", ("0.s", "01"), 0), EpisodeSpec("1.q", ("1.s", "01"), 1)]


@pytest.fixture(scope="module")
def synthetic():
    return SyntheticDataset(size=64, images_per_class=12, seed=0)


def test_query_shows_another_class_and_no_pixel_of_the_own_one():
    dataset = Pairs(a=["0", "01"], b=["1", "01", "1-0"], c=["2", "2-0", "02"])
    specs = drawn(dataset, SPECS)
    assert {(s.query, s.shown) for s in specs if s.class_id == 0} == {("1", 1), ("2", 2)}
    assert {(s.query, s.shown) for s in specs if s.class_id == 1} == {("0", 0), ("2", 2), ("2-0", 2), ("02", 2)}
    assert [(s.supports, s.class_id) for s in specs] == [(s.supports, s.class_id) for s in SPECS] * 10


def test_each_mask_is_read_once_for_a_class_and_only_if_drawn():
    dataset = Pairs(a=["0"], b=["1", "01"], c=[f"2.{i}" for i in range(500)])
    specs = drawn(dataset, SPECS[:1], count=5)
    assert len(dataset.read) == len(set(dataset.read)) <= 10
    assert {s.query for s in specs} <= set(dataset.read)


def test_the_list_depends_on_the_seed_alone():
    dataset = Pairs(a=["0"], b=["1"], c=[f"2.{i}" for i in range(9)])
    assert drawn(dataset, SPECS) == drawn(dataset, SPECS) != drawn(dataset, SPECS, seed=1)
    assert drawn(dataset, SPECS, count=5) == drawn(dataset, SPECS)[:5]


def test_single_class_and_class_that_is_everywhere_are_refused():
    with pytest.raises(DatasetError, match=r"'a' is the only class of pairs.*episodes\.absent=0.*fold=all"):
        drawn(Pairs(a=["0"]), SPECS[:1])
    with pytest.raises(DatasetError, match=r"no 'a', but 1,000 draws found none\. Set episodes\.absent=0"):
        drawn(Pairs(a=["0"], b=["01", "1-0"]), SPECS[:1])


@pytest.mark.parametrize("share, count", [(0, 0), (0.01, 1), (0.25, 4), (0.5, 11), (0.75, 33)])
def test_share_is_that_of_all_episodes(share, count):
    assert count_absent(share, 11) == count


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_share_that_cannot_be_is_refused(synthetic, share):
    with pytest.raises(DatasetError, match=r"episodes\.absent.*at least 0 and less than 1"):
        make(synthetic, absent=share)


def test_ordinary_episodes_come_first_and_unchanged(synthetic):
    plain, data = make(synthetic), make(synthetic, absent=0.3)
    assert data.test_specs == plain.test_specs
    assert {k: v for k, v in data.provenance.items() if k != "absent"} == plain.provenance
    assert data.provenance["absent"] | {"share": 0.3, "episodes": 5} == data.provenance["absent"]
    assert data.training_record == plain.training_record
    ordinary, both = one_by_one(plain.test_dataloader()), one_by_one(data.test_dataloader())
    assert len(ordinary) == 11
    assert all(same(a, b) for a, b in zip(ordinary, both, strict=False))
    for i, (spec, episode) in enumerate(zip(data.absent_specs, both[11:], strict=True)):
        assert episode.index.tolist() == [11 + i]
        assert episode.spec == [spec.episode]
        index = synthetic.read_index(spec.query)
        assert not (index == spec.class_id + 1).any()
        assert (index == spec.shown + 1).any()
        assert set(episode.query_mask.unique().tolist()) == {0, 2}
        assert torch.equal(episode.support, ordinary[i].support)
        assert episode.class_id == ordinary[i].class_id


def test_batch_size_and_processes_change_no_episode(synthetic):
    whole = one_by_one(make(synthetic, absent=0.3).test_dataloader())
    for size in (1, 3):
        again = one_by_one(make(synthetic, absent=0.3, test_batch_size=size).test_dataloader())
        assert all(same(a, b) for a, b in zip(whole, again, strict=True))
    shares = [one_by_one(make(synthetic, p, 2, absent=0.3).test_dataloader()) for p in (0, 1)]
    merged = sorted((e for share in shares for e in share), key=lambda e: int(e.index))
    assert all(same(a, b) for a, b in zip(whole, merged, strict=True))
