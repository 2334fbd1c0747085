"""Supports without a mask: a box, points or a scribble, from which the backbone's features grow a mask.

A position belongs to the object if its feature is closer to the mean of the object's than to the parts of the
background. Outside a box all is background; what of the inside is the object is found in turns, as in k-means. Of
points and scribbles, what is least like the object and the border of the image are background too, and what is near a
mark on the object is more probably object.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pmnet.errors import SettingError

BACKGROUND, FOREGROUND, UNKNOWN, PROBABLE = 0, 1, 2, 3  # of seeds
ROUNDS = 8
REACH = 0.2  # how far the object reaches beyond a mark, as a share of the image's side
CELL = 4  # pixels of the network's image that are judged together


class Mark(ABC):
    """What stands for a mask."""

    @abstractmethod
    def seeds(self, size: tuple[int, int]) -> Tensor:
        """(H, W) uint8 of BACKGROUND, FOREGROUND, UNKNOWN, PROBABLE foreground, for an image of `size` H, W.

        Raises:
            SettingError: the mark lies outside the image.
        """


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
    grid = (-(-seeds_HW.shape[0] // CELL), -(-seeds_HW.shape[1] // CELL))
    feature_Cyx = F.interpolate(features_Chw[None].float().cpu(), grid, mode="bilinear", align_corners=False)[0]
    feature_NC, seeds_yx = F.normalize(feature_Cyx, dim=0).flatten(1).T, coarse(seeds_HW, grid)
    in_box = bool((seeds_HW == PROBABLE).any())
    fore_yx = (boxed if in_box else near)(feature_NC, seeds_yx)
    size = (seeds_HW.shape[0], seeds_HW.shape[1])
    fine_HW = F.interpolate(fore_yx[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0] > 0.5
    return torch.where(seeds_HW == FOREGROUND, True, fine_HW & (seeds_HW != BACKGROUND)).to(torch.uint8)


def boxed(feature_NC: Tensor, seeds_yx: Tensor) -> Tensor:
    """What of a box is the object: at first all of it, then what is closer to the mean of what it was before."""
    inside_N = (seeds_yx == PROBABLE).flatten()
    back_KC = centres(feature_NC[~inside_N]) if not inside_N.all() else feature_NC.new_zeros(1, feature_NC.shape[1])
    fore_N = inside_N
    for _ in range(ROUNDS):
        now_N = inside_N & (closer(feature_NC, fore_N, back_KC) > 0)
        if not now_N.any() or (now_N == fore_N).all():
            break
        fore_N = now_N
    return fore_N.view(seeds_yx.shape)


def near(feature_NC: Tensor, seeds_yx: Tensor) -> Tensor:
    """What is like the marks on the object and near them."""
    height, width = seeds_yx.shape
    seeds_N = seeds_yx.flatten()
    on_N, beside_N = seeds_N == FOREGROUND, seeds_N == BACKGROUND
    place_N2 = torch.cartesian_prod(torch.arange(height) / height, torch.arange(width) / width)
    apart_N = torch.cdist(place_N2, place_N2[on_N]).amin(1)  # distance as a share of the image's side
    border_yx = torch.ones(height, width, dtype=torch.bool)
    border_yx[1:-1, 1:-1] = False
    like_N = feature_NC @ feature_NC[on_N].mean(0)
    back_N = beside_N | (border_yx.flatten() & (apart_N > REACH)) | (like_N < like_N.quantile(0.5))
    fore_N = closer(feature_NC, on_N, centres(feature_NC[back_N & ~on_N])) > apart_N - REACH
    return torch.where(on_N | beside_N, on_N, fore_N).view(height, width)


def closer(feature_NC: Tensor, fore_N: Tensor, back_KC: Tensor) -> Tensor:
    """(N,): by how much each position is closer to the mean of the foreground than to any part of the background."""
    return feature_NC @ F.normalize(feature_NC[fore_N].mean(0), dim=0) - (feature_NC @ back_KC.T).amax(1)


def coarse(seeds_HW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Seeds of a grid's cells: a cell that a mark touches is marked."""
    nearest = F.interpolate(seeds_HW[None, None], grid, mode="nearest")[0, 0]
    if not (seeds_HW == UNKNOWN).any():
        return nearest
    for side in (BACKGROUND, FOREGROUND):
        touched = F.adaptive_max_pool2d((seeds_HW == side)[None].float(), grid)[0] > 0
        nearest = torch.where(touched, side, nearest)
    return nearest


def centres(feature_NC: Tensor, count: int = 4) -> Tensor:
    """(count, C): means of length 1 of the parts into which k-means divides features, begun evenly."""
    chosen = feature_NC[torch.linspace(0, len(feature_NC) - 1, min(count, len(feature_NC))).long()]
    for _ in range(5):
        part_N = (feature_NC @ chosen.T).argmax(1)
        means = [feature_NC[part_N == k].mean(0) if (part_N == k).any() else chosen[k] for k in range(len(chosen))]
        chosen = F.normalize(torch.stack(means), dim=1)
    return chosen
