"""Maps against timm's own intermediates; where they lie over the image; files in timm's names and in the authors'."""

import os
import subprocess
import sys
from functools import cache
from math import ceil

import pytest
import safetensors.torch
import timm
import torch
import yaml
from torchvision.transforms.functional import resize

from pmnet import Backbone, FeatureCache, PMNet
from pmnet.backbones.vit import ViTBackbone, renamed
from pmnet.backbones.weights import URLS, load_weights
from pmnet.errors import SettingError, WeightsError
from tests.conftest import ROOT

SMALL = {  # ours -> timm's, patch
    "dinov2_small": ("vit_small_patch14_dinov2", 14),
    "dinov2_small_reg4": ("vit_small_patch14_reg4_dinov2", 14),
    "dinov3_small": ("vit_small_patch16_dinov3", 16),
}
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}


@cache
def timms_network(name):
    """With random weights all of which do something: at first, layer scales hide what the blocks add."""
    torch.manual_seed(0)
    network = timm.create_model(SMALL[name][0], pretrained=False, dynamic_img_size=True).eval()
    for tensor_name, tensor in network.state_dict().items():
        if tensor_name.endswith(("gamma", "gamma_1", "gamma_2")):
            tensor.uniform_(0.5, 1.5)
        elif tensor_name.endswith(("bias", "token", "pos_embed")):
            tensor.normal_(std=0.3)
        elif "norm" in tensor_name:
            tensor.uniform_(0.5, 1.5)
    return network


@pytest.fixture
def backbone(request, tmp_path):
    torch.save(timms_network(request.param).state_dict(), tmp_path / "timm.pth")
    return ViTBackbone(request.param, str(tmp_path / "timm.pth")).freeze()


every = pytest.mark.parametrize("backbone", SMALL, indirect=True)
dinov2 = pytest.mark.parametrize("backbone", ["dinov2_small"], indirect=True)


def pictures(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def area(maps, size):
    """Mean over the positions that each cell of a coarser grid touches, cell by cell."""
    h, w = maps.shape[-2:]
    out = torch.empty(*maps.shape[:2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * h // size[0], ceil((i + 1) * h / size[0]))
            columns = slice(j * w // size[1], ceil((j + 1) * w / size[1]))
            out[..., i, j] = maps[..., rows, columns].mean((2, 3))
    return out


# Features


@pytest.mark.parametrize("H, W", [(112, 224), (97, 130)])
@every
def test_maps_are_timms_intermediates_resized(backbone, H, W):
    name = backbone.provenance.backbone
    patch = SMALL[name][1]
    images = torch.randn(2, 3, H, W)
    enlarged = resize(images, [patch * ceil(H / patch), patch * ceil(W / patch)], antialias=False)
    with torch.no_grad():
        tokens = timms_network(name).forward_intermediates(enlarged, norm=True, intermediates_only=True)
        features = backbone(images)
    assert len(tokens) == 12
    for i, (layer, stride) in enumerate(STRIDES.items()):
        size = [ceil(H / stride), ceil(W / stride)]
        for feature, maps in zip(features[layer], tokens[3 * i : 3 * i + 3], strict=True):
            expected = resize(maps, size, antialias=False) if stride < patch else area(maps, size)
            torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


@dinov2
def test_maps_before_resizing_are_what_the_authors_interface_returns(backbone):
    images = torch.randn(1, 3, 98, 140)
    with torch.no_grad():
        theirs = timms_network("dinov2_small").get_intermediate_layers(images, n=12, reshape=True, norm=True)
        ours = Backbone.forward(backbone, images)
    for mine, other in zip((m for maps in ours.values() for m in maps), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@every
def test_maps_lie_evenly_over_the_image(backbone):
    """What a small change of the image changes in a map has its centre where the image was changed."""
    for parameter in backbone.trunk.blocks.parameters():
        parameter.mul_(0.02)  # attention carries every change everywhere: of interest is the token of the place
    H, W, top, left, side = 130, 97, 84, 14, 28
    image = pictures(1, 3, H, W)
    changed = image.clone()
    changed[..., top : top + side, left : left + side] = 255 - changed[..., top : top + side, left : left + side]
    with torch.no_grad():
        before, after = backbone(image), backbone(changed)
    for layer in STRIDES:
        change = (after[layer][-1] - before[layer][-1]).square().sum(1)[0]
        change = change / change.sum()
        h, w = change.shape
        y = (change.sum(1) * (torch.arange(h) + 0.5)).sum() * H / h
        x = (change.sum(0) * (torch.arange(w) + 0.5)).sum() * W / w
        assert abs(y - (top + side / 2)) < 5, layer
        assert abs(x - (left + side / 2)) < 5, layer


@dinov2
def test_every_side_is_taken(backbone):
    for H, W in ((97, 130), (64, 96), (33, 31), (5, 40)):
        features = backbone(pictures(1, 3, H, W))
        for layer, stride in STRIDES.items():
            assert {f.shape for f in features[layer]} == {(1, 384, ceil(H / stride), ceil(W / stride))}
            assert len(features[layer]) == backbone.blocks[layer] == 3


@every
def test_only_what_is_read_is_computed_and_cached_at_the_patches_stride(backbone, tmp_path):
    images = pictures(2, 3, 97, 130)
    full = backbone(images)
    backbone.cache = FeatureCache(host_gb=0, folder=tmp_path / "cache")
    ran = []
    for block in backbone.trunk.blocks:
        block.register_forward_hook(lambda module, inputs, output: ran.append(module))
    for count, reads in enumerate(({"layer1": "all"}, {"layer1": "last"}, {"layer2": "last", "layer3": "all"}), 1):
        ran.clear()
        for _ in range(2):
            features = backbone(images, reads)
            assert features.keys() == reads.keys()
            for layer, which in reads.items():
                wanted = full[layer][-1:] if which == "last" else full[layer]
                torch.testing.assert_close(features[layer], wanted, rtol=1e-5, atol=1e-5)
        assert len(ran) == (9 if "layer3" in reads else 3)
        assert len(list(tmp_path.rglob("cache/*/*.safetensors"))) == 2 * count
    patch = SMALL[backbone.provenance.backbone][1]
    for path in tmp_path.rglob("cache/*/*.safetensors"):
        for tensor in safetensors.torch.load_file(path).values():
            assert tensor.shape == (ceil(97 / patch), ceil(130 / patch), 384)


@dinov2
def test_pmnet_on_it_trains_and_segments(backbone):
    torch.manual_seed(0)
    network = PMNet(backbone)
    query, support, masks = pictures(1, 3, 64, 96), pictures(1, 2, 3, 64, 96, seed=1), torch.rand(1, 2, 64, 96) < 0.4
    logits = network.train()(query, support, masks)
    assert logits.shape == (1, 2, 64, 96)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.head.parameters())
    assert all(p.grad is None for p in network.backbone.parameters())


def test_every_parameter_is_trained():
    backbone = ViTBackbone("dinov3_small", "none").train()
    sum(f.square().mean() for maps in backbone(pictures(2, 3, 64, 64)).values() for f in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("size, channels, blocks", [("base", 768, 3), ("large", 1024, 6)])
@pytest.mark.parametrize("kind", ["dinov2_{}", "dinov2_{}_reg4", "dinov3_{}"])
def test_larger_ones(kind, size, channels, blocks):
    backbone = ViTBackbone(kind.format(size), "none").freeze()
    features = backbone(pictures(1, 3, 64, 96))
    for layer, stride in STRIDES.items():
        assert backbone.channels[layer] == channels
        assert backbone.blocks[layer] == blocks
        assert [f.shape for f in features[layer]] == blocks * [(1, channels, 64 // stride, 96 // stride)]


def test_unknown_network_is_answered_with_the_known_ones():
    with pytest.raises(SettingError, match=r"backbone\.name=dinov2_huge.*dinov2_small, .*dinov3_large"):
        ViTBackbone("dinov2_huge", "none")


# Weights


@every
def test_own_file_loads(backbone, tmp_path):
    state = backbone.trunk.state_dict()
    safetensors.torch.save_file(state, tmp_path / "own.safetensors")
    again = ViTBackbone(backbone.provenance.backbone, str(tmp_path / "own.safetensors"))
    assert again.provenance.sha256 == backbone.provenance.sha256


def in_the_names_of_the_authors(name):
    state = {key: tensor.clone() for key, tensor in timms_network(name).state_dict().items()}
    C = 384
    state["mask_token"] = torch.ones(1, C)
    if name == "dinov2_small_reg4":
        state["register_tokens"] = state.pop("reg_token")
        position = torch.randn(1, 1, C)  # of the class token
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - position
    if name == "dinov3_small":
        state["storage_tokens"] = state.pop("reg_token")
        state["rope_embed.periods"] = torch.ones(16)
        for i in range(12):
            state[f"blocks.{i}.ls1.gamma"] = state.pop(f"blocks.{i}.gamma_1")
            state[f"blocks.{i}.ls2.gamma"] = state.pop(f"blocks.{i}.gamma_2")
            state[f"blocks.{i}.attn.qkv.bias"] = torch.zeros(3 * C)
            state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3 * C)
    return state


@pytest.mark.parametrize("name", SMALL)
def test_authors_file_loads_as_timm_reads_it(name, tmp_path):
    from timm.models import eva, vision_transformer

    state = in_the_names_of_the_authors(name)
    torch.save(state, tmp_path / "authors.pth")
    loaded = ViTBackbone(name, str(tmp_path / "authors.pth")).trunk.state_dict()
    module = eva if name.startswith("dinov3") else vision_transformer
    by_timm = module.checkpoint_filter_fn(dict(state), timms_network(name))
    assert loaded.keys() == by_timm.keys()
    for key, tensor in timms_network(name).state_dict().items():
        assert torch.equal(loaded[key], by_timm[key])
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=1e-6)


def test_biases_that_the_network_lacks_are_not_dropped_in_silence(tmp_path):
    state = in_the_names_of_the_authors("dinov3_small")
    state["blocks.3.attn.qkv.bias"][5] = 0.1
    assert "blocks.3.attn.qkv.bias" in renamed(state)
    torch.save(state, tmp_path / "authors.pth")
    with pytest.raises(WeightsError, match=r"blocks\.3\.attn\.qkv\.bias"):
        ViTBackbone("dinov3_small", str(tmp_path / "authors.pth"))


def test_file_of_another_vit_is_refused(tmp_path):
    torch.save(timms_network("dinov2_small").state_dict(), tmp_path / "timm.pth")
    with pytest.raises(WeightsError, match="does not hold weights of dinov2_small_reg4"):
        ViTBackbone("dinov2_small_reg4", str(tmp_path / "timm.pth"))


PUBLISHED = [
    (
        "dinov2_small",
        "lvd142m",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "dinov2_vits14_pretrain.pth",
    ),
    (
        "dinov2_large_reg4",
        "lvd142m",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
        "dinov2_vitl14_reg4_pretrain.pth",
    ),
    (
        "dinov3_base",
        "lvd1689m",
        "https://huggingface.co/timm/vit_base_patch16_dinov3.lvd1689m/resolve/main/model.safetensors",
        "vit_base_patch16_dinov3.lvd1689m.safetensors",
    ),
]


@pytest.fixture
def hub(tmp_path):
    """An empty folder as torch's place for downloaded weights."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    yield tmp_path / "checkpoints"
    torch.hub.set_dir(before)


@pytest.mark.parametrize("name, weights, url, file", PUBLISHED)
def test_weights_that_are_not_there_are_named_with_source_and_place(name, weights, url, file, hub, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: pytest.fail("tried to download"))
    with pytest.raises(WeightsError) as error:
        load_weights(torch.nn.Identity, name, weights, download=False)
    for part in (name, f"'{weights}'", url, f"{hub / file}\n", "backbone.download=true"):
        assert part in str(error.value)


def test_weights_are_fetched_to_a_name_of_their_own_when_asked(hub, monkeypatch):
    def fetch(url, path, hash_prefix=None):
        assert url == URLS["dinov3_small", "lvd1689m"]
        state = dict(timms_network("dinov3_small").state_dict())
        safetensors.torch.save_file(state, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    backbone = ViTBackbone("dinov3_small", "lvd1689m", download=True)
    assert [path.name for path in hub.iterdir()] == ["vit_small_patch16_dinov3.lvd1689m.safetensors"]
    assert backbone.provenance.source == URLS["dinov3_small", "lvd1689m"]
    theirs = timms_network("dinov3_small").state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in backbone.trunk.state_dict().items())


def test_configs_name_networks_and_weights_that_exist():
    configs = [yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / "backbone").glob("dino*.yaml")]
    assert len(configs) == 6
    assert all((config["name"], config["weights"]) in URLS and not config["download"] for config in configs)


# Imports


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["import pmnet.backbones", "from pmnet import ViTBackbone, SwinBackbone"])
def test_timm_and_torchvision_are_imported_by_the_networks_that_need_them(statement):
    code = f"{statement}; import sys; print(sorted({{'timm', 'torchvision'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"
