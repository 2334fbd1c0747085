"""The contract that every method keeps: what it reads, what it remembers of supports, what it answers, what it learns.

A method is a `Head`, which turns features into a mask, on a `Backbone`, which turns images into features. A new one is
one file here and one yaml in `conf/model/`; both classes have defaults for everything but `Head.segment`:

    class MyHead(Head):
        def segment(self, query_feats, seen, size):  # logits (B, 2, H, W)
            ...

    class MyMethod(Method):
        query_reads = support_reads = {"layer3": "last"}

        def __init__(self, backbone: Backbone) -> None:
            super().__init__(backbone, MyHead())

Axes in names of tensors, here and in the methods: B batch, K shots, C channels, H, W image, h, w feature map, Q query
positions (hq * wq), S support positions (hs * ws), L blocks of one stage.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones.base import Backbone, Features, Reads, union
from pmnet.errors import SettingError

if TYPE_CHECKING:  # batches are read by their fields' names alone
    from datamodules import Episode

IGNORE = 255  # value of a mask's pixels that count neither as foreground nor as background
Criterion = Callable[[Tensor, Tensor], Tensor]  # of logits (B, 2, H, W) and masks (B, H, W) int64 with 255 = ignore


class Support(NamedTuple):
    """What a head remembers of B episodes' supports by default: everything.

    Attributes:
        features: layer -> list of (B, K, C, h, w).
        masks: (B, K, H, W), 0 or 1.
    """

    features: Features
    masks: Tensor


class Head(nn.Module, ABC):
    """The part of a method above the backbone; all of it that is learned is saved in checkpoints.

    A subclass writes `segment`, and `see` if it remembers less of a support than its features and masks. What `see`
    returns is a tensor, or a named tuple, dict or list of tensors, each with the batch as its first axis.
    """

    def see(self, support_feats: Features, support_masks: Tensor) -> Any:
        """What is remembered of the supports, computed once for any number of queries.

        Args:
            support_feats: layer -> list of (B, K, C, h, w).
            support_masks: (B, K, H, W), 0 or 1, any dtype.
        """
        return Support(support_feats, support_masks)

    @abstractmethod
    def segment(self, query_feats: Features, seen: Any, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W), background and foreground.

        Args:
            query_feats: layer -> list of (B, C, h, w).
            seen: of the same B episodes.
            size: H, W of the query image.
        """

    def mask(self, query_feats: Features, seen: Any, size: tuple[int, int]) -> Tensor:
        """The answer as a mask, (B, H, W) bool; by default the larger logit. Arguments as those of `segment`."""
        return self.segment(query_feats, seen, size).argmax(dim=1).bool()

    def forward(self, query_feats: Features, support_feats: Features, support_masks: Tensor) -> Tensor:
        """Logits (B, 2, H, W) at the masks' size; arguments as those of `see` and `segment`."""
        return self.segment(query_feats, self.see(support_feats, support_masks), size_of(support_masks))

    def predict(self, query_feats: Features, support_feats: Features, support_masks: Tensor) -> Tensor:
        """The mask (B, H, W) bool at the masks' size, for any number of shots."""
        return self.mask(query_feats, self.see(support_feats, support_masks), size_of(support_masks))

    def loss(
        self,
        query_feats: Features,
        support_feats: Features,
        support_masks: Tensor,
        query_mask: Tensor,
        criterion: Criterion,
    ) -> Tensor:
        """The training loss, a scalar; by default the criterion of the logits.

        Args:
            query_mask: (B, H, W): 1, 0, or 255 = ignore.
            criterion: the chosen loss of logits and masks.
        """
        return scored(criterion, self(query_feats, support_feats, support_masks), query_mask)

    @property
    def head(self) -> Self:
        """Itself: a head without a backbone is used as that of a method, `released.head(...)`."""
        return self


class Method(nn.Module):
    """A backbone and a head: segments queries by their supports.

    Args:
        backbone: frozen here, but for the parts named in `learned_layers`.
        head: see `Head`.

    Attributes:
        query_reads, support_reads: layer -> "all" or "last", the blocks whose features the head takes.
        side_multiple: image sides are multiples of it.
        learned_layers: parts of the backbone's trunk that are trained, and saved in checkpoints.
        batchnorm: how the frozen backbone's BatchNorm behaves in training: by its stored statistics ("eval"), or by
            those of the batch, which change the stored ones ("train", as the PFENet family's programs do).
        ignored: what pixels marked 255 are in the training loss: "ignore", or "background" as in HSNet's family.
    """

    query_reads: Reads
    support_reads: Reads
    side_multiple: ClassVar[int] = 32
    learned_layers: tuple[str, ...] = ()
    batchnorm: Literal["eval", "train"] = "eval"
    ignored: Literal["ignore", "background"] = "ignore"

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone.freeze(but=self.learned_layers).to(memory_format=torch.channels_last)
        self.head = head

    # Segmenting

    def forward(self, query: Tensor, support: Tensor, support_masks: Tensor) -> Tensor:
        """
        Args:
            query: (B, 3, H, W): uint8 in 0..255, or float already normalised with ImageNet's mean and std.
            support: (B, K, 3, H, W), likewise.
            support_masks: (B, K, H, W), 0 or 1, any dtype.

        Returns:
            Logits (B, 2, H, W): background, foreground.

        Raises:
            ValueError: a side that the method does not take, or shapes that do not belong together.
        """
        self.check(query, support, support_masks)
        return self.head(*self.features(query, support, support_masks), support_masks)

    def predict(self, query: Tensor, support: Tensor, support_masks: Tensor) -> Tensor:
        """The mask (B, H, W) bool; arguments as those of `forward`."""
        self.check(query, support, support_masks)
        return self.head.predict(*self.features(query, support, support_masks), support_masks)

    def see(self, support: Tensor, support_masks: Tensor) -> Any:
        """What is remembered of supports, computed once for `segment` and `mask`; arguments as those of `forward`."""
        self.check(None, support, support_masks)
        passed = self.backbone_pass(support.flatten(0, 1), self.support_reads)
        return self.head.see(self.of_supports(passed, support, support_masks), support_masks)

    def segment(self, query: Tensor, seen: Any) -> Tensor:
        """Logits (B, 2, H, W), by supports that were seen before.

        Args:
            query: (B, 3, H, W); as many as the supports' episodes, unless that is one.
            seen: what `see` returned.
        """
        return self.head.segment(*self.met(query, seen), size_of(query))

    def mask(self, query: Tensor, seen: Any) -> Tensor:
        """The mask (B, H, W) bool, by supports that were seen before; arguments as those of `segment`."""
        return self.head.mask(*self.met(query, seen), size_of(query))

    def met(self, query: Tensor, seen: Any) -> tuple[Features, Any]:
        """Features of the queries, and what was seen of the supports, for as many episodes."""
        self.check_sides(size_of(query))
        return self.backbone_pass(query, self.query_reads), repeated(seen, len(query))

    # Training

    def loss(self, episode: "Episode", criterion: Criterion) -> Tensor:
        """The training loss of a batch of episodes, a scalar."""
        masks = episode.query_mask
        if self.ignored == "background":
            masks = masks.masked_fill(masks == IGNORE, 0)
        feats = self.features(episode.query, episode.support, episode.support_masks)
        return self.head.loss(*feats, episode.support_masks, masks, criterion)

    def learned(self) -> list[Any]:
        """Parameters, or groups of them, for the optimiser; none where the method learns nothing."""
        return [p for p in self.parameters() if p.requires_grad]

    def saved(self) -> set[str]:
        """Names of the tensors that a checkpoint holds: all but those of the frozen backbone."""
        frozen = {f"backbone.{name}" for name in self.backbone.frozen_names()}
        return set(self.state_dict()) - frozen

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.batchnorm == "train":
            self.backbone.train_batchnorm(mode)
        return self

    # Features

    @property
    def reads(self) -> Reads:
        """The blocks to compute where queries and supports pass through the backbone together."""
        return union(self.query_reads, self.support_reads)

    def features(self, query: Tensor, support: Tensor, support_masks: Tensor) -> tuple[Features, Features]:
        """Those of the queries and of the supports that the head takes; arguments as those of `forward`."""
        return self.chosen(*self.passes(query, support, self.reads), support, support_masks)

    def passes(self, query: Tensor, support: Tensor, reads: Reads) -> tuple[Features, Features]:
        """The backbone's features of B queries and of B * K supports, in one pass where their sizes are equal."""
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
        """Of what passed through the backbone, perhaps for other methods too, what this head takes."""
        return pick(query_feats, self.query_reads), self.of_supports(support_feats, support, support_masks)

    def of_supports(self, support_feats: Features, support: Tensor, support_masks: Tensor) -> Features:
        """The supports' features with the axis of shots, (B, K, C, h, w).

        A method that lets supports pass through the backbone in another way as well does it here.
        """
        chosen = pick(support_feats, self.support_reads)
        return {layer: [f.unflatten(0, support.shape[:2]) for f in blocks] for layer, blocks in chosen.items()}

    def backbone_pass(self, images: Tensor, reads: Reads) -> Features:
        with torch.set_grad_enabled(bool(self.learned_layers) and torch.is_grad_enabled()):
            return self.backbone(images, reads)

    # What a method takes

    def check_sides(self, size: tuple[int, int]) -> None:
        """Raises SettingError for sides that the method does not take."""
        if any(side % self.side_multiple for side in size):
            raise SettingError(
                f"{type(self).__name__} takes image sides that are multiples of {self.side_multiple}, not "
                f"{size[0]}x{size[1]}: choose episodes.image_size, or resize the images."
            )

    def check_shots(self, shots: int) -> None:
        """Raises SettingError for a number of supports that the method does not take; by default it takes any."""

    def check(self, query: Tensor | None, support: Tensor, support_masks: Tensor) -> None:
        """Raises SettingError, or ValueError where shapes do not belong together."""
        B, K = support.shape[:2]
        if support_masks.shape[:2] != (B, K) or (query is not None and len(query) != B):
            raise ValueError(
                "want query (B,3,H,W), support (B,K,3,H,W), masks (B,K,H,W), got "
                f"{tuple(query.shape) if query is not None else None}, {tuple(support.shape)}, "
                f"{tuple(support_masks.shape)}"
            )
        for images in (support, *(() if query is None else (query,))):
            self.check_sides(size_of(images))
        self.check_shots(K)


def size_of(images: Tensor) -> tuple[int, int]:
    """H, W of (..., H, W)."""
    return images.shape[-2], images.shape[-1]


def pick(features: Features, reads: Reads) -> Features:
    """Of features that hold at least what is read, just that."""
    return {layer: features[layer][-1:] if which == "last" else features[layer] for layer, which in reads.items()}


def repeated(seen: Any, B: int) -> Any:
    """What was seen of one episode's supports, for B queries; of B episodes, as it is.

    Raises:
        ValueError: the supports are of another number of episodes.
    """
    if isinstance(seen, Tensor):
        if len(seen) not in (1, B):
            raise ValueError(f"{B} queries do not go with the supports of {len(seen)} episodes")
        return seen.expand(B, *seen.shape[1:])
    if isinstance(seen, Mapping):
        return {name: repeated(value, B) for name, value in seen.items()}
    if isinstance(seen, tuple) and hasattr(seen, "_fields"):
        return type(seen)(*(repeated(value, B) for value in seen))
    if isinstance(seen, (list, tuple)):
        return type(seen)(repeated(value, B) for value in seen)
    return seen


def scored(criterion: Criterion, logits: Tensor, masks: Tensor) -> Tensor:
    """The criterion in float32; 0 where every pixel is marked 255, of which a mean would be no number."""
    masks = masks.long()
    return criterion(logits.float(), masks) if (masks != IGNORE).any() else 0 * logits.float().sum()


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) -> (N, C, H, W); bilinear, corners aligned, as all these methods resize features and masks."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)
