"""The centre-pivot 4D convolution (Min et al., ICCV 2021), and the step that HSNet's family builds of it.

Axes: B batch, C channels, hq, wq the query plane, hs, ws the support plane, in this order; S = hs * ws.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 4  # of every GroupNorm
Box = tuple[slice, slice]  # rows and columns of a support plane


class CenterPivotConv4d(nn.Module):
    """A 4D convolution whose kernel is non-zero only where one of its two planes is at its centre.

    What is left is two 2D convolutions, each with its own bias, whose outputs are added. The one over the query plane
    is computed at the support positions 0, s, 2s, ... alone.

    Args:
        kernel: side of both kernels, odd; zero padding keeps the sides.
        stride: s, of the support plane; the query plane keeps its size.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.reach = stride, kernel // 2
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel, padding=self.reach)  # over the query plane
        self.conv2 = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=self.reach)  # over the support plane

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, hq, wq, hs, ws) -> (B, C', hq, wq, ceil(hs / s), ceil(ws / s))."""
        if self.stride == 1 and max(x.shape[4:]) <= self.reach + 1:
            return self.of_small_plane(x)
        B, _, hq, wq = x.shape[:4]
        over_support = self.conv2(x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
        kept = x[..., :: self.stride, :: self.stride].permute(0, 4, 5, 1, 2, 3).flatten(0, 2)
        over_query = self.conv1(kept.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        sums, others = over_support.reshape(B, -1, len(kept) // B), over_query.reshape(B, len(kept) // B, -1)
        for b in range(B):
            sums[b] += others[b].T.contiguous()  # a transposed matrix is copied faster than it is added
        return sums.view(B, hq, wq, -1, *over_support.shape[2:]).permute(0, 3, 1, 2, 4, 5)

    def of_small_plane(self, x: Tensor) -> Tensor:
        """The same where every window over the support plane covers all of it: one matrix product, where a convolution
        would multiply mostly padding."""
        B, _, hq, wq, hs, ws = x.shape
        x_BSCQ = x.permute(0, 4, 5, 1, 2, 3).flatten(0, 2).contiguous()
        over_query = F.conv2d(x_BSCQ, self.conv1.weight, self.bias, padding=self.reach)
        from_i_j = [self.conv2.weight[:, :, self.reach - i :, self.reach - j :] for i in range(hs) for j in range(ws)]
        weight = torch.stack([w[:, :, :hs, :ws] for w in from_i_j])  # (to S, C', C, from hs, from ws)
        matrix = weight.permute(0, 1, 3, 4, 2).reshape(1, -1, x_BSCQ.shape[1] * hs * ws).expand(B, -1, -1)
        both = torch.baddbmm(over_query.reshape(B, -1, hq * wq), matrix, x_BSCQ.view(B, -1, hq * wq))
        return both.view(B, hs, ws, -1, hq, wq).permute(0, 3, 4, 5, 1, 2)

    @property
    def bias(self) -> Tensor:
        """What the output is where the input is zero, (C',)."""
        return self.conv1.bias + self.conv2.bias  # type: ignore[operator]

    def box(self, occupied: Box, size: tuple[int, int]) -> Box:
        """The part to convolve of a support plane of some size, where the input is zero outside `occupied`."""

        def stretch(part: slice, side: int) -> slice:
            start = max(0, part.start - self.reach) // self.stride * self.stride
            return slice(start, min(side, part.stop + self.reach))

        return stretch(occupied[0], size[0]), stretch(occupied[1], size[1])

    def whole(self, y: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
        """The output for a whole support plane of some size.

        Args:
            y: the output for the part of the input in `box`; the input is zero elsewhere.
        """
        sides = [-(-side // self.stride) for side in size]
        if list(y.shape[4:]) == sides:
            return y
        y = y.permute(0, 2, 3, 1, 4, 5)
        plane = self.bias[:, None, None].expand(*y.shape[:4], *sides).clone(memory_format=torch.contiguous_format)
        i, j = (part.start // self.stride for part in box)
        plane[..., i : i + y.shape[4], j : j + y.shape[5]] = y
        return plane.permute(0, 3, 1, 2, 4, 5)


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
