"""A small residual network for small machines: 0.9 million parameters, under 2 MB in half precision."""

from torch import Tensor, nn

from pmnet.backbones.resnet import ResidualBackbone
from pmnet.backbones.weights import load_weights

WIDTHS, DEPTHS = (24, 48, 96, 128), (1, 1, 2, 2)


class SmallBackbone(ResidualBackbone):
    """Residual network of four stages with 24, 48, 96 and 128 channels and 1, 1, 2, 2 basic blocks.

    Args:
        weights: "quickstart" (shipped; `conf/experiment/quickstart_backbone.yaml` trained it), a path, or "none".

    Raises:
        WeightsError: the weights are missing, damaged, or of another network.
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.trunk, self.provenance = load_weights(build_trunk, "small", weights, download=False)
        self.measure()

    def stem(self, images: Tensor) -> Tensor:
        return self.trunk.stem(images)


def build_trunk() -> nn.Module:
    from torchvision.models.resnet import BasicBlock  # takes a second to import

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
