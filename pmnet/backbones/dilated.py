"""ResNets with a stem of three 3x3 convolutions and with dilation: layer2, layer3 and layer4 all have stride 8.

PFENet and related methods use this backbone of PSPNet. A side of 8n + 1 pixels becomes n + 1 positions.
"""

import re
from functools import partial
from typing import Any, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones.base import Backbone
from pmnet.backbones.resnet import ResidualBackbone
from pmnet.backbones.weights import Provenance, load_weights
from pmnet.errors import SettingError

Dilation = Literal["all", "torchvision"]
DEPTHS = {"resnet50s": "resnet50", "resnet101s": "resnet101"}
STEM = {"conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.3", "bn2": "conv1.4", "conv3": "conv1.6", "bn3": "bn1"}


class DilatedResNetBackbone(ResidualBackbone):
    """A deep-stem ResNet whose layer3 and layer4 keep the stride of layer2.

    Args:
        name: "resnet50s" or "resnet101s".
        weights: see `pmnet.backbones.weights`. A file may use the tensor names of timm, PFENet's family, SSP or CyCTR.
        dilation: of the 3x3 convolutions. "all": 2 in layer3 and 4 in layer4 (PFENet, RePRI, ASGNet, SCL, NTRENet).
            "torchvision": the first block of each has the dilation of the previous stage, 1 and 2 (SSP, CyCTR).
        download: download named weights that are not on this machine yet.

    Raises:
        SettingError: unknown name or dilation.
        WeightsError: the weights are missing, damaged, or of another network.

    Example:
        >>> import torch
        >>> from pmnet.backbones.dilated import DilatedResNetBackbone
        >>> features = DilatedResNetBackbone("resnet50s", "none")(torch.rand(1, 3, 97, 97))
        >>> [features[layer][-1].shape[-1] for layer in ("layer1", "layer2", "layer3", "layer4")]
        [25, 13, 13, 13]
    """

    strides = {"layer1": 4, "layer2": 8, "layer3": 8, "layer4": 8}

    def __init__(self, name: str, weights: str, dilation: Dilation = "all", download: bool = False) -> None:
        super().__init__()
        build = partial(build_trunk, name, dilation)
        self.trunk, self.provenance = load_weights(build, name, weights, download, names_of_timm)
        self.measure()

    @classmethod
    def around(cls, trunk: nn.Module, provenance: Provenance) -> Self:
        """A backbone whose trunk, from `build_trunk`, has its weights already."""
        backbone = cls.__new__(cls)
        Backbone.__init__(backbone)
        backbone.trunk, backbone.provenance = trunk, provenance
        backbone.measure()
        return backbone

    def stem(self, images: Tensor) -> Tensor:
        trunk = self.trunk
        return trunk.maxpool(F.relu(trunk.bn1(trunk.conv1(images))))


def build_trunk(name: str, dilation: Dilation) -> nn.Module:
    """torchvision's ResNet with another stem; the tensors have the names of timm's "resnet50s"."""
    import torchvision  # takes a second to import

    if name not in DEPTHS:
        raise SettingError(f"backbone.name={name} is not one of {', '.join(DEPTHS)}.")
    if dilation not in ("all", "torchvision"):
        raise SettingError(f"backbone.dilation={dilation} is not one of all, torchvision.")
    trunk: Any = torchvision.models.get_model(
        DEPTHS[name], weights=None, replace_stride_with_dilation=[False, True, True]
    )
    trunk.conv1 = nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.Conv2d(64, 128, 3, padding=1, bias=False),
    )
    trunk.bn1 = nn.BatchNorm2d(128)
    first = trunk.layer1[0]
    first.conv1 = nn.Conv2d(128, 64, 1, bias=False)
    first.downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
    if dilation == "all":
        for stage in (trunk.layer3, trunk.layer4):
            stage[0].conv2.dilation = stage[0].conv2.padding = stage[1].conv2.dilation
    trunk.fc = nn.Identity()
    return trunk


def names_of_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the stem's tensors of PFENet's family (layer0.0, ...), SSP (layer0.0.0, ...) or CyCTR (conv1, conv2, ...)
    to timm's names, and leaves out those of the heads in the same files."""
    stem = {f"layer0.{i}": f"conv1.{i}" for i in (0, 1, 3, 4, 6)} | {"layer0.7": "bn1"}
    if "layer0.0.0.weight" in bare(state):
        stem = {f"layer0.0.{i}": f"conv1.{i}" for i in (0, 1, 3, 4, 6)} | {"layer0.1": "bn1"}
    if "conv3.weight" in bare(state):
        stem = STEM
    renamed = {}
    for name, tensor in bare(state).items():
        module, _, leaf = name.rpartition(".")
        renamed[f"{stem.get(module, module)}.{leaf}"] = tensor
    return {name: tensor for name, tensor in renamed.items() if re.match(r"(conv1|bn1|layer[1-4])\.", name)}


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes that parallel training and CyCTR add to every name."""
    return {re.sub(r"^(module\.|backbone\.|body\.)*", "", name): tensor for name, tensor in state.items()}
