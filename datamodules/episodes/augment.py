"""Data augmentation: random changes of a training image and its mask, as some methods publish them.

An augmentation is a callable (image, mask) -> (image, mask) on torchvision's types `Image` and `Mask`: any transform of
`torchvision.transforms.v2`, or `Crops` of `crops.py`. It draws from PyTorch's global generator.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchvision import tv_tensors

Augment = Callable[["tv_tensors.Image", "tv_tensors.Mask"], tuple[Tensor, Tensor]]


def augmented(augment: Augment, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A (3, H, W) uint8 image and its (H, W) uint8 mask, changed at random; the side may change too."""
    from torchvision import tv_tensors  # takes a second to import

    image, mask = augment(tv_tensors.Image(image), tv_tensors.Mask(mask))
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Draws of PyTorch's generator within depend on these numbers alone; the generator is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash(numbers) % 2**63)
        yield


def named(augment: Augment) -> str:
    """An augmentation and its options in one line, for records."""
    return " ".join(repr(augment).split())
