"""A training-free baseline: each query position gets the label of the most similar support position, by cosine.

The features are those of the backbone, unchanged.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmnet.backbones import Backbone, Features
from pmnet.methods.base import Head, Method, resize
from pmnet.methods.prototype import SCALE, foreground_share

NONE = -1.0  # similarity to background or foreground if no support shows it: the lowest cosine


class Positions(NamedTuple):
    """All positions of the supports of B episodes.

    Attributes:
        feature: features of length 1, (B, S, C) with S = K * hs * ws.
        foreground: (B, S) bool, True where at least half of the position's pixels are foreground. If an object is too
            small for that, the positions with the largest share are foreground.
    """

    feature: Tensor
    foreground: Tensor


class NearestHead(Head):
    """Compares every query position with every support position.

    Args:
        layer: the stage whose last block is used.
    """

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def see(self, support_feats: Features, support_masks: Tensor) -> Positions:
        """Computes the features and labels of all support positions. Arguments as in `Head.see`."""
        feature_BKChw = support_feats[self.layer][-1]
        share_BS = foreground_share(support_masks, feature_BKChw)
        most_B1 = share_BS.amax(dim=1, keepdim=True).clamp(min=1e-6)  # > 0: empty masks have no foreground
        feature_BSC = feature_BKChw.movedim(2, -1).flatten(1, 3)
        return Positions(F.normalize(feature_BSC, dim=2), share_BS >= most_B1.clamp(max=0.5))

    def segment(self, query_feats: Features, seen: Positions, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W): the largest cosines with background and with foreground positions, times 10.

        Arguments as in `Head.segment`.
        """
        feature_BChw = query_feats[self.layer][-1]
        cosine_BSQ = seen.feature @ F.normalize(feature_BChw.flatten(2), dim=1)
        of_side = seen.foreground[:, :, None]
        sides = [cosine_BSQ.masked_fill(other, NONE).amax(dim=1) for other in (of_side, ~of_side)]
        return resize(SCALE * torch.stack(sides, dim=1).unflatten(2, feature_BChw.shape[-2:]), size)


class Nearest(Method):
    """Segments by nearest neighbours, without training. Takes any number of shots and any image sides.

    Args:
        backbone: any backbone.
        layer: the stage whose last block is used, "layer1" to "layer4"; None takes the deepest.

    Raises:
        SettingError: the backbone does not have this layer.

    Example:
        >>> import torch
        >>> from pmnet import Nearest, ResNetBackbone
        >>> method = Nearest(ResNetBackbone("resnet18", weights="none"), layer="layer3")
        >>> seen = method.see(torch.rand(1, 5, 3, 80, 96), torch.ones(1, 5, 80, 96))  # once, for many queries
        >>> method.mask(torch.rand(8, 3, 64, 64), seen).shape
        torch.Size([8, 64, 64])
    """

    side_multiple = 1

    def __init__(self, backbone: Backbone, layer: str | None = None) -> None:
        layer = layer or list(backbone.blocks)[-1]
        super().__init__(backbone, NearestHead(layer))
        self.query_reads = self.support_reads = backbone.checked({layer: "last"})
