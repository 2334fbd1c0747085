"""VGG-16 beside torchvision's convolutions and beside features made by PANet's program."""

import pytest
import torch
import torchvision
from torch import nn

from pmnet.backbones.vgg import VGGBackbone
from pmnet.errors import WeightsError
from tests.pmnet.methods.ruled import Golden, assert_near


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return torchvision.models.vgg16()


@pytest.mark.slow
def test_features_are_those_of_torchvisions_layers_with_other_pools(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "vgg16.pth")
    backbone = VGGBackbone(str(tmp_path / "vgg16.pth")).freeze()
    x, expected, pools = torch.rand(1, 3, 49, 33), [], [nn.MaxPool2d(3, s, 1) for s in (2, 2, 2, 1, 1)]
    features = backbone(x)
    with torch.no_grad():
        for layer in theirs.features:
            if isinstance(layer, nn.MaxPool2d):
                x = pools.pop(0)(x)
            elif isinstance(layer, nn.Conv2d):
                dilation = 2 if len(pools) == 1 else 1
                x = nn.functional.conv2d(x, layer.weight, layer.bias, padding=dilation, dilation=dilation)
                expected.append(x)
            else:
                x = x.relu()
    found = [f for blocks in features.values() for f in blocks]
    for value, of_torchvision in zip(found, expected[2:], strict=True):
        assert_near(value, of_torchvision)


def test_features_are_those_of_panet(shared, tmp_path):
    golden = Golden(shared / "golden" / "methods" / "panet_vgg16_1shot.npz")
    torch.save({f"module.{name}": t for name, t in golden.weights().items()}, tmp_path / "panet.pth")
    backbone = VGGBackbone(str(tmp_path / "panet.pth")).freeze()
    assert_near(backbone(golden["query"])["layer4"][-1], golden["features/query"], 1e-3)  # stored as float16


def test_layout_and_parameters():
    backbone = VGGBackbone("none").freeze()
    assert backbone.channels == {"layer1": 128, "layer2": 256, "layer3": 512, "layer4": 512}
    assert backbone.blocks == {"layer1": 2, "layer2": 3, "layer3": 3, "layer4": 3}
    assert sum(p.numel() for p in backbone.parameters()) == 14_714_688
    sizes = {layer: blocks[-1].shape[-1] for layer, blocks in backbone(torch.rand(1, 3, 97, 97)).items()}
    assert sizes == {"layer1": 49, "layer2": 25, "layer3": 13, "layer4": 13}


def test_stage_takes_the_activated_feature_of_the_stage_before():
    backbone = VGGBackbone("none").freeze()
    features = backbone(torch.rand(1, 3, 33, 33))
    again, _ = backbone.stage("layer4", backbone.activated(features["layer3"][-1]))
    assert torch.equal(again[-1], features["layer4"][-1])


@pytest.mark.slow
def test_file_of_another_network_is_refused(tmp_path):
    torch.save(torchvision.models.vgg11().state_dict(), tmp_path / "vgg11.pth")
    with pytest.raises(WeightsError, match=r"vgg11\.pth does not hold weights of vgg16"):
        VGGBackbone(str(tmp_path / "vgg11.pth"))


def test_named_weights_are_those_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsError) as error:
        VGGBackbone("imagenet1k_v1")
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in str(error.value)
