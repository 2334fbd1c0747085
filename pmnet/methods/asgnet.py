"""ASGNet: superpixels of the support's object as prototypes; each query position uses the most similar one.

Li et al., "Adaptive Prototype Learning and Allocation for Few-Shot Segmentation", CVPR 2021. Published program:
github.com/Reagan1311/ASGNet at cd898c5, no licence; this code was written from a description of it.

Each support's object gets up to five seeds, depending on its area, far from its edge and from one another. Clustering
starts from the seeds, and the cluster centres are the prototypes. The query's features, the prototype allocated to each
position and a map of all similarities pass through PFENet's pyramid.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones import Features
from pmnet.methods.base import Criterion, Method, resize, size_of
from pmnet.methods.pfenet import (
    BINS,
    EPS,
    WIDTH,
    Enriched,
    PFENet,
    PyramidHead,
    flat,
    mask_at,
    middle,
    pointwise,
    supervised,
)
from pmnet.methods.pooling import masked_mean
from pmnet.methods.release import filled, inputs, of_head

MOST = 5  # seeds of a support
AREA = 100  # positions per seed
TRAIN_ROUNDS, TEST_ROUNDS = 10, 5
NEARNESS = 0.1  # weight of distances in the map, relative to distances of features


class Seen(NamedTuple):
    """The prototypes of B episodes.

    Attributes:
        prototypes: (B, P, 256), up to five per shot; P = 5 * K.
        used: (B, P) bool, False for padding.
    """

    prototypes: Tensor
    used: Tensor


class ASGNetHead(PyramidHead):
    """The learned part of ASGNet.

    Args:
        middle_channels: channels of layer2 and layer3 together.
        bins: see `PyramidHead`.
    """

    def __init__(self, middle_channels: int, bins: Sequence[float] = BINS) -> None:
        super().__init__(bins)
        self.down_conv = nn.Sequential(nn.Conv2d(middle_channels, WIDTH, 1, bias=False), nn.Dropout2d(0.5))
        self.corr_conv = nn.ModuleList(pointwise(2 * WIDTH + 1) for _ in self.bins)

    def see(self, support_feats: Features, support_masks: Tensor) -> Seen:
        """Computes the prototypes of each support.

        Args:
            support_feats: "layer2" and "layer3".
            support_masks: (B, K, H, W), 0 or 1.
        """
        B, K = support_masks.shape[:2]
        support_NChw = self.down_conv(middle(flat(support_feats)))
        mask_Nhw = mask_at(support_masks, support_NChw).flatten(0, 1)
        rounds = TRAIN_ROUNDS if self.training else TEST_ROUNDS
        found = [
            prototypes(feature, mask, seeds(small_mask(full, size_of(mask))), rounds)
            for feature, mask, full in zip(support_NChw, mask_Nhw, support_masks.flatten(0, 1), strict=True)
        ]
        padded_NPC = torch.stack([F.pad(p_nC, (0, 0, 0, MOST - len(p_nC))) for p_nC in found])
        count_N = torch.tensor([len(p_nC) for p_nC in found], device=padded_NPC.device)
        used_NP = torch.arange(MOST, device=padded_NPC.device) < count_N[:, None]
        return Seen(padded_NPC.unflatten(0, (B, K)).flatten(1, 2), used_NP.unflatten(0, (B, K)).flatten(1, 2))

    def segment(self, query_feats: Features, seen: Seen, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W), from "layer2" and "layer3" of the query."""
        return resize(self.outputs(query_feats, seen).logits, size)

    def outputs(self, query_feats: Features, seen: Seen) -> Enriched:
        query_BChw = self.down_conv(middle(query_feats))
        guide_BChw, map_B1hw = allocated(query_BChw, seen)
        guided = self.pooled(torch.cat([query_BChw, guide_BChw], dim=1))
        merged = [
            merge(torch.cat([g, resize(map_B1hw, size_of(g))], dim=1))
            for merge, g in zip(self.corr_conv, guided, strict=True)
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


def small_mask(mask_HW: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask's top left pixel of each position of a feature map, (h, w) bool."""
    (h, w), (H, W) = size, size_of(mask_HW)
    rows, columns = (torch.arange(n, device=mask_HW.device) * N // n for n, N in ((h, H), (w, W)))
    return (mask_HW == 1)[rows[:, None], columns]


def seeds(mask_hw: Tensor) -> Tensor:
    """Rows and columns (n, 2) of up to five positions of an object, each as far as possible from the object's edge and
    from the previous seeds. A small object has none.

    The edge is made of the other positions in the object's bounding box; if there are none, of those around the box.
    """
    inside_N2 = mask_hw.nonzero()
    n = min(round(len(inside_N2) / AREA), MOST)
    if n <= 1:
        return inside_N2[:0]
    (top, left), (bottom, right) = inside_N2.amin(0).tolist(), inside_N2.amax(0).tolist()
    box = mask_hw[top : bottom + 1, left : right + 1]
    if box.all():
        box, top, left = F.pad(box, (1, 1, 1, 1)), top - 1, left - 1
    outside_M2 = (~box).nonzero() + torch.tensor([top, left], device=mask_hw.device)
    distance_N = (inside_N2[:, None] - outside_M2).square().sum(2).amin(1)  # squared, so integers: ties are exact
    chosen = []
    for _ in range(n):
        first = int((distance_N == distance_N.amax()).nonzero()[0])
        chosen.append(first)
        distance_N = distance_N.minimum((inside_N2 - inside_N2[first]).square().sum(1))
    return inside_N2[chosen]


def prototypes(feature_Chw: Tensor, mask_hw: Tensor, seeds_n2: Tensor, rounds: int) -> Tensor:
    """The prototypes of one support, (n, C): cluster centres, or the object's mean feature if there are no seeds.

    Args:
        feature_Chw: its features.
        mask_hw: in [0, 1]; only positions with exactly 1 are clustered.
        seeds_n2: the output of `seeds`.
        rounds: number of iterations.
    """
    inside = mask_hw == 1
    if not len(seeds_n2) or not inside.any():
        return masked_mean(feature_Chw[None], mask_hw[None], EPS)
    with torch.no_grad():
        grid = torch.stack(torch.meshgrid(*(torch.arange(n).to(feature_Chw) for n in size_of(mask_hw)), indexing="ij"))
        placed_Dhw = torch.cat([feature_Chw, NEARNESS * grid])
        pixels_SD = placed_Dhw[:, inside].T
        centres_nD = placed_Dhw[:, *seeds_n2.T].T
        for _ in range(rounds):
            distance_nS = torch.cdist(centres_nD, pixels_SD, compute_mode="donot_use_mm_for_euclid_dist")
            centres_nD = (-distance_nS).softmax(dim=1) @ pixels_SD  # centres do not compete for pixels
    return centres_nD[:, : len(feature_Chw)]


def allocated(query_BChw: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    """The most similar prototype of each query position (B, C, h, w), and the sum of all similarities (B, 1, h, w)."""
    size = size_of(query_BChw)
    cosine_BPQ = F.normalize(seen.prototypes, dim=2) @ F.normalize(query_BChw.flatten(2), dim=1)
    unused_BP1 = ~seen.used[:, :, None]
    best_BQ = cosine_BPQ.masked_fill(unused_BP1, -torch.inf).argmax(dim=1)
    guide_BQC = seen.prototypes.gather(1, best_BQ[:, :, None].expand(-1, -1, query_BChw.shape[1]))
    map_B1Q = cosine_BPQ.masked_fill(unused_BP1, 0).sum(dim=1, keepdim=True)
    return guide_BQC.transpose(1, 2).unflatten(2, size), map_B1Q.unflatten(2, size)


class ASGNet(PFENet):
    """Supports any number of shots. Image sides must be 8n + 1, which puts a feature position on every eighth pixel.

    Args:
        backbone: published: `DilatedResNetBackbone`.
        bins: see `PyramidHead`.
        batchnorm: how the frozen backbone's BatchNorm layers work in training: "train", as published, uses the batch's
            statistics and updates the stored ones; "eval" uses the stored ones.

    Example:
        >>> import torch
        >>> from pmnet.backbones.dilated import DilatedResNetBackbone
        >>> from pmnet.methods.asgnet import ASGNet
        >>> method = ASGNet(DilatedResNetBackbone("resnet50s", "none")).eval()
        >>> method.predict(torch.rand(1, 3, 65, 65), torch.rand(1, 5, 3, 65, 65), torch.ones(1, 5, 65, 65)).shape
        torch.Size([1, 65, 65])
    """

    query_reads = support_reads = {"layer2": "last", "layer3": "last"}
    head_type: ClassVar[Any] = ASGNetHead

    def of_supports(self, support_feats: Features, support: Tensor, support_masks: Tensor) -> Features:
        return Method.of_supports(self, support_feats, support, support_masks)  # without layer4


def from_release(state_dict: Mapping[str, Tensor], bins: Sequence[float] = BINS) -> ASGNetHead:
    """Builds the head from the tensors of the authors' program.

    Args:
        state_dict: a checkpoint of the network with the pyramid; the backbone's tensors are ignored.
        bins: see `PyramidHead`.

    Returns:
        The head in eval mode.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state = of_head(state_dict)
    return filled(ASGNetHead(inputs(state, "down_conv.0.weight"), bins), state)
