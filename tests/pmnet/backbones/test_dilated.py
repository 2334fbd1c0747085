"""The dilated deep-stem ResNets beside timm's, and beside features made by the programs that use them."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from pmnet.backbones.dilated import DEPTHS, DilatedResNetBackbone
from pmnet.errors import SettingError, WeightsError
from tests.pmnet.methods.ruled import Golden, assert_near

LAYERS = ("layer1", "layer2", "layer3", "layer4")
STEM = {"conv1.0": "conv1", "conv1.1": "bn1", "conv1.3": "conv2", "conv1.4": "bn2", "conv1.6": "conv3", "bn1": "bn3"}


def reference(name="resnet50s", output_stride=8):
    """timm's, its norms away from their initial values; its dilation is torchvision's."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, output_stride=output_stride).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith(("bias", "running_mean")):
            tensor.normal_(std=0.1)
        elif key.endswith("running_var"):
            tensor.uniform_(0.8, 1.2)
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model = reference()
    path = tmp_path_factory.mktemp("weights") / "resnet50s.pth"
    torch.save(model.state_dict(), path)
    return model, str(path)


def renamed(state, stem):
    """The stem's tensors by other names; `stem` maps timm's module to theirs."""
    split = {name: name.rpartition(".") for name in state}
    return {f"{stem.get(module, module)}.{leaf}": state[name] for name, (module, _, leaf) in split.items()}


@torch.no_grad()
def outputs(backbone, images):
    return {layer: F.relu(blocks[-1]) for layer, blocks in backbone.eval()(images).items()}


def test_features_are_those_of_timm(file):
    model, path = file
    images = torch.rand(1, 3, 65, 97)
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
    found = outputs(DilatedResNetBackbone("resnet50s", path, dilation="torchvision"), images)
    for layer, value in zip(LAYERS, expected, strict=True):
        assert_near(found[layer], value)


@pytest.mark.slow
def test_all_dilates_every_block_of_layer3_and_layer4(file):
    """Beside timm's network without dilation, whose 3x3 convolutions are given the dilations of the table."""
    model = reference(output_stride=32)
    for layer, dilation in (("layer3", 2), ("layer4", 4)):
        stage = getattr(model, layer)
        for block in stage:
            block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (dilation,) * 2, (dilation,) * 2
        stage[0].downsample[0].stride = (1, 1)
    images = torch.rand(1, 3, 97, 65)
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
    found = outputs(DilatedResNetBackbone("resnet50s", file[1]), images)
    for layer, value in zip(LAYERS, expected, strict=True):
        assert_near(found[layer], value)


@pytest.mark.slow
@pytest.mark.parametrize("method, dilation", [("pfenet", "all"), ("ssp", "torchvision")])
def test_features_are_those_of_the_programs_that_use_it(shared, tmp_path, method, dilation):
    golden = Golden(shared / "golden" / "methods" / f"{method}_resnet50_1shot.npz")
    state = golden.weights()
    blank = DilatedResNetBackbone("resnet50s", "none").trunk.state_dict()
    state |= {name: tensor for name, tensor in blank.items() if name not in state and name.startswith("layer4.")}
    torch.save(state, tmp_path / "theirs.pth")
    backbone = DilatedResNetBackbone("resnet50s", str(tmp_path / "theirs.pth"), dilation).freeze()
    features = backbone(golden["query"])
    if method == "ssp":
        assert_near(features["layer3"][-1], golden["features/query"], 1e-3)  # stored as float16
    else:
        for layer in ("layer2", "layer3", "layer4"):
            assert_near(F.relu(features[layer][-1]), golden[f"features/query/{layer}"], 1e-3)


@pytest.mark.parametrize(
    "stem",
    [
        {f"conv1.{i}": f"layer0.{i}" for i in (0, 1, 3, 4, 6)} | {"bn1": "layer0.7"},
        {f"conv1.{i}": f"layer0.0.{i}" for i in (0, 1, 3, 4, 6)} | {"bn1": "layer0.1"},
        STEM,
    ],
    ids=["pfenet", "ssp", "cyctr"],
)
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.body."])
def test_files_of_the_authors_load_by_their_names(file, tmp_path, stem, prefix):
    own = DilatedResNetBackbone("resnet50s", file[1]).provenance.sha256
    theirs = renamed(file[0].state_dict(), stem) | {"down_query.0.weight": torch.zeros(1)}
    torch.save({prefix + name: tensor for name, tensor in theirs.items()}, tmp_path / "theirs.pth")
    assert DilatedResNetBackbone("resnet50s", str(tmp_path / "theirs.pth")).provenance.sha256 == own


def test_file_of_a_plain_resnet_is_refused(tmp_path):
    torch.save(timm.create_model("resnet50").state_dict(), tmp_path / "plain.pth")
    with pytest.raises(WeightsError, match=r"plain\.pth does not hold weights of resnet50s"):
        DilatedResNetBackbone("resnet50s", str(tmp_path / "plain.pth"))


@pytest.mark.parametrize("name, blocks, parameters", [("resnet50s", 6, 23_631_808), ("resnet101s", 23, 42_623_936)])
def test_layout_and_parameters(name, blocks, parameters):
    backbone = DilatedResNetBackbone(name, "none").freeze()
    assert backbone.channels == dict(zip(LAYERS, (256, 512, 1024, 2048), strict=True))
    assert backbone.blocks == dict(zip(LAYERS, (3, 4, blocks, 3), strict=True))
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    trunk = backbone.trunk
    to_layer3 = nn.ModuleList([trunk.conv1, trunk.bn1, trunk.layer1, trunk.layer2, trunk.layer3])
    assert sum(p.numel() for p in to_layer3.parameters()) == {"resnet50s": 8_667_072, "resnet101s": 27_659_200}[name]


@pytest.mark.parametrize("side, strided", [(97, 13), (161, 21), (64, 8)])
def test_layers_2_to_4_have_stride_8(side, strided):
    backbone = DilatedResNetBackbone("resnet50s", "none").freeze()
    features = backbone(torch.rand(1, 3, side, side), {"layer2": "last", "layer3": "last", "layer4": "last"})
    assert {blocks[-1].shape[-2:] for blocks in features.values()} == {(strided, strided)}


@pytest.mark.parametrize("name, dilation, wrong", [("resnet50", "all", "name"), ("resnet50s", "none", "dilation")])
def test_another_name_or_dilation_is_refused(name, dilation, wrong):
    with pytest.raises(SettingError, match=f"backbone.{wrong}"):
        DilatedResNetBackbone(name, "none", dilation)


@pytest.mark.parametrize("name", DEPTHS)
def test_named_weights_are_those_of_timm(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = timm.get_pretrained_cfg(f"{name}.gluon_in1k").url
    with pytest.raises(WeightsError) as error:
        DilatedResNetBackbone(name, "gluon_in1k")
    assert url in str(error.value)
    with pytest.raises(WeightsError, match=r"gluon_in1k\|none"):
        DilatedResNetBackbone(name, "a1h")
