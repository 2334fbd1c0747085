"""Hysteretic spatial filtering module, HSFM (paper 3.3). Suffixes of tensor names: see `affinity.py`."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.errors import SettingError
from pmnet.methods.pmnet.lean import Convolved, Filtered, RectifiedAndConvolved, filtered, statistics

Norm = Literal["batch", "group"]
ENHANCED = 16  # channels of the enhanced affinity and of a coarse mask


class B3DConv(nn.Module):
    """One bidirectional 3D convolution (paper eq. 2): pixel-to-patch relations in both directions.

    One convolution slides over the query plane for each support pixel, the other over the support plane for each query
    pixel. Their sum is normalised, then passed through a ReLU.

    Args:
        in_channels: channels of the input, L or 16.
        out_channels: channels of the output, a multiple of 4.
        kernel: odd side of both kernels.
        norm: "batch" (paper) or "group" (4 groups, the authors' program).

    Raises:
        SettingError: unknown norm.

    Example:
        >>> B3DConv(3, 16, kernel=5, norm="batch")(torch.rand(4, 3, 4, 6, 2, 5)).shape
        torch.Size([4, 16, 4, 6, 2, 5])
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
        """Enhances affinities: (N, C, hq, wq, hs, ws) -> (N, C', hq, wq, hs, ws), channels last in memory."""
        over_query, over_support, bias = self.weights
        fold = isinstance(self.norm, nn.BatchNorm3d) and not self.norm.training  # then it is a constant scale and shift
        if fold:
            over_query, over_support, bias = folded(self.norm, over_query, over_support, bias)
        enhanced = convolved(S, over_query, over_support, bias)
        if not fold:
            enhanced = self.norm(enhanced)
        return F.relu(enhanced, inplace=True).unflatten(4, S.shape[4:])

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Kernels of the convolutions over the query and over the support, and the sum of their biases."""
        query, support = self.query_conv, self.support_conv
        return query.weight, support.weight, query.bias + support.bias  # type: ignore[operator]


def uses_batch(norm: nn.Module) -> bool:
    """Whether `lean.py` can train this norm: a usual BatchNorm or GroupNorm, in training mode, no SyncBatchNorm."""
    usual = norm.affine and (type(norm) is nn.GroupNorm or (norm.track_running_stats and norm.momentum is not None))
    return norm.training and type(norm) in (nn.BatchNorm3d, nn.GroupNorm) and bool(usual)


def convolved(S: Tensor, over_query: Tensor, over_support: Tensor, bias: Tensor) -> Tensor:
    """Sum of both convolutions: (N, C, hq, wq, hs, ws) -> (N, C', hq, wq, hs*ws), channels last in memory."""
    k = over_query.shape[2] // 2
    total = F.conv3d(S.flatten(4), over_query, bias, padding=(k, k, 0))
    total += F.conv3d(S.flatten(2, 3), over_support, padding=(0, k, k)).unflatten(2, S.shape[2:4]).flatten(4)
    return total


def folded(norm: nn.Module, over_query: Tensor, over_support: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Folds a BatchNorm in eval mode into the kernels and the bias of the convolutions before it."""
    mean, var, weight = norm.running_mean, norm.running_var, norm.weight
    scale: Tensor = weight * torch.rsqrt(var + norm.eps)  # type: ignore[operator]
    shift: Tensor = norm.bias + (bias - mean) * scale  # type: ignore[operator]
    return over_query * scale.view(-1, 1, 1, 1, 1), over_support * scale.view(-1, 1, 1, 1, 1), shift


class Evidence(NamedTuple):
    """The evidence of each support for each query pixel; `logsum` weighs the shots of an episode.

    Attributes:
        share: share of the softmax over the support's pixels that lies on its mask, (N, A, Q, C) in [0, 1].
        logsum: logarithm of the softmax's denominator, (N, A, Q, C).
    """

    share: Tensor
    logsum: Tensor


class HSFM(nn.Module):
    """Enhances affinities with two B3DConvs, then filters them with the support masks.

    Args:
        blocks: number of backbone blocks of the stage, the L channels of its affinity.
        norm: see `B3DConv`.
        b3dconvs: False skips the enhancement (table 6, "w/o B3DConvs").

    Attributes:
        out_channels: channels C of the result: 16, or L without B3DConvs.

    Example:
        >>> S, masks = [torch.rand(2, 4, 4 * 6, 2 * 5)] * 3, torch.ones(2, 2 * 5)  # 2 pairs, 4 heads, 3 blocks
        >>> evidence = HSFM(blocks=3).eval()(S, masks, query_size=(4, 6), support_size=(2, 5))
        >>> evidence.share.shape
        torch.Size([2, 4, 24, 16])
    """

    def __init__(self, blocks: int, norm: Norm = "batch", b3dconvs: bool = True) -> None:
        super().__init__()
        self.out_channels = ENHANCED if b3dconvs else blocks
        self.b3dconvs = (
            nn.Sequential(B3DConv(blocks, ENHANCED, 5, norm), B3DConv(ENHANCED, ENHANCED, 3, norm))
            if b3dconvs
            else nn.Identity()
        )

    @property
    def halo(self) -> int | None:
        """Rows of the query on either side on which a row's evidence depends; None: all, as a GroupNorm's do."""
        layers = cast("list[B3DConv]", list(self.b3dconvs.children()))
        if any(isinstance(layer.norm, nn.GroupNorm) for layer in layers):
            return None
        return sum(layer.query_conv.kernel_size[0] // 2 for layer in layers)

    def forward(
        self,
        affinities: Iterable[Tensor],
        mask_NS: Tensor,
        query_size: tuple[int, int],
        support_size: tuple[int, int],
    ) -> Evidence:
        """Enhances the affinities of N pairs and applies the softmax over each support's pixels (paper eq. 3).

        Args:
            affinities: L tensors (N, A, Q, S), of all heads or of some.
            mask_NS: support masks at feature size, values in [0, 1].
            query_size: hq, wq.
            support_size: hs, ws.

        Returns:
            The evidence of each support, for `coarse_mask`.
        """
        layers = cast("list[B3DConv]", list(self.b3dconvs.children()))
        if not layers:
            blocks = (share(S, mask_NS) for S in affinities)
            return Evidence(*(torch.stack(x, dim=-1) for x in zip(*blocks, strict=True)))
        S_NAQSL = torch.stack(list(affinities), dim=-1)
        heads = S_NAQSL.shape[1]
        S = S_NAQSL.flatten(0, 1).unflatten(2, support_size).unflatten(1, query_size).movedim(-1, 1)
        mask_NS = mask_NS.repeat_interleave(heads, dim=0)
        if all(uses_batch(layer.norm) for layer in layers):
            evidence = self.in_training(S, mask_NS, *layers)
        else:
            enhanced = self.b3dconvs(S).movedim(1, -1)
            evidence = filtered(enhanced.flatten(3, 4).flatten(1, 2), mask_NS)
        return Evidence(*(x.unflatten(0, (-1, heads)) for x in evidence))

    def in_training(self, S: Tensor, mask_NS: Tensor, first: B3DConv, second: B3DConv) -> tuple[Tensor, Tensor]:
        """As `forward`, with norms in training mode: batch statistics, and less memory for the backward pass."""
        sizes = (S.shape[2], S.shape[3], S.shape[4], S.shape[5])
        S_NPC = S.movedim(1, -1).flatten(1, 4)
        z_NPC = Convolved.apply(S_NPC, *(weight.to(S.dtype) for weight in first.weights), sizes)
        mean, rstd, groups = statistics(first.norm, z_NPC)
        weights = (weight.to(S.dtype) for weight in second.weights)
        norm = first.norm
        z_NPC = RectifiedAndConvolved.apply(z_NPC, mean, rstd, norm.weight, norm.bias, *weights, groups, sizes)
        mean, rstd, groups = statistics(second.norm, z_NPC)
        return Filtered.apply(z_NPC, mean, rstd, second.norm.weight, second.norm.bias, mask_NS, groups, sizes)


def share(S_NAQS: Tensor, mask_NS: Tensor) -> Evidence:
    """The evidence (N, A, Q) of one block's affinities as they are; faster than `filtered`: the last axis is summed."""
    softmax = S_NAQS.softmax(dim=-1)
    peak = S_NAQS.max(dim=-1, keepdim=True)
    logsum = (peak.values - softmax.gather(-1, peak.indices).log()).squeeze(-1)
    return Evidence((softmax * mask_NS[:, None, None]).sum(dim=-1), logsum)


def coarse_mask(evidence: Evidence, shots: int) -> Tensor:
    """Joins the shots as one softmax over the pixels of all supports would (paper eq. 3), then averages over heads.

    Args:
        evidence: of N = B*K pairs; the shots of an episode are next to each other.
        shots: K.

    Returns:
        (B, C, Q), values in [0, 1].
    """
    share_BAQC = evidence.share
    if shots > 1:
        share_BKAQC, logsum_BKAQC = (x.unflatten(0, (-1, shots)) for x in evidence)
        share_BAQC = (logsum_BKAQC.softmax(dim=1) * share_BKAQC).sum(dim=1)
    return share_BAQC.mean(dim=1).transpose(1, 2)
