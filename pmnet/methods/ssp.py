"""SSP: self-support matching, with prototypes from the query itself.

Fan et al., "Self-Support Few-Shot Semantic Segmentation", ECCV 2022. Published program: github.com/fanq15/SSP at
df5bd49, MIT licence; this code was written from a description of it.

The supports' two prototypes give a first answer. Where it is confident, the query's own features become new prototypes,
which fit the query better; those of the background differ from position to position. There are no new layers: layer2
and layer3 of the backbone are trained.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones import Backbone, Features
from pmnet.backbones.dilated import DilatedResNetBackbone, bare, build_trunk, names_of_timm
from pmnet.backbones.weights import Provenance, state_hash
from pmnet.errors import CheckpointError
from pmnet.methods.base import Criterion, Head, Method, resize, scored, size_of
from pmnet.methods.pooling import masked_mean, only
from pmnet.methods.release import filled

EPS = 1e-5
SCALE = 10.0  # of cosines as logits
SHARPNESS = 2.0  # of the attention that makes the adaptive background prototypes
CONFIDENT_FOREGROUND, CONFIDENT_BACKGROUND = 0.7, 0.6  # probabilities above which a position supports its query
FALLBACK = 12  # positions, if none is above


class Prototypes(NamedTuple):
    """Foreground and background of each episode: one vector (B, C, 1, 1), or one per position (B, C, h, w)."""

    foreground: Tensor
    background: Tensor


class SSPHead(Head):
    """Matches features of one stage with prototypes. It has no parameters.

    Args:
        refine: match twice, as in the published results, or once.
    """

    def __init__(self, refine: bool = True) -> None:
        super().__init__()
        self.refine = refine

    def see(self, support_feats: Features, support_masks: Tensor) -> Prototypes:
        """The prototypes of the supports, averaged over the shots."""
        each = prototypes(*supports(support_feats, support_masks))
        B, K = support_masks.shape[:2]
        return Prototypes(*(side.unflatten(0, (B, K)).mean(dim=1) for side in each))

    def segment(self, query_feats: Features, seen: Prototypes, size: tuple[int, int]) -> Tensor:
        return resize(self.answers(only(query_feats), seen)[-1], size)

    def answers(self, query_BChw: Tensor, seen: Prototypes) -> list[Tensor]:
        """Logits (B, 2, h, w) after the first matching and, if `refine`, after the second."""
        out_0 = matched(query_BChw, seen)
        first = self_support(query_BChw, out_0)
        once = Prototypes(0.5 * seen.foreground + 0.5 * first.foreground, first.background)
        out_1 = matched(query_BChw, once)
        if not self.refine:
            return [out_1]
        second = self_support(query_BChw, out_1)
        fg = 0.5 * seen.foreground + 0.2 * once.foreground
        fg = fg + 0.3 * (0.5 * seen.foreground + 0.5 * second.foreground)
        bg = 0.5 * seen.background + 0.2 * once.background + 0.3 * second.background
        return [out_1, 0.7 * matched(query_BChw, Prototypes(fg, bg)) + 0.3 * out_1]

    def loss(
        self,
        query_feats: Features,
        support_feats: Features,
        support_masks: Tensor,
        query_mask: Tensor,
        criterion: Criterion,
    ) -> Tensor:
        """The criterion of each matching, plus that of the query matched with prototypes from its own true mask, plus
        0.2 times that of the supports matched with their own prototypes."""
        query_BChw, size = only(query_feats), size_of(query_mask)
        outputs = self.answers(query_BChw, self.see(support_feats, support_masks))
        outputs.append(matched(query_BChw, prototypes(query_BChw, query_mask)))
        of_query = sum(scored(criterion, resize(out, size), query_mask) for out in outputs)
        feature_NChw, mask_NHW = supports(support_feats, support_masks)
        of_supports = resize(matched(feature_NChw, prototypes(feature_NChw, mask_NHW)), size_of(mask_NHW))
        return of_query + 0.2 * scored(criterion, of_supports, mask_NHW)


def supports(support_feats: Features, support_masks: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B * K, C, h, w) and masks (B * K, H, W) of the supports."""
    return only(support_feats).flatten(0, 1), support_masks.flatten(0, 1)


def prototypes(feature_NChw: Tensor, mask_NHW: Tensor) -> Prototypes:
    """Masked means of the pixels that are 1 and of those that are 0; pixels marked 255 are in neither."""
    size = size_of(feature_NChw)
    sides = ((mask_NHW == side).to(feature_NChw.dtype)[:, None] for side in (1, 0))
    means = (masked_mean(feature_NChw, resize(side, size)[:, 0], EPS) for side in sides)
    return Prototypes(*(mean_NC[..., None, None] for mean_NC in means))


def matched(feature_NChw: Tensor, by: Prototypes) -> Tensor:
    """Logits (N, 2, h, w): cosine similarities with the prototypes, background first."""
    sides = (by.background, by.foreground)
    return SCALE * torch.stack([F.cosine_similarity(feature_NChw, side, dim=1) for side in sides], dim=1)


def self_support(query_BChw: Tensor, out_B2hw: Tensor) -> Prototypes:
    """Prototypes from the query's own features, where an answer is confident."""
    query_BCQ, p_B2Q = query_BChw.flatten(2), out_B2hw.softmax(dim=1).flatten(2)
    background_BQ = confident(p_B2Q[:, 0], CONFIDENT_BACKGROUND)
    means_BC = (mean_of(query_BCQ, chosen) for chosen in (confident(p_B2Q[:, 1], CONFIDENT_FOREGROUND), background_BQ))
    foreground, background = (mean_BC[..., None, None] for mean_BC in means_BC)
    adaptive_BChw = attended(query_BCQ, background_BQ).unflatten(2, size_of(query_BChw))
    return Prototypes(foreground, 0.3 * background + 0.7 * adaptive_BChw)


def confident(p_BQ: Tensor, threshold: float) -> Tensor:
    """The positions above the threshold, (B, Q) bool; for an episode without any, the 12 most confident."""
    above_BQ = p_BQ > threshold
    best_BQ = torch.zeros_like(above_BQ).scatter(1, p_BQ.topk(min(FALLBACK, p_BQ.shape[1])).indices, True)
    return torch.where(above_BQ.any(dim=1, keepdim=True), above_BQ, best_BQ)


def mean_of(feature_BCQ: Tensor, chosen_BQ: Tensor) -> Tensor:
    """The mean over the chosen positions, (B, C)."""
    weight_BQ = chosen_BQ.to(feature_BCQ.dtype)
    return torch.einsum("bcq,bq->bc", feature_BCQ, weight_BQ) / weight_BQ.sum(dim=1, keepdim=True)


def attended(feature_BCQ: Tensor, chosen_BP: Tensor) -> Tensor:
    """For each position, the mean of the chosen ones weighted by their similarity to it, (B, C, Q)."""
    unit_BCQ = F.normalize(feature_BCQ, dim=1)
    like_BQP = SHARPNESS * unit_BCQ.transpose(1, 2) @ unit_BCQ
    weight_BQP = like_BQP.masked_fill(~chosen_BP[:, None], -torch.inf).softmax(dim=2)
    return feature_BCQ @ weight_BQP.transpose(1, 2)


class SSP(Method):
    """Supports any number of shots and any image sides. Trains the convolutions of the backbone's layer2 and layer3.

    Args:
        backbone: published: `DilatedResNetBackbone` with dilation="torchvision".
        refine: match twice, as in the published results, or once.
        trained: the parts of the backbone's trunk to train; those of `EfficientNetLiteBackbone` that make layer2 and
            layer3 are "blocks.2", "blocks.3" and "blocks.4".

    Raises:
        SettingError: the backbone has no such parts.

    Example:
        >>> import torch
        >>> from pmnet.backbones.dilated import DilatedResNetBackbone
        >>> from pmnet.methods.ssp import SSP
        >>> method = SSP(DilatedResNetBackbone("resnet50s", "none", dilation="torchvision"))
        >>> method.predict(torch.rand(1, 3, 64, 80), torch.rand(1, 5, 3, 64, 80), torch.ones(1, 5, 64, 80)).shape
        torch.Size([1, 64, 80])
    """

    protocol = "ssp"
    query_reads = support_reads = {"layer3": "last"}
    side_multiple = 1

    def __init__(self, backbone: Backbone, refine: bool = True, trained: Sequence[str] = ("layer2", "layer3")) -> None:
        self.learned_layers = tuple(trained)
        super().__init__(backbone, SSPHead(refine))
        for module in backbone.trunk.modules():
            if isinstance(module, nn.BatchNorm2d):  # neither its weights nor its statistics change
                module.requires_grad_(False)


def from_release(state_dict: Mapping[str, Tensor], refine: bool = True) -> SSP:
    """Builds the whole network from the tensors of the authors' program: all that is learned is in its backbone.

    Args:
        state_dict: a checkpoint with ResNet-50 or ResNet-101.
        refine: match twice, as in the published results, or once.

    Returns:
        The method in eval mode.

    Raises:
        CheckpointError: a tensor up to layer3 is missing, unknown, or of an unexpected shape.
    """
    tensors = {name: torch.as_tensor(value) for name, value in state_dict.items()}
    if unknown := sorted(name for name in bare(tensors) if not re.match(r"(layer[0-4]|conv1|bn1)\.", name)):
        raise CheckpointError(f"Not a checkpoint of SSP by its authors: it has no head, but here is {unknown[:3]}.")
    state = names_of_timm(tensors)
    blocks = len({m[1] for name in state if (m := re.match(r"layer3\.(\d+)\.", name))})
    name = "resnet101s" if blocks > 6 else "resnet50s"
    trunk = filled(build_trunk(name, "torchvision"), state, "SSP", unread="layer4.")  # their network ends before it
    provenance = Provenance(name, "release", "SSP's authors", state_hash(state))
    return SSP(DilatedResNetBackbone.around(trunk, provenance), refine).eval()
