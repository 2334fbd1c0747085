"""Prototypes, nothing learned: a query position takes the side whose mean support feature is more like its own.

The first of the two training-free floors. Masked average pooling as in Zhang et al., SG-One (2018), for the background
as well as the foreground; what is compared is the backbone's, as it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pmnet.backbones import Backbone, Features
from pmnet.methods.base import Head, Method, resize

SCALE = 10.0  # of cosines as logits; changes no mask, only how sure the scores look


class PrototypeHead(Head):
    """
    Args:
        layer: the stage whose last block is compared.
    """

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def see(self, support_feats: Features, support_masks: Tensor) -> Tensor:
        """The prototypes (B, 2, C), background and foreground: means over the positions of all shots, each position
        weighted by the share of its pixels that is of that side."""
        feature_BKChw = support_feats[self.layer][-1]
        share_BS = foreground_share(support_masks, feature_BKChw)
        weight_B2S = torch.stack([1 - share_BS, share_BS], dim=1)
        feature_BSC = feature_BKChw.movedim(2, -1).flatten(1, 3)
        return weight_B2S @ feature_BSC / weight_B2S.sum(dim=2, keepdim=True).clamp(min=1e-6)

    def segment(self, query_feats: Features, seen: Tensor, size: tuple[int, int]) -> Tensor:
        """Cosines with both prototypes, times 10; arguments as those of `Head.segment`."""
        feature_BChw = query_feats[self.layer][-1]
        cosine_B2Q = F.normalize(seen, dim=2) @ F.normalize(feature_BChw.flatten(2), dim=1)
        return resize(SCALE * cosine_B2Q.unflatten(2, feature_BChw.shape[-2:]), size)


class Prototype(Method):
    """Takes any number of shots and any image sides.

    Args:
        layer: the stage whose last block is compared, "layer1" to "layer4".

    Example:
        >>> import torch
        >>> from pmnet import Prototype, ResNetBackbone
        >>> method = Prototype(ResNetBackbone("resnet18", weights="none"), layer="layer3")
        >>> masks = method.predict(torch.rand(1, 3, 80, 96), torch.rand(1, 5, 3, 80, 96), torch.ones(1, 5, 80, 96))
        >>> masks.shape, masks.dtype
        (torch.Size([1, 80, 96]), torch.bool)
    """

    side_multiple = 1

    def __init__(self, backbone: Backbone, layer: str) -> None:
        super().__init__(backbone, PrototypeHead(layer))
        self.query_reads = self.support_reads = backbone.checked({layer: "last"})


def foreground_share(masks_BKHW: Tensor, feature_BKChw: Tensor) -> Tensor:
    """(B, K*h*w) in [0, 1]: of the pixels at each position of a feature map, how many are foreground."""
    size = (feature_BKChw.shape[-2], feature_BKChw.shape[-1])
    return F.interpolate(masks_BKHW.to(feature_BKChw.dtype), size, mode="area").flatten(1)
