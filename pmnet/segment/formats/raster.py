"""Shapes and run lengths as pixels.

A pixel belongs to a shape if its centre does; pixel (0, 0) covers [0, 1) x [0, 1).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Size = tuple[int, int]  # H, W


class Shape(Protocol):
    """Something that marks pixels."""

    def paint(self, index: np.ndarray, value: int) -> None:
        """Writes `value` into the index mask (H, W) uint8 where the shape is."""


def painted(size: Size, shapes: Iterable[tuple[int, Shape]]) -> np.ndarray:
    """The index mask (H, W) uint8 of pairs of a value and a shape; later ones over earlier ones."""
    index = np.zeros(size, np.uint8)
    for value, shape in shapes:
        shape.paint(index, value)
    return index


def points_of(numbers: object) -> np.ndarray:
    """(N, 2) float32 of x, y, x, y, ... or of pairs. Raises ValueError if these are no points."""
    points = np.array(numbers, np.float32)
    if points.size % 2 or not np.isfinite(points).all():
        raise ValueError("a point needs two finite numbers")
    return points.reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class Rings:
    """Polygons, each (N, 2) x, y; a pixel inside any of them is marked."""

    rings: Sequence[np.ndarray]

    def paint(self, index: np.ndarray, value: int) -> None:
        for ring in self.rings:
            fill(index, ring, value)


@dataclass(frozen=True, slots=True)
class Stroke:
    """Everything within `radius` of a line through points (N, 2); a disc for a single point."""

    points: np.ndarray
    radius: float

    def paint(self, index: np.ndarray, value: int) -> None:
        begins = self.points[:-1] if len(self.points) > 1 else self.points
        ends = self.points[1:] if len(self.points) > 1 else self.points
        for begin, end in zip(begins, ends, strict=True):
            box = window(np.stack([begin, end]), index.shape, self.radius)
            y, x = np.ogrid[box]
            along, across = end - begin, (x + 0.5 - begin[0], y + 0.5 - begin[1])
            share = np.clip((across[0] * along[0] + across[1] * along[1]) / max(along @ along, 1e-12), 0, 1)
            near = np.hypot(across[0] - share * along[0], across[1] - share * along[1]) <= self.radius
            index[box][near] = value


@dataclass(frozen=True, slots=True)
class Runs:
    """COCO's run lengths: of zeros and ones in turn, down the columns.

    Attributes:
        counts: the lengths, (N,) int; or text that holds them compressed.
    """

    counts: str | np.ndarray
    size: Size

    def paint(self, index: np.ndarray, value: int) -> None:
        if self.size != index.shape:
            raise ValueError(f"run lengths of {self.size} (height, width) in an image of {index.shape}")
        counts = decompressed(self.counts) if isinstance(self.counts, str) else self.counts
        if (counts < 0).any() or counts.sum() != index.size:
            raise ValueError(f"the run lengths add up to {counts.sum()} instead of {index.size} pixels")
        marked = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(index.shape[::-1]).T
        index[marked] = value


def window(points: np.ndarray, size: Size, margin: float = 0) -> tuple[slice, slice]:
    """The rows and columns of an image that hold points (N, 2) and a margin around them."""
    height, width = size
    left, top = np.clip(np.floor(points.min(0) - margin), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(0) + margin), 0, (width, height)).astype(int)
    return slice(top, bottom), slice(left, right)


def fill(index: np.ndarray, ring: np.ndarray, value: int) -> None:
    """Paints the inside of a polygon (N, 2): a pixel left of whose centre an odd number of edges passes."""
    rows, columns = window(ring, index.shape)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if not height or not width:
        return
    begin = ring - (columns.start, rows.start) - 0.5
    end = np.roll(begin, -1, 0)
    ends = np.ceil(np.clip(np.stack([begin[:, 1], end[:, 1]]), -1, height)).clip(0).astype(int)
    first, last = ends.min(0), ends.max(0)  # an edge crosses the rows first .. last - 1
    lengths = last - first
    edge = np.repeat(np.arange(len(ring)), lengths)
    row = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths - first, lengths)
    (x, y), (dx, dy) = begin[edge].T, (end - begin)[edge].T
    column = np.ceil(np.clip(x + (row - y) / dy * dx, -1, width)).clip(0).astype(int)
    crossings = np.bincount(row * (width + 1) + column, minlength=height * (width + 1)).reshape(height, width + 1)
    inside = (crossings.cumsum(1) % 2 == 1)[:, :width]
    index[rows, columns][inside] = value


def decompressed(text: str) -> np.ndarray:
    """The run lengths in COCO's compressed text: 5 bits a character, and from the fourth on as differences.

    Raises:
        ValueError: the text holds no run lengths.

    Example:
        >>> decompressed("52203")
        array([5, 2, 2, 2, 5])
    """
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)  # of each number's last character
    if not len(ends) or ends[-1] != len(codes) - 1 or codes.min() < 0 or codes.max() > 63:
        raise ValueError("the compressed run lengths are damaged")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:
        raise ValueError("the compressed run lengths are damaged")
    place = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    counts = np.add.reduceat((codes & 31) << place, starts) - ((codes[ends] & 16) >> 4 << 5 * lengths)
    counts[1::2] = counts[1::2].cumsum()
    counts[2::2] = counts[2::2].cumsum()
    return counts
