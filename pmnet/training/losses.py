"""Losses of logits (B, 2, H, W) and masks (B, H, W) int64: 1 = foreground, 0 = background, 255 = ignore."""

import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.methods.base import IGNORE


class DiceCrossEntropy(nn.Module):
    """Cross-entropy plus the soft Dice loss of the foreground (Milletari et al., V-Net, 2016), averaged over episodes.

    Where objects are small, the cross-entropy alone is low for a network that marks nothing; the Dice loss is not, as
    it compares areas.

    Args:
        dice: weight of the Dice loss.
        ignore_index: mask value that does not count.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[0, 1], [1, 255]]])
        >>> right = torch.stack([1 - mask, mask], dim=1) * 20.0
        >>> f"{DiceCrossEntropy()(right, mask):.3f} {DiceCrossEntropy()(-right, mask):.3f}"
        '0.000 20.750'
    """

    def __init__(self, dice: float = 1.0, ignore_index: int = IGNORE) -> None:
        super().__init__()
        self.dice, self.ignore_index = dice, ignore_index

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        counted_BHW = masks != self.ignore_index
        share_BHW = logits.softmax(dim=1)[:, 1] * counted_BHW
        true_BHW = (masks == 1).to(share_BHW.dtype)
        common_B, areas_B = (share_BHW * true_BHW).sum((1, 2)), (share_BHW + true_BHW).sum((1, 2))
        dice_B = 1 - (2 * common_B + 1) / (areas_B + 1)
        return F.cross_entropy(logits, masks, ignore_index=self.ignore_index) + self.dice * dice_B.mean()
