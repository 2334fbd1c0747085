"""PFENet: a training-free prior mask, and a pyramid whose coarse scales learn from the fine ones.

Tian et al., "Prior Guided Feature Enrichment Network for Few-Shot Segmentation", TPAMI 2020. Published program:
github.com/dvlab-research/PFENet at a505675, no licence; this code was written from a description of it.

The prior mask is the similarity of each query position's deep features to those of the support's object. At four
scales, the network merges the query's middle features, the mean feature of the support's object and the prior mask;
each scale passes its result on to the next. ASGNet, SCL and NTRENet use the same pyramid.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones import Backbone, Features, Reads
from pmnet.errors import SettingError
from pmnet.methods.base import Criterion, Head, Method, resize, scored, size_of
from pmnet.methods.pooling import masked_mean
from pmnet.methods.release import filled, inputs, of_head

WIDTH = 256
BINS = (60, 30, 15, 8)
EPS = 0.0005  # of the masked means
PRIOR_EPS = 1e-7


class Enriched(NamedTuple):
    """The output of the pyramid for N feature maps.

    Attributes:
        logits: (N, 2, h, w).
        inner: for each scale, logits (N, 2, b, b).
        kept: for each scale, features (N, 256, h, w).
    """

    logits: Tensor
    inner: list[Tensor]
    kept: list[Tensor]


class PyramidHead(Head):
    """The pyramid, with the authors' names of layers. A subclass computes its input at each scale.

    Args:
        bins: side of each scale: a number of positions, or, if at most 1, a fraction of the feature map's height.
    """

    def __init__(self, bins: Sequence[float] = BINS) -> None:
        super().__init__()
        self.bins = tuple(bins)
        scales = range(len(self.bins))
        self.alpha_conv = nn.ModuleList(pointwise(2 * WIDTH) for _ in scales[1:])
        self.beta_conv = nn.ModuleList(residual() for _ in scales)
        self.inner_cls = nn.ModuleList(classifier() for _ in scales)
        self.res1 = pointwise(len(self.bins) * WIDTH)
        self.res2 = residual()
        self.cls = classifier()

    def sides(self, map_: Tensor) -> list[int]:
        """The side of each scale, for feature maps (..., h, w)."""
        return [int(bin_ * map_.shape[-2]) if bin_ <= 1 else int(bin_) for bin_ in self.bins]

    def pooled(self, map_: Tensor) -> list[Tensor]:
        """A feature map at each scale, larger ones included."""
        return [F.adaptive_avg_pool2d(map_, side) for side in self.sides(map_)]

    def enriched(
        self, merged: Sequence[Tensor], size: tuple[int, int], earlier: Sequence[Tensor] | None = None
    ) -> Enriched:
        """Runs the pyramid.

        Args:
            merged: for each scale, (N, 256, b, b).
            size: h, w of the feature map.
            earlier: `kept` of another pass, from which the scales learn instead of from one another.
        """
        inner: list[Tensor] = []
        kept: list[Tensor] = []
        for i, x in enumerate(merged):
            if i > 0:
                finer = resize((kept if earlier is None else earlier)[i - 1], size_of(x))
                x = x + self.alpha_conv[i - 1](torch.cat([x, finer], dim=1))
            x = x + self.beta_conv[i](x)
            inner.append(self.inner_cls[i](x))
            kept.append(resize(x, size))
        f = self.res1(torch.cat(kept, dim=1))
        f = f + self.res2(f)
        return Enriched(self.cls(f), inner, kept)


def pointwise(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, WIDTH, 1, bias=False), nn.ReLU())


def residual() -> nn.Sequential:
    first, second = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def classifier() -> nn.Sequential:
    feature = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
    return nn.Sequential(feature, nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(WIDTH, 2, 1))


def spread(vector_NC: Tensor, like: Tensor) -> Tensor:
    """The same vector at every position of a map, (N, C, h, w)."""
    return vector_NC[..., None, None].expand(-1, -1, *size_of(like))


def supervised(out: Enriched, masks: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """The criterion of the logits, and the mean of the criterion over the scales."""
    size = size_of(masks)
    main, *inner = (scored(criterion, resize(logits, size), masks) for logits in (out.logits, *out.inner))
    return main, torch.stack(inner).mean()


# PFENet


class Seen(NamedTuple):
    """What the head keeps of the supports of B episodes.

    Attributes:
        prototype: (B, 256), the mean over the shots.
        deep: (B, K, C, hs, ws), layer4 features of the object, 0 elsewhere.
    """

    prototype: Tensor
    deep: Tensor


class PFENetHead(PyramidHead):
    """The learned part of PFENet.

    Args:
        middle_channels: channels of layer2 and layer3 together.
        bins: see `PyramidHead`.
    """

    def __init__(self, middle_channels: int, bins: Sequence[float] = BINS) -> None:
        super().__init__(bins)
        self.down_query = reduction(middle_channels)
        self.down_supp = reduction(middle_channels)
        self.init_merge = nn.ModuleList(pointwise(2 * WIDTH + 1) for _ in self.bins)

    def see(self, support_feats: Features, support_masks: Tensor) -> Seen:
        """Computes prototypes and masked deep features.

        Args:
            support_feats: "layer2", "layer3", and "layer4_masked", the output of layer4 for masked layer3 features.
            support_masks: (B, K, H, W), 0 or 1.
        """
        B, K = support_masks.shape[:2]
        support_NChw = self.down_supp(middle(flat(support_feats)))
        mask_BKhw = mask_at(support_masks, support_NChw)
        prototype_NC = masked_mean(support_NChw, mask_BKhw.flatten(0, 1), EPS)
        return Seen(prototype_NC.unflatten(0, (B, K)).mean(dim=1), masked_deep(support_feats, support_masks))

    def segment(self, query_feats: Features, seen: Seen, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W), from "layer2", "layer3" and "layer4" of the query."""
        return resize(self.outputs(query_feats, seen).logits, size)

    def outputs(self, query_feats: Features, seen: Seen) -> Enriched:
        query_BChw = self.down_query(middle(query_feats))
        prior_B1hw = prior_mask(query_feats["layer4"][-1], seen.deep).mean(dim=1, keepdim=True)
        merged = [
            merge(torch.cat([q, spread(seen.prototype, q), resize(prior_B1hw, size_of(q))], dim=1))
            for merge, q in zip(self.init_merge, self.pooled(query_BChw), strict=True)
        ]
        return self.enriched(merged, size_of(query_BChw))

    def loss(
        self,
        query_feats: Features,
        support_feats: Features,
        support_masks: Tensor,
        query_mask: Tensor,
        criterion: Criterion,
    ) -> Tensor:
        """The criterion of the logits, plus the mean of the criterion over the scales."""
        out = self.outputs(query_feats, self.see(support_feats, support_masks))
        return torch.stack(supervised(out, query_mask, criterion)).sum()


def reduction(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, WIDTH, 1, bias=False), nn.ReLU(), nn.Dropout2d(0.5))


def middle(feats: Features) -> Tensor:
    """layer3 and layer2 after their last ReLU, (N, C, h, w), at the size of layer3."""
    layer3, layer2 = F.relu(feats["layer3"][-1]), F.relu(feats["layer2"][-1])
    return torch.cat([layer3, resize(layer2, size_of(layer3))], dim=1)


def flat(support_feats: Features) -> Features:
    """Merges the axes of batch and shots: (B, K, ...) -> (B * K, ...)."""
    return {layer: [f.flatten(0, 1) for f in blocks] for layer, blocks in support_feats.items()}


def mask_at(masks_BKHW: Tensor, map_: Tensor) -> Tensor:
    """The masks at the size of a feature map, (B, K, h, w) in [0, 1]; exactly 0 or 1 if H = s * (h - 1) + 1."""
    return resize((masks_BKHW == 1).to(map_.dtype), size_of(map_))


def masked_deep(support_feats: Features, support_masks: Tensor) -> Tensor:
    """layer4 features of the supports' objects, (B, K, C, hs, ws), 0 elsewhere."""
    deep_BKChw = F.relu(support_feats["layer4_masked"][-1])
    return deep_BKChw * mask_at(support_masks, deep_BKChw)[:, :, None]


@torch.no_grad()
def prior_mask(query_BChw: Tensor, deep_BKChw: Tensor) -> Tensor:
    """The largest cosine similarity of each query position with a position of each support's object, (B, K, h, w),
    scaled to [0, 1] per query and shot."""
    unit_BCQ = F.normalize(F.relu(query_BChw).flatten(2), dim=1)
    shots = []
    for deep_BChw in deep_BKChw.unbind(1):  # one at a time: each needs memory for all pairs of positions
        unit_BSC = F.normalize(deep_BChw.flatten(2), dim=1).transpose(1, 2)  # masked positions stay 0
        best_BQ = (unit_BSC @ unit_BCQ).amax(dim=1)
        low, high = best_BQ.amin(dim=1, keepdim=True), best_BQ.amax(dim=1, keepdim=True)
        shots.append((best_BQ - low) / (high - low + PRIOR_EPS))
    return torch.stack(shots, dim=1).unflatten(2, size_of(query_BChw))


class PFENet(Method):
    """Supports any number of shots. Image sides must be 8n + 1, which puts a feature position on every eighth pixel.

    Args:
        backbone: a convolutional network; published: `DilatedResNetBackbone`.
        bins: see `PyramidHead`.
        batchnorm: how the frozen backbone's BatchNorm layers work in training: "train", as published, uses the batch's
            statistics and updates the stored ones; "eval" uses the stored ones.

    Raises:
        SettingError: the backbone is a transformer.

    Example:
        >>> import torch
        >>> from pmnet.backbones.dilated import DilatedResNetBackbone
        >>> from pmnet.methods.pfenet import PFENet
        >>> method = PFENet(DilatedResNetBackbone("resnet50s", "none")).eval()
        >>> method.predict(torch.rand(1, 3, 65, 65), torch.rand(1, 5, 3, 65, 65), torch.ones(1, 5, 65, 65)).shape
        torch.Size([1, 65, 65])
    """

    protocol = "pfenet"
    query_reads: Reads = {"layer2": "last", "layer3": "last", "layer4": "last"}
    support_reads: Reads = {"layer2": "last", "layer3": "last"}
    side_multiple, side_offset = 8, 1
    head_type: ClassVar[Any] = PFENetHead

    def __init__(
        self, backbone: Backbone, bins: Sequence[float] = BINS, batchnorm: Literal["train", "eval"] = "train"
    ) -> None:
        if hasattr(backbone.trunk, "patch_embed"):
            raise SettingError(
                f"{type(self).__name__} takes a convolutional backbone, not {backbone.provenance.backbone}: it masks "
                "feature maps within the backbone and needs image sides of 8n + 1. Choose backbone=resnet50s (as "
                "published), resnet50, vgg16 or efficientnet_lite0."
            )
        channels = backbone.channels
        super().__init__(backbone, self.head_type(channels["layer2"] + channels["layer3"], bins))
        self.batchnorm = batchnorm

    def features(self, query: Tensor, support: Tensor, support_masks: Tensor) -> tuple[Features, Features]:
        """Passes queries and supports separately: each have their own batch statistics, and supports skip layer4."""
        query_feats = self.backbone_pass(query, self.query_reads)
        support_feats = self.backbone_pass(support.flatten(0, 1), self.support_reads)
        return self.chosen(query_feats, support_feats, support, support_masks)

    def of_supports(self, support_feats: Features, support: Tensor, support_masks: Tensor) -> Features:
        """Adds "layer4_masked", the output of layer4 for masked layer3 features."""
        layer3 = self.backbone.activated(support_feats["layer3"][-1])
        mask_N1hw = mask_at(support_masks, layer3).flatten(0, 1)[:, None]
        with torch.no_grad():
            blocks, _ = self.backbone.stage("layer4", layer3 * mask_N1hw)
        deep = blocks[-1].unflatten(0, support.shape[:2])
        return super().of_supports(support_feats, support, support_masks) | {"layer4_masked": [deep]}


def from_release(state_dict: Mapping[str, Tensor], bins: Sequence[float] = BINS) -> PFENetHead:
    """Builds the head from the tensors of the authors' program.

    Args:
        state_dict: a checkpoint; the backbone's tensors are ignored.
        bins: see `PyramidHead`.

    Returns:
        The head in eval mode.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state = of_head(state_dict)
    return filled(PFENetHead(inputs(state, "down_query.0.weight"), bins), state)
