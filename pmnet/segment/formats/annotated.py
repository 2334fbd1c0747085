"""What every reader of a format returns: images with lazy index masks."""

import base64
import binascii
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from pmnet.errors import SettingError
from pmnet.segment.images import (
    IGNORE,
    MAX_PIXELS,
    ORIENTATION,
    SUFFIXES,
    TURN,
    as_image,
    load_image,
    one_error,
    opened,
)

BACKGROUND = {"background", "_background_", "__background__"}  # names that stand for "none of the classes"
IGNORED = {"ignore", "__ignore__", "void"}
TURNED = range(5, 9)  # EXIF orientations that swap height and width


@dataclass(frozen=True)
class Embedded:
    """An image that a labelme file holds itself.

    Attributes:
        path: the JSON file.
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def open(self) -> Image.Image:
        """The image, not yet decoded. Raises ImageError if it cannot be read."""
        with one_error(self.path):
            try:
                content = base64.b64decode(json.loads(self.path.read_bytes())["imageData"], validate=True)
            except (binascii.Error, TypeError, KeyError) as error:
                raise OSError(f"imageData is not a base64 image: {error}") from error
            return opened(io.BytesIO(content))

    def read(self) -> Image.Image:
        """The decoded image. Raises ImageError if it cannot be read."""
        image = self.open()
        with one_error(self.path):
            image.load()
        return image


@dataclass(frozen=True)
class Annotated:
    """An image and its annotation. Neither is decoded before it is asked for.

    Attributes:
        name: unique in its folder, such as "cat/1".
        image: the image's file.
        source: the annotation's file.
        read: makes the mask; `masks` checks it.
        classes: the names of all classes of the folder.
        meaning: what else the mask depends on, besides these and the annotation's file.
    """

    name: str
    image: Path | Embedded
    source: Path
    read: Callable[[], np.ndarray]
    classes: Sequence[str]
    meaning: str = ""

    @property
    def path(self) -> Path:
        """The file that holds the image."""
        return self.image.path if isinstance(self.image, Embedded) else self.image

    def pixels(self) -> Tensor:
        """The image, (3, H, W) uint8, turned as EXIF says. Raises ImageError if it cannot be read."""
        return load_image(self.image) if isinstance(self.image, Path) else as_image(self.image.read())

    def masks(self) -> np.ndarray:
        """The index mask, (H, W) uint8: 0 = none, k = the k-th class, 255 = ignore.

        Raises:
            SettingError: the annotation is invalid, or of another size than the image.
            ImageError: a file cannot be read.
        """
        height, width = size_of(self.image)
        is_mask = self.source.suffix.lower() in SUFFIXES
        mask = None if is_mask and size_of(self.source) != (height, width) else self.read()
        h, w = size_of(self.source) if mask is None else mask.shape
        if mask is None or (h, w) != (height, width):
            raise SettingError(
                f"{self.source} is {w}x{h} pixels, but its image {self.image.name} is {width}x{height}. Both need the "
                f"same size.{TURN if (w, h) == (height, width) else ''}"
            )
        return mask


def size_of(image: Path | Embedded) -> tuple[int, int]:
    """Height and width of an image, turned as EXIF says. Only the file's header is read.

    Raises:
        ImageError: the file is missing or is not an image.
    """
    path = image if isinstance(image, Path) else image.path
    with one_error(path), image.open() if isinstance(image, Embedded) else Image.open(image) as opened:
        width, height = opened.size
        turned = opened.getexif().get(ORIENTATION, 1) in TURNED
    return (width, height) if turned else (height, width)


def numbered(names: Iterable[str], path: Path) -> dict[str, int]:
    """Name -> its value in index masks: 1, 2, ... in order; 0 for the background, 255 for what is ignored.

    Args:
        names: of all classes; one that occurs again is the same class.
        path: where they come from.

    Raises:
        SettingError: there is none, or there are too many.

    Example:
        >>> numbered(["_background_", "cat", "dog"], Path("class_names.txt"))
        {'_background_': 0, 'cat': 1, 'dog': 2}
    """
    names = list(dict.fromkeys(names))
    kept = [name for name in names if name.lower() not in BACKGROUND | IGNORED]
    if not 0 < len(kept) < IGNORE or "" in kept:
        raise SettingError(f"{path} must name 1 to {IGNORE - 1} classes, not {len(kept)}.")
    special = {name: IGNORE if name.lower() in IGNORED else 0 for name in names if name not in kept}
    return special | {name: value for value, name in enumerate(kept, start=1)}


def classes_of(values: Mapping[str, int]) -> tuple[str, ...]:
    """The classes among `numbered` names, in their order."""
    return tuple(name for name, value in values.items() if 0 < value < IGNORE)


def name_of(image: Path, root: Path) -> str:
    """The name of an image: its path in the folder, without suffix and without images/ at the beginning."""
    inside = image.relative_to(root) if image.is_relative_to(root) else Path(image.name)
    return inside.with_suffix("").as_posix().removeprefix("images/")


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, without empty ones at its end. Raises SettingError if it is gone or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    return [line.strip() for line in text.rstrip().splitlines()]


def listed(path: Path) -> list[str]:
    """The names in a file such as classes.txt, one per line; a background on the first lines is left out.

    Raises:
        SettingError: the file is invalid.
    """
    names = lines_of(path)
    while names and names[0].lower() in BACKGROUND | IGNORED:  # labelme begins with __ignore__ and _background_
        del names[0]
    if not 0 < len(names) < IGNORE or len(set(names)) < len(names) or "" in names:
        raise SettingError(
            f"{path} must contain 1 to {IGNORE - 1} different class names, one per line, without empty lines "
            "(line k names mask value k)."
        )
    return names


def checked_size(height: object, width: object) -> tuple[int, int]:
    """Raises ValueError if no image has this size."""
    numbers = [side for side in (height, width) if isinstance(side, (int, float)) and not isinstance(side, bool)]
    sides = [int(side) for side in numbers if float(side).is_integer() and side > 0]
    if len(sides) < 2 or sides[0] * sides[1] > MAX_PIXELS:
        raise ValueError(f"an image cannot be {width}x{height} pixels")
    return sides[0], sides[1]


@contextmanager
def valid(path: Path, what: str) -> Iterator[None]:
    """Turns what bad contents raise into one SettingError that names the file."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, SettingError):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise SettingError(f"{path}: {what} is invalid ({reason}). Correct or remove it.") from error
