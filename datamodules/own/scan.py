"""Reads every image and mask of a folder once, so that a broken file is found before training."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import DatasetError
from datamodules.own.layouts import Pair
from datamodules.progress import track
from pmnet.segment.images import decode, load_image

Pixels = dict[int, int]  # value in a mask -> number of its pixels


def scan(pairs: Mapping[str, Pair], read_mask: Callable[[Path], Tensor], what: str) -> dict[str, Pixels]:
    """Reads and checks all pairs, on all CPU cores.

    Args:
        pairs: name -> image and mask.
        read_mask: reads a mask file, as `index_values` or `foreground`.
        what: what is read, for the progress bar.

    Returns:
        Name -> number of pixels of each value in the mask. An entry depends on its two files and on `read_mask` alone,
        not on any setting.

    Raises:
        DatasetError: a mask is invalid, or its size differs from that of its image.
        ImageError: a file cannot be read.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda pair: examine(pair, read_mask), pairs.values())
        return dict(zip(pairs, track(found, f"Reading {what}", len(pairs)), strict=True))


def examine(pair: Pair, read_mask: Callable[[Path], Tensor]) -> Pixels:
    """The pixels of each value in the mask of one pair; arguments and errors as those of `scan`."""
    image, mask = load_image(pair.image), read_mask(pair.mask)
    if image.shape[1:] != mask.shape:
        (h, w), (mh, mw) = image.shape[1:], mask.shape
        raise DatasetError(
            f"{pair.mask} is {mw}x{mh} pixels, but its image {pair.image.name} is {w}x{h}. "
            "Save both with the same size."
        )
    counts = torch.bincount(mask.flatten().int(), minlength=256)
    return {value: int(counts[value]) for value in counts.nonzero().flatten().tolist()}


def index_values(path: Path) -> Tensor:
    """Reads an index mask: (H, W) uint8 values, by index if it has a palette. A 1-bit mask holds 0 and 255.

    Raises:
        DatasetError: it has colours, transparency or more than 8 bits.
        ImageError: it cannot be read.
    """
    mask = decode(path)
    values = np.array(mask.convert("L") if mask.mode == "1" else mask)
    if mask.mode in ("LA", "RGBA") and (values[..., -1] == 255).all():
        values = values[..., :-1]
    if mask.mode in ("LA", "RGB", "RGBA") and (values == values[..., :1]).all():
        values = values[..., 0]  # grey, saved with several equal channels
    if values.ndim != 2 or mask.mode == "F" or values.max(initial=0) > 255:
        raise DatasetError(
            f"{path} is not an index mask (mode {mask.mode}). Save it with one channel of 8 bits: "
            "0 = none, k = class of line k in classes.txt, 255 = ignore."
        )
    return torch.from_numpy(values.astype(np.uint8))


def foreground(path: Path) -> Tensor:
    """Reads a black and white mask: (H, W) uint8, 1 where it is 128 or more, or 1 in a mask of 0 and 1.

    Raises:
        ImageError: it cannot be read.
    """
    values = np.asarray(decode(path).convert("L"))
    return torch.from_numpy((values >= (128 if values.max() > 1 else 1)).astype(np.uint8))
