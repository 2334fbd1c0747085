"""Tells whether two photos are the same, also if one was saved again, resized or mirrored."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from datamodules import FewShotDataset
from datamodules.progress import track

SIDE = 32  # of the thumbnails that are compared
BLUR = 5  # the mean over so many pixels of a thumbnail is taken away: what is left tells photos of one kind apart
SAME = 0.95  # correlation from which two images are one: edits have 0.96 or more, different photos 0.56 or less
PLAIN = 1.0  # grey levels by which an image must differ from its blur; otherwise there is nothing to compare
BLOCK = 2048  # images compared at a time


class Print(NamedTuple):
    """What identifies an image.

    Attributes:
        pixels: sha256 of its size and pixels; empty if all pixels are equal.
        detail: (SIDE, SIDE) float16 of norm 1, its thumbnail without the blurred thumbnail; 0 if it is plain.
    """

    pixels: str
    detail: np.ndarray


def print_of(image: Tensor) -> Print:
    """The print of an image (3, H, W) uint8.

    Example:
        >>> import torch
        >>> image = torch.randint(256, (3, 48, 64), dtype=torch.uint8)
        >>> like(print_of(image), print_of(image.flip(2)))[0]
        'mirrored'
    """
    pixels = hashlib.sha256(f"{tuple(image.shape)}".encode() + image.contiguous().numpy().tobytes()).hexdigest()
    thumbnail = F.adaptive_avg_pool2d(image.float().mean(0)[None, None], SIDE)
    detail = thumbnail - F.avg_pool2d(thumbnail, BLUR, 1, BLUR // 2, count_include_pad=False)
    norm = float(detail.norm())
    detail = detail / norm if norm >= PLAIN * SIDE else detail * 0
    return Print("" if image.min() == image.max() else pixels, detail[0, 0].half().numpy())


def like(a: Print, b: Print) -> tuple[str, float] | None:
    """How two images are the same, and their correlation; None if they are not."""
    first, second = a.detail.astype(np.float32), b.detail.astype(np.float32)
    straight, turned = float((first * second).sum()), float((first[:, ::-1] * second).sum())
    if a.pixels and a.pixels == b.pixels:
        return "same pixels", 1.0
    if max(straight, turned) < SAME:
        return None
    return ("near-duplicate", straight) if straight >= turned else ("mirrored", turned)


def nearest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `a` (N, D), the largest product with a row of `b` (M, D), and its number; flat in memory."""
    best, where = np.full(len(a), -1, np.float32), np.zeros(len(a), np.int64)
    for top in track(range(0, len(a), BLOCK), "Comparing"):
        part = a[top : top + BLOCK].astype(np.float32)
        for left in range(0, len(b), BLOCK):
            product_NM = part @ b[left : left + BLOCK].astype(np.float32).T
            column, value = product_NM.argmax(1), product_NM.max(1)
            better = value > best[top : top + BLOCK]
            best[top : top + BLOCK][better] = value[better]
            where[top : top + BLOCK][better] = left + column[better]
    return best, where


class Album:
    """The prints of a dataset's images; each image is read once.

    Args:
        dataset: reads the images.
    """

    def __init__(self, dataset: FewShotDataset) -> None:
        self.dataset = dataset
        self.known: dict[str, Print] = {}

    def prints(self, names: Iterable[str]) -> dict[str, Print]:
        """Name -> print."""
        names = list(names)
        missing = [name for name in names if name not in self.known]

        def read(name: str) -> Print:
            return print_of(self.dataset.read_image(name))

        detail_NHW = np.empty((len(missing), SIDE, SIDE), np.float16)  # many small blocks fragment memory
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = track(pool.map(read, missing), f"Reading {self.dataset.name}", len(missing))
            for name, each, detail_HW in zip(missing, found, detail_NHW, strict=True):
                detail_HW[:] = each.detail
                self.known[name] = Print(each.pixels, detail_HW)
        return {name: self.known[name] for name in names}
