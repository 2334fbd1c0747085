"""Hysteretic spatial filtering module, HSFM (paper 3.3). Axis letters: see `affinity.py`."""

from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.errors import SettingError
from pmnet.methods.pmnet.affinity import HEADS
from pmnet.methods.pmnet.lean import Convolved, Filtered, RectifiedAndConvolved, filtered, statistics

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
        over_query, over_support, bias = self.weights
        known = isinstance(self.norm, nn.BatchNorm3d) and not self.norm.training  # before the input is
        if known:
            over_query, over_support, bias = folded(self.norm, over_query, over_support, bias)
        enhanced = convolved(S, over_query, over_support, bias)
        if not known:
            enhanced = self.norm(enhanced)
        return F.relu(enhanced, inplace=True).unflatten(4, S.shape[4:])

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of both convolutions, and their common bias."""
        query, support = self.query_conv, self.support_conv
        return query.weight, support.weight, query.bias + support.bias  # type: ignore[operator]


def uses_batch(norm: nn.Module) -> bool:
    """Whether a norm is in training, and set as `lean.py` knows it: no SyncBatchNorm, nor one that is held in eval."""
    usual = norm.affine and (type(norm) is nn.GroupNorm or (norm.track_running_stats and norm.momentum is not None))
    return norm.training and type(norm) in (nn.BatchNorm3d, nn.GroupNorm) and bool(usual)


def convolved(S: Tensor, over_query: Tensor, over_support: Tensor, bias: Tensor) -> Tensor:
    """(N, C, hq, wq, hs, ws) -> (N, C', hq, wq, hs*ws), channels last in memory."""
    k = over_query.shape[2] // 2
    total = F.conv3d(S.flatten(4), over_query, bias, padding=(k, k, 0))
    total += F.conv3d(S.flatten(2, 3), over_support, padding=(0, k, k)).unflatten(2, S.shape[2:4]).flatten(4)
    return total


def folded(norm: nn.Module, over_query: Tensor, over_support: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The convolutions' weights and their common bias with a BatchNorm in eval mode in them."""
    mean, var, weight = norm.running_mean, norm.running_var, norm.weight
    scale: Tensor = weight * torch.rsqrt(var + norm.eps)  # type: ignore[operator]
    shift: Tensor = norm.bias + (bias - mean) * scale  # type: ignore[operator]
    return over_query * scale.view(-1, 1, 1, 1, 1), over_support * scale.view(-1, 1, 1, 1, 1), shift


class Evidence(NamedTuple):
    """What each support says about each query pixel; shots are weighed against each other by `logsum`.

    Attributes:
        share: of the softmax over the support's pixels, what is on its mask; (N, A, Q, C) in [0, 1].
        logsum: logarithm of that softmax's denominator, likewise.
    """

    share: Tensor
    logsum: Tensor


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

    def forward(
        self, S: Tensor, mask_NS: Tensor, query_size: tuple[int, int], support_size: tuple[int, int]
    ) -> Evidence:
        """Enhances the affinities of N pairs, and takes the softmax over each support's pixels (paper eq. 3).

        Args:
            S: (N*A, Q, S, L).
            mask_NS: the supports' masks at their feature size, in [0, 1].
            query_size: hq, wq.
            support_size: hs, ws.
        """
        S = S.unflatten(2, support_size).unflatten(1, query_size).movedim(-1, 1)
        mask_NS = mask_NS.repeat_interleave(HEADS, dim=0)
        layers = cast("list[B3DConv]", list(self.b3dconvs.children()))
        if layers and all(uses_batch(layer.norm) for layer in layers):
            evidence = self.in_training(S, mask_NS, *layers)
        else:
            enhanced = self.b3dconvs(S).movedim(1, -1)
            evidence = filtered(enhanced.flatten(3, 4).flatten(1, 2), mask_NS)
        return Evidence(*(x.unflatten(0, (-1, HEADS)) for x in evidence))

    def in_training(self, S: Tensor, mask_NS: Tensor, first: B3DConv, second: B3DConv) -> tuple[Tensor, Tensor]:
        """The same of a batch, by its own statistics."""
        sizes = (S.shape[2], S.shape[3], S.shape[4], S.shape[5])
        S_NPC = S.movedim(1, -1).flatten(1, 4)
        z_NPC = Convolved.apply(S_NPC, *(weight.to(S.dtype) for weight in first.weights), sizes)
        mean, rstd, groups = statistics(first.norm, z_NPC)
        weights = (weight.to(S.dtype) for weight in second.weights)
        norm = first.norm
        z_NPC = RectifiedAndConvolved.apply(z_NPC, mean, rstd, norm.weight, norm.bias, *weights, groups, sizes)
        mean, rstd, groups = statistics(second.norm, z_NPC)
        return Filtered.apply(z_NPC, mean, rstd, second.norm.weight, second.norm.bias, mask_NS, groups, sizes)


def coarse_mask(evidence: Evidence, shots: int) -> Tensor:
    """What a softmax over the support pixels of all shots gives (paper eq. 3); its mean over heads.

    Args:
        evidence: of N = B*K pairs, the shots of an episode side by side.

    Returns:
        (B, C, Q), values in [0, 1].
    """
    share_BAQC = evidence.share
    if shots > 1:
        share_BKAQC, logsum_BKAQC = (x.unflatten(0, (-1, shots)) for x in evidence)
        share_BAQC = (logsum_BKAQC.softmax(dim=1) * share_BKAQC).sum(dim=1)
    return share_BAQC.mean(dim=1).transpose(1, 2)
