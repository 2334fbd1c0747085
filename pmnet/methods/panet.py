"""PANet: cosine similarity with the mean features of the supports' object and background.

Wang et al., "PANet: Few-Shot Image Semantic Segmentation with Prototype Alignment", ICCV 2019. Published program:
github.com/kaixin96/PANet at 1695bf3, no licence; this code was written from a description of it.

There are no new layers: the whole backbone is trained. In training, prototypes from the query and its predicted mask
must also segment the supports: the alignment loss.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmnet.backbones import Backbone, Features
from pmnet.backbones.vgg import VGGBackbone, build_trunk, own_names
from pmnet.backbones.weights import Provenance, state_hash
from pmnet.methods.base import Criterion, Head, Method, scored, size_of
from pmnet.methods.pooling import masked_mean, mean_at_mask_size, only
from pmnet.methods.release import filled

EPS = 1e-5
SCALE = 20.0  # of cosines as logits


class Prototypes(NamedTuple):
    """Foreground and background of each episode, (B, C)."""

    foreground: Tensor
    background: Tensor


class PANetHead(Head):
    """Matches features of one stage with prototypes. It has no parameters."""

    def see(self, support_feats: Features, support_masks: Tensor) -> Prototypes:
        """The prototypes of the supports, averaged over the shots. Everything but foreground is background."""
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
        """The criterion of the query, plus that of the supports segmented with the query's prototypes."""
        query_BChw, size = only(query_feats), size_of(query_mask)
        logits_B2hw = matched(query_BChw, self.see(support_feats, support_masks))
        query_loss = scored(criterion, enlarged(logits_B2hw, size), query_mask)
        pred_Bhw = logits_B2hw.argmax(dim=1)
        found_B = (pred_Bhw == 1).flatten(1).any(dim=1)  # the others have no alignment loss
        if not found_B.any():
            return query_loss
        return query_loss + found_B.float().mean() * aligned(
            query_BChw[found_B], pred_Bhw[found_B], only(support_feats)[found_B], support_masks[found_B], criterion
        )


def aligned(
    query_BChw: Tensor, pred_Bhw: Tensor, support_BKChw: Tensor, masks_BKHW: Tensor, criterion: Criterion
) -> Tensor:
    """The criterion of the supports, segmented with prototypes from the query's predicted mask."""
    sides = (masked_mean(query_BChw, pred_Bhw == side, EPS) for side in (1, 0))
    each = Prototypes(*(side_BC.repeat_interleave(masks_BKHW.shape[1], dim=0) for side_BC in sides))
    mask_NHW = (masks_BKHW == 1).flatten(0, 1)
    return scored(criterion, enlarged(matched(support_BKChw.flatten(0, 1), each), size_of(mask_NHW)), mask_NHW)


def matched(feature_NChw: Tensor, by: Prototypes) -> Tensor:
    """Logits (N, 2, h, w): cosine similarities with the prototypes, background first."""
    sides = (side_NC[..., None, None] for side_NC in (by.background, by.foreground))
    return SCALE * torch.stack([F.cosine_similarity(feature_NChw, side, dim=1) for side in sides], dim=1)


def enlarged(logits_N2hw: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits_N2hw, size, mode="bilinear", align_corners=False)


class PANet(Method):
    """Supports any number of shots and any image sides. Trains the whole backbone.

    Args:
        backbone: published: `VGGBackbone`.
        layer: the stage whose last block is matched with the prototypes.

    Example:
        >>> import torch
        >>> from pmnet.backbones.vgg import VGGBackbone
        >>> from pmnet.methods.panet import PANet
        >>> method = PANet(VGGBackbone("none"))
        >>> method.predict(torch.rand(1, 3, 64, 80), torch.rand(1, 5, 3, 64, 80), torch.ones(1, 5, 64, 80)).shape
        torch.Size([1, 64, 80])
    """

    protocol = "panet"
    side_multiple = 1

    def __init__(self, backbone: Backbone, layer: str = "layer4") -> None:
        reads, stages = backbone.checked({layer: "last"}), list(backbone.blocks)
        unused = stages[stages.index(layer) + 1 :]
        self.learned_layers = tuple(name for name, _ in backbone.trunk.named_children() if name not in unused)
        super().__init__(backbone, PANetHead())
        self.query_reads = self.support_reads = reads


def from_release(state_dict: Mapping[str, Tensor]) -> PANet:
    """Builds the whole network from the tensors of the authors' program: all that is learned is in its VGG-16.

    Returns:
        The method in eval mode.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state = own_names({name: torch.as_tensor(value) for name, value in state_dict.items()})
    trunk = filled(build_trunk(), state, "PANet")
    provenance = Provenance("vgg16", "release", "PANet's authors", state_hash(trunk.state_dict()))
    return PANet(VGGBackbone.around(trunk, provenance)).eval()
