from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from datamodules.episodes.pixels import GREY, BasePixels, LabelledImages, PixelDataModule
from datamodules.own.folder import FolderDataset
from tests.data.folder import write_indexed

SIZE = (32, 32)
KEYS = [(epoch, index) for epoch in range(2) for index in range(30)]  # more than a round of 18 images


def read(root):
    return FolderDataset(str(root), folds=3, min_area=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_indexed(tmp_path_factory.mktemp("pixels"), classes=6, images_per_class=3, suffix=".png")


def pixels_of(root, fold=1, seed=0, smallest_crop=0.3):
    return BasePixels(read(root), fold, SIZE, smallest_crop, seed)


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("fold", [0, 1])
def test_nothing_depends_on_the_pixels_of_novel_classes(tmp_path, folder, fold):
    novel = [c + 1 for c in read(folder).novel_classes(fold)]
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").symlink_to(folder / "masks")
    (tmp_path / "classes.txt").write_text((folder / "classes.txt").read_text())
    random, changed = np.random.default_rng(1), 0
    for path in sorted((folder / "images").iterdir()):
        image, mask = np.array(Image.open(path)), np.array(Image.open(folder / "masks" / path.name))
        where = np.isin(mask, novel)
        image[where] = random.integers(0, 256, (where.sum(), 3))
        Image.fromarray(image).save(tmp_path / "images" / path.name)
        changed += where.sum()
    assert changed > 1000
    before, after = pixels_of(folder, fold), pixels_of(tmp_path, fold)
    assert any(not torch.equal(before.dataset.read_image(n), after.dataset.read_image(n)) for n in before.names)
    assert all(same(before[key], after[key]) for key in KEYS)


def test_pixels_of_base_classes_do_matter(tmp_path):
    before = pixels_of(write_indexed(tmp_path, suffix=".png"))[0, 0]
    for path in (tmp_path / "images").iterdir():
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    after = pixels_of(tmp_path)[0, 0]
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_novel_classes_are_painted_grey_and_base_classes_renumbered(folder):
    pixels = pixels_of(folder, fold=1)
    assert pixels.base == [0, 1, 4, 5]
    numbers = {0: 0, 1: 1, 2: 2, 3: 255, 4: 255, 5: 3, 6: 4, 255: 255}  # value in the file -> in training
    painted = 0
    for name in pixels.names:
        image, index = pixels.dataset.read_image(name), pixels.dataset.read_index(name)
        clean, mask = pixels.without_novel(name)
        assert mask.tolist() == [[numbers[v] for v in row] for row in index.tolist()]
        novel = (index == 3) | (index == 4)
        assert torch.equal(clean[:, ~novel], image[:, ~novel])
        assert (clean[:, novel] == GREY[:, :, 0]).all()
        painted += int(novel.sum())
    assert painted > 0


def test_images_are_those_that_show_a_base_class(folder):
    pixels = pixels_of(folder, fold=1)
    shown = {n for c in pixels.base for n in pixels.dataset.images_of(c, "train")}
    assert pixels.names == sorted(shown)
    assert 0 < len(pixels) < 18  # images 2, 8 and 14 show the two novel classes alone
    assert not {"002", "008", "014"} & set(pixels.names)


def test_items_have_the_documented_shapes_dtypes_and_values(folder):
    pixels, values = pixels_of(folder), set()
    for key in KEYS:
        image, mask = pixels[key]
        assert image.shape == (3, *SIZE)
        assert mask.shape == SIZE
        assert image.dtype == mask.dtype == torch.uint8
        values |= set(mask.unique().tolist())
    assert values == {0, 1, 2, 3, 4, 255}


def test_item_is_a_function_of_seed_epoch_and_index_alone(folder):
    pixels = pixels_of(folder)
    in_order = {key: pixels[key] for key in KEYS}
    torch.manual_seed(99)
    np.random.seed(99)
    other = pixels_of(folder)
    assert all(same(other[key], in_order[key]) for key in reversed(KEYS))


def test_reading_leaves_the_random_state_alone(folder):
    before = torch.get_rng_state()
    pixels_of(folder)[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_crop_and_colour_depend_on_seed_epoch_and_index(tmp_path):
    root = write_indexed(tmp_path, classes=2, images_per_class=1, suffix=".png", neighbours=False)
    data = FolderDataset(str(root), folds=2, min_area=0.01)
    pixels = [BasePixels(data, 0, SIZE, 0.3, seed) for seed in (0, 1)]
    assert len(pixels[0]) == 1  # so that no shuffling tells two keys apart
    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in range(10)]
    assert len({pixels[seed][epoch, index][0].numpy().tobytes() for seed, epoch, index in keys}) == len(keys)


def test_each_image_is_seen_once_a_round(tmp_path):
    root = write_indexed(tmp_path, classes=6, images_per_class=3, neighbours=False, suffix=".png")
    pixels = pixels_of(root, fold=0)
    read_names = []
    pixels.without_novel = lambda name: read_names.append(name) or BasePixels.without_novel(pixels, name)
    for index in range(2 * len(pixels)):
        pixels[0, index]
    rounds = read_names[: len(pixels)], read_names[len(pixels) :]
    assert sorted(rounds[0]) == sorted(rounds[1]) == pixels.names
    assert rounds[0] != rounds[1]


def test_image_and_mask_are_cut_alike(tmp_path):
    write_indexed(tmp_path, classes=3, suffix=".png", neighbours=False)
    for path in (tmp_path / "images").iterdir():
        mask = np.array(Image.open(tmp_path / "masks" / path.name))
        bright = np.where(np.isin(mask, [0, 255]), 40, 220).astype(np.uint8)
        Image.fromarray(np.stack([bright] * 3, 2)).save(path)
    pixels, compared = BasePixels(read(tmp_path), 0, (96, 96), 0.3, seed=0), 0
    for index in range(40):
        image, mask = pixels[0, index]
        inside, outside = (image.float().mean(0)[m] for m in ((mask > 0) & (mask < 255), mask == 0))
        if min(len(inside), len(outside)) > 900:
            middle = (inside.mean() + outside.mean()) / 2
            assert (inside > middle).float().mean() > 0.9  # not all: bilinear image, nearest mask
            assert (outside < middle).float().mean() > 0.9
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_two_processes_together_are_those_of_one(folder, workers):
    def batches(process, processes, workers):
        data = PixelDataModule(pixels_of(folder), batch_size=4, images_per_epoch=9, workers=workers)
        data.trainer = SimpleNamespace(global_rank=process, world_size=processes, current_epoch=0)
        return list(data.train_dataloader())

    alone, shares = batches(0, 1, 0), [batches(p, 2, workers) for p in range(2)]
    assert len(alone) == 3
    for batch, *parts in zip(alone, *shares, strict=True):
        assert same(batch, [torch.cat(halves) for halves in zip(*parts, strict=True)])


# Labelled images


@pytest.mark.parametrize("fold", [0, 1])
def test_labelled_images_are_whole_and_novel_pixels_are_ignored(folder, fold):
    """One of the four flips of the resized image and mask, with base classes renumbered and novel ones 255."""
    data = read(folder)
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
    images, flips, novel_pixels = LabelledImages(data, fold, SIZE, seed=0, augment=augment), set(), 0
    place = {0: 0, 255: 255} | {c + 1: 255 for c in data.novel_classes(fold)}
    place |= {c + 1: i + 1 for i, c in enumerate(data.base_classes(fold))}
    for key in KEYS:
        image, labels, name = images[key]
        whole, index = data.read_image(name), data.read_index(name)
        small = Image.fromarray(whole.permute(1, 2, 0).numpy()).resize(SIZE[::-1], Image.Resampling.BILINEAR)
        rows, columns = ([i * old // new for i in range(new)] for old, new in zip(index.shape, SIZE, strict=True))
        expected = np.array([[place[int(index[r, c])] for c in columns] for r in rows])
        found = [
            f
            for f in ((), (0,), (1,), (0, 1))
            if np.array_equal(np.flip(expected, f), labels.numpy())
            and np.abs(np.flip(np.array(small), f).astype(int) - image.permute(1, 2, 0).numpy()).max() <= 1
        ]
        assert found
        flips.add(found[0])
        novel_pixels += (expected == 255).sum()
    assert novel_pixels > 100
    assert len(flips) == 4
