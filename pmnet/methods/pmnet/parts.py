"""Affinities of large images in parts that fit into memory: some pairs, then some heads, then some rows of the query.

An enhanced affinity depends on those of the query's rows nearby alone, so that each part is computed with a few rows
around it, which are dropped again.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pmnet.methods.pmnet.affinity import HEADS
from pmnet.methods.pmnet.hsfm import Evidence
from pmnet.methods.pmnet.lean import at_a_time

LARGEST = 6  # a part may be so many times larger than what is fastest: smaller ones compute too many rows twice
FEWEST = 2  # heads at a time: PyTorch chooses a slow convolution for a batch of one


class Rows(NamedTuple):
    """Rows of the query plane: those to compute, and those of the result to keep."""

    computed: slice
    kept: slice


def pairs_at_a_time(positions: int, device: torch.device) -> int:
    """Pairs of query and support to process at a time, at least 1.

    Args:
        positions: hq*wq*hs*ws.
        device: where the affinities are.
    """
    return max(1, at_a_time(device) // (HEADS * positions))


def in_parts(
    compute: Callable[[slice, slice], Evidence], query_size: tuple[int, int], support: int, halo: int | None,
    device: torch.device,
) -> Evidence:  # fmt: skip
    """The evidence of all heads and rows.

    Args:
        compute: the evidence (N, A', Q', C) of some heads and of some rows of the query.
        query_size: hq, wq.
        support: hs*ws.
        halo: rows on either side on which a row's result depends; None: all.
        device: where the affinities are.
    """
    hq, wq = query_size
    most = LARGEST * at_a_time(device) // (wq * support)  # rows of one head
    heads = HEADS if HEADS * hq <= most else FEWEST
    rows = hq if halo is None else most // heads
    found = []
    for first in range(0, HEADS, heads):
        chosen = slice(first, first + heads)
        blocks = [cut(compute(chosen, block.computed), block.kept, wq) for block in blocks_of(hq, rows, halo or 0)]
        found.append(Evidence(*(torch.cat(part, dim=2) for part in zip(*blocks, strict=True))))
    return Evidence(*(torch.cat(part, dim=1) for part in zip(*found, strict=True)))


def blocks_of(rows: int, most: int, halo: int) -> Iterator[Rows]:
    """Cuts rows into blocks.

    Args:
        rows: their number.
        most: rows to compute at a time, if these are at least three times `halo`.
        halo: rows to compute on either side of those to keep.

    Example:
        >>> for block in blocks_of(10, most=8, halo=1):
        ...     print(block.computed, block.kept)
        slice(0, 7, None) slice(0, 6, None)
        slice(5, 10, None) slice(1, 5, None)
    """
    step = rows if most >= rows else max(1, halo, most - 2 * halo)
    for first in range(0, rows, step):
        top, last = max(0, first - halo), min(first + step, rows)
        yield Rows(slice(top, min(last + halo, rows)), slice(first - top, last - top))


def cut(evidence: Evidence, rows: slice, width: int) -> Evidence:
    """Some rows of evidence (N, A, Q, C)."""

    def part(x: Tensor) -> Tensor:
        return x[:, :, rows.start * width : rows.stop * width]

    return Evidence(*map(part, evidence))
