"""What methods ask of a backbone: features of its blocks, the blocks they name and no others."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from pmnet.backbones.cache import FeatureCache, Features
from pmnet.backbones.weights import Provenance, state_hash
from pmnet.errors import SettingError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYERS = ("layer1", "layer2", "layer3", "layer4")
Reads = Mapping[str, Literal["all", "last"]]  # layer -> which of its blocks


class Backbone(nn.Module, ABC):
    """Extractor of per-block features in four stages, "layer1".."layer4", at strides 4, 8, 16 and 32 unless a subclass
    says otherwise.

    A subclass sets the attributes below and writes `stem` and `stage`.

    Attributes:
        channels: feature channels of each layer.
        blocks: number of blocks of each layer.
        provenance: which weights these are; part of every result and checkpoint.
        trunk: the network itself, whose `state_dict` the weights are.
        cache: of features, used while the whole backbone is frozen.
        compiled: whether torch.compile works on the stages.
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
        self.learned: tuple[str, ...] = ()  # parts of the trunk that are trained all the same
        self.known: tuple[list[tuple[int, int]], str] | None = None  # versions of the weights, and their hash
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    # What a subclass writes

    @abstractmethod
    def stem(self, images: Tensor) -> Any:
        """(B, 3, H, W) normalised -> what the first stage takes."""

    @abstractmethod
    def stage(self, layer: str, x: Any) -> tuple[list[Tensor], Any]:
        """Runs one stage on what the stage before it handed on.

        Returns:
            The features of its blocks, each (B, C, h, w), and what the next stage takes.
        """

    def activated(self, feature: Tensor) -> Tensor:
        """What a block hands on to the next, made of its feature: in a ResNet the feature after the last ReLU."""
        return feature

    # Features

    def forward(self, images: Tensor, reads: Reads | None = None) -> Features:
        """
        Args:
            images: (B, 3, H, W); uint8 is normalised here, on its device; float is taken as normalised.
            reads: layer -> "all" or "last", the blocks to return; None returns every block.

        Returns:
            layer -> list of (B, C, h, w), in the order of the blocks.

        Raises:
            SettingError: a layer that this backbone does not have.
        """
        reads = self.checked(dict.fromkeys(self.blocks, "all") if reads is None else reads)
        compute = functools.partial(self.computed, reads=reads)
        differentiated = images.requires_grad and torch.is_grad_enabled()
        if self.cache is None or not self.frozen or differentiated or not len(images):
            return compute(images)
        return self.cache(images, f"{self.identity()} {sorted(reads.items())}", compute)

    def computed(self, images: Tensor, reads: Reads) -> Features:
        if images.dtype == torch.uint8:
            images = ((images / 255 - self.mean) / self.std).to(self.mean.dtype)
        return (compiled() if self.compiled else stages)(self, images, reads)

    def checked(self, reads: Reads) -> Reads:
        unknown = [layer for layer in reads if layer not in self.blocks]
        if unknown:
            raise SettingError(
                f"{type(self).__name__} has no {unknown[0]}; it has {', '.join(self.blocks)}. Choose another layer or "
                "another backbone."
            )
        return reads

    def identity(self) -> str:
        """Names what determines the features: the kind of backbone, and a hash of its weights as they are now."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors.values()]
        if self.known is None or self.known[0] != versions:
            self.known = (versions, state_hash(tensors))
        return f"{type(self).__module__}.{type(self).__qualname__} {self.known[1]}"

    # Training

    def freeze(self, but: Sequence[str] = ()) -> Self:
        """No gradients, and eval mode whatever `train()` is called from here on.

        Args:
            but: parts of the trunk, such as "layer3", whose parameters are trained all the same. Their BatchNorm
                layers stay in eval mode.
        """
        self.learned, self.frozen = tuple(but), not but
        self.requires_grad_(False)
        for name in but:
            self.trunk.get_submodule(name).requires_grad_(True)
        return super().train(False)

    def frozen_names(self) -> set[str]:
        """Names in the state dict of what is not trained."""
        learned = tuple(f"trunk.{name}." for name in self.learned)
        return {name for name in self.state_dict() if not (learned and name.startswith(learned))}

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen and not self.learned)

    def train_batchnorm(self, mode: bool) -> None:
        """Puts the BatchNorm layers alone into training mode: they use the batch's statistics and update their own."""
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)


def stages(backbone: Backbone, images: Tensor, reads: Reads) -> Features:
    """The features that are read; stages deeper than these are not computed."""
    features: Features = {}
    x = backbone.stem(images)
    for layer in backbone.blocks:
        blocks, x = backbone.stage(layer, x)
        if layer in reads:
            features[layer] = blocks[-1:] if reads[layer] == "last" else blocks
        if len(features) == len(reads):
            break
    return features


@functools.cache
def compiled() -> Callable[[Backbone, Tensor, Reads], Features]:
    return torch.compile(stages)


def union(*reads: Reads) -> Reads:
    """What all of them read."""
    together: dict[str, Literal["all", "last"]] = {}
    for layer in LAYERS:
        asked = {r[layer] for r in reads if layer in r}
        if asked:
            together[layer] = "all" if "all" in asked else "last"
    return together
