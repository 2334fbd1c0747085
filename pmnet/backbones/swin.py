"""Swin-B (patch 4, window 12, trained at 384x384), as timm builds it."""

from functools import partial

from torch import Tensor

from pmnet.backbones.base import LAYERS, Backbone
from pmnet.backbones.weights import load_weights


class SwinBackbone(Backbone):
    """The feature of a block is its output; 128, 256, 512, 1024 channels and 2, 2, 18, 2 blocks.

    Args:
        weights: see `pmnet.backbones.weights.load_weights`.
        download: fetch named weights that are not on this machine yet.

    Raises:
        WeightsError: the weights are missing, damaged, or of another network.
    """

    def __init__(self, weights: str, download: bool = False) -> None:
        import timm  # takes seconds to import

        super().__init__()
        name = "swin_base_patch4_window12_384"
        build = partial(timm.create_model, name, pretrained=False, strict_img_size=False, num_classes=0)
        self.trunk, self.provenance = load_weights(build, "swin_b", weights, download)
        self.channels = {layer: 128 * 2**i for i, layer in enumerate(LAYERS)}
        self.blocks = {layer: len(stage.blocks) for layer, stage in zip(LAYERS, self.trunk.layers, strict=True)}

    def stem(self, images: Tensor) -> Tensor:
        return self.trunk.patch_embed(images)

    def stage(self, layer: str, x: Tensor) -> tuple[list[Tensor], Tensor]:
        part = self.trunk.layers[LAYERS.index(layer)]
        x_BHWC = part.downsample(x)
        features = []
        for block in part.blocks:
            x_BHWC = block(x_BHWC)
            features.append(x_BHWC.permute(0, 3, 1, 2))
        return features, x_BHWC
