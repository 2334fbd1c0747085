"""How an image file becomes pixels: the one place for reading and resizing, shared by the library and the datasets."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from pmnet.errors import ImageError, SettingError

MAX_PIXELS = 120_000_000  # of an image; reading one takes 8 bytes of memory per pixel
STRIP = 512  # rows converted at a time
GREY = (124, 116, 104)  # ImageNet's mean
IGNORE = 255  # mask value of pixels that count as neither
ORIENTATION = 0x0112  # the EXIF entry
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
TURN = " The photo is turned as its EXIF orientation says: turn the mask as well, or remove the orientation."
AnyImage = str | Path | Image.Image | np.ndarray | Tensor


def load_image(path: Path, turn: bool = True) -> Tensor:
    """Reads an image file of any format that Pillow knows.

    Args:
        turn: apply the EXIF orientation. Published masks follow the stored pixels, so benchmarks do not.

    Returns:
        (3, H, W) uint8 RGB. Greyscale of 12 or 16 bits, told apart by the largest value, is scaled to 8 bits, and
        floats in 0..1 to 0..255.

    Raises:
        ImageError: the file is missing or cannot be read.
    """
    with one_error(path):
        content = path.read_bytes()
        image = opened(io.BytesIO(content))
        if (array := fast(content, image, turn)) is not None:
            return torch.from_numpy(array).permute(2, 0, 1)
        image.load()
        if turn:
            ImageOps.exif_transpose(image, in_place=True)
        return pixels(image)


def fast(content: bytes, image: Image.Image, turn: bool) -> np.ndarray | None:
    """(H, W, 3) uint8 of a common JPEG photo, in half of Pillow's time and with its pixels; None: leave it to Pillow.

    Args:
        content: the file.
        image: its header.
        turn: as in `load_image`.
    """
    if (image.format, image.mode) != ("JPEG", "RGB") or (turn and image.getexif().get(ORIENTATION, 1) != 1):
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(content)
        same = (width, height) == image.size  # or else MAX_PIXELS would not hold
        return simplejpeg.decode_jpeg(content, "RGB") if same else None
    except ValueError:  # damaged: Pillow says how, or reads it
        return None


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of a PIL image of any mode."""
    if image.mode.startswith("I;16") or image.mode == "I":  # convert() would clip, not scale
        values = np.asarray(image)
        depth = next((bits for bits in (8, 12) if values.max() < 1 << bits), 16)
        image = Image.fromarray((values >> (depth - 8)).astype(np.uint8))
    if image.mode == "F" and 0 < np.asarray(image).max() <= 1:
        image = Image.fromarray((np.asarray(image).clip(min=0) * 255).round().astype(np.uint8))
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
        image = opened(path)
        image.load()
        return image


def opened(file: Path | io.BytesIO) -> Image.Image:
    """An image of which only the header is read yet. Raises OSError, and whatever Pillow does, if it is not safe."""
    image = Image.open(file)
    if image.format == "EPS":
        raise OSError("EPS is not supported: it is a program, which Ghostscript would run")
    if image.width * image.height > MAX_PIXELS:
        raise OSError(f"it has more than {MAX_PIXELS / 1e6:.0f} megapixels: cut it into tiles")
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


# Whatever a caller has


def as_image(image: AnyImage) -> Tensor:
    """(3, H, W) uint8 of a path, a PIL image, an array (H, W), (H, W, 3 or 4), or a tensor (H, W), (1 or 3, H, W).

    Arrays and tensors are uint8, uint16, or float in 0..1.

    Raises:
        ImageError: the file is missing or cannot be read.
        SettingError: an array or a tensor has another shape or type.
    """
    if isinstance(image, (str, Path)):
        return load_image(Path(image))
    if isinstance(image, Image.Image):
        return pixels(ImageOps.exif_transpose(image))
    values = image if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(image).copy())
    if not isinstance(image, Tensor) and values.ndim == 3:
        values = values[..., :3].movedim(-1, 0)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or len(values) not in (1, 3) or not values.numel():
        raise SettingError(
            f"An image is (H, W, 3) as an array and (3, H, W) as a tensor, not {tuple(image.shape)} as "
            f"{'a tensor' if isinstance(image, Tensor) else 'an array'}."
        )
    return eight_bits(values.detach().cpu()).expand(3, *values.shape[1:]).contiguous()


def eight_bits(values: Tensor) -> Tensor:
    """uint8 of uint8, uint16, or float in 0..1. Raises SettingError for other types and values."""
    if values.dtype == torch.uint16:
        return (values.int() >> 8).to(torch.uint8)
    if values.is_floating_point() and values.min() >= 0 and values.max() <= 1:
        return (values * 255).round().to(torch.uint8)
    if values.dtype != torch.uint8:
        raise SettingError(f"Pixels are uint8, uint16, or float in 0..1, not {values.dtype} up to {values.max()}.")
    return values


def as_mask(mask: AnyImage, size: tuple[int, int]) -> Tensor:
    """The mask of a support, (H, W) uint8: 0 = background, 1 = foreground, 255 = ignore.

    Every other value than 0 is foreground, but 255 is "ignore" if further values are there. If some of these are 128 or
    more, as smoothing and JPEG leave them, foreground begins at 128; in floats of 0..1 above 0.5. A mask in colours or
    with transparency is foreground where it is not black, or not transparent.

    Args:
        size: (H, W) of its image.

    Raises:
        ImageError: the file is missing or cannot be read.
        SettingError: it has another size than its image.
    """
    where = f"{mask}" if isinstance(mask, (str, Path)) else "A mask"
    if isinstance(mask, (str, Path)):
        mask = decode(Path(mask))
    if isinstance(mask, Image.Image):
        colours = mask.mode in ("RGB", "RGBA", "LA", "CMYK", "HSV", "LAB", "YCbCr") or white_first(mask)
        mask = np.asarray(mask if not colours else flat_mask(mask))
    values = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
    values = values.detach().cpu().squeeze()
    if tuple(values.shape) != tuple(size):
        raise SettingError(
            f"{where} has {' x '.join(map(str, values.shape))} pixels, its image {size[0]} x {size[1]} (height x "
            f"width): they must be equal.{TURN if tuple(values.shape) == tuple(size)[::-1] else ''}"
        )
    values = values.int() if values.dtype == torch.uint16 else values
    if values.is_floating_point() and values.max() <= 1:
        values = values > 0.5
    white = values == IGNORE
    if white.any() and ((values >= 128) & (values < IGNORE)).any():  # smoothed edges, or JPEG
        return (values >= 128).to(torch.uint8)
    ignored = white & bool(((values != 0) & ~white).any())
    return (values != 0).to(torch.uint8).masked_fill(ignored, IGNORE)


def white_first(mask: Image.Image) -> bool:
    """Whether a palette holds black and white, in this order of numbers: white, black."""
    colours = np.reshape(mask.getpalette() or [], (-1, 3)) if mask.mode == "P" else np.zeros((0, 3))
    return len(colours) > 1 and bool((colours[0] > 0).all()) and not colours[1:].any()


def flat_mask(mask: Image.Image) -> Image.Image:
    """One band of a mask in colours: its alpha if that says something, else its brightest band."""
    if "A" in mask.getbands() and mask.getchannel("A").getextrema()[0] == 0:
        return mask.getchannel("A")
    return Image.fromarray(np.asarray(mask.convert("RGB")).max(2))


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder and of those below it, sorted, without hidden ones."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(p for p in found if p.is_file() and not any(part.startswith(".") for part in p.parts[-1:]))


@dataclass(frozen=True)
class Frame:
    """The sides at which a network sees images.

    Attributes:
        size: H, W.
        keep_aspect: fit images in, at the top left, and fill up with grey; otherwise squeeze them.
    """

    size: tuple[int, int]
    keep_aspect: bool = False

    def inside(self, size: tuple[int, int]) -> tuple[int, int]:
        """H, W of the part that an image of `size` takes.

        Example:
            >>> Frame((384, 384), keep_aspect=True).inside((375, 500))
            (288, 384)
        """
        if not self.keep_aspect:
            return self.size
        scale = min(self.size[0] / size[0], self.size[1] / size[1])
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def image(self, image: Tensor) -> Tensor:
        """(3, h, w) uint8 -> (3, H, W) uint8."""
        height, width = self.inside((image.shape[-2], image.shape[-1]))
        resized = resize_image(image, (height, width))
        if (height, width) == self.size:
            return resized
        full = torch.tensor(GREY, dtype=torch.uint8).view(3, 1, 1).repeat(1, *self.size)
        full[:, :height, :width] = resized
        return full

    def mask(self, mask: Tensor) -> Tensor:
        """(h, w) uint8 -> (H, W) uint8, 0 where the image is filled up."""
        height, width = self.inside((mask.shape[-2], mask.shape[-1]))
        full = torch.zeros(self.size, dtype=torch.uint8)
        full[:height, :width] = resize_mask(mask, (height, width))
        return full
