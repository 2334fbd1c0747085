import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from datamodules.own.synthetic import CLASSES, SyntheticDataset, draw
from datamodules.registry import all_datasets
from pmnet.training.metrics import FewShotIoU

ROOT = Path(__file__).parents[3]
SIZE = 96


@pytest.fixture(scope="module")
def synthetic() -> SyntheticDataset:
    return SyntheticDataset(size=SIZE, images_per_class=20, seed=0)


def all_names(dataset, class_id):
    return [*dataset.images_of(class_id, "train"), *dataset.images_of(class_id, "test")]


def digest(kind: str) -> str:
    """sha256 of an image and a mask of each class."""
    dataset = all_datasets()[kind](size=64, images_per_class=2, seed=3)
    sha = hashlib.sha256()
    for class_id in range(len(dataset.classes)):
        for name in (dataset.images_of(class_id, "train")[1], dataset.images_of(class_id, "test")[0]):
            sha.update(dataset.read_image(name).numpy().tobytes() + dataset.read_index(name).numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["synthetic", "materials"])
def test_another_process_draws_the_same(kind):
    code = f"from tests.datamodules.own.test_synthetic import digest; print(digest('{kind}'))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert other.returncode == 0, other.stderr
    assert other.stdout.strip() == digest(kind)


@pytest.mark.parametrize("kind", ["synthetic", "materials"])
def test_fingerprint_is_that_of_what_is_drawn(kind):
    """Caches of images tell datasets apart by it."""
    settings = [{}, {"size": 48}, {"seed": 4}]
    prints = {
        all_datasets()[kind](**({"size": 64, "images_per_class": 2, "seed": 3} | s)).fingerprint() for s in settings
    }
    assert len(prints) == 3


def test_random_state_outside_changes_nothing(synthetic):
    name = synthetic.images_of(4, "test")[3]
    before = synthetic.read_image(name)
    draw.cache_clear()
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(synthetic.read_image(name), before)


def test_changing_what_was_read_does_not_change_what_is_read_next(synthetic):
    name = synthetic.images_of(0, "train")[0]
    image, index = synthetic.read_image(name), synthetic.read_index(name)
    kept = image.clone(), index.clone()
    image.zero_()
    index.zero_()
    assert torch.equal(synthetic.read_image(name), kept[0])
    assert torch.equal(synthetic.read_index(name), kept[1])


def test_shapes_dtypes_and_range(synthetic):
    name = synthetic.images_of(7, "train")[0]
    image, index = synthetic.read_image(name), synthetic.read_index(name)
    assert image.shape == (3, SIZE, SIZE)
    assert index.shape == (SIZE, SIZE)
    assert image.dtype == index.dtype == torch.uint8
    assert image.max() - image.min() > 80


def test_20_classes_in_4_folds_of_5():
    assert len(set(CLASSES)) == 20
    assert [list(f) for f in SyntheticDataset.folds] == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]


def test_another_seed_draws_other_images(synthetic):
    other = SyntheticDataset(size=SIZE, images_per_class=20, seed=1)
    for class_id in range(0, 20, 7):
        name = synthetic.images_of(class_id, "test")[0]
        assert not torch.equal(synthetic.read_image(name), other.read_image(name))
        assert not torch.equal(synthetic.read_index(name), other.read_index(name))


def test_all_images_of_a_class_differ_in_training_and_test(synthetic):
    names = all_names(synthetic, 6)
    assert len(names) == len(set(names)) == 40
    assert len({synthetic.read_image(n).numpy().tobytes() for n in names}) == 40
    assert len({synthetic.read_index(n).numpy().tobytes() for n in names}) == 40


@pytest.mark.parametrize("class_id", range(20))
def test_image_shows_its_class_and_only_classes_of_its_fold(synthetic, class_id):
    fold = next(f for f in synthetic.folds if class_id in f)
    shown = set()
    for name in all_names(synthetic, class_id):
        index = synthetic.read_index(name)
        values = set(index.unique().tolist())
        assert class_id + 1 in values
        assert values <= {0, *(c + 1 for c in fold)}
        assert 0.005 < (index == class_id + 1).float().mean() < 0.6
        shown |= values
    assert shown == {0, *(c + 1 for c in fold)}  # so that the above was put to the test


def all_foreground(index):
    return torch.ones_like(index)


def class_of_the_biggest_object(index):
    parts = [(np.bincount(ndimage.label(index == v)[0].flat)[1:].max(), v) for v in np.unique(index) if v]
    return (index == int(max(parts)[1])).int()


@pytest.mark.parametrize("guess", [all_foreground, class_of_the_biggest_object])
def test_guessing_without_the_supports_scores_low(synthetic, guess):
    metric = FewShotIoU(synthetic.novel_classes(0))
    for class_id in synthetic.novel_classes(0):
        for name in synthetic.images_of(class_id, "test"):
            index = synthetic.read_index(name)
            metric.update(guess(index)[None], (index == class_id + 1)[None], torch.tensor([class_id]))
    assert 2 < metric.compute()["miou"] < 25
