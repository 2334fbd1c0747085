"""What PMNet asks of a backbone."""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from pmnet.backbone.weights import Provenance
from pmnet.cache import FeatureCache, Features

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module, ABC):
    """Extractor of per-block features at strides 4, 8, 16 and 32 ("layer1".."layer4").

    A subclass sets the attributes below and writes `blocks_of`.

    Attributes:
        channels: feature channels of each layer.
        blocks: number of blocks of each layer.
        provenance: which weights these are; part of every result and checkpoint.
        trunk: the network itself, whose `state_dict` the weights are.
        cache: of features, used while the backbone is frozen.
    """

    channels: dict[str, int]
    blocks: dict[str, int]
    provenance: Provenance
    trunk: Any  # torchvision, timm and our own networks share no type
    cache: FeatureCache | None = None
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @abstractmethod
    def blocks_of(self, images: Tensor) -> Features:
        """Features of every block: (B, 3, H, W) normalised -> layer -> list of (B, C, h, w)."""

    def forward(self, images: Tensor) -> Features:
        """All blocks of layer3 and layer4, the last block of layer1 and of layer2.

        Args:
            images: (B, 3, H, W); uint8 is normalised here, on its device; float is taken as normalised.
        """
        if self.cache is None or not self.frozen:
            return self.computed(images)
        return self.cache(images, self.provenance.sha256, self.computed)

    def computed(self, images: Tensor) -> Features:
        if images.dtype == torch.uint8:
            images = (images / 255 - self.mean) / self.std
        features = self.blocks_of(images)
        return features | {layer: features[layer][-1:] for layer in ("layer1", "layer2")}

    def freeze(self) -> Self:
        """No gradients, and eval mode whatever `train()` is called from here on."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)
