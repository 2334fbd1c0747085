"""Large images in tiles: small objects keep their pixels, and memory does not grow with the image."""

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from pmnet.segment.segmenter import Segmenter

OVERLAP = 0.25  # share of a tile's side that it has in common with the next


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


def joined(segmenter: "Segmenter", image: Tensor, side: int, gate: bool) -> Piece:
    """Segments an image (3, H, W) uint8 tile by tile; each pixel is that of the tile whose middle is nearest."""
    height, width = image.shape[-2:]
    mask, score = np.zeros((height, width), np.uint8), np.zeros((height, width), np.float16)
    presences = [0.0] * len(segmenter.classes)
    for top, bottom, upper, lower in steps(height, side):
        for left, right, first, last in steps(width, side):
            piece = segmenter.piece(image[:, top:bottom, left:right], gate)
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
