"""What PMNet asks of a backbone."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from pmnet.backbones.cache import FeatureCache, Features
from pmnet.backbones.weights import Provenance, state_hash

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
        compiled: whether torch.compile works on `blocks_of`.
    """

    channels: dict[str, int]
    blocks: dict[str, int]
    provenance: Provenance
    trunk: Any  # torchvision, timm and our own networks share no type
    cache: FeatureCache | None = None
    compiled: bool = False
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        self.known: tuple[list[tuple[int, int]], str] | None = None  # versions of the weights, and their hash
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
        differentiated = images.requires_grad and torch.is_grad_enabled()
        if self.cache is None or not self.frozen or differentiated or not len(images):
            return self.computed(images)
        return self.cache(images, self.identity(), self.computed)

    def computed(self, images: Tensor) -> Features:
        if images.dtype == torch.uint8:
            images = ((images / 255 - self.mean) / self.std).to(self.mean.dtype)
        features = compiled()(self, images) if self.compiled else self.blocks_of(images)
        return features | {layer: features[layer][-1:] for layer in ("layer1", "layer2")}

    def identity(self) -> str:
        """Names what makes the features: the kind of backbone, and a hash of its weights as they are now."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors.values()]
        if self.known is None or self.known[0] != versions:
            self.known = (versions, state_hash(tensors))
        return f"{type(self).__module__}.{type(self).__qualname__} {self.known[1]}"

    def freeze(self) -> Self:
        """No gradients, and eval mode whatever `train()` is called from here on."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)


@functools.cache
def compiled() -> Callable[[Backbone, Tensor], Features]:
    return torch.compile(lambda backbone, images: backbone.blocks_of(images))
