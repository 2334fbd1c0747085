"""Supports without a mask: a box, points or a scribble, from which the backbone's features grow a mask.

Positions that are surely foreground and surely background give two sets of features; every other position takes the
side of its nearest one. Outside a box all is background; inside, both sides are found in turn, as in k-means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pmnet.errors import SettingError

BACKGROUND, FOREGROUND, UNKNOWN, PROBABLE = 0, 1, 2, 3  # of seeds
ROUNDS = 8


class Mark:
    """What stands for a mask."""

    def seeds(self, size: tuple[int, int]) -> Tensor:
        """(H, W) uint8 of BACKGROUND, FOREGROUND, UNKNOWN, PROBABLE foreground, for an image of `size` H, W.

        Raises:
            SettingError: the mark lies outside the image.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Box(Mark):
    """The object fills a box: x0 <= x < x1 and y0 <= y < y1, in pixels of the image."""

    x0: float
    y0: float
    x1: float
    y1: float

    def seeds(self, size: tuple[int, int]) -> Tensor:
        top, bottom = (int(np.clip(round(y), 0, size[0])) for y in (self.y0, self.y1))
        left, right = (int(np.clip(round(x), 0, size[1])) for x in (self.x0, self.x1))
        if bottom <= top or right <= left:
            raise SettingError(f"{self} holds no pixel of an image of {size[1]} x {size[0]} (width x height).")
        seeds = torch.full(size, BACKGROUND, dtype=torch.uint8)
        seeds[top:bottom, left:right] = PROBABLE
        return seeds


@dataclass(frozen=True)
class Points(Mark):
    """Points on the object, and points beside it, as (x, y) in pixels of the image."""

    on: Sequence[tuple[float, float]]
    beside: Sequence[tuple[float, float]] = ()
    radius: float = 0.02  # of a point, as a share of the image's longer side

    def seeds(self, size: tuple[int, int]) -> Tensor:
        seeds = torch.full(size, UNKNOWN, dtype=torch.uint8)
        y_HW, x_HW = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
        for side, points in ((BACKGROUND, self.beside), (FOREGROUND, self.on)):
            for x, y in points:
                if not (0 <= x < size[1] and 0 <= y < size[0]):
                    raise SettingError(f"The point ({x}, {y}) lies outside the image, {size[1]} x {size[0]}.")
                seeds[(x_HW - x) ** 2 + (y_HW - y) ** 2 <= (self.radius * max(size)) ** 2 + 1] = side
        return seeds


@dataclass(frozen=True)
class Scribble(Mark):
    """Lines painted over the image: (H, W), 1 on the object, 2 beside it, 0 where nothing is painted."""

    painted: np.ndarray

    def seeds(self, size: tuple[int, int]) -> Tensor:
        painted = torch.from_numpy(np.array(self.painted))
        if tuple(painted.shape) != tuple(size):
            raise SettingError(f"The scribble has {tuple(painted.shape)} pixels, its image {tuple(size)}.")
        seeds = torch.full(size, UNKNOWN, dtype=torch.uint8)
        seeds[painted == 1], seeds[painted == 2] = FOREGROUND, BACKGROUND
        return seeds


def grow(features_Chw: Tensor, seeds_HW: Tensor) -> Tensor:
    """The mask that seeds mean.

    Args:
        features_Chw: of the image.
        seeds_HW: (H, W) uint8, see `Mark.seeds`.

    Returns:
        (H, W) uint8, 0 or 1.
    """
    size = (seeds_HW.shape[0], seeds_HW.shape[1])
    feature_CHW = F.normalize(
        F.interpolate(features_Chw[None].float().cpu(), size, mode="bilinear", align_corners=False)[0], dim=0
    )
    feature_NC, seeds_N = feature_CHW.flatten(1).T, seeds_HW.flatten()
    sure = seeds_N == FOREGROUND
    fore_N, free_N = (seeds_N == FOREGROUND) | (seeds_N == PROBABLE), (seeds_N == PROBABLE) | (seeds_N == UNKNOWN)
    if not (seeds_N == BACKGROUND).any():  # nothing is known beside the object: what is least like it
        like_N = feature_NC @ feature_NC[sure].mean(0)
        seeds_N = torch.where(free_N & (like_N < like_N.quantile(0.3)), BACKGROUND, seeds_N)
        free_N = (seeds_N == PROBABLE) | (seeds_N == UNKNOWN)
    back_N = seeds_N == BACKGROUND
    for _ in range(ROUNDS):
        fore_C, back_KC = feature_NC[fore_N].mean(0), centres(feature_NC[back_N])
        closer_N = feature_NC @ F.normalize(fore_C, dim=0) > (feature_NC @ back_KC.T).amax(1)
        now_N = torch.where(free_N, closer_N, sure)
        if not now_N.any() or (now_N == fore_N).all():
            break
        fore_N = now_N
    return fore_N.view(size).to(torch.uint8)


def centres(feature_NC: Tensor, count: int = 4) -> Tensor:
    """(count, C): means of length 1 of the parts into which k-means divides features, begun evenly."""
    chosen = feature_NC[torch.linspace(0, len(feature_NC) - 1, min(count, len(feature_NC))).long()]
    for _ in range(5):
        part_N = (feature_NC @ chosen.T).argmax(1)
        means = [feature_NC[part_N == k].mean(0) if (part_N == k).any() else chosen[k] for k in range(len(chosen))]
        chosen = F.normalize(torch.stack(means), dim=1)
    return chosen
