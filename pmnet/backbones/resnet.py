"""ResNets as torchvision builds them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones.base import LAYERS, Backbone
from pmnet.backbones.weights import load_weights
from pmnet.errors import SettingError


class ResidualBackbone(Backbone):
    """What residual networks share: a block's feature is its residual sum, before the last ReLU."""

    def stage(self, layer: str, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features = list(residual_sums(getattr(self.trunk, layer), x))
        return features, F.relu(features[-1])

    def activated(self, feature: Tensor) -> Tensor:
        return F.relu(feature)

    def measure(self) -> None:
        """Reads `channels` and `blocks` off the trunk."""
        stages = {layer: getattr(self.trunk, layer) for layer in LAYERS}
        self.channels = {layer: list(stage.parameters())[-1].shape[0] for layer, stage in stages.items()}
        self.blocks = {layer: len(stage) for layer, stage in stages.items()}


class ResNetBackbone(ResidualBackbone):
    """A ResNet of torchvision.

    Args:
        name: "resnet18", "resnet50" or "resnet101" (any ResNet of torchvision works).
        weights: see `pmnet.backbones.weights.load_weights`.
        download: fetch named weights that are not on this machine yet.

    Raises:
        SettingError: torchvision has no ResNet of that name.
        WeightsError: the weights are missing, damaged, or of another network.
    """

    def __init__(self, name: str, weights: str, download: bool = False) -> None:
        super().__init__()
        self.trunk, self.provenance = load_weights(partial(build_trunk, name), name, weights, download)
        self.measure()

    def stem(self, images: Tensor) -> Tensor:
        trunk = self.trunk
        return trunk.maxpool(F.relu(trunk.bn1(trunk.conv1(images))))


def build_trunk(name: str) -> nn.Module:
    import torchvision  # takes a second to import

    if name not in torchvision.models.list_models(include="resnet*"):
        raise SettingError(
            f"backbone.name={name} is not one of {', '.join(torchvision.models.list_models(include='resnet*'))}."
        )
    trunk = torchvision.models.get_model(name, weights=None)
    trunk.fc = nn.Identity()
    return trunk


def residual_sums(stage: Any, x: Tensor) -> Iterator[Tensor]:
    """Of each block of a stage, the sum before its last ReLU."""
    for block in stage:
        out = F.relu(block.bn1(block.conv1(x)), inplace=True)
        out = block.bn2(block.conv2(out))
        if hasattr(block, "conv3"):  # a bottleneck
            out = block.bn3(block.conv3(F.relu(out, inplace=True)))
        out = out + (x if block.downsample is None else block.downsample(x))
        yield out
        x = F.relu(out)
