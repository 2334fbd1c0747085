"""Heads in .safetensors files: loaded into a configured network, or refused; the shipped one, and what it is worth."""

import json

import pytest
import safetensors.torch
import torch

from datamodules.episodes.dataset import Episodes
from datamodules.episodes.episode import IGNORE
from datamodules.episodes.loader import collate
from datamodules.own.folder import FolderDataset
from experiments.run import heads
from pmnet import EfficientNetLiteBackbone, Nearest, PMNet, Prototype
from pmnet.backbones import SmallBackbone
from pmnet.errors import CheckpointError, WeightsError
from pmnet.segment.recipe import SHIPPED, build
from pmnet.training.metrics import FewShotIoU

LITE = SHIPPED / "pmnet_lite.safetensors"


def make(seed, weights="none", **options):
    torch.manual_seed(seed)
    return PMNet(SmallBackbone(weights), **options).eval()


def save(path, network):
    state = {name: value for name, value in network.state_dict().items() if name in network.saved()}
    about = {"needs": network.backbone.provenance.as_dict(), "training": {"steps": 7}}
    safetensors.torch.save_file(state, path, {"pmnet": json.dumps(about)})
    return path


def test_a_file_or_the_name_of_a_shipped_head(tmp_path):
    assert heads.named("pmnet_lite") == LITE
    assert heads.named("mine/head.safetensors").name == "head.safetensors"
    assert [heads.named(ckpt) for ckpt in (None, "outputs/run", "best.ckpt", str(tmp_path))] == [None] * 4


def test_loads_every_tensor(tmp_path):
    first, second = (make(seed, evidence=["nearest"]) for seed in (0, 1))
    loaded = heads.load(save(tmp_path / "head.safetensors", first), second)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert loaded.released
    assert loaded.content["by"] == "this project"


def test_another_network_or_backbone_is_refused(tmp_path):
    path = save(tmp_path / "head.safetensors", make(0))
    with pytest.raises(CheckpointError, match="another network"):
        heads.load(path, make(0, evidence=["nearest"]))
    with pytest.raises(CheckpointError, match="needs backbone small with weights 'none'"):
        heads.load(path, make(0, weights="quickstart"))


def test_a_file_that_is_no_head_is_refused(tmp_path):
    path = tmp_path / "head.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="does not say of which method"):
        heads.load(path, make(0))
    with pytest.raises(WeightsError):
        heads.load(tmp_path / "absent.safetensors", make(0))


@pytest.mark.parametrize(
    "training",
    [
        {"base_classes": ["cat"]},
        {"dataset": "shapes", "base_classes": [1]},
        {"dataset": "shapes", "base_classes": ["cat"], "novel_pixels": []},
        {"dataset": "shapes", "base_classes": ["cat"], "started_from": {"file": "other.safetensors"}},
    ],
)
def test_an_unsound_account_of_a_training_counts_as_none(training: dict):
    assert heads.training_of({"training": training}) == {}
    sound = {"dataset": "shapes", "base_classes": ["cat"], "started_from": {"dataset": "a", "base_classes": []}}
    assert heads.training_of({"training": sound}) == sound


# The shipped head


def test_shipped_head_is_small_and_says_what_it_is():
    assert LITE.stat().st_size < 1.5e6
    recipe = build("pmnet_lite").recipe
    assert recipe["needs"]["backbone"] == "efficientnet_lite0"
    assert len(recipe["needs"]["sha256"]) == 64
    assert recipe["licence"].startswith("MIT. Trained on images of PASCAL VOC 2012 (Flickr terms of use)")
    assert recipe["training"]["base_classes"]
    assert recipe["training"]["seed"] == 0


def test_shipped_head_is_the_same_in_the_framework_and_in_the_library():
    network = PMNet(
        EfficientNetLiteBackbone("imagenet"), b3dconvs=False, dropout=0.0, evidence=["prototype", "nearest"]
    ).eval()
    heads.load(LITE, network)
    random = torch.Generator().manual_seed(0)
    query = torch.randint(256, (1, 3, 64, 96), generator=random, dtype=torch.uint8)
    support = torch.randint(256, (1, 2, 3, 64, 96), generator=random, dtype=torch.uint8)
    masks = (torch.rand(1, 2, 64, 96, generator=random) < 0.4).to(torch.uint8)
    assert torch.equal(network(query, support, masks), build("pmnet_lite").method(query, support, masks))


@pytest.mark.slow
def test_shipped_head_beats_the_floors_on_photos_of_another_kind(shared):
    method = build("pmnet_lite").method
    dataset = FolderDataset(shared / "data" / "industrial", folds=1, min_area=0.01)
    specs = dataset.test_episodes(dataset.novel_classes(0), count=36, shot=1)
    episodes = Episodes(dataset, specs, (384, 384))
    methods = [method, Prototype(method.backbone), Nearest(method.backbone)]
    scores = [FewShotIoU(dataset.novel_classes(0)) for _ in methods]
    for i in range(0, len(specs), 6):
        batch = collate([episodes[j] for j in range(i, i + 6)])
        for each, score in zip(methods, scores, strict=True):
            with torch.no_grad():
                mask = each.predict(batch.query, batch.support, batch.support_masks)
            score.update(mask, batch.query_mask == 1, batch.class_id, batch.query_mask == IGNORE)
    ours, *floors = (score.compute()["miou"] for score in scores)
    assert ours > max(floors) + 3
