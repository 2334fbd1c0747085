"""Large images in tiles: small objects keep their pixels, and memory does not grow with the image.

Of large supports with small objects, the part around an object is shown to the method when an image is cut into tiles.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pmnet.errors import SettingError

if TYPE_CHECKING:
    from pmnet.segment.segmenter import Segmenter, Shown

LEAST = 64  # pixels of a tile's side
OVERLAP = 0.25  # share of a tile's side that it has in common with the next
LARGE = 4  # a support is large whose side is this many times that of the network
AROUND = 3  # side of the part around an object, as a multiple of the object's
CELLS = 8  # steps per side in which this part is looked for
Part = tuple[slice, slice]  # rows and columns of an image


class Piece(NamedTuple):
    """What was found in an image or a tile of H x W pixels.

    Attributes:
        mask: (H, W) uint8; 0 = none, k = the k-th class.
        score: (H, W) float16 in 0..1.
        presences: of each class, 0..1.
    """

    mask: np.ndarray
    score: np.ndarray
    presences: list[float]


def check(tile: int | str | None) -> None:
    """Raises SettingError if this is none of "auto", None and a side of tiles."""
    if tile not in ("auto", None) and not (isinstance(tile, int) and tile >= LEAST):
        raise SettingError(f"tile must be auto, none or a side of at least {LEAST} pixels, not {tile!r}.")


def joined(segmenter: "Segmenter", shown: "Sequence[Shown]", image: Tensor, side: int, gate: bool) -> Piece:
    """Segments an image (3, H, W) uint8 tile by tile; each pixel is that of the tile whose middle is nearest."""
    height, width = image.shape[-2:]
    mask, score = np.zeros((height, width), np.uint8), np.zeros((height, width), np.float16)
    presences = [0.0] * len(segmenter.classes)
    for top, bottom, upper, lower in steps(height, side):
        for left, right, first, last in steps(width, side):
            piece = segmenter.piece(shown, image[:, top:bottom, left:right], gate)
            inner = slice(upper - top, lower - top), slice(first - left, last - left)
            mask[upper:lower, first:last] = piece.mask[inner]
            score[upper:lower, first:last] = piece.score[inner]
            presences = [max(pair) for pair in zip(presences, piece.presences, strict=True)]
    return Piece(mask, score, presences)


def steps(length: int, side: int) -> list[tuple[int, int, int, int]]:
    """Tiles along one axis: where each begins and ends, and where its own part begins and ends.

    Example:
        >>> steps(100, 60)
        [(0, 60, 0, 50), (40, 100, 50, 100)]
        >>> steps(50, 60)
        [(0, 50, 0, 50)]
    """
    if length <= side:
        return [(0, length, 0, length)]
    count = 1 + -(-(length - side) // round(side * (1 - OVERLAP)))
    starts = [round(i * (length - side) / (count - 1)) for i in range(count)]
    borders = [0, *((a + side + b) // 2 for a, b in pairwise(starts)), length]
    return [(a, a + side, borders[i], borders[i + 1]) for i, a in enumerate(starts)]


# Parts of supports


def close_ups(mask_HW: Tensor, network_side: int) -> list[Part]:
    """The part of a large support around a small object, and one of the same size that shows no object.

    Args:
        mask_HW: (H, W) bool.
        network_side: the longer side of the images that the network sees.

    Returns:
        Both parts, or the first alone; none if the support is not large or the object is not small.
    """
    height, width = mask_HW.shape
    if max(height, width) < LARGE * network_side:
        return []
    side = max(round(AROUND * extent(mask_HW.numpy())), network_side)
    if max(height, width) <= 2 * side:
        return []
    cell = side // CELLS
    share_yx = F.avg_pool2d(mask_HW[None, None].float(), (min(cell, height), min(cell, width)))
    share_yx = F.avg_pool2d(share_yx, [min(CELLS, length) for length in share_yx.shape[-2:]], 1)[0, 0]
    top, left = (int(at) * cell for at in divmod(int(share_yx.argmax()), share_yx.shape[1]))
    y, x = torch.nonzero(mask_HW[top : top + side, left : left + side], as_tuple=True)
    around = part(top + int(y.float().mean()), left + int(x.float().mean()), side, (height, width))
    top, left = (int(at) * cell for at in divmod(int(share_yx.argmin()), share_yx.shape[1]))
    bare = part(top + side // 2, left + side // 2, side, (height, width))
    return [around] if mask_HW[bare].any() else [around, bare]


def part(y: int, x: int, side: int, size: tuple[int, int]) -> Part:
    """The square around a pixel, moved into the image of `size` H, W."""
    starts = [max(0, min(at - side // 2, length - side)) for at, length in zip((y, x), size, strict=True)]
    rows, columns = (slice(a, min(a + side, length)) for a, length in zip(starts, size, strict=True))
    return rows, columns


def middle(image: Tensor, side: int) -> Part:
    """The square in the middle of an image (3, H, W)."""
    height, width = image.shape[-2:]
    return part(height // 2, width // 2, side, (height, width))


def extent(mask_HW: np.ndarray) -> float:
    """How long a mask's runs of pixels are, along the rows or down the columns: the mean over its pixels.

    Example:
        >>> mask = np.zeros((9, 9), bool)
        >>> mask[2:5, 1:3] = mask[7, 7] = True
        >>> round(extent(mask), 2)  # six pixels in columns of 3, one alone
        2.71
    """
    means = []
    for lines in (mask_HW, mask_HW.T):
        flat = np.pad(lines, ((0, 0), (1, 1))).ravel()
        borders = np.flatnonzero(flat[1:] != flat[:-1])
        lengths = borders[1::2] - borders[::2]
        means.append(float((lengths**2).sum() / max(lengths.sum(), 1)))
    return max(means)
