"""How an image file becomes pixels: the one place for reading and resizing, shared by the library and the datasets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from pmnet.errors import ImageError

MAX_PIXELS = 120_000_000  # of an image; reading one takes 8 bytes of memory per pixel
STRIP = 512  # rows converted at a time


def load_image(path: Path, turn: bool = True) -> Tensor:
    """Reads an image file of any format that Pillow knows.

    Args:
        turn: apply the EXIF orientation. Published masks follow the stored pixels, so benchmarks do not.

    Returns:
        (3, H, W) uint8 RGB; 16-bit greyscale is scaled to 8 bits.

    Raises:
        ImageError: the file is missing or cannot be read.
    """
    image = decode(path)
    with one_error(path):
        if image.mode.startswith("I;16") or image.mode == "I":
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert() would clip, not scale
        if turn:
            ImageOps.exif_transpose(image, in_place=True)
        return torch.from_numpy(rgb_array(image)).permute(2, 0, 1)


def rgb_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an image of any mode; in strips, as Pillow copies what it converts three times."""
    array = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height)))
        array[top : top + STRIP] = np.asarray(strip.convert("RGB"))
    return array


def decode(path: Path) -> Image.Image:
    """Reads and decodes a whole image file. Raises ImageError where it is missing or broken."""
    with one_error(path):
        image = Image.open(path)
        if image.format == "EPS":
            raise OSError("EPS is not supported: it is a program, which Ghostscript would run")
        if image.width * image.height > MAX_PIXELS:
            raise OSError(f"it has more than {MAX_PIXELS / 1e6:.0f} megapixels: cut it into tiles")
        image.load()
        return image


def verify(path: Path) -> None:
    """Raises ImageError where a file's own checksums show damage; does not decode the pixels."""
    with one_error(path), Image.open(path) as image:
        image.verify()


@contextmanager
def one_error(path: Path) -> Iterator[None]:
    """Turns whatever Pillow raises into one ImageError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ImageError(f"No such image: {path}") from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise ImageError(
            f"{path} cannot be read ({str(error) or type(error).__name__}). It may be truncated, or not an image. "
            "Replace or remove it."
        ) from error


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) uint8 -> (3, H, W) uint8; bilinear, antialiased."""
    return interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w) uint8 -> (H, W) uint8; nearest."""
    return interpolate(mask[None, None], size, mode="nearest")[0, 0]
