"""PANet: cosines with the means of the supports' object and background, on a backbone that is trained to fit them.

Wang et al., "PANet: Few-Shot Image Semantic Segmentation with Prototype Alignment", ICCV 2019. Published program:
github.com/kaixin96/PANet at 1695bf3, no licence; this code was written from a description of it.

Nothing is added to the backbone, all of which is trained. While training, the query with its answer also has to segment
the supports: the alignment.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmnet.backbones import Backbone, Features
from pmnet.backbones.vgg import VGGBackbone, own_names
from pmnet.backbones.weights import Provenance, state_hash
from pmnet.methods.base import Criterion, Head, Method, scored, size_of
from pmnet.methods.pfenet import filled
from pmnet.methods.pooling import masked_mean, mean_at_mask_size, only

EPS = 1e-5
SCALE = 20.0  # of cosines as logits


class Prototypes(NamedTuple):
    """Of each episode's two sides, (B, C)."""

    foreground: Tensor
    background: Tensor


class PANetHead(Head):
    """Reads the last block of one stage; has no parameters."""

    def see(self, support_feats: Features, support_masks: Tensor) -> Prototypes:
        """The means over the shots; what is not foreground is background."""
        B, K = support_masks.shape[:2]
        feature_NChw, mask_NHW = only(support_feats).flatten(0, 1), (support_masks == 1).flatten(0, 1)
        each_NC = (mean_at_mask_size(feature_NChw, side, EPS) for side in (mask_NHW, ~mask_NHW))
        return Prototypes(*(side_NC.unflatten(0, (B, K)).mean(dim=1) for side_NC in each_NC))

    def segment(self, query_feats: Features, seen: Prototypes, size: tuple[int, int]) -> Tensor:
        return enlarged(matched(only(query_feats), seen), size)

    def loss(
        self,
        query_feats: Features,
        support_feats: Features,
        support_masks: Tensor,
        query_mask: Tensor,
        criterion: Criterion,
    ) -> Tensor:
        """Of the query, and as much of the supports when segmented by the query."""
        query_BChw, size = only(query_feats), size_of(query_mask)
        logits_B2hw = matched(query_BChw, self.see(support_feats, support_masks))
        query_loss = scored(criterion, enlarged(logits_B2hw, size), query_mask)
        pred_Bhw = logits_B2hw.argmax(dim=1)
        found_B = (pred_Bhw == 1).flatten(1).any(dim=1)  # an episode without foreground is not aligned
        if not found_B.any():
            return query_loss
        return query_loss + found_B.float().mean() * aligned(
            query_BChw[found_B], pred_Bhw[found_B], only(support_feats)[found_B], support_masks[found_B], criterion
        )


def aligned(
    query_BChw: Tensor, pred_Bhw: Tensor, support_BKChw: Tensor, masks_BKHW: Tensor, criterion: Criterion
) -> Tensor:
    """The loss of the supports, segmented by the prototypes of their query's prediction."""
    sides = (masked_mean(query_BChw, pred_Bhw == side, EPS) for side in (1, 0))
    each = Prototypes(*(side_BC.repeat_interleave(masks_BKHW.shape[1], dim=0) for side_BC in sides))
    mask_NHW = masks_BKHW.flatten(0, 1)
    return scored(criterion, enlarged(matched(support_BKChw.flatten(0, 1), each), size_of(mask_NHW)), mask_NHW)


def matched(feature_NChw: Tensor, by: Prototypes) -> Tensor:
    """Cosines with the prototypes as logits (N, 2, h, w), background first."""
    sides = (side_NC[..., None, None] for side_NC in (by.background, by.foreground))
    return SCALE * torch.stack([F.cosine_similarity(feature_NChw, side, dim=1) for side in sides], dim=1)


def enlarged(logits_N2hw: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits_N2hw, size, mode="bilinear", align_corners=False)


class PANet(Method):
    """Takes any number of shots and any image sides. Trains the whole backbone.

    Args:
        backbone: published: `VGGBackbone`.
        layer: the stage whose last block is matched.

    Example:
        >>> import torch
        >>> from pmnet.backbones.vgg import VGGBackbone
        >>> from pmnet.methods.panet import PANet
        >>> method = PANet(VGGBackbone("none"))
        >>> method.predict(torch.rand(1, 3, 64, 80), torch.rand(1, 5, 3, 64, 80), torch.ones(1, 5, 64, 80)).shape
        torch.Size([1, 64, 80])
    """

    side_multiple = 1

    def __init__(self, backbone: Backbone, layer: str = "layer4") -> None:
        self.learned_layers = tuple(name for name, _ in backbone.trunk.named_children())
        super().__init__(backbone, PANetHead())
        self.query_reads = self.support_reads = backbone.checked({layer: "last"})


def from_release(state_dict: Mapping[str, Tensor]) -> PANet:
    """The network on VGG-16, in eval mode, from the authors' tensor names: all of it is the backbone.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state = own_names({name: torch.as_tensor(value) for name, value in state_dict.items()})
    backbone = VGGBackbone("none")
    filled(backbone.trunk, state, "PANet")
    backbone.provenance = Provenance("vgg16", "release", "PANet's authors", state_hash(backbone.trunk.state_dict()))
    return PANet(backbone).eval()
