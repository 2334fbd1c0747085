"""SCL on PFENet: two prototypes, one for the part of the support's object that the network finds, one for the rest.

Zhang, Xiao, Qin, "Self-Guided and Cross-Guided Learning for Few-Shot Segmentation", CVPR 2021. Published program:
github.com/zbf1991/SCL at 872233a, folder SCL_PFENet, no licence; this code was written from a description of it.

PFENet's pyramid first segments the support with its own mean feature, which splits its object in two: self-guidance.
With several shots, each gives an answer of its own, weighted by how well its prototypes segment all supports:
cross-guidance.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pmnet.backbones import Features
from pmnet.errors import SettingError
from pmnet.methods.base import Criterion, resize, size_of
from pmnet.methods.pfenet import (
    BINS,
    EPS,
    WIDTH,
    Enriched,
    PFENet,
    PyramidHead,
    flat,
    mask_at,
    masked_deep,
    middle,
    pointwise,
    prior_mask,
    reduction,
    spread,
    supervised,
)
from pmnet.methods.pooling import masked_mean
from pmnet.methods.release import filled, inputs, of_head

SHARE = 5  # divides the weighted sum over the shots, for any number of them


class Seen(NamedTuple):
    """What the head keeps of the supports of B episodes.

    Attributes:
        primary: (B, K, 256), the prototype of the part of each object that is found.
        auxiliary: (B, K, 256), the prototype of the part that is missed.
        deep: (B, K, C, hs, ws), layer4 features of the object, 0 elsewhere.
        weight: (B, K), the weight of each shot's logits.
    """

    primary: Tensor
    auxiliary: Tensor
    deep: Tensor
    weight: Tensor


class Guided(NamedTuple):
    """N supports segmented with their own mean features, and the resulting prototypes.

    Attributes:
        feature: (N, 256, h, w).
        out: the pyramid's output.
        primary: (N, 256).
        auxiliary: (N, 256).
    """

    feature: Tensor
    out: Enriched
    primary: Tensor
    auxiliary: Tensor


class SCLHead(PyramidHead):
    """The learned part of SCL.

    Args:
        middle_channels: channels of layer2 and layer3 together.
        bins: see `PyramidHead`.
    """

    def __init__(self, middle_channels: int, bins: Sequence[float] = BINS) -> None:
        super().__init__(bins)
        self.down_query = reduction(middle_channels)
        self.down_supp = reduction(middle_channels)
        self.supp_init_merge = nn.ModuleList(pointwise(3 * WIDTH) for _ in self.bins)
        self.init_merge = nn.ModuleList(pointwise(3 * WIDTH + 1) for _ in self.bins)

    # Supports

    def see(self, support_feats: Features, support_masks: Tensor) -> Seen:
        """Segments each support, and computes two prototypes and the weight of each.

        Args:
            support_feats: "layer2", "layer3", and "layer4_masked", the output of layer4 for masked layer3 features.
            support_masks: (B, K, H, W), 0 or 1.
        """
        guided = self.self_guided(support_feats, support_masks)
        return self.remembered(guided, support_feats, support_masks)

    def remembered(self, guided: Guided, support_feats: Features, support_masks: Tensor) -> Seen:
        B, K = support_masks.shape[:2]
        primary, auxiliary = (vector.unflatten(0, (B, K)) for vector in (guided.primary, guided.auxiliary))
        deep = masked_deep(support_feats, support_masks)
        weight = self.weights(guided, support_masks) if K > 1 else torch.ones_like(primary[..., 0])
        return Seen(primary, auxiliary, deep, weight)

    def self_guided(self, support_feats: Features, support_masks: Tensor) -> Guided:
        """Segments each support with its object's mean feature; computes prototypes of the parts found and missed."""
        feature_NChw = self.down_supp(middle(flat(support_feats)))
        mask_Nhw = mask_at(support_masks, feature_NChw).flatten(0, 1)
        mean_NC = masked_mean(feature_NChw, mask_Nhw, EPS)
        out = self.of_support(feature_NChw, mean_NC, mean_NC)
        found_Nhw = out.logits.argmax(dim=1) == 1
        parts = ((mask_Nhw == 1) & found_Nhw, (mask_Nhw == 1) & ~found_Nhw)  # soft edges are in neither
        return Guided(feature_NChw, out, *(masked_mean(feature_NChw, part, EPS) for part in parts))

    def of_support(
        self, feature_NChw: Tensor, primary_NC: Tensor, auxiliary_NC: Tensor, earlier: Sequence[Tensor] | None = None
    ) -> Enriched:
        merged = [
            merge(torch.cat([f, spread(primary_NC, f), spread(auxiliary_NC, f)], dim=1))
            for merge, f in zip(self.supp_init_merge, self.pooled(feature_NChw), strict=True)
        ]
        return self.enriched(merged, size_of(feature_NChw), earlier)

    def weights(self, guided: Guided, support_masks: Tensor) -> Tensor:
        """How well each shot's prototypes segment all supports, (B, K): the mean IoU, divided by 5."""
        B, K = support_masks.shape[:2]
        mask_BKHW = support_masks == 1
        scores = []
        for k in range(K):
            primary, auxiliary = (
                vector.unflatten(0, (B, K))[:, k : k + 1].expand(-1, K, -1).flatten(0, 1)
                for vector in (guided.primary, guided.auxiliary)
            )
            out = self.of_support(guided.feature, primary, auxiliary, guided.out.kept)
            pred_NHW = resize(out.logits, size_of(support_masks)).argmax(dim=1) == 1
            scores.append(mean_iou(pred_NHW.unflatten(0, (B, K)), mask_BKHW).mean(dim=1))
        return torch.stack(scores, dim=1) / SHARE

    # Queries

    def segment(self, query_feats: Features, seen: Seen, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W), from "layer2", "layer3" and "layer4" of the query; a weighted sum over the shots."""
        logits_BK2hw = self.outputs(query_feats, seen).logits.unflatten(0, seen.weight.shape)
        return resize(torch.einsum("bkchw,bk->bchw", logits_BK2hw, seen.weight), size)

    def outputs(self, query_feats: Features, seen: Seen) -> Enriched:
        """The pyramid's output for each shot separately; first axis B * K."""
        K = seen.weight.shape[1]
        query_BChw = self.down_query(middle(query_feats))
        prior_N1hw = prior_mask(query_feats["layer4"][-1], seen.deep).flatten(0, 1)[:, None]
        merged = []
        for merge, pooled in zip(self.init_merge, self.pooled(query_BChw), strict=True):
            q = pooled.repeat_interleave(K, dim=0)
            primary, auxiliary = (spread(vector.flatten(0, 1), q) for vector in (seen.primary, seen.auxiliary))
            merged.append(merge(torch.cat([q, primary, auxiliary, resize(prior_N1hw, size_of(q))], dim=1)))
        return self.enriched(merged, size_of(query_BChw))

    def loss(
        self,
        query_feats: Features,
        support_feats: Features,
        support_masks: Tensor,
        query_mask: Tensor,
        criterion: Criterion,
    ) -> Tensor:
        """The criterion of the query, of the support segmented with its mean feature, and of the support segmented with
        its two prototypes; for each, plus the mean of the criterion over the scales."""
        if support_masks.shape[1] != 1:
            raise SettingError("SCL trains on 1-shot episodes; the same weights answer any shots. Set train_shot=1.")
        guided = self.self_guided(support_feats, support_masks)
        query = self.outputs(query_feats, self.remembered(guided, support_feats, support_masks))
        again = self.of_support(guided.feature, guided.primary, guided.auxiliary, guided.out.kept)
        support_mask = support_masks.flatten(0, 1)
        parts = (
            *supervised(query, query_mask, criterion),
            *supervised(guided.out, support_mask, criterion),
            *supervised(again, support_mask, criterion),
        )
        return torch.stack(parts).sum()


def mean_iou(pred: Tensor, truth: Tensor) -> Tensor:
    """The mean of foreground and background IoU of masks (..., H, W) bool; the IoU is 0 if the union is empty."""
    sides = ((pred, truth), (~pred, ~truth))
    ious = ((p & t).sum((-2, -1)) / (p | t).sum((-2, -1)).clamp(min=1) for p, t in sides)
    return torch.stack(list(ious)).mean(dim=0)


class SCL(PFENet):
    """Supports any number of shots at test, and trains with one. Image sides must be 8n + 1, which puts a feature
    position on every eighth pixel. K shots take K forward passes of the head per query, and K * K once per support set.

    Args:
        backbone: a convolutional network; published: `DilatedResNetBackbone`.
        bins: see `PyramidHead`.
        batchnorm: how the frozen backbone's BatchNorm layers work in training: "train", as published, uses the batch's
            statistics and updates the stored ones; "eval" uses the stored ones.

    Example:
        >>> import torch
        >>> from pmnet.backbones.dilated import DilatedResNetBackbone
        >>> from pmnet.methods.scl import SCL
        >>> method = SCL(DilatedResNetBackbone("resnet50s", "none")).eval()
        >>> method.predict(torch.rand(1, 3, 65, 65), torch.rand(1, 2, 3, 65, 65), torch.ones(1, 2, 65, 65)).shape
        torch.Size([1, 65, 65])
    """

    head_type: ClassVar[Any] = SCLHead


def from_release(state_dict: Mapping[str, Tensor], bins: Sequence[float] = BINS) -> SCLHead:
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
    return filled(SCLHead(inputs(state, "down_query.0.weight"), bins), state)
