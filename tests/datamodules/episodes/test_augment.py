"""Augmentation: the geometry of crops, what each method publishes, and that draws depend on the episode alone."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from datamodules.episodes.augment import augmented, seeded
from datamodules.episodes.crops import Crops
from datamodules.episodes.dataset import Episodes
from datamodules.episodes.sampler import TrainingEpisodes
from datamodules.own.synthetic import SyntheticDataset
from tests.conftest import ROOT

PUBLISHED = {
    **dict.fromkeys(("pfenet", "asgnet", "scl", "ntrenet", "cyctr"), "crops"),
    "ssp": "crops_ssp",
    "pmms": "resized_crops",
    "rpmms": "resized_crops",
    "panet": "flip",
    "repri": "flips",
    **dict.fromkeys(("vat", "vat_hm"), "colours"),
    **dict.fromkeys(("pmnet", "hsnet", "hsnet_hm", "dcama", "fecanet", "patnet"), "none"),
}


def square(h: int = 60, w: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright object on dark ground, and its mask."""
    mask = torch.zeros(h, w, dtype=torch.uint8)
    mask[h // 3 : h // 2, w // 4 : w // 2] = 1
    return (40 + 180 * mask).expand(3, h, w).contiguous(), mask


def test_without_options_a_crop_only_flips_and_pads() -> None:
    image, mask = square()
    grey = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1).expand(3, 10, 80)
    for seed in range(4):
        with seeded(seed):
            changed, of_changed = augmented(Crops(size=80), image, mask)
        assert (of_changed[:10] == 255).all()
        assert (of_changed[-10:] == 255).all()
        assert torch.equal(changed[:, :10], grey)
        inner, of_inner = changed[:, 10:70], of_changed[10:70]
        assert any(torch.equal(inner, x) and torch.equal(of_inner, y)
                   for x, y in ((image, mask), (image.flip(2), mask.flip(1))))  # fmt: skip


def test_ssp_pads_black_at_the_right_and_below() -> None:
    image, mask = square()
    changed, of_changed = augmented(Crops(size=[90, 80], fill=(0, 0, 0), centred=False), image, mask)
    assert (of_changed[60:] == 255).all()
    assert (of_changed[:60] < 255).all()
    assert (changed[:, 60:] == 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_image_and_mask_change_alike_and_crops_hold_the_object(seed: int) -> None:
    image, mask = square(120, 160)
    with seeded(seed):
        changed, of_changed = augmented(Crops(128, (0.95, 1.16), degrees=10, blur=0.5, holds=0.85), image, mask)
    assert changed.shape == (3, 128, 128)
    assert of_changed.shape == (128, 128)
    inside = of_changed < 255
    bright = changed[0] > 130
    assert (bright == (of_changed == 1))[inside].float().mean() > 0.97  # all but blurred edges
    whole = int(mask.sum()) * (0.95 * 128 / 160) ** 2
    assert int((of_changed == 1).sum()) > 0.8 * whole


@pytest.mark.parametrize("model, group", PUBLISHED.items())
def test_a_model_selects_its_published_augmentation(model: str, group: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        options = ["episodes.image_size=[64,96]", "dataset=synthetic", "hydra.mode=RUN"]
        cfg = compose("config", [f"model={model}", *options], return_hydra_config=True)
        off = compose("config", [f"model={model}", "augment=none", *options])
    assert cfg.hydra.runtime.choices.augment == group
    assert instantiate(off.episodes).augment is None
    data = instantiate(cfg.episodes)
    assert (data.augment is None) == (group == "none")
    if data.augment:
        with seeded(1):
            image, mask = augmented(data.augment, *square())
        assert (image.dtype, mask.dtype) == (torch.uint8, torch.uint8)
        assert image.shape[1:] == mask.shape
        assert (image.shape[1:] == (64, 96)) == ("crops" in group)
        assert data.training_record["augment"].startswith(type(data.augment).__name__)
    else:
        assert "augment" not in data.training_record


def test_draws_depend_on_the_episode_alone() -> None:
    dataset = SyntheticDataset(size=64, images_per_class=5, seed=0)
    specs = TrainingEpisodes({0: dataset.images_of(0, "train"), 1: dataset.images_of(1, "train")}, 2, seed=3)
    plain, changed = (Episodes(dataset, specs, (64, 64), augment=a) for a in (None, Crops(64, (0.5, 2), 10, 0.5)))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = changed[2, 7]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again, later = changed[2, 7], changed[3, 7]
    assert torch.equal(first.query, again.query)
    assert torch.equal(first.support_masks, again.support_masks)
    assert not torch.equal(first.query, plain[2, 7].query)
    assert not torch.equal(later.support, changed[4, 7].support)
    assert first.spec == plain[2, 7].spec
    assert set(first.support_masks.unique().tolist()) <= {0, 1}


def test_images_of_a_cache_are_augmented_too() -> None:
    dataset = SyntheticDataset(size=64, images_per_class=5, seed=0)
    names = dataset.images_of(0, "train")
    cache = {name: (dataset.read_image(name), dataset.read_index(name)) for name in names}
    specs = TrainingEpisodes({0: names}, 1, seed=0)
    one, other = (Episodes(dataset, specs, (64, 64), cache=c, augment=Crops(64, (0.5, 2)))[0, 0] for c in (None, cache))
    assert torch.equal(one.query, other.query)
    assert torch.equal(one.query_mask, other.query_mask)
