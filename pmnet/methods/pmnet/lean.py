"""The three expensive steps of the HSFM in training, with little memory. Suffixes of tensor names: see `affinity.py`.

The second and third step begin with y = relu(norm(z)). Autograd would keep z, y and the result of the step for the
backward pass. These functions keep only z and compute the rest again, a few pairs at a time.

In this file, N is the number of pairs times heads, and P the number of positions of an affinity, hq*wq*hs*ws.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ON_CPU, ELSEWHERE = 2**21, 2**25  # positions of affinities that are processed at a time
Sizes = tuple[int, int, int, int]  # hq, wq, hs, ws


def at_a_time(device: torch.device) -> int:
    """Positions to process at a time: enough to fill a CPU's cores; many more for an accelerator, at 64 bytes each."""
    return ON_CPU if device.type == "cpu" else ELSEWHERE


def portions(x_NPC: Tensor) -> Iterator[slice]:
    """Slices of the axis N to process one after the other."""
    half = at_a_time(x_NPC.device) // x_NPC.shape[1] // 4
    step = max(2, 2 * half)  # even, because PyTorch chooses a slow convolution for a batch of one
    return (slice(i, i + step) for i in range(0, len(x_NPC), step))


class Rectified(NamedTuple):
    """relu(norm(z)), computed portion by portion on request.

    Attributes:
        z: the input (N, P, C).
        mean: the mean by which the norm shifts, (N, 1, C); it depends on z.
        rstd: the inverse standard deviation by which the norm scales, (N, 1, C); it depends on z.
        weight: of the norm, (C,).
        bias: of the norm, (C,).
        groups: number of groups of a GroupNorm; 0 for a BatchNorm.
    """

    z: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    groups: int

    def part(self, i: slice) -> Tensor:
        """relu(norm(z)) of one portion, in the dtype of z."""
        scale = self.rstd[i] * self.weight
        return torch.addcmul(self.bias - self.mean[i] * scale, self.z[i], scale).relu_().to(self.z.dtype)

    def backward(self, gradient: Callable[[slice, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of z, weight and bias.

        Args:
            gradient: returns the gradient of y = relu(norm(z)), given a portion and its y.
        """
        grad_NPC = torch.empty_like(self.z)
        sums, sums_of_z = torch.empty_like(self.mean), torch.empty_like(self.mean)
        for i in portions(self.z):
            y = self.part(i)
            part = torch.ops.aten.threshold_backward.grad_input(gradient(i, y), y, 0, grad_input=grad_NPC[i])
            sums[i] = part.sum(1, keepdim=True, dtype=sums.dtype)
            sums_of_z[i] = ((self.z[i] - self.mean[i]) * part).sum(1, keepdim=True, dtype=sums.dtype) * self.rstd[i]
        of_mean, of_z = (average(self.weight * s, self.groups) / self.z.shape[1] for s in (sums, sums_of_z))
        slope = -self.rstd.square() * of_z
        scale, shift = self.rstd * self.weight, -self.rstd * of_mean - slope * self.mean
        for i in portions(self.z):  # rounds only once, at the end
            grad_NPC[i] = torch.addcmul(torch.addcmul(shift[i], grad_NPC[i], scale[i]), self.z[i], slope[i])
        return grad_NPC, sums_of_z.sum((0, 1)), sums.sum((0, 1))


def average(x_N1C: Tensor, groups: int) -> Tensor:
    """Averages over what the norm normalises together: the batch (groups = 0), or the channels of each group."""
    if not groups:
        return x_N1C.mean(0, keepdim=True).expand_as(x_N1C)
    grouped = x_N1C.unflatten(2, (groups, -1))
    return grouped.mean(3, keepdim=True).expand_as(grouped).flatten(2)


@torch.no_grad()
def statistics(norm: nn.Module, z_NPC: Tensor) -> tuple[Tensor, Tensor, int]:
    """Statistics of a batch. Updates the running ones of a BatchNorm.

    Args:
        norm: BatchNorm3d or GroupNorm, in training mode.
        z_NPC: the input of the norm.

    Returns:
        Mean and inverse standard deviation, (N, 1, C) in float32 or better, and the number of groups (0: BatchNorm).
    """
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
    exact = torch.promote_types(z_NPC.dtype, torch.float32)
    mean = average(z_NPC.mean(1, keepdim=True, dtype=exact), groups)
    squares = [(z_NPC[i] - mean[i]).square_().mean(1, keepdim=True, dtype=exact) for i in portions(z_NPC)]
    var = average(torch.cat(squares), groups)
    if isinstance(norm, nn.BatchNorm3d):
        count = z_NPC[..., 0].numel()
        for running, new in ((norm.running_mean, mean[0, 0]), (norm.running_var, var[0, 0] * count / (count - 1))):
            running.lerp_(new.to(running.dtype), norm.momentum)  # type: ignore[union-attr, arg-type]
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    return mean, torch.rsqrt(var + norm.eps), groups  # type: ignore[operator]


class Convolved(Function):
    """Sum of both convolutions of a B3DConv, applied to the affinities S (N, P, C)."""

    @staticmethod
    def forward(
        ctx: Any, S: Tensor, over_query: Tensor, over_support: Tensor, shift: Tensor, sizes: Sizes
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(S, over_query, over_support)
        ctx.sizes = sizes
        return convolved(S, lambda i: S[i], over_query, over_support, shift, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        S, *kernels = ctx.saved_tensors
        of_S = torch.empty_like(S) if ctx.needs_input_grad[0] else None
        backward = ConvolvedBackward(grad, kernels, ctx.sizes)
        for i in portions(S):
            of_part = backward(i, S[i], of_S is not None)
            if of_S is not None:
                of_S[i] = of_part
        return of_S, *backward.of_kernels, grad.sum((0, 1)), None


class RectifiedAndConvolved(Function):
    """Sum of both convolutions of a B3DConv, applied to relu(norm(z))."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
        over_query: Tensor, over_support: Tensor, shift: Tensor, groups: int, sizes: Sizes,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(z, mean, rstd, weight, bias, over_query, over_support)
        ctx.groups, ctx.sizes = groups, sizes
        rectified = Rectified(z, mean, rstd, weight, bias, groups)
        return convolved(z, rectified.part, over_query, over_support, shift, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, rstd, weight, bias, *kernels = ctx.saved_tensors
        backward = ConvolvedBackward(grad, kernels, ctx.sizes)
        of_z, of_weight, of_bias = Rectified(z, mean, rstd, weight, bias, ctx.groups).backward(backward)
        return of_z, None, None, of_weight, of_bias, *backward.of_kernels, grad.sum((0, 1)), None, None


class Filtered(Function):
    """`filtered`, applied to relu(norm(z))."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
        mask_NS: Tensor, groups: int, sizes: Sizes,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rectified = Rectified(z, mean, rstd, weight, bias, groups)
        parts = [filtered(by_support_pixel(rectified.part(i), sizes), mask_NS[i]) for i in portions(z)]
        share, logsum = (torch.cat(x) for x in zip(*parts, strict=True))
        ctx.save_for_backward(z, mean, rstd, weight, bias, mask_NS, share)
        ctx.groups, ctx.sizes = groups, sizes
        return share, logsum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_share: Tensor, of_logsum: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, rstd, weight, bias, mask_NS, share_NQC = ctx.saved_tensors

        def gradient(i: slice, y: Tensor) -> Tensor:
            E_NQSC = by_support_pixel(y, ctx.sizes)
            above = torch.sub(mask_NS[i, None, :, None], share_NQC[i, :, None], out=torch.empty_like(E_NQSC))
            total = above.mul_(of_share[i, :, None]).add_(of_logsum[i, :, None])
            return total.mul_(E_NQSC.softmax(dim=2)).flatten(1, 2)

        of_z, of_weight, of_bias = Rectified(z, mean, rstd, weight, bias, ctx.groups).backward(gradient)
        return of_z, None, None, of_weight, of_bias, None, None, None


def convolved(
    like: Tensor, part: Callable[[slice], Tensor], over_query: Tensor, over_support: Tensor, shift: Tensor, sizes: Sizes
) -> Tensor:
    """Sum of both convolutions of a B3DConv.

    Args:
        like: a tensor with the shape (N, P, C), dtype and device of the input.
        part: returns a portion of the input.
        over_query: kernel of the convolution over the query plane, (C', C, k, k, 1).
        over_support: kernel of the convolution over the support plane, (C', C, 1, k, k).
        shift: sum of both biases, (C',).
        sizes: hq, wq, hs, ws.

    Returns:
        (N, P, C'). Its memory block has some bytes to spare, so that a gradient of the same size can reuse it:
        PyTorch asks for aligned memory, and glibc before 2.38 only finds it in blocks larger than requested.
    """
    shape = (*like.shape[:2], len(shift))
    out = like.new_empty(math.prod(shape) + 1024)[:-1024].view(shape)
    k = over_query.shape[2] // 2
    for i in portions(like):
        y_query, y_support = planes(part(i), sizes)
        out_part = out[i]
        z_query = F.conv3d(y_query, over_query, shift, padding=(k, k, 0))
        z_support = F.conv3d(y_support, over_support, padding=(0, k, k))
        both = (z.movedim(1, -1).reshape(out_part.shape) for z in (z_query, z_support))
        torch.add(*both, out=out_part)
    return out


class ConvolvedBackward:
    """The backward pass of `convolved`.

    Args:
        grad: gradient of the result, (N, P, C').
        kernels: of the convolutions over the query and over the support.
        sizes: hq, wq, hs, ws.
    """

    def __init__(self, grad: Tensor, kernels: list[Tensor], sizes: Sizes) -> None:
        exact = torch.promote_types(grad.dtype, torch.float32)
        self.grad, self.kernels, self.sizes = grad, kernels, sizes
        self.sums = [torch.zeros_like(kernel, dtype=exact) for kernel in kernels]

    def __call__(self, i: slice, y: Tensor, wanted: bool = True) -> Tensor:
        """Adds the portion's gradients of the kernels. Returns the gradient of its input y; if not `wanted`, empty."""
        k = self.kernels[0].shape[2] // 2
        sides = zip(planes(self.grad[i], self.sizes), planes(y, self.sizes), strict=True)
        of_y = []
        for (g, x), kernel, total, pad in zip(sides, self.kernels, self.sums, ((k, k, 0), (0, k, k)), strict=True):
            of_x, of_kernel, _ = torch.ops.aten.convolution_backward(
                g, x, kernel, None, (1, 1, 1), pad, (1, 1, 1), False, (0, 0, 0), 1, (wanted, True, False)
            )
            total += of_kernel
            of_y.append(of_x.movedim(1, -1).reshape(y.shape) if wanted else y.new_empty(0))
        return of_y[0].add_(of_y[1])

    @property
    def of_kernels(self) -> list[Tensor]:
        """Gradients of both kernels."""
        return [total.to(kernel.dtype) for total, kernel in zip(self.sums, self.kernels, strict=True)]


def planes(x_NPC: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Two views of (N, P, C): (N, C, hq, wq, S) and (N, C, Q, hs, ws)."""
    hq, wq, hs, ws = sizes
    x = x_NPC.movedim(2, 1)
    return x.unflatten(2, (hq, wq, hs * ws)), x.unflatten(2, (hq * wq, hs, ws))


def by_support_pixel(x_NPC: Tensor, sizes: Sizes) -> Tensor:
    """(N, P, C) -> (N, Q, S, C)."""
    return x_NPC.unflatten(1, (sizes[0] * sizes[1], -1))


def filtered(E_NQSC: Tensor, mask_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the support pixels: the share on the mask, and the logarithm of the denominator.

    Args:
        E_NQSC: enhanced affinities.
        mask_NS: support masks, values in [0, 1].

    Returns:
        Share in [0, 1] and log-denominator, each (N, Q, C).
    """
    softmax = E_NQSC.softmax(dim=2)
    peak, at = peaks(softmax)  # the peak is exp(E - logsum) at the largest E; torch.logsumexp takes twice as long
    return on_mask(softmax, mask_NS), (E_NQSC.gather(2, at) - peak.log()).squeeze(2)


def on_mask(softmax_NQSC: Tensor, mask_NS: Tensor) -> Tensor:
    """The share (N, Q, C) of a softmax over the support pixels that lies on the mask."""
    if softmax_NQSC.device.type != "cpu":  # autocast would round both sides of a matrix product
        return (softmax_NQSC * mask_NS[:, None, :, None]).sum(dim=2)
    return (mask_NS[:, None, None].to(softmax_NQSC.dtype) @ softmax_NQSC).squeeze(2)


def peaks(x_NQSC: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entries over the support pixels, and where they are, each (N, Q, 1, C)."""
    if x_NQSC.device.type != "cpu":
        return x_NQSC.max(dim=2, keepdim=True)
    x = x_NQSC.flatten(0, 1).movedim(2, 1)[:, :, None]  # (N*Q, C, 1, S), where a pooling is three times as fast as max
    pooled = F.max_pool2d(x, (1, x.shape[3]), return_indices=True)
    return tuple(y.movedim(1, -1).flatten(1, 2).unflatten(0, x_NQSC.shape[:2]) for y in pooled)
