"""Random crops, as several methods publish them for their training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datamodules.episodes.episode import IGNORE


@dataclass(frozen=True)
class Crops:
    """Scales, rotates, blurs, flips and crops an image, each at random, without changing its proportions.

    Args:
        size: side of the crop, or [height, width].
        scale: smallest and largest scale. At 1, the longer side of the image is that of the crop.
        degrees: largest angle of the rotation, which happens with a probability of 0.5; 0: none.
        blur: probability of a Gaussian blur of 5x5 pixels.
        holds: the crop is drawn again, up to 31 times, until it holds this share of the object's pixels.
        fill: colour of what lies outside the image, where the mask is 255.
        centred: whether an image that is smaller than the crop is in its middle, or at the top left.

    Example:
        >>> from datamodules.episodes.augment import augmented, seeded
        >>> image, mask = torch.zeros(3, 60, 80, dtype=torch.uint8), torch.ones(60, 80, dtype=torch.uint8)
        >>> with seeded(0):
        ...     image, mask = augmented(Crops(size=64), image, mask)
        >>> image.shape, mask.shape
        (torch.Size([3, 64, 64]), torch.Size([64, 64]))
    """

    size: int | Sequence[int]
    scale: Sequence[float] = (1.0, 1.0)
    degrees: float = 0.0
    blur: float = 0.0
    holds: float = 0.0
    fill: Sequence[int] = (124, 116, 104)  # ImageNet's mean: zero once normalised
    centred: bool = True

    def __call__(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[Tensor, Tensor]:
        H, W = (self.size, self.size) if isinstance(self.size, int) else self.size
        h, w = image.shape[-2:]
        ratio = between(*self.scale) * min(H / h, W / w)
        pair: list[Any] = [F.resize(x, [max(1, round(h * ratio)), max(1, round(w * ratio))]) for x in (image, mask)]
        if self.degrees and chance(0.5):
            angle, bilinear = between(-self.degrees, self.degrees), InterpolationMode.BILINEAR
            pair = [F.rotate(x, angle, bilinear, fill=f) for x, f in zip(pair, (list(self.fill), IGNORE), strict=True)]
        if chance(self.blur):
            pair[0] = F.gaussian_blur(pair[0], [5, 5])
        if chance(0.5):
            pair = [F.horizontal_flip(x) for x in pair]
        pair = [padded(x, H, W, f, self.centred) for x, f in zip(pair, (list(self.fill), IGNORE), strict=True)]
        return self.cropped(pair[0], pair[1], H, W)

    def cropped(self, image: Tensor, mask: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
        """A random crop that holds enough of the object, or the last one drawn."""
        enough = self.holds * (mask == 1).sum()
        for _ in range(32):
            top, left = (int(torch.randint(side - to + 1, ())) for side, to in zip(mask.shape, (H, W), strict=True))
            part = F.crop(mask, top, left, H, W)
            if (part == 1).sum() >= enough:
                break
        return F.crop(image, top, left, H, W), part


def padded(x: Tensor, H: int, W: int, fill: Any, centred: bool) -> Tensor:
    """Padded to sides of at least H and W."""
    down, right = (max(0, to - side) for to, side in zip((H, W), x.shape[-2:], strict=True))
    left, top = (right // 2, down // 2) if centred else (0, 0)
    return F.pad(x, [left, top, right - left, down - top], fill=fill)


def between(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def chance(p: float) -> bool:
    return bool(torch.rand(()) < p)
