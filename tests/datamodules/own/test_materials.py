import numpy as np
import pytest
import torch
from scipy import ndimage

from datamodules.own.materials import CLASSES, FORMS, MaterialsDataset, draw, noise, region
from datamodules.registry import all_datasets
from pmnet.training.metrics import FewShotIoU

SIZE = 96


@pytest.fixture(scope="module")
def materials() -> MaterialsDataset:
    return MaterialsDataset(size=SIZE, images_per_class=6, seed=0)


def test_48_classes_in_4_folds_each_with_all_forms(materials):
    assert len(set(CLASSES)) == 48
    assert all_datasets()["materials"] is MaterialsDataset
    assert sorted(c for fold in materials.folds for c in fold) == list(range(48))
    for fold in materials.folds:
        assert {CLASSES[c].split()[0] for c in fold} == set(FORMS)


@pytest.mark.parametrize("class_id", range(0, 48, 5))
def test_images_show_their_class_alone_and_all_differ(materials, class_id):
    names = [*materials.images_of(class_id, "train"), *materials.images_of(class_id, "test")]
    images, masks = ([read(name) for name in names] for read in (materials.read_image, materials.read_index))
    assert len({image.numpy().tobytes() for image in images}) == len(names) == 12
    assert len({mask.numpy().tobytes() for mask in masks}) == 12  # noise alone would make images differ
    for image, index in zip(images, masks, strict=True):
        assert (image.shape, index.shape) == ((3, SIZE, SIZE), (SIZE, SIZE))
        assert image.dtype == index.dtype == torch.uint8
        assert index.unique().tolist() == [0, class_id + 1]
        assert 0.02 < (index != 0).float().mean() < 0.8


def test_the_result_depends_on_the_arguments_alone(materials):
    name = materials.images_of(3, "test")[2]
    image, index = materials.read_image(name), materials.read_index(name)
    kept = image.clone(), index.clone()
    image.zero_()
    index.zero_()
    assert torch.equal(materials.read_image(name), kept[0])
    assert torch.equal(materials.read_index(name), kept[1])
    draw.cache_clear()
    np.random.seed(1)
    assert torch.equal(materials.read_image(name), kept[0])
    other = MaterialsDataset(size=SIZE, images_per_class=6, seed=1)
    assert not torch.equal(other.read_image(name), kept[0])
    assert not torch.equal(other.read_index(name), kept[1])


def everything(grey):
    return torch.ones_like(grey)


def lighter(grey):
    return grey > grey.median()


def darker(grey):
    return grey < grey.median()


@pytest.mark.parametrize("guess", [everything, lighter, darker])
def test_guessing_without_the_supports_scores_low(materials, guess):
    metric = FewShotIoU(range(48))
    for class_id in range(48):
        for name in materials.images_of(class_id, "test"):
            grey = materials.read_image(name).float().mean(0)
            shown = (materials.read_index(name) != 0)[None]
            metric.update(guess(grey).int()[None], shown, torch.tensor([class_id]))
    assert 2 < metric.compute()["miou"] < 35


def test_odd_sizes():
    dataset = MaterialsDataset(size=33, images_per_class=2, seed=3)
    for name in dataset.images_of(4, "train"):
        assert dataset.read_image(name).shape == (3, 33, 33)
        assert dataset.read_index(name).unique().tolist() == [0, 5]


@pytest.mark.parametrize("period", [0.02, 0.05, 0.1])
def test_noise_has_its_period(period):
    """The autocorrelation of isotropic noise of one frequency is Bessel's J0, whose first root is 2.405."""
    field = noise(np.random.default_rng(0), 512, period, 0.05)
    assert abs(field.mean()) < 1e-9
    assert abs(field.std() - 1) < 1e-9
    correlation = np.fft.irfft2(np.abs(np.fft.rfft2(field)) ** 2)[0, :200]
    root = int(np.argmax(correlation < 0)) / 512
    assert abs(root - 2.405 / (2 * np.pi) * period) < 0.05 * period + 1 / 512


def test_stretched_noise_is_longer_across_its_angle():
    field = noise(np.random.default_rng(0), 256, 0.1, 0.3, angle=np.pi / 2, stretch=4)
    down, right = np.gradient(field)
    assert 2 * right.std() < down.std()


@pytest.mark.parametrize("seed", range(0, 50, 7))
def test_forms(seed):
    inside = {form: region(form, np.random.default_rng(seed), 256, 0.05) for form in FORMS}
    parts = {form: ndimage.label(mask)[1] for form, mask in inside.items()}
    assert parts["grains"] > 3 * parts["blots"]
    assert 0.3 <= inside["layers"].mean() <= 0.7
    thickness = {form: 2 * ndimage.distance_transform_edt(mask).max() for form, mask in inside.items()}
    assert max(thickness["grains"], thickness["veins"]) < 25
    assert min(thickness["blots"], thickness["layers"]) > 30
