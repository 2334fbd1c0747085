"""The contract of all methods: the features they read, what they keep of supports, their masks, what they train.

A method is a `Backbone`, which turns images into features, and a `Head`, which turns features into a mask. A new method
is one file here and one yaml in `conf/model/`. Everything but `Head.segment` has a default:

    class MyHead(Head):
        def segment(self, query_feats, seen, size):  # logits (B, 2, H, W)
            ...

    class MyMethod(Method):
        query_reads = support_reads = {"layer3": "last"}

        def __init__(self, backbone: Backbone) -> None:
            super().__init__(backbone, MyHead())

Suffixes of tensor names, here and in the methods: B batch, K shots, C channels, H, W image, h, w feature map, Q query
positions (hq * wq), S support positions (hs * ws), L blocks of one stage.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones.base import Backbone, Features, Reads, union
from pmnet.errors import SettingError

if TYPE_CHECKING:  # at run time, any object with the fields of an Episode will do
    from datamodules import Episode

IGNORE = 255  # mask value of pixels that are neither foreground nor background
Criterion = Callable[[Tensor, Tensor], Tensor]  # logits (B, 2, H, W), masks (B, H, W) int64 with 255 = ignore -> loss


class Support(NamedTuple):
    """What a head keeps of the supports of B episodes by default: all features and masks.

    Attributes:
        features: layer -> list of (B, K, C, h, w).
        masks: (B, K, H, W), 0 or 1.
    """

    features: Features
    masks: Tensor


class Head(nn.Module, ABC):
    """The part of a method after the backbone. Its tensors are saved in checkpoints.

    A subclass implements `segment`, and `see` if it keeps something else than features and masks of the supports. `see`
    returns a tensor, or a named tuple, dict or list of tensors, each with the batch as its first axis.
    """

    def see(self, support_feats: Features, support_masks: Tensor) -> Any:
        """Computes what the head keeps of the supports, once for any number of queries.

        Args:
            support_feats: layer -> list of (B, K, C, h, w).
            support_masks: (B, K, H, W), 0 or 1, any dtype.

        Returns:
            By default, a `Support`.
        """
        return Support(support_feats, support_masks)

    @abstractmethod
    def segment(self, query_feats: Features, seen: Any, size: tuple[int, int]) -> Tensor:
        """Segments queries, given what `see` returned.

        Args:
            query_feats: layer -> list of (B, C, h, w).
            seen: the output of `see` for the same B episodes.
            size: H, W of the query image.

        Returns:
            Logits (B, 2, H, W): background, foreground.
        """

    def mask(self, query_feats: Features, seen: Any, size: tuple[int, int]) -> Tensor:
        """Predicted masks (B, H, W) bool; by default, the larger logit.

        Arguments as in `segment`, but `size` may be another one than the query's, to which logits are resized.
        """
        logits = self.logits(query_feats, seen, size)
        return logits[:, 1] > logits[:, 0]

    def logits(self, query_feats: Features, seen: Any, size: tuple[int, int]) -> Tensor:
        """Like `segment`, at any size."""
        logits = self.segment(query_feats, seen, size)
        return logits if size_of(logits) == size else resize(logits, size)

    def margin(self, query_feats: Features, seen: Any, size: tuple[int, int]) -> Tensor:
        """By how much the foreground's logit exceeds the background's, (B, H, W); > 0 exactly where `mask` is true.

        A head whose `mask` is not that of its logits may say better how sure it is. Arguments as in `segment`.
        """
        margin = margin_of(self.logits(query_feats, seen, size))
        if type(self).mask is Head.mask:
            return margin
        return agreeing(margin, self.mask(query_feats, seen, size))

    def forward(self, query_feats: Features, support_feats: Features, support_masks: Tensor) -> Tensor:
        """Logits (B, 2, H, W) at the masks' size. Arguments as in `see` and `segment`."""
        return self.segment(query_feats, self.see(support_feats, support_masks), size_of(support_masks))

    def predict(self, query_feats: Features, support_feats: Features, support_masks: Tensor) -> Tensor:
        """Predicted masks (B, H, W) bool at the support masks' size. Arguments as in `see` and `segment`."""
        return self.mask(query_feats, self.see(support_feats, support_masks), size_of(support_masks))

    def loss(
        self,
        query_feats: Features,
        support_feats: Features,
        support_masks: Tensor,
        query_mask: Tensor,
        criterion: Criterion,
    ) -> Tensor:
        """The training loss, a scalar; by default, the criterion applied to the logits.

        Args:
            query_feats: as in `segment`.
            support_feats: as in `see`.
            support_masks: as in `see`.
            query_mask: (B, H, W); 1 = foreground, 0 = background, 255 = ignore.
            criterion: the configured loss of logits and masks.
        """
        return scored(criterion, self(query_feats, support_feats, support_masks), query_mask)

    @property
    def head(self) -> Self:
        """The head itself, so that `from_release(...).head` works whether it returns a head or a method."""
        return self


class Method(nn.Module):
    """A backbone and a head: segments queries, given a few supports with masks.

    Args:
        backbone: gets frozen, except for the parts named in `learned_layers` or trained by another method.
        head: see `Head`.

    Attributes:
        query_reads: layer -> "all" or "last", the blocks whose features the head takes of the query.
        support_reads: the same for the supports.
        strides: layer -> stride that the backbone must have there; empty: any.
        side_multiple: image sides must be multiples of this, plus `side_offset`.
        side_offset: see `side_multiple`; 1 for sides of 8n + 1.
        learned_layers: parts of the backbone's trunk that are trained and saved in checkpoints.
        batchnorm: how the frozen backbone's BatchNorm layers work in training: "eval" uses the stored statistics;
            "train" uses the batch's and updates the stored ones, as the programs of the PFENet family do.
        ignored: how the training loss treats pixels marked 255: "ignore", or "background" as in HSNet's family.
        title: the method's name as published, if it is not the name of the class.
        protocol: the choice of `conf/protocol/` behind its published numbers; empty: one of its own, or none published.
        tuned_on: what gradient steps at test use, for a method that takes some; stored in every result.

    Raises:
        SettingError: the backbone has other strides than the method needs, takes no image side that the method takes,
            or does not have the parts named in `learned_layers`.
    """

    query_reads: Reads
    support_reads: Reads
    strides: ClassVar[Mapping[str, int]] = {}
    side_multiple: ClassVar[int] = 32
    side_offset: ClassVar[int] = 0
    learned_layers: tuple[str, ...] = ()
    batchnorm: Literal["eval", "train"] = "eval"
    ignored: Literal["ignore", "background"] = "ignore"
    title: ClassVar[str] = ""
    protocol: ClassVar[str] = ""
    tuned_on: str = ""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        if any(backbone.strides.get(layer) != stride for layer, stride in self.strides.items()):
            need, have = (
                ", ".join(str(strides.get(layer)) for layer in self.strides)
                for strides in (self.strides, backbone.strides)
            )
            raise SettingError(
                f"{type(self).__name__} needs a backbone with strides of {need} in {', '.join(self.strides)}; "
                f"{backbone.provenance.backbone} has {have}. Choose another, such as backbone=resnet50."
            )
        if self.side_offset % math.gcd(self.side_multiple, backbone.side_multiple):
            raise SettingError(
                f"{type(self).__name__} takes image sides {self.sides()}, and backbone {backbone.provenance.backbone} "
                f"multiples of {backbone.side_multiple}: no side suits both. Choose another backbone, such as "
                "backbone=resnet50."
            )
        if self.learned_layers or not backbone.learned:  # a backbone that another method trains stays as it is
            backbone.freeze(but=self.learned_layers)
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.head = head

    # Segmenting

    def forward(self, query: Tensor, support: Tensor, support_masks: Tensor) -> Tensor:
        """Segments B queries, each by its own K supports.

        Args:
            query: (B, 3, H, W); uint8 in 0..255, or float already normalised with ImageNet's mean and std.
            support: (B, K, 3, H, W), likewise; H and W may differ from the query's.
            support_masks: (B, K, H, W), 0 or 1, any dtype.

        Returns:
            Logits (B, 2, H, W): background, foreground.

        Raises:
            SettingError: the method does not support the image sides or the number of shots.
            ValueError: the shapes do not match.
        """
        self.check(query, support, support_masks)
        query_feats, support_feats = self.features(query, support, support_masks)
        return self.head.segment(query_feats, self.head.see(support_feats, support_masks), size_of(query))

    def predict(self, query: Tensor, support: Tensor, support_masks: Tensor) -> Tensor:
        """Predicted masks (B, H, W) bool. Arguments as in `forward`."""
        self.check(query, support, support_masks)
        query_feats, support_feats = self.features(query, support, support_masks)
        return self.head.mask(query_feats, self.head.see(support_feats, support_masks), size_of(query))

    def see(self, support: Tensor, support_masks: Tensor) -> Any:
        """Processes supports once, for any number of calls of `segment` and `mask`. Arguments as in `forward`."""
        self.check(None, support, support_masks)
        passed = self.backbone_pass(support.flatten(0, 1), self.support_reads)
        return self.head.see(self.of_supports(passed, support, support_masks), support_masks)

    def segment(self, query: Tensor, seen: Any) -> Tensor:
        """Segments queries by supports that `see` has processed.

        Args:
            query: (B, 3, H, W), as in `forward`.
            seen: the output of `see`, for B episodes or for one that all queries share.

        Returns:
            Logits (B, 2, H, W): background, foreground.

        Raises:
            SettingError: the method does not support the image sides.
            ValueError: the number of queries does not match.
        """
        return self.head.segment(*self.met(query, seen), size_of(query))

    def mask(self, query: Tensor, seen: Any) -> Tensor:
        """Predicted masks (B, H, W) bool. Arguments as in `segment`."""
        return self.head.mask(*self.met(query, seen), size_of(query))

    def met(self, query: Tensor, seen: Any) -> tuple[Features, Any]:
        """The queries' features, and `seen` expanded to the number of queries."""
        self.check_sides(size_of(query))
        return self.backbone_pass(query, self.query_reads), repeated(seen, len(query))

    # Training

    def loss(self, episode: "Episode", criterion: Criterion) -> Tensor:
        """The training loss of a batch of episodes, a scalar.

        Args:
            episode: B episodes.
            criterion: loss of logits (B, 2, H, W) and masks (B, H, W) int64 with 255 = ignore.
        """
        masks = episode.query_mask
        if self.ignored == "background":
            masks = masks.masked_fill(masks == IGNORE, 0)
        feats = self.features(episode.query, episode.support, episode.support_masks)
        return self.head.loss(*feats, episode.support_masks, masks, criterion)

    def learned(self) -> list[Any]:
        """Parameters or parameter groups for the optimiser; empty for a training-free method."""
        return [p for p in self.parameters() if p.requires_grad]

    def saved(self) -> set[str]:
        """Names of the tensors to save in a checkpoint: all except those of the backbone that training leaves alone."""
        frozen = {f"backbone.{name}" for name in self.backbone.frozen_names()}
        if self.batchnorm == "train":
            frozen -= {name for name, _ in self.named_buffers() if name.startswith("backbone.trunk.")}
        return set(self.state_dict()) - frozen

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.batchnorm == "train":
            self.backbone.train_batchnorm(mode)
        return self

    # Features

    @property
    def reads(self) -> Reads:
        """The blocks to compute when queries and supports pass through the backbone together."""
        return union(self.query_reads, self.support_reads)

    def features(self, query: Tensor, support: Tensor, support_masks: Tensor) -> tuple[Features, Features]:
        """The features that the head takes of the queries and of the supports. Arguments as in `forward`."""
        return self.chosen(*self.passes(query, support, self.reads), support, support_masks)

    def passes(self, query: Tensor, support: Tensor, reads: Reads) -> tuple[Features, Features]:
        """The backbone's features of B queries and of B * K supports, in one forward pass if their sizes are equal."""
        supports = support.flatten(0, 1)
        if (query.shape[1:], query.dtype) != (supports.shape[1:], supports.dtype):
            return self.backbone_pass(query, reads), self.backbone_pass(supports, reads)
        both = self.backbone_pass(torch.cat([query, supports]), reads)
        parts = {layer: [f.split([len(query), len(supports)]) for f in blocks] for layer, blocks in both.items()}
        query_feats, support_feats = ({m: [f[i] for f in blocks] for m, blocks in parts.items()} for i in (0, 1))
        return query_feats, support_feats

    def chosen(
        self, query_feats: Features, support_feats: Features, support: Tensor, support_masks: Tensor
    ) -> tuple[Features, Features]:
        """Selects what this head takes from the backbone's features, which may be shared with other methods."""
        return pick(query_feats, self.query_reads), self.of_supports(support_feats, support, support_masks)

    def of_supports(self, support_feats: Features, support: Tensor, support_masks: Tensor) -> Features:
        """The supports' features with an axis for the shots, layer -> list of (B, K, C, h, w).

        A method that needs another forward pass of its supports, for example of masked images, overrides this.
        """
        chosen = pick(support_feats, self.support_reads)
        return {layer: [f.unflatten(0, support.shape[:2]) for f in blocks] for layer, blocks in chosen.items()}

    def backbone_pass(self, images: Tensor, reads: Reads) -> Features:
        """A forward pass of the backbone, with gradients only if parts of it are trained."""
        with torch.set_grad_enabled(bool(self.learned_layers) and torch.is_grad_enabled()):
            return self.backbone(images, reads)

    # Checks of the input

    def check_sides(self, size: tuple[int, int]) -> None:
        """Raises SettingError if the method or its backbone does not support images of `size` (H, W)."""
        if any(side % self.side_multiple != self.side_offset % self.side_multiple for side in size):
            raise SettingError(
                f"{type(self).__name__} takes image sides {self.sides()}, not {size[0]}x{size[1]}: choose "
                "episodes.image_size, or resize the images."
            )
        self.backbone.check_sides(size)

    def sides(self) -> str:
        """Which image sides the method takes, in words."""
        if not self.side_offset:
            return f"that are multiples of {self.side_multiple}"
        step, offset = self.side_multiple, self.side_offset
        return f"of {step}n + {offset}, such as {59 * step + offset} or {48 * step + offset}"

    def check_shots(self, shots: int) -> None:
        """Raises SettingError if the method does not support this number of shots; by default, it supports any."""

    def check(self, query: Tensor | None, support: Tensor, support_masks: Tensor) -> None:
        """Checks shapes, image sides and the number of shots. Arguments as in `forward`.

        Raises:
            SettingError: the method does not support the image sides or the number of shots.
            ValueError: the shapes do not match.
        """
        B, K = support.shape[:2]
        if support_masks.shape[:2] != (B, K) or (query is not None and len(query) != B):
            raise ValueError(
                "The shapes do not match: expected query (B,3,H,W), support (B,K,3,H,W), masks (B,K,H,W), got "
                f"{tuple(query.shape) if query is not None else None}, {tuple(support.shape)}, "
                f"{tuple(support_masks.shape)}"
            )
        for images in (support, *(() if query is None else (query,))):
            self.check_sides(size_of(images))
        self.check_shots(K)


def size_of(images: Tensor) -> tuple[int, int]:
    """H, W of images (..., H, W)."""
    return images.shape[-2], images.shape[-1]


def pick(features: Features, reads: Reads) -> Features:
    """Selects the features in `reads` from features that include at least those."""
    return {layer: features[layer][-1:] if which == "last" else features[layer] for layer, which in reads.items()}


def repeated(seen: Any, B: int) -> Any:
    """Expands the output of `see` for one episode to B queries; returns that for B episodes unchanged.

    Raises:
        ValueError: it is for another number of episodes.
    """
    if isinstance(seen, Tensor):
        if len(seen) not in (1, B):
            raise ValueError(f"{B} queries do not match the supports of {len(seen)} episodes.")
        return seen.expand(B, *seen.shape[1:])
    if isinstance(seen, Mapping):
        return {name: repeated(value, B) for name, value in seen.items()}
    if isinstance(seen, tuple) and hasattr(seen, "_fields"):
        return type(seen)(*(repeated(value, B) for value in seen))
    if isinstance(seen, (list, tuple)):
        return type(seen)(repeated(value, B) for value in seen)
    return seen


def margin_of(logits: Tensor) -> Tensor:
    """Foreground minus background logit, (B, 2, ...) -> (B, ...) float; -inf where they do not compare (NaN)."""
    background, foreground = logits.to(torch.promote_types(logits.dtype, torch.float32)).unbind(1)
    return (foreground - background).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def agreeing(margin: Tensor, mask: Tensor) -> Tensor:
    """Margins of any shape, made > 0 exactly where `mask` is true."""
    return torch.where(mask, margin.clamp(min=torch.finfo(margin.dtype).tiny), margin.clamp(max=0))


def scored(criterion: Criterion, logits: Tensor, masks: Tensor) -> Tensor:
    """Computes the criterion in float32; 0 if every pixel is marked 255, because their mean would be NaN."""
    masks = masks.long()
    return criterion(logits.float(), masks) if (masks != IGNORE).any() else 0 * logits.float().sum()


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (N, C, h, w) to (N, C, H, W), bilinear with aligned corners, as all these methods do."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)
