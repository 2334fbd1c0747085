"""Features against the libraries' own forward passes; weights that are missing, damaged, wrong or malicious."""

import os
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.functional import normalize

from pmnet import PMNet
from pmnet.backbones import EfficientNetLiteBackbone, ResNetBackbone, SmallBackbone, SwinBackbone, weights
from pmnet.backbones.dilated import DilatedResNetBackbone
from pmnet.backbones.small import build_trunk
from pmnet.backbones.vgg import VGGBackbone
from pmnet.backbones.vit import ViTBackbone
from pmnet.backbones.weights import load_weights
from pmnet.errors import SettingError, WeightsError
from pmnet.files import file_hash
from pmnet.methods.dcama import DCAMA
from pmnet.methods.hsnet import HSNet
from pmnet.methods.mixture import MixtureBackbone
from pmnet.training.pretrain import BackbonePretraining

LAYERS = ("layer1", "layer2", "layer3", "layer4")
STRIDES = dict(zip(LAYERS, (4, 8, 16, 32), strict=True))
SMALL = partial(SmallBackbone, "none")
RESNET18, RESNET50, RESNET101 = (partial(ResNetBackbone, f"resnet{depth}", "none") for depth in (18, 50, 101))
SWIN = partial(SwinBackbone, "none")
LAYOUTS = [
    pytest.param(SMALL, (24, 48, 96, 128), (1, 1, 2, 2), id="small"),
    pytest.param(RESNET18, (64, 128, 256, 512), (2, 2, 2, 2), id="resnet18"),
    pytest.param(RESNET50, (256, 512, 1024, 2048), (3, 4, 6, 3), id="resnet50"),
    pytest.param(RESNET101, (256, 512, 1024, 2048), (3, 4, 23, 3), id="resnet101"),
    pytest.param(SWIN, (128, 256, 512, 1024), (2, 2, 18, 2), id="swin", marks=pytest.mark.slow),
]


@pytest.fixture
def hub(tmp_path):
    """An empty folder as torch's folder for downloaded weights."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    torch.hub.set_dir(before)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("tried to download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def randomise(trunk):
    """Changes the statistics and biases, because the norms ignore their initial values."""
    torch.manual_seed(0)
    for name, tensor in trunk.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.8, 1.2)


def random_state(seed=1):
    """Weights of the small backbone that differ from those of `none`."""
    torch.manual_seed(seed)
    return build_trunk().state_dict()


def assert_holds(backbone, state):
    for name, tensor in backbone.trunk.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# Features


@pytest.mark.parametrize("build", [RESNET18, RESNET50], ids=["resnet18", "resnet50"])
def test_resnet_features_are_residual_sums_before_the_last_relu(build):
    backbone = build().freeze().double()
    randomise(backbone.trunk)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    outputs = {layer: [] for layer in LAYERS}  # torchvision's, after the last ReLU
    for layer, kept in outputs.items():
        for block in getattr(backbone.trunk, layer):
            block.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output.clone()))
    with torch.no_grad():
        logits, features = backbone.trunk(images), backbone(images)
        last = F.relu(features["layer4"][-1])
        torch.testing.assert_close(backbone.trunk.fc(last.mean((2, 3))), logits, rtol=1e-9, atol=1e-9)
    for layer in LAYERS:
        for feature, output in zip(features[layer], outputs[layer], strict=True):
            torch.testing.assert_close(F.relu(feature), output, rtol=1e-9, atol=1e-9)
            assert (feature < 0).any()


def test_small_backbone_features_are_residual_sums_of_torchvision_blocks():
    backbone = SMALL().freeze()
    randomise(backbone.trunk)
    x = images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = backbone(images)
        x = backbone.trunk.stem(x)
        for layer in LAYERS:
            outputs = []
            for block in getattr(backbone.trunk, layer):
                outputs.append(x := block(x))
            for feature, output in zip(features[layer], outputs, strict=True):
                torch.testing.assert_close(F.relu(feature), output, rtol=1e-5, atol=1e-5)
                assert (feature < 0).any()


@pytest.mark.slow
def test_swin_features_are_block_outputs():
    backbone = SWIN().freeze()
    reference = timm.create_model("swin_base_patch4_window12_384", pretrained=False, num_classes=0).eval()
    reference.load_state_dict(backbone.trunk.state_dict())
    outputs = {layer: [] for layer in LAYERS}
    for kept, stage in zip(outputs.values(), reference.layers, strict=True):
        for block in stage.blocks:
            block.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output.movedim(3, 1)))
    image = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        logits, features = reference(image), backbone(image)
        last = features["layer4"][-1].movedim(1, 3)
        torch.testing.assert_close(reference.head(reference.norm(last)), logits, rtol=1e-4, atol=1e-4)
    for layer in LAYERS:
        for feature, output in zip(features[layer], outputs[layer], strict=True):
            torch.testing.assert_close(feature, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build, channels, blocks", LAYOUTS)
def test_features_have_the_declared_channels_blocks_and_strides(build, channels, blocks):
    backbone = build().freeze()
    assert backbone.channels == dict(zip(LAYERS, channels, strict=True))
    assert backbone.blocks == dict(zip(LAYERS, blocks, strict=True))
    for H, W in ((64, 96), (128, 64)):
        with torch.no_grad():
            features = backbone(torch.randn(1, 3, H, W))
        assert {layer: len(maps) for layer, maps in features.items()} == backbone.blocks
        for (layer, maps), C in zip(sorted(features.items()), channels, strict=True):
            assert {tuple(f.shape) for f in maps} == {(1, C, H // STRIDES[layer], W // STRIDES[layer])}
            assert all(f.isfinite().all() for f in maps)


def test_uint8_images_are_normalised_with_imagenet_statistics():
    backbone = SMALL().freeze()
    images = torch.randint(0, 256, (2, 3, 64, 64)).to(torch.uint8)
    by_torchvision = normalize(images / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    with torch.no_grad():
        of_bytes, of_floats = backbone(images), backbone(by_torchvision)
    for layer in LAYERS:
        torch.testing.assert_close(of_bytes[layer], of_floats[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [SMALL, RESNET18], ids=["small", "resnet18"])
def test_backbone_stays_frozen_while_the_network_trains(build):
    network = PMNet(build())
    network.train()
    backbone = network.backbone
    assert network.head.training
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    network(torch.randn(2, 3, 64, 64), torch.randn(2, 1, 3, 64, 64), torch.ones(2, 1, 64, 64)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())


def test_backbone_can_be_trained_unless_frozen():
    backbone = SMALL().train()
    assert all(module.training for module in backbone.modules())
    assert all(p.requires_grad for p in backbone.parameters())


def test_named_parts_of_a_frozen_backbone_are_trained():
    backbone = SMALL().freeze(but=["layer3", "layer4.1"]).train()
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in backbone.named_parameters() if name.startswith(("trunk.layer3.", "trunk.layer4.1."))
    }
    assert not trained & backbone.frozen_names()
    assert not any(module.training for module in backbone.modules())


@pytest.mark.slow
@torch.no_grad()
def test_sides_that_are_no_multiples_of_the_patch_are_refused():
    backbone = SwinBackbone("none").eval()
    message = "swin_b takes image sides that are multiples of 4, not 64x66: choose episodes.image_size"
    with pytest.raises(SettingError, match=message):
        backbone(torch.rand(1, 3, 64, 66), {"layer1": "last"})
    with pytest.raises(SettingError, match=message):
        HSNet(backbone).check_sides((64, 66))
    sizes = [tuple(f[-1].shape[-2:]) for f in backbone(torch.rand(1, 3, 60, 68)).values()]
    assert sizes == [(15, 17), (8, 9), (4, 5), (2, 3)]


@pytest.mark.parametrize("part", ["layer3", "blocks.9"])
def test_training_a_part_that_the_backbone_lacks_is_refused(part):
    backbone = EfficientNetLiteBackbone("none")
    message = rf"EfficientNetLiteBackbone has no part {part} .*blocks.* Name parts that it has"
    with pytest.raises(SettingError, match=message):
        backbone.freeze(but=["blocks.1", part])
    assert all(p.requires_grad for p in backbone.parameters())  # unchanged
    assert not backbone.frozen


# Random weights


def test_random_weights_are_reproducible_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = SMALL()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = SMALL()
    assert_holds(second, first.trunk.state_dict())
    assert first.provenance == second.provenance
    assert first.provenance.as_dict() | {"backbone": "small", "weights": "none"} == first.provenance.as_dict()


# Files


def write(path, state):
    safetensors.torch.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
def test_file_of_another_program_loads(tmp_path, wrap):
    state = random_state()
    torch.save(wrap(state), tmp_path / "mine.pth")
    assert_holds(SmallBackbone(str(tmp_path / "mine.pth")), state)


def test_provenance_identifies_weights_independently_of_the_file(tmp_path):
    backbones = {}
    for name, seed in (("a.pth", 1), ("a.safetensors", 1), ("b.pth", 2)):
        state = random_state(seed)
        write(tmp_path / name, state)
        backbones[name] = SmallBackbone(str(tmp_path / name))
        assert_holds(backbones[name], state)
        assert backbones[name].provenance.source == str(tmp_path / name)
        assert backbones[name].provenance.weights == str(tmp_path / name)
    hashes = {name: backbone.provenance.sha256 for name, backbone in backbones.items()}
    assert hashes["a.pth"] == hashes["a.safetensors"]
    assert len({*hashes.values(), SMALL().provenance.sha256}) == 3


def test_path_may_be_relative_or_start_with_the_home_folder(tmp_path, monkeypatch):
    state = random_state()
    write(tmp_path / "mine.pth", state)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("mine.pth", "./mine.pth", "~/mine.pth"):
        backbone = SmallBackbone(path)
        assert_holds(backbone, state)
        assert Path(backbone.provenance.source) == tmp_path / "mine.pth"


def test_pretrained_backbone_loads_with_the_record_of_its_training(tmp_path):
    module = BackbonePretraining(SMALL(), 4, torch.optim.SGD, torch.optim.lr_scheduler.OneCycleLR)
    randomise(module.backbone.trunk)
    trained_on = {"dataset": "synthetic", "classes": ["square", "disc"]}
    module.save_backbone(tmp_path / "mine.safetensors", trained_on)
    backbone = SmallBackbone(str(tmp_path / "mine.safetensors"))
    assert backbone.provenance.trained_on == trained_on
    own = module.backbone.trunk.state_dict()
    assert_holds(backbone, {k: v.half().float() if v.is_floating_point() else v for k, v in own.items()})
    assert all(p.dtype == torch.float32 for p in backbone.parameters())


@pytest.mark.parametrize("classes", [7, None])
def test_classifier_in_the_file_is_optional_and_ignored(tmp_path, classes):
    torch.manual_seed(1)
    state = torchvision.models.resnet18(num_classes=classes or 1000).state_dict()
    state = {k: v for k, v in state.items() if classes or not k.startswith("fc.")}
    torch.save(state, tmp_path / "mine.pth")
    loaded = ResNetBackbone("resnet18", str(tmp_path / "mine.pth")).trunk.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if not k.startswith("fc."))
    assert not any(k.startswith("fc.") for k in loaded)  # not part of a backbone or its hash


@pytest.mark.slow
@pytest.mark.parametrize("headless", [False, True])
def test_swin_file_with_tensor_names_of_the_authors_or_of_timm_loads(tmp_path, headless):
    torch.manual_seed(1)
    timms = timm.create_model("swin_base_patch4_window12_384", pretrained=False).state_dict()
    if headless:
        timms = {k: v for k, v in timms.items() if not k.startswith("head.")}
    authors = {}  # they merge patches at the end of a stage, timm does at the start of the next
    for name, tensor in timms.items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        authors[".".join(parts).replace("head.fc.", "head.")] = tensor
    authors["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 144, 144)
    for name, state in (("timm", timms), ("authors", {"model": authors})):
        torch.save(state, tmp_path / f"{name}.pth")
        loaded = SwinBackbone(str(tmp_path / f"{name}.pth")).trunk.state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in timms.items() if not k.startswith("head."))


def test_missing_file_is_reported(tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere\.pth.*backbone\.weights"):
        SmallBackbone(str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", ["empty", "text", "truncated"])
def test_damaged_file_is_reported(tmp_path, suffix, content):
    path = tmp_path / f"mine{suffix}"
    write(path, random_state())
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"<html>404</html>", "truncated": whole[: len(whole) // 2]}[content])
    with pytest.raises(WeightsError, match=rf"mine\{suffix}"):
        SmallBackbone(str(path))


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"state_dict": 3}, {"layer1.0.conv1.weight": "text"}])
def test_file_without_a_state_dict_is_reported(tmp_path, content):
    torch.save(content, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=r"mine\.pth"):
        SmallBackbone(str(tmp_path / "mine.pth"))


def test_damaged_metadata_is_reported(tmp_path):
    safetensors.torch.save_file(random_state(), tmp_path / "mine.safetensors", {"trained_on": "{"})
    with pytest.raises(WeightsError, match=r"mine\.safetensors .*metadata"):
        SmallBackbone(str(tmp_path / "mine.safetensors"))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "network"])
def test_weights_of_another_network_are_reported(tmp_path, change):
    state = random_state()
    if change == "missing":
        del state["layer4.1.bn2.running_mean"]
    if change == "unknown":
        state["layer4.2.conv1.weight"] = torch.zeros(1)
    if change == "shape":
        state["layer4.1.bn2.bias"] = torch.zeros(64)
    if change == "network":
        state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=r"mine\.pth does not hold weights of small"):
        SmallBackbone(str(tmp_path / "mine.pth"))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    sprung = tmp_path / "sprung"
    state = random_state() | {"fc.weight": Trap(sprung)}
    torch.save(state, tmp_path / "mine.pth", _use_new_zipfile_serialization=zipped)
    torch.load(tmp_path / "mine.pth", weights_only=False)  # the trap works
    sprung.rmdir()
    with pytest.raises(WeightsError, match=r"mine\.pth"):
        SmallBackbone(str(tmp_path / "mine.pth"))
    assert not sprung.exists()


# Named weights

RELEASES = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-rsb-weights/"
MICROSOFT = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
NAMED = [
    ("resnet18", "imagenet1k_v1", "https://download.pytorch.org/models/resnet18-f37072fd.pth"),
    ("resnet50", "imagenet1k_v1", "https://download.pytorch.org/models/resnet50-0676ba61.pth"),
    ("resnet50", "imagenet1k_v2", "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"),
    ("resnet101", "imagenet1k_v1", "https://download.pytorch.org/models/resnet101-63fe2227.pth"),
    ("resnet101", "imagenet1k_v2", "https://download.pytorch.org/models/resnet101-cd907fc2.pth"),
    ("resnet50", "a1h", RELEASES + "resnet50_a1h-35c100f8.pth"),
    ("resnet101", "a1h", RELEASES + "resnet101_a1h-36d3f2aa.pth"),
    ("swin_b", "ms_in1k", MICROSOFT + "swin_base_patch4_window12_384.pth"),
    ("swin_b", "ms_in22k_ft_in1k", MICROSOFT + "swin_base_patch4_window12_384_22kto1k.pth"),
]


@pytest.mark.parametrize("backbone, name, url", NAMED)
@pytest.mark.usefixtures("no_network")
def test_message_for_missing_weights_gives_their_url_and_path(hub, backbone, name, url):
    with pytest.raises(WeightsError) as error:
        load_weights(nn.Identity, backbone, name, download=False)
    for part in (backbone, f"'{name}'", url, str(hub / Path(url).name), "backbone.download=true"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "backbone, known",
    [
        ("resnet50", ["a1h", "imagenet1k_v1", "imagenet1k_v2", "none"]),
        ("resnet18", ["imagenet1k_v1", "none"]),
        ("swin_b", ["ms_in1k", "ms_in22k_ft_in1k", "none"]),
        ("small", ["quickstart", "none"]),
    ],
)
@pytest.mark.usefixtures("hub", "no_network")
def test_message_for_unknown_weights_lists_the_known_ones(backbone, known):
    with pytest.raises(WeightsError, match=r"'imagenet22k'") as error:
        load_weights(nn.Identity, backbone, "imagenet22k", download=True)
    choices = str(error.value).split("backbone.weights=")[1].split()[0]
    assert sorted(choices.split("|")) == sorted(known)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Weights named `mine` with a URL on this machine and the file's true hash in its name."""
    torch.save(random_state(), tmp_path / "w.pth")
    source = tmp_path / f"small-{file_hash(tmp_path / 'w.pth')[:8]}.pth"
    (tmp_path / "w.pth").rename(source)
    monkeypatch.setitem(weights.URLS, ("small", "mine"), source.as_uri())
    return source


def load_mine(download=False):
    return load_weights(build_trunk, "small", "mine", download)


@pytest.mark.usefixtures("no_network")
def test_named_file_on_this_machine_is_not_downloaded_again(hub, published):
    (hub / published.name).write_bytes(published.read_bytes())
    trunk, provenance = load_mine(download=True)
    assert all(torch.equal(trunk.state_dict()[k], v) for k, v in random_state().items())
    assert provenance.source == published.as_uri()
    assert provenance.weights == "mine"


@pytest.mark.usefixtures("no_network")
def test_hash_in_the_file_name_reveals_damage(hub, published):
    state = random_state()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] += 1  # readable but wrong
    torch.save(state, hub / published.name)
    with pytest.raises(WeightsError, match=r"damaged.*Delete") as error:
        load_mine()
    assert str(hub / published.name) in str(error.value)
    assert published.as_uri() in str(error.value)


@pytest.mark.usefixtures("no_network")
def test_hash_of_a_published_resnet_is_checked(hub):
    torch.save(torchvision.models.resnet18().state_dict(), hub / "resnet18-f37072fd.pth")
    with pytest.raises(WeightsError, match="f37072fd"):
        ResNetBackbone("resnet18", "imagenet1k_v1")


def test_named_file_is_downloaded_on_request(hub, published):
    trunk, _ = load_mine(download=True)
    assert all(torch.equal(trunk.state_dict()[k], v) for k, v in random_state().items())
    assert (hub / published.name).read_bytes() == published.read_bytes()


def test_download_with_a_wrong_hash_is_refused_and_deleted(hub, published):
    torch.save(random_state(seed=2), published)
    with pytest.raises(WeightsError, match="invalid hash"):
        load_mine(download=True)
    assert list(hub.iterdir()) == []


def test_message_for_a_failed_download_gives_url_and_path(hub, published):
    published.unlink()
    with pytest.raises(WeightsError, match="Could not download") as error:
        load_mine(download=True)
    assert published.as_uri() in str(error.value)
    assert str(hub / published.name) in str(error.value)


@pytest.mark.parametrize(
    "build",
    [
        *(SMALL, RESNET18, SWIN, partial(VGGBackbone, "none"), partial(DilatedResNetBackbone, "resnet50s", "none")),
        *(partial(MixtureBackbone, "resnet50", "none"), partial(ViTBackbone, "dinov2_small", "none")),
    ],
)
def test_strides_are_those_of_the_features(build):
    backbone = build().eval()
    with torch.no_grad():
        small, large = (backbone(torch.rand(1, 3, 32, side)) for side in (32, 96))
    more = {layer: large[layer][-1].shape[-1] - small[layer][-1].shape[-1] for layer in small}
    assert {layer: 64 // positions for layer, positions in more.items()} == backbone.strides


def test_layer_that_a_backbone_lacks_is_named():
    backbone = MixtureBackbone("resnet50", "none")
    for build in (PMNet, HSNet, DCAMA):
        with pytest.raises(SettingError, match="no layer4; it has layer1, layer2, layer3"):
            build(backbone)
