"""Cached features against those of the backbone, and where they are stored."""

import copy
import os
import pickle

import pytest
import safetensors.torch
import torch

import pmnet.backbones.cache
from pmnet import FeatureCache, PMNet
from pmnet.backbones import SmallBackbone

EVERY = dict.fromkeys(("layer1", "layer2", "layer3", "layer4"), "all")


def make_backbone(cache=None, weights="none"):
    backbone = SmallBackbone(weights).freeze()
    backbone.cache = cache
    passed = []
    inner = backbone.stem
    backbone.stem = lambda images: (passed.append(len(images)), inner(images))[1]
    return backbone, passed


def pictures(count, size=(64, 96), seed=0):
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for layer in theirs:
        for a, b in zip(ours[layer], theirs[layer], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert a.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def images():
    return pictures(5)


@pytest.fixture
def expected(images):
    with torch.no_grad():
        return make_backbone()[0](images)


@pytest.mark.parametrize("where", ["host", "disk", "nowhere", "partly on disk", "little memory"])
def test_each_image_is_computed_once_with_the_same_features(images, expected, where, tmp_path, monkeypatch):
    one = sum(f[0].nbytes for blocks in expected.values() for f in blocks) / 1e9
    options = {
        "host": {},
        "disk": {"host_gb": 0, "folder": tmp_path},
        "nowhere": {"host_gb": 0},
        "partly on disk": {"host_gb": 2.5 * one, "folder": tmp_path, "disk_gb": 2 * one},
        "little memory": {"folder": tmp_path},
    }[where]
    if where == "little memory":
        monkeypatch.setattr(pmnet.backbones.cache, "free_memory", lambda: pmnet.backbones.cache.SPARE)
    backbone, passed = make_backbone(FeatureCache(**options))
    with torch.no_grad():
        for order in ([0, 1, 2], [2, 3, 0, 2], [4, 3, 1], [0, 1, 2, 3, 4]):
            wanted = {layer: [f[order] for f in blocks] for layer, blocks in expected.items()}
            assert_same(backbone(images[order]), wanted)
    files = list(tmp_path.rglob("*.safetensors"))
    want = {"host": ([3, 1, 1], 0), "disk": ([3, 1, 1], 5), "nowhere": ([3, 3, 3, 5], 0)}
    want |= {"partly on disk": ([3, 1, 1, 1], 2), "little memory": ([3, 1, 1], 5)}
    assert (passed, len(files)) == want[where]
    assert not list(tmp_path.rglob("*.part"))


def test_folder_is_shared_for_equal_weights_size_and_precision(images, tmp_path):
    def passes(images, weights="none", low=False):
        backbone, passed = make_backbone(FeatureCache(host_gb=0, folder=tmp_path), weights)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            features = backbone(images)
        return passed, features["layer3"][0].dtype

    assert passes(images) == ([5], torch.float32)
    assert passes(images) == ([], torch.float32)
    assert passes(images, weights="quickstart") == ([5], torch.float32)
    assert passes(images[..., :64]) == ([5], torch.float32)
    assert passes(images, low=True) == ([5], torch.bfloat16)
    assert passes(images, low=True) == ([], torch.bfloat16)
    changed = images.clone()
    changed[2, 0, 5, 7] += 1
    assert passes(changed)[0] == [1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_features_of_each_precision_are_cached_separately(dtype, images, tmp_path):
    for to in (torch.float32, torch.bfloat16):
        backbone, passed = make_backbone(FeatureCache(host_gb=0, folder=tmp_path))
        backbone.to(to)
        given = images.to(dtype) if dtype == torch.uint8 else (images / 255).to(to)
        with torch.no_grad():
            features = [backbone(given)["layer4"][0] for _ in range(2)]
        assert [f.dtype for f in features] == [to, to]
        assert torch.equal(*features)
        assert passed == [5]


def test_features_of_other_backbones_and_changed_weights_are_cached_separately(images, expected, tmp_path):
    class Rectified(SmallBackbone):
        def stage(self, layer, x):
            features, x = super().stage(layer, x)
            return [f.relu() for f in features], x

    cache = FeatureCache(host_gb=0, folder=tmp_path)
    with torch.no_grad():
        backbone, _ = make_backbone(cache)
        backbone(images)
        rectified = Rectified("none").freeze()
        rectified.cache = cache
        assert torch.equal(rectified(images)["layer3"][0], expected["layer3"][0].relu())
        for change in (backbone.mean, next(backbone.trunk.parameters())):
            change.mul_(1.5)
            assert_same(backbone(images), backbone.computed(images, EVERY))
            assert not torch.allclose(backbone(images)["layer3"][0], expected["layer3"][0])


@pytest.mark.parametrize("damage", ["bit", "zeros", "other tensors"])
def test_damaged_file_is_not_used(damage, images, expected, tmp_path, caplog):
    with torch.no_grad():
        make_backbone(FeatureCache(folder=tmp_path))[0](images)
        path = next(tmp_path.rglob("*.safetensors"))
        content = bytearray(path.read_bytes())
        if damage == "bit":
            content[-1001] ^= 64
        elif damage == "zeros":
            content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        else:
            content = safetensors.torch.save({"layer3.0": torch.ones(2, 2, 2)})
        path.write_bytes(content)
        assert_same(make_backbone(FeatureCache(folder=tmp_path))[0](images), expected)
    assert caplog.text.count("cannot be read") == 1


def test_copies_of_a_cache_are_empty(images):
    backbone, _ = make_backbone(FeatureCache())
    with torch.no_grad():
        backbone(images)
    for other in (copy.deepcopy(backbone.cache), pickle.loads(pickle.dumps(backbone.cache))):
        assert backbone.cache.kept
        assert not other.kept
        assert other.room == other.budget


def test_cache_is_skipped_for_gradients_to_images(images):
    backbone, _ = make_backbone(FeatureCache())
    image = (images[:1] / 255).requires_grad_()
    for _ in range(2):
        assert torch.autograd.grad(backbone(image)["layer4"][0].sum(), image)[0].abs().sum() > 0
    assert backbone(images[:0])["layer4"][0].shape[0] == 0


def test_truncated_file_is_reported_and_written_again(images, expected, tmp_path, caplog):
    with torch.no_grad():
        make_backbone(FeatureCache(host_gb=0, folder=tmp_path))[0](images)
        for path in list(tmp_path.rglob("*.safetensors"))[:2]:
            os.truncate(path, 1000)
        backbone, passed = make_backbone(FeatureCache(host_gb=0, folder=tmp_path))
        assert_same(backbone(images), expected)
        assert passed == [2]
        assert caplog.text.count("cannot be read") == 2
        assert_same(backbone(images), expected)
    assert passed == [2]


def test_failing_disk_is_reported_once(images, expected, tmp_path, caplog):
    (tmp_path / "file").touch()
    backbone, passed = make_backbone(FeatureCache(host_gb=0, folder=tmp_path / "file"))
    with torch.no_grad():
        for _ in range(2):
            assert_same(backbone(images), expected)
    assert passed == [5, 5]
    assert caplog.text.count("Cannot write features") == 1


def test_network_trains_and_segments_the_same_with_a_cache():
    torch.manual_seed(0)
    network = PMNet(SmallBackbone("none"), dropout=0.0)
    query, support, masks = pictures(2), pictures(4, seed=1).unflatten(0, (2, 2)), torch.rand(2, 2, 64, 96) < 0.4

    def gradients():
        network.train().zero_grad()
        network(query, support, masks).square().mean().backward()
        found = [p.grad.clone() for p in network.head.parameters()]
        with torch.no_grad():
            return [*found, network.eval()(query, support, masks)]

    state = {name: t.clone() for name, t in network.state_dict().items()}
    without = gradients()
    network.backbone.cache = FeatureCache()
    for _ in range(2):
        network.load_state_dict(state)
        for ours, theirs in zip(gradients(), without, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
