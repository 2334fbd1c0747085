"""The centre-pivot 4D convolution (Min et al., ICCV 2021), and the step that HSNet's family builds of it.

Axes: B batch, C channels, hq, wq the query plane, hs, ws the support plane, in this order.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 4  # of every GroupNorm


class CenterPivotConv4d(nn.Module):
    """A 4D convolution whose kernel is non-zero only where one of its two planes is at its centre.

    What is left is two 2D convolutions, each with its own bias, whose outputs are added.

    Args:
        kernel: side of both kernels, odd; zero padding keeps the sides.
        stride: of the support plane; the query plane keeps its size.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)  # over the query plane
        self.conv2 = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)  # over the support's

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, hq, wq, hs, ws) -> (B, C', hq, wq, ceil(hs / stride), ceil(ws / stride))."""
        B, _, hq, wq = x.shape[:4]
        kept = x[..., :: self.stride, :: self.stride]
        hs, ws = kept.shape[-2:]
        over_query = self.conv1(kept.permute(0, 4, 5, 1, 2, 3).flatten(0, 2)).unflatten(0, (B, hs, ws))
        over_support = self.conv2(x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)).unflatten(0, (B, hq, wq))
        return over_query.permute(0, 3, 4, 5, 1, 2) + over_support.permute(0, 3, 1, 2, 4, 5)


class GroupNorm4d(nn.GroupNorm):
    """GroupNorm whose statistics are over a group's channels and all four axes of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def building_steps(channels: Sequence[int], kernels: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """4D convolution, GroupNorm and ReLU, once for each kernel.

    Args:
        channels: of the input and of each step's output: one more than there are steps.
        kernels: side of each step's kernels.
        strides: of each step's support plane.
    """
    steps: list[nn.Module] = []
    for (in_channels, out_channels), kernel, stride in zip(pairwise(channels), kernels, strides, strict=True):
        conv = CenterPivotConv4d(in_channels, out_channels, kernel, stride)
        steps += [conv, GroupNorm4d(GROUPS, out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*steps)
