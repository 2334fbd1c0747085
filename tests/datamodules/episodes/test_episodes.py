from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler

from datamodules.episodes.dataset import FewShotDataset
from datamodules.episodes.episode import TENSORS, Episode
from datamodules.episodes.module import FewShotDataModule
from datamodules.episodes.sampler import EpochSampler, PlainDraw, TrainingEpisodes, draw_in_turn, list_hash
from datamodules.errors import DatasetError
from datamodules.own.folder import FolderDataset
from pmnet.segment.images import resize_image, resize_mask
from tests.data.folder import write_indexed

IMAGES = {7: [f"g{i}" for i in range(9)], 2: [f"b{i}" for i in range(4)], 5: [f"e{i}" for i in range(30)]}
SETTING = {
    "fold": 0,
    "shot": 2,
    "train_shot": 1,
    "image_size": (32, 64),
    "batch_size": 4,
    "test_batch_size": 3,
    "per_epoch": 10,
    "val": 5,
    "test": 11,
    "novel_pixels": "background",
    "workers": 0,
    "seed": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> FewShotDataset:
    root = write_indexed(tmp_path_factory.mktemp("episodes"), classes=6, images_per_class=3)
    return FolderDataset(str(root), folds=3, min_area=0.01)


def drawn(images, episodes, shot, seed=0):
    return draw_in_turn(images, episodes, shot, PlainDraw(repeats=False, seed=seed))


def make(dataset, process=0, processes=1, **options) -> FewShotDataModule:
    """A DataModule in one of several processes; its trainer tells it which."""
    data = FewShotDataModule(dataset, **(SETTING | options))
    device = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(current_epoch=0, global_rank=process, world_size=processes, strategy=device)
    return data


def same(a: Episode, b: Episode) -> bool:
    return a.spec == b.spec and all(torch.equal(getattr(a, n), getattr(b, n)) for n in TENSORS)


def one_by_one(loader) -> list[Episode]:
    """The episodes of all batches, as batches of one episode."""
    return [
        Episode(**{n: getattr(batch, n)[i : i + 1] for n in TENSORS}, spec=[batch.spec[i]])
        for batch in loader
        for i in range(len(batch.spec))
    ]


# The test list


@pytest.mark.parametrize("shot", [1, 3])
def test_list_is_the_same_numbers_as_the_protocol_in_plain_numpy(shot):
    random = np.random.RandomState(0)
    expected = []
    for i in range(200):
        class_id = [2, 5, 7][i % 3]
        query = random.choice(IMAGES[class_id])
        supports = []
        while len(supports) < shot:
            name = random.choice(IMAGES[class_id])
            if name not in [query, *supports]:
                supports.append(name)
        expected.append([query, supports, class_id])
    assert [e.row() for e in drawn(IMAGES, 200, shot)] == expected


@pytest.mark.parametrize("shot", [1, 3])
def test_list_cycles_through_classes_and_supports_differ_from_the_query(shot):
    episodes = drawn(IMAGES, 200, shot)
    assert [e.class_id for e in episodes] == ([2, 5, 7] * 67)[:200]
    for e in episodes:
        assert len({e.query, *e.supports}) == shot + 1
        assert {e.query, *e.supports} <= set(IMAGES[e.class_id])


def test_list_depends_on_the_seed_alone():
    episodes = drawn(IMAGES, 50, 2)
    np.random.seed(3)
    backwards = dict(reversed(IMAGES.items()))
    assert drawn(backwards, 50, 2) == episodes
    assert list_hash(drawn(IMAGES, 50, 2)) == list_hash(episodes)
    assert list_hash(drawn(IMAGES, 50, 2, seed=1)) != list_hash(episodes)


def test_shorter_list_is_the_head_of_a_longer_one():
    assert drawn(IMAGES, 20, 2) == drawn(IMAGES, 50, 2)[:20]


# Training episodes


@pytest.mark.parametrize("shot", [1, 3])
def test_training_episodes_are_the_same_in_any_order(shot):
    keys = [(epoch, index) for epoch in range(3) for index in range(100)]
    specs = TrainingEpisodes(IMAGES, shot, seed=4)
    in_order = {key: specs[key] for key in keys}
    np.random.default_rng(0).shuffle(keys)
    np.random.seed(5)
    other = TrainingEpisodes(dict(reversed(IMAGES.items())), shot, seed=4)
    assert all(other[tuple(key)] == in_order[tuple(key)] for key in keys)


def test_each_pair_is_the_query_once_a_round():
    specs = TrainingEpisodes(IMAGES, 1, seed=0)
    assert specs.pairs == 43
    pairs = sorted((c, n) for c, names in IMAGES.items() for n in names)
    rounds = [[(specs[2, r * 43 + i].class_id, specs[2, r * 43 + i].query) for i in range(43)] for r in range(3)]
    assert all(sorted(r) == pairs for r in rounds)
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]


@pytest.mark.parametrize("shot", [1, 3])
def test_training_supports_are_of_the_class_and_never_the_query(shot):
    specs = TrainingEpisodes(IMAGES, shot, seed=0)
    for e in (specs[0, i] for i in range(300)):
        assert len({e.query, *e.supports}) == shot + 1
        assert {e.query, *e.supports} <= set(IMAGES[e.class_id])


def test_every_other_image_of_the_class_becomes_support():
    specs = TrainingEpisodes({0: ["a", "b", "c", "d"]}, 1, seed=0)
    met = {(e.query, e.supports[0]) for e in (specs[0, i] for i in range(300))}
    assert met == {(q, s) for q in "abcd" for s in "abcd" if q != s}


def test_another_epoch_or_seed_draws_other_queries_and_other_supports():
    names = [f"n{i}" for i in range(10)]

    def draw(seed, epoch):
        """The query of each index, and the position of its support among the other images."""
        episodes = [TrainingEpisodes({0: names}, 1, seed)[epoch, i] for i in range(10)]
        places = [[n for n in names if n != e.query].index(e.supports[0]) for e in episodes]
        return [e.query for e in episodes], places

    first = draw(0, 0)
    assert draw(0, 0) == first
    for other in (draw(0, 1), draw(1, 0)):
        assert other[0] != first[0]
        assert other[1] != first[1]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("epoch", [0, 3])
def test_batches_of_all_processes_together_are_those_of_one(processes, epoch):
    length, batch_size = 40, 8

    def batches(process, count):
        sampler = EpochSampler(length, batch_size, process, count)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler) == length // count
        return list(BatchSampler(sampler, batch_size // count, drop_last=False))

    shares = [batches(p, processes) for p in range(processes)]
    together = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert together == batches(0, 1)
    assert list(chain(*together)) == [(epoch, i) for i in range(length)]


# Batches


@pytest.mark.parametrize("shot, size", [(1, (32, 64)), (3, (64, 32))])
def test_batches_have_the_documented_shapes_and_dtypes(folder, shot, size):
    batch = next(iter(make(folder, shot=shot, image_size=size).test_dataloader()))
    h, w = size
    shapes = {n: tuple(getattr(batch, n).shape) for n in TENSORS}
    assert shapes == {
        "query": (3, 3, h, w),
        "query_mask": (3, h, w),
        "support": (3, shot, 3, h, w),
        "support_masks": (3, shot, h, w),
        "class_id": (3,),
        "index": (3,),
    }
    assert {n for n in TENSORS if getattr(batch, n).dtype == torch.int64} == {"class_id", "index"}
    assert {n for n in TENSORS if getattr(batch, n).dtype == torch.uint8} == set(TENSORS) - {"class_id", "index"}
    assert set(batch.query_mask.unique().tolist()) == {0, 1, 255}
    assert set(batch.support_masks.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("train_shot", [1, 3])
def test_training_batches_have_their_own_number_of_shots(folder, train_shot):
    batch = next(iter(make(folder, train_shot=train_shot).train_dataloader()))
    assert batch.support.shape == (4, train_shot, 3, 32, 64)
    assert set(batch.class_id.tolist()) <= set(folder.base_classes(0))


def test_episodes_contain_the_images_of_their_spec(folder):
    data = make(folder)
    for i, episode in enumerate(one_by_one(data.test_dataloader())):
        spec = data.test_specs[i]
        assert episode.spec == [spec]
        assert episode.class_id.tolist() == [spec.class_id]
        assert episode.index.tolist() == [i]
        mask = resize_mask(folder.read_mask(spec.query, spec.class_id), (32, 64))
        assert torch.equal(episode.query[0], resize_image(folder.read_image(spec.query), (32, 64)))
        assert torch.equal(episode.query_mask[0], mask)
        for k, name in enumerate(spec.supports):
            assert torch.equal(episode.support[0, k], resize_image(folder.read_image(name), (32, 64)))
            mask = resize_mask(folder.read_mask(name, spec.class_id), (32, 64))
            assert torch.equal(episode.support_masks[0, k], (mask == 1).to(torch.uint8))
            assert episode.support_masks[0, k].any()


def test_collate_stacks_in_order(folder):
    episodes = make(folder).test_dataset()
    singles = [episodes[i] for i in (4, 0, 2)]
    batch = Episode.collate(singles)
    assert batch.spec == [s.spec[0] for s in singles]
    assert batch.index.tolist() == [4, 0, 2]
    for name in TENSORS:
        assert all(torch.equal(getattr(batch, name)[i], getattr(s, name)) for i, s in enumerate(singles))


def test_to_moves_every_tensor_and_keeps_the_rest(folder):
    batch = next(iter(make(folder).test_dataloader()))
    moved = batch.to("meta")
    assert all(getattr(moved, n).device.type == "meta" for n in TENSORS)
    assert all(getattr(batch, n).device.type == "cpu" for n in TENSORS)
    assert moved.spec == batch.spec
    assert same(batch.to("cpu"), batch)


@pytest.mark.parametrize("part", ["train_dataloader", "val_dataloader", "test_dataloader"])
def test_workers_change_no_byte(folder, part):
    batches = [list(getattr(make(folder, workers=workers), part)()) for workers in (0, 2)]
    assert len(batches[0]) == len(batches[1]) > 1
    assert all(same(a, b) for a, b in zip(*batches, strict=True))


def test_test_batch_size_changes_no_episode(folder):
    lists = [one_by_one(make(folder, test_batch_size=size).test_dataloader()) for size in (1, 4, 64)]
    assert len(lists[0]) == 11
    assert all(same(a, b) and same(a, c) for a, b, c in zip(*lists, strict=True))


def test_batch_size_changes_no_training_episode(folder):
    lists = [one_by_one(make(folder, batch_size=size).train_dataloader()) for size in (1, 4)]
    assert [len(episodes) for episodes in lists] == [10, 12]  # rounded up to whole batches
    assert all(same(a, b) for a, b in zip(*lists, strict=False))


def test_each_epoch_has_its_own_training_episodes(folder):
    loader = make(folder).train_dataloader()
    first = [b.spec for b in loader]
    assert [b.spec for b in loader] == first
    loader.sampler.set_epoch(1)
    assert [b.spec for b in loader] != first


def test_epoch_has_one_episode_per_pair_by_default(folder):
    data = make(folder, per_epoch=None, batch_size=1)
    pairs = sum(len(folder.images_of(c, "train")) for c in folder.base_classes(0))
    assert len(data.train_dataloader()) == pairs == data.train_specs.pairs


def test_validation_is_the_head_of_the_test_list_of_as_many_shots(folder):
    data = make(folder, train_shot=2)
    validation, test = one_by_one(data.val_dataloader()), one_by_one(data.test_dataloader())
    assert len(validation) == 5
    assert all(same(a, b) for a, b in zip(validation, test, strict=False))


def test_validation_is_the_same_whatever_shot_is_tested(folder):
    one, two = (one_by_one(make(folder, shot=k).val_dataloader()) for k in (1, 2))
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert one[0].support.shape[1] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_training_resumes_in_the_middle_of_an_epoch(folder, workers):
    """The state after three batches, loaded into a new loader, gives the remaining batches."""
    whole = make(folder, batch_size=2, workers=workers).train_dataloader()
    whole.sampler.set_epoch(1)
    batches = iter(whole)
    for _ in range(3):
        next(batches)
    state, rest = whole.state_dict(), list(batches)
    data = make(folder, batch_size=2, workers=workers)
    data.trainer.current_epoch = 1
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    left = list(resumed)
    assert state == {"batches": 3}
    assert len(left) == len(rest) == 2
    assert all(same(a, b) for a, b in zip(left, rest, strict=True))
    resumed.sampler.set_epoch(2)
    assert len(list(resumed)) == len(whole) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_wait_for_the_epoch(folder, workers):
    """The Trainer sets the epoch after `iter`, when a training is resumed between two epochs."""
    loader = make(folder, batch_size=2, workers=workers).train_dataloader()
    batches = iter(loader)
    loader.sampler.set_epoch(2)
    expected = make(folder, batch_size=2).train_dataloader()
    expected.sampler.set_epoch(2)
    assert all(same(a, b) for a, b in zip(batches, expected, strict=True))


def test_finished_epoch_is_not_resumed(folder):
    loader = make(folder, batch_size=2).train_dataloader()
    list(loader)
    other = make(folder, batch_size=2).train_dataloader()
    other.load_state_dict(loader.state_dict())
    assert len(list(other)) == 5


@pytest.mark.parametrize("processes, count", [(2, 11), (2, 10), (3, 11), (4, 2)])
def test_processes_test_each_episode_exactly_once(folder, processes, count):
    parts = [make(folder, p, processes, test=count) for p in range(processes)]
    indices = [i for data in parts for batch in data.test_dataloader() for i in batch.index.tolist()]
    assert sorted(indices) == list(range(count))
    alone = {e.index.item(): e for e in one_by_one(make(folder, test=count).test_dataloader())}
    assert all(same(e, alone[e.index.item()]) for data in parts for e in one_by_one(data.test_dataloader()))


@pytest.mark.parametrize("processes", [2, 4])
def test_training_batches_of_all_processes_together_are_those_of_one(folder, processes):
    shares = [list(make(folder, p, processes).train_dataloader()) for p in range(processes)]
    for parts, batch in zip(zip(*shares, strict=True), make(folder).train_dataloader(), strict=True):
        together = [torch.cat([getattr(p, n) for p in parts]) for n in TENSORS]
        assert list(chain(*(p.spec for p in parts))) == batch.spec
        assert all(torch.equal(t, getattr(batch, n)) for t, n in zip(together, TENSORS, strict=True))


def test_novel_pixels_are_background_as_published_or_marked_255(folder):
    def load(choice):
        return one_by_one(make(folder, novel_pixels=choice, per_epoch=24).train_dataloader())

    changed = 0
    for background, ignore in zip(load("background"), load("ignore"), strict=True):
        index = resize_mask(folder.read_index(background.spec[0].query), (32, 64))
        novel = torch.isin(index, torch.tensor([c + 1 for c in folder.novel_classes(0)], dtype=torch.uint8))
        assert (background.query_mask[0][novel] == 0).all()
        assert (ignore.query_mask[0][novel] == 255).all()
        assert torch.equal(ignore.query_mask[0][~novel], background.query_mask[0][~novel])
        assert torch.equal(ignore.support_masks, background.support_masks)
        changed += int(novel.sum())
    assert changed > 0


def test_novel_pixels_ignore_leaves_tests_alone(folder):
    lists = [one_by_one(make(folder, novel_pixels=n).test_dataloader()) for n in ("background", "ignore")]
    assert all(same(a, b) for a, b in zip(*lists, strict=True))


def test_batch_size_must_be_divisible_by_the_processes(folder):
    with pytest.raises(DatasetError, match=r"episodes\.batch_size=4 .* 3 processes"):
        make(folder, 0, 3).train_dataloader()


@pytest.mark.parametrize("size, shape", [(33, (33, 33)), ((50, 41), (50, 41)), ([7, 100], (7, 100))])
def test_any_image_sides_are_possible(folder, size, shape):
    data = make(folder, image_size=size)
    batch = next(iter(data.test_dataloader()))
    assert data.image_size == batch.query.shape[-2:] == batch.support_masks.shape[-2:] == shape


@pytest.mark.parametrize("size", [0, -32, (32, 0), (64,), (64, 64, 64), 64.5, "64", (64, 6.4)])
def test_image_sides_must_be_positive_whole_numbers(folder, size):
    with pytest.raises(DatasetError, match=r"episodes\.image_size must be one or two positive whole numbers, not "):
        make(folder, image_size=size)


def test_setup_says_what_is_missing_before_any_batch(folder):
    with pytest.raises(DatasetError, match="9-shot episode to test on needs 10 images"):
        make(folder, shot=9).setup("test")
    with pytest.raises(DatasetError, match="9-shot episode to train on needs 10 images"):
        make(folder, train_shot=9).setup("fit")


# Resizing


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (160, 128)])
def test_images_are_resized_as_pillow_does(size):
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    expected = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    resized = resize_image(torch.from_numpy(image).permute(2, 0, 1), size)
    assert resized.dtype == torch.uint8
    assert np.abs(resized.numpy().astype(int) - expected).max() <= 2


def test_masks_are_resized_without_new_values():
    mask = torch.from_numpy(np.random.default_rng(0).choice([0, 3, 17, 255], (90, 120)).astype(np.uint8))
    for size in [(32, 32), (160, 128)]:
        resized = resize_mask(mask, size)
        assert resized.shape == size
        assert resized.dtype == torch.uint8
        assert set(resized.unique().tolist()) == {0, 3, 17, 255}


def test_masks_are_resized_to_the_nearest_pixel():
    mask = torch.arange(64, dtype=torch.uint8).view(8, 8)
    assert torch.equal(resize_mask(mask, (16, 16)), mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(resize_mask(mask, (8, 8)), mask)
