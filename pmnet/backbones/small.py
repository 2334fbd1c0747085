"""A small residual network for small machines: 0.9 million parameters, under 2 MB in half precision."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from pmnet.backbones.base import Backbone, Features
from pmnet.backbones.resnet import residual_features, residual_layout
from pmnet.backbones.weights import load_weights

WIDTHS, DEPTHS = (24, 48, 96, 128), (1, 1, 2, 2)


class SmallBackbone(Backbone):
    """Residual network of four stages with 24, 48, 96 and 128 channels and 1, 1, 2, 2 basic blocks.

    Args:
        weights: "quickstart" (shipped; see `conf/experiment/quickstart_backbone.yaml` for how it was
            made), a path, or "none".
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.trunk, self.provenance = load_weights(build_trunk, "small", weights, download=False)
        self.channels, self.blocks = residual_layout(self.trunk)

    def blocks_of(self, images: Tensor) -> Features:
        return residual_features(self.trunk, self.trunk.stem(images))


def build_trunk() -> nn.Module:
    trunk = nn.Module()
    trunk.stem = nn.Sequential(
        nn.Conv2d(3, WIDTHS[0], 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(WIDTHS[0]),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    inputs = WIDTHS[0]
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), start=1):
        layer = nn.Sequential()
        for block in range(depth):
            stride = 2 if stage > 1 and block == 0 else 1
            shortcut = None
            if stride == 2:
                shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            layer.append(BasicBlock(inputs, width, stride, shortcut))
            inputs = width
        trunk.add_module(f"layer{stage}", layer)
    return trunk
