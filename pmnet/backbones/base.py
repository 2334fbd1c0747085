"""The interface of all backbones: images in, features of the requested blocks out."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from pmnet.backbones.cache import FeatureCache, Features
from pmnet.backbones.weights import Provenance, state_hash
from pmnet.errors import SettingError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYERS = ("layer1", "layer2", "layer3", "layer4")
Reads = Mapping[str, Literal["all", "last"]]  # layer -> which of its blocks to return


class ByLayer(dict[str, int]):
    """layer -> number, of a backbone without some of the layers. Raises SettingError for those."""

    def __missing__(self, layer: str) -> int:
        raise SettingError(
            f"This backbone has no {layer}; it has {', '.join(self)}. Choose another backbone, such as "
            "backbone=resnet50, or the one that the model selects."
        )


class Backbone(nn.Module, ABC):
    """Extracts features of every block in four stages, "layer1" to "layer4".

    A subclass sets `channels`, `blocks`, `provenance`
    and `trunk`, and implements `stem` and `stage`.

    Attributes:
        channels: layer -> number of feature channels.
        blocks: layer -> number of blocks.
        provenance: source of the weights; stored in every result and checkpoint.
        trunk: the network that holds the weights.
        strides: layer -> pixels from one position to the next; 4, 8, 16 and 32 unless a subclass says otherwise.
        side_multiple: image sides must be multiples of this.
        cache: cache of features, used while the whole backbone is frozen; None computes every feature.
        compiled: run the stages through torch.compile.

    Example:
        >>> import torch
        >>> from pmnet import SmallBackbone
        >>> backbone = SmallBackbone("quickstart").freeze()
        >>> features = backbone(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), {"layer2": "last", "layer3": "all"})
        >>> {layer: [tuple(feature.shape) for feature in blocks] for layer, blocks in features.items()}
        {'layer2': [(1, 48, 8, 12)], 'layer3': [(1, 96, 4, 6), (1, 96, 4, 6)]}
    """

    channels: dict[str, int]
    blocks: dict[str, int]
    provenance: Provenance
    trunk: Any  # networks of torchvision, timm and this package have no common type
    strides: ClassVar[Mapping[str, int]] = dict(zip(LAYERS, (4, 8, 16, 32), strict=True))
    side_multiple: ClassVar[int] = 1
    cache: FeatureCache | None = None
    compiled: bool = False
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        self.by_batch = False  # whether features depend on the batch, so that they cannot be cached
        self.learned: tuple[str, ...] = ()  # parts of the trunk that are trained although the rest is frozen
        self.known: tuple[list[tuple[int, int]], str] | None = None  # versions of the weights, and their hash
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    # Implemented by subclasses

    @abstractmethod
    def stem(self, images: Tensor) -> Any:
        """Computes the input of the first stage.

        Args:
            images: (B, 3, H, W) float, normalised.
        """

    @abstractmethod
    def stage(self, layer: str, x: Any) -> tuple[list[Tensor], Any]:
        """Runs one stage.

        Args:
            layer: "layer1" to "layer4".
            x: the output of the stem or of the previous stage.

        Returns:
            The features of the stage's blocks, each (B, C, h, w), and the input of the next stage.
        """

    def activated(self, feature: Tensor) -> Tensor:
        """The input of the next block, given a block's feature: in a ResNet, the feature after the last ReLU."""
        return feature

    # Features

    def forward(self, images: Tensor, reads: Reads | None = None) -> Features:
        """Computes features, or takes them from the cache.

        Args:
            images: (B, 3, H, W); uint8 in 0..255, or float already normalised with ImageNet's mean and std.
            reads: layer -> "all" or "last", the blocks to return; None returns every block.

        Returns:
            layer -> list of (B, C, h, w), in the order of the blocks.

        Raises:
            SettingError: the backbone does not have one of the layers, or does not take the images' sides.
        """
        self.check_sides((images.shape[-2], images.shape[-1]))
        reads = self.checked(dict.fromkeys(self.blocks, "all") if reads is None else reads)
        compute = functools.partial(self.computed, reads=reads)
        differentiated = images.requires_grad and torch.is_grad_enabled()
        if self.cache is None or not self.frozen or self.by_batch or differentiated or not len(images):
            return compute(images)
        return self.cache(images, f"{self.identity()} {sorted(reads.items())}", compute)

    def computed(self, images: Tensor, reads: Reads) -> Features:
        """The features, without the cache. Arguments as in `forward`."""
        if images.dtype == torch.uint8:
            images = ((images / 255 - self.mean) / self.std).to(self.mean.dtype)
        return (compiled() if self.compiled else stages)(self, images, reads)

    def check_sides(self, size: tuple[int, int]) -> None:
        """Raises SettingError if the backbone does not take images of `size` (H, W)."""
        if any(side % self.side_multiple for side in size):
            raise SettingError(
                f"Backbone {self.provenance.backbone} takes image sides that are multiples of {self.side_multiple}, "
                f"not {size[0]}x{size[1]}: choose episodes.image_size, resize the images, or choose another backbone."
            )

    def checked(self, reads: Reads) -> Reads:
        """Returns `reads`. Raises SettingError if the backbone does not have one of its layers."""
        unknown = [layer for layer in reads if layer not in self.blocks]
        if unknown:
            raise SettingError(
                f"{type(self).__name__} has no {unknown[0]}; it has {', '.join(self.blocks)}. Choose another layer or "
                "another backbone."
            )
        return reads

    def identity(self) -> str:
        """The class and a hash of the current weights: together they determine the features of an image."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors.values()]
        if self.known is None or self.known[0] != versions:
            self.known = (versions, state_hash(tensors))
        return f"{type(self).__module__}.{type(self).__qualname__} {self.known[1]}"

    # Training

    def freeze(self, but: Sequence[str] = ()) -> Self:
        """Turns off gradients and keeps eval mode, even if `train()` is called later.

        Args:
            but: parts of the trunk whose parameters are trained nevertheless, such as "layer3". Their BatchNorm layers
                stay in eval mode too.

        Returns:
            The backbone itself.

        Raises:
            SettingError: the trunk has no part of that name.
        """
        trained = [self.part(name) for name in but]
        self.learned, self.frozen = tuple(but), not but
        self.requires_grad_(False)
        for part in trained:
            part.requires_grad_(True)
        return super().train(False)

    def part(self, name: str) -> nn.Module:
        """The part of the trunk with this name, such as "layer3"."""
        try:
            return self.trunk.get_submodule(name)
        except AttributeError as error:
            own = ", ".join(part for part, _ in self.trunk.named_children())
            raise SettingError(
                f"{type(self).__name__} has no part {name} to train; it has {own}. Name parts that it has, for example "
                "model.trained=[blocks.3,blocks.4], or choose a backbone with layers, such as backbone=resnet50."
            ) from error

    def frozen_names(self) -> set[str]:
        """Names of the tensors in the state dict that are not trained."""
        learned = tuple(f"trunk.{name}." for name in self.learned)
        return {name for name in self.state_dict() if not (learned and name.startswith(learned))}

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen and not self.learned)

    def train_batchnorm(self, mode: bool) -> None:
        """Sets only the BatchNorm layers to training mode: they normalise by the batch and update their statistics."""
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        self.by_batch = mode


def stages(backbone: Backbone, images: Tensor, reads: Reads) -> Features:
    """Computes the requested features. Deeper stages are not run."""
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
    """The smallest request that covers all of them."""
    together: dict[str, Literal["all", "last"]] = {}
    for layer in LAYERS:
        asked = {r[layer] for r in reads if layer in r}
        if asked:
            together[layer] = "all" if "all" in asked else "last"
    return together
