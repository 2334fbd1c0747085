"""VGG-16 as PANet uses it: 3x3 pools, and stride 8 from the fourth block on.

A side of 8n + 1 pixels becomes n + 1 positions.
"""

from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones.base import Backbone
from pmnet.backbones.weights import Provenance, load_weights

# Output channels of the 3x3 convolutions of the five blocks, their dilation, and the stride of the pool before them.
BLOCKS = {
    "stem": ((64, 64), 1, None),
    "layer1": ((128, 128), 1, 2),
    "layer2": ((256, 256, 256), 1, 2),
    "layer3": ((512, 512, 512), 1, 2),
    "layer4": ((512, 512, 512), 2, 1),
}
OURS = [f"{block}.{i}" for block, (widths, *_) in BLOCKS.items() for i in range(len(widths))]
TORCHVISION = [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
PANET = [f"features.{2 * b}.{2 * i}" for b, (widths, *_) in enumerate(BLOCKS.values()) for i in range(len(widths))]


class VGGBackbone(Backbone):
    """VGG-16 without BatchNorm. A feature is the output of one convolution, before its ReLU; layer1 has stride 2,
    layer2 stride 4, layer3 and layer4 stride 8.

    Args:
        weights: see `pmnet.backbones.weights`. A file may use the tensor names of torchvision or PANet.
        download: download named weights that are not on this machine yet.

    Raises:
        WeightsError: the weights are missing, damaged, or of another network.

    Example:
        >>> import torch
        >>> from pmnet.backbones.vgg import VGGBackbone
        >>> features = VGGBackbone("none")(torch.rand(1, 3, 97, 97))
        >>> [features[layer][-1].shape[-1] for layer in ("layer1", "layer2", "layer3", "layer4")]
        [49, 25, 13, 13]
    """

    channels = {layer: widths[-1] for layer, (widths, *_) in BLOCKS.items() if layer != "stem"}
    strides = {"layer1": 2, "layer2": 4, "layer3": 8, "layer4": 8}
    blocks = {layer: len(widths) for layer, (widths, *_) in BLOCKS.items() if layer != "stem"}

    def __init__(self, weights: str, download: bool = False) -> None:
        super().__init__()
        self.trunk, self.provenance = load_weights(build_trunk, "vgg16", weights, download, own_names)

    @classmethod
    def around(cls, trunk: nn.Module, provenance: Provenance) -> Self:
        """A backbone whose trunk, from `build_trunk`, has its weights already."""
        backbone = cls.__new__(cls)
        Backbone.__init__(backbone)
        backbone.trunk, backbone.provenance = trunk, provenance
        return backbone

    def stem(self, images: Tensor) -> Tensor:
        return self.stage("stem", images)[1]

    def stage(self, layer: str, x: Tensor) -> tuple[list[Tensor], Tensor]:
        *_, stride = BLOCKS[layer]
        if stride is not None:
            x = F.max_pool2d(x, 3, stride, padding=1)
        features = []
        for convolution in self.trunk.get_submodule(layer):
            features.append(convolution(x))
            x = F.relu(features[-1])
        return features, x

    def activated(self, feature: Tensor) -> Tensor:
        return F.relu(feature)


def build_trunk() -> nn.Module:
    """The 13 convolutions, initialised as in PANet."""
    trunk, channels = nn.ModuleDict(), 3
    for block, (widths, dilation, _) in BLOCKS.items():
        inputs = (channels, *widths[:-1])
        convolutions = [
            nn.Conv2d(c, width, 3, padding=dilation, dilation=dilation) for c, width in zip(inputs, widths, strict=True)
        ]
        trunk[block] = nn.Sequential(*convolutions)
        channels = widths[-1]
    for name, tensor in trunk.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(tensor, nonlinearity="relu")
    return trunk


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the convolutions' tensors from the names of torchvision or PANet, and leaves out the classifier's."""
    state = {name.removeprefix("module.").removeprefix("encoder.backbone."): t for name, t in state.items()}
    theirs = PANET if "features.0.0.weight" in state else TORCHVISION
    ours = dict(zip(theirs, OURS, strict=True))
    named = {name: name.rpartition(".") for name in state if not name.startswith("classifier.")}
    return {f"{ours.get(module, module)}.{leaf}": state[name] for name, (module, _, leaf) in named.items()}
