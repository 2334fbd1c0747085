"""Swin-B (patch 4, window 12, trained at 384x384), as timm builds it."""

from functools import partial

import timm
from torch import Tensor

from pmnet.backbones.base import Backbone, Features
from pmnet.backbones.weights import load_weights

STAGES = ("layer1", "layer2", "layer3", "layer4")


class SwinBackbone(Backbone):
    """The feature of a block is its output; 128, 256, 512, 1024 channels and 2, 2, 18, 2 blocks.

    Args:
        weights: see `pmnet.backbones.weights.load_weights`.
        download: fetch named weights that are not there yet.

    Raises:
        WeightsError: the weights are not there, damaged, or of another network.
    """

    def __init__(self, weights: str, download: bool = False) -> None:
        super().__init__()
        name = "swin_base_patch4_window12_384"
        build = partial(timm.create_model, name, pretrained=False, strict_img_size=False, num_classes=0)
        self.trunk, self.provenance = load_weights(build, "swin_b", weights, download)
        self.channels = {stage: 128 * 2**i for i, stage in enumerate(STAGES)}
        self.blocks = {stage: len(layer.blocks) for stage, layer in zip(STAGES, self.trunk.layers, strict=True)}

    def blocks_of(self, images: Tensor) -> Features:
        x_BHWC = self.trunk.patch_embed(images)
        features: Features = {}
        for stage, layer in zip(STAGES, self.trunk.layers, strict=True):
            x_BHWC = layer.downsample(x_BHWC)
            features[stage] = []
            for block in layer.blocks:
                x_BHWC = block(x_BHWC)
                features[stage].append(x_BHWC.permute(0, 3, 1, 2))
        return features
