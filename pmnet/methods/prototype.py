"""A training-free baseline: each query position gets the label of the more similar prototype, by cosine.

The prototypes are mean support features of background and foreground (masked average pooling as in Zhang et al.,
SG-One, 2018). The features are those of the backbone, unchanged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pmnet.backbones import Backbone, Features
from pmnet.methods.base import Head, Method, resize

SCALE = 10.0  # factor from cosines to logits; affects the confidence of the scores, but no mask


class PrototypeHead(Head):
    """Compares query features with a background and a foreground prototype.

    Args:
        layer: the stage whose last block is used.
    """

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def see(self, support_feats: Features, support_masks: Tensor) -> Tensor:
        """Computes the prototypes: weighted means over the positions of all shots. Arguments as in `Head.see`.

        A position's weight is the share of its pixels that are background or foreground.

        Returns:
            (B, 2, C): background, foreground.
        """
        feature_BKChw = support_feats[self.layer][-1]
        share_BS = foreground_share(support_masks, feature_BKChw)
        weight_B2S = torch.stack([1 - share_BS, share_BS], dim=1)
        feature_BSC = feature_BKChw.movedim(2, -1).flatten(1, 3)
        return weight_B2S @ feature_BSC / weight_B2S.sum(dim=2, keepdim=True).clamp(min=1e-6)

    def segment(self, query_feats: Features, seen: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W): the cosines with both prototypes, times 10. Arguments as in `Head.segment`."""
        feature_BChw = query_feats[self.layer][-1]
        cosine_B2Q = F.normalize(seen, dim=2) @ F.normalize(feature_BChw.flatten(2), dim=1)
        return resize(SCALE * cosine_B2Q.unflatten(2, feature_BChw.shape[-2:]), size)


class Prototype(Method):
    """Segments by comparison with two prototypes, without training. Takes any number of shots and any image sides.

    Args:
        backbone: any backbone.
        layer: the stage whose last block is used, "layer1" to "layer4"; None takes the deepest.

    Raises:
        SettingError: the backbone does not have this layer.

    Example:
        >>> import torch
        >>> from pmnet import Prototype, ResNetBackbone
        >>> method = Prototype(ResNetBackbone("resnet18", weights="none"), layer="layer3")
        >>> masks = method.predict(torch.rand(1, 3, 80, 96), torch.rand(1, 5, 3, 80, 96), torch.ones(1, 5, 80, 96))
        >>> masks.shape, masks.dtype
        (torch.Size([1, 80, 96]), torch.bool)
    """

    side_multiple = 1

    def __init__(self, backbone: Backbone, layer: str | None = None) -> None:
        layer = layer or list(backbone.blocks)[-1]
        super().__init__(backbone, PrototypeHead(layer))
        self.query_reads = self.support_reads = backbone.checked({layer: "last"})


def foreground_share(masks_BKHW: Tensor, feature_BKChw: Tensor) -> Tensor:
    """Share of foreground pixels at each position of a feature map.

    Args:
        masks_BKHW: 0 or 1, any dtype.
        feature_BKChw: features, which give the size h, w and the dtype.

    Returns:
        (B, K*h*w), values in [0, 1].
    """
    size = (feature_BKChw.shape[-2], feature_BKChw.shape[-1])
    return F.interpolate(masks_BKHW.to(feature_BKChw.dtype), size, mode="area").flatten(1)
