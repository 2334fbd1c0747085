"""Swin-B (patch 4, window 12, trained at 384x384), as timm builds it."""

import torch
from torch import Tensor, nn

from pmnet.backbones.base import LAYERS, Backbone
from pmnet.backbones.weights import load_weights


class SwinBackbone(Backbone):
    """Swin-B with 128, 256, 512, 1024 channels and 2, 2, 18, 2 blocks. The feature of a block is its output.

    Args:
        weights: "ms_in1k", "ms_in22k_ft_in1k", a path, or "none"; see `pmnet.backbones.weights`. A file may have the
            tensor names of timm or of the authors.
        download: download named weights that are not on this machine yet.

    Raises:
        WeightsError: the weights are missing, damaged, or of another network.
    """

    side_multiple = 4  # the patch

    def __init__(self, weights: str, download: bool = False) -> None:
        super().__init__()
        self.trunk, self.provenance = load_weights(build_trunk, "swin_b", weights, download, names_of_timm)
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


def build_trunk() -> nn.Module:
    import timm  # takes seconds to import

    return timm.create_model("swin_base_patch4_window12_384", pretrained=False, strict_img_size=False, num_classes=0)


def names_of_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the authors' tensor names to timm's, and resizes position biases trained with other windows."""
    from timm.models.swin_transformer import checkpoint_filter_fn

    if "patch_embed.proj.weight" not in state:
        return state
    with torch.device("meta"):  # the filter reads shapes from the trunk, no values
        trunk = build_trunk()
    return checkpoint_filter_fn(state, trunk)
