"""Hysteretic spatial filtering module, HSFM (paper 3.3). Axis letters: see `affinity.py`."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.affinity import HEADS
from pmnet.errors import SettingError

Norm = Literal["batch", "group"]
ENHANCED = 16  # channels of the enhanced affinity and so of a coarse mask


class B3DConv(nn.Module):
    """One bidirectional 3D convolution (paper eq. 2): pixel-to-patch relations in both directions.

    One convolution slides over the query plane for each support pixel, one over the support plane for
    each query pixel; their sum is normalised and rectified.

    Args:
        norm: "batch" as the paper says, "group" (4 groups) as the authors' program does.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, norm: Norm) -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise SettingError(f"model.norm={norm} is not one of batch, group.")
        pad = kernel // 2
        self.query_conv = nn.Conv3d(in_channels, out_channels, (kernel, kernel, 1), padding=(pad, pad, 0))
        self.support_conv = nn.Conv3d(in_channels, out_channels, (1, kernel, kernel), padding=(0, pad, pad))
        self.norm = nn.BatchNorm3d(out_channels) if norm == "batch" else nn.GroupNorm(4, out_channels)

    def forward(self, S: Tensor) -> Tensor:
        """(N, C, hq, wq, hs, ws) -> (N, C', hq, wq, hs, ws), channels last in memory."""
        hq, wq, hs, ws = S.shape[2:]
        over_query = self.query_conv(S.flatten(4)).unflatten(4, (hs, ws))
        over_support = self.support_conv(S.flatten(2, 3)).unflatten(2, (hq, wq))
        enhanced = self.norm((over_query + over_support).flatten(2, 3))
        return F.relu(enhanced, inplace=True).unflatten(2, (hq, wq))


class HSFM(nn.Module):
    """Enhances the affinity with two B3DConvs, then filters it with the support masks.

    Args:
        blocks: backbone blocks of the stage (the L channels of its affinity).
        norm: see `B3DConv`.
        b3dconvs: False leaves the enhancement out (table 6, "w/o B3DConvs").
    """

    def __init__(self, blocks: int, norm: Norm = "batch", b3dconvs: bool = True) -> None:
        super().__init__()
        self.out_channels = ENHANCED if b3dconvs else blocks
        self.b3dconvs = (
            nn.Sequential(B3DConv(blocks, ENHANCED, 5, norm), B3DConv(ENHANCED, ENHANCED, 3, norm))
            if b3dconvs
            else nn.Identity()
        )

    def forward(self, S: Tensor, support_masks: Tensor) -> Tensor:
        """Coarse query masks of one stage (paper eq. 3).

        Each shot is enhanced on its own; the softmax then runs over the support pixels of all shots.

        Args:
            S: (B*K*A, L, hq, wq, hs, ws).
            support_masks: (B, K, H, W), float in [0, 1].

        Returns:
            (B, C, hq, wq), values in [0, 1].
        """
        hq, wq, hs, ws = S.shape[2:]
        B, K = support_masks.shape[:2]
        mask_BT = resize(support_masks, (hs, ws)).reshape(B, K * hs * ws)
        S_BKACQS = self.b3dconvs(S).flatten(4).flatten(2, 3).unflatten(0, (B, K, HEADS))
        S_BAQTC = S_BKACQS.permute(0, 2, 4, 1, 5, 3).flatten(3, 4)  # T: the pixels of all K supports
        coarse_BACQ = S_BAQTC.softmax(dim=3).transpose(3, 4) @ mask_BT.to(S.dtype)[:, None, None, :, None]
        return coarse_BACQ.squeeze(-1).mean(dim=1).transpose(1, 2).unflatten(2, (hq, wq))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners aligned: the one way in which PMNet resizes masks and features."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)
