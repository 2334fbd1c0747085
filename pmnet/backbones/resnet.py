"""ResNet-18, -50 and -101 as torchvision builds them."""

from functools import partial

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pmnet.backbones.base import Backbone, Features
from pmnet.backbones.weights import load_weights
from pmnet.errors import SettingError


class ResNetBackbone(Backbone):
    """The feature of a block is its output after the residual sum and before the last ReLU.

    Args:
        name: "resnet18", "resnet50" or "resnet101" (any ResNet of torchvision works).
        weights: see `pmnet.backbones.weights.load_weights`.
        download: fetch named weights that are not there yet.

    Raises:
        WeightsError: the weights are not there, damaged, or of another network.
    """

    def __init__(self, name: str, weights: str, download: bool = False) -> None:
        super().__init__()
        self.trunk, self.provenance = load_weights(partial(build_trunk, name), name, weights, download)
        self.channels, self.blocks = residual_layout(self.trunk)

    def blocks_of(self, images: Tensor) -> Features:
        trunk = self.trunk
        return residual_features(trunk, trunk.maxpool(F.relu(trunk.bn1(trunk.conv1(images)))))


def build_trunk(name: str) -> nn.Module:
    if name not in torchvision.models.list_models(include="resnet*"):
        raise SettingError(
            f"backbone.name={name} is not one of {', '.join(torchvision.models.list_models(include='resnet*'))}."
        )
    trunk = torchvision.models.get_model(name, weights=None)
    trunk.fc = nn.Identity()
    return trunk


def residual_layout(trunk: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Channels and number of blocks of layer1..layer4 of a residual network."""
    layers = {f"layer{i}": getattr(trunk, f"layer{i}") for i in range(1, 5)}
    channels = {name: list(layer.parameters())[-1].shape[0] for name, layer in layers.items()}
    return channels, {name: len(layer) for name, layer in layers.items()}


def residual_features(trunk: nn.Module, x: Tensor) -> Features:
    """Every block's sum before its last ReLU, for the output `x` of the stem."""
    features: Features = {}
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        features[layer] = []
        for block in getattr(trunk, layer):
            out = F.relu(block.bn1(block.conv1(x)), inplace=True)
            out = block.bn2(block.conv2(out))
            if hasattr(block, "conv3"):  # a bottleneck
                out = block.bn3(block.conv3(F.relu(out, inplace=True)))
            out = out + (x if block.downsample is None else block.downsample(x))
            features[layer].append(out)
            x = F.relu(out)
    return features
