"""What one browser tab of `pmnet serve` works on: classes with examples, photos, and what was found in them.

The page itself is `page.py`; nothing here knows of a browser.
"""

import base64
import copy
import io
import re
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Self, TypedDict

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from pmnet.errors import PMNetError, SettingError
from pmnet.segment import tiles
from pmnet.segment.folder import overlay, tints, write_mask
from pmnet.segment.images import as_image, as_mask
from pmnet.segment.presence import PRESENT, evidence
from pmnet.segment.segmenter import Segmenter, Shown

MAX_FILES = 50  # examples, and photos
PREVIEW, LARGE = 800, 2000  # pixels of the longer side of what the page shows
NEW = "object"  # name of a class that has none yet


class Stroke(TypedDict):
    """A line that was painted; in shares of the photo's width (x, size) and height (y)."""

    tool: str  # brush, erase, or outline, which is filled
    size: float
    points: list[tuple[float, float]]


@dataclass
class Upload:
    """A photo that was uploaded.

    Attributes:
        name: of the file, as the user knows it.
        path: where it lies.
        size: (H, W) in pixels.
        preview: reduced to `PREVIEW` pixels.
    """

    name: str
    path: Path
    size: tuple[int, int]
    preview: Image.Image

    @classmethod
    def read(cls, name: str, path: Path) -> Self:
        """Raises ImageError where the file cannot be read."""
        with named((name, path)):
            pixels = as_image(path)
        preview = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        preview.thumbnail((PREVIEW, PREVIEW))
        return cls(name, path, (pixels.shape[1], pixels.shape[2]), preview)


@dataclass
class Example(Upload):
    """A photo and what was painted on it.

    Attributes:
        base: (H, W) uint8, 0 or 1: an uploaded mask, below the strokes.
        strokes: in the order in which they were painted.
    """

    base: np.ndarray | None = None
    strokes: list[Stroke] = field(default_factory=list)

    def mask(self) -> np.ndarray:
        """(H, W) uint8, 0 or 1."""
        height, width = self.size
        mask = Image.new("L", (width, height)) if self.base is None else Image.fromarray(self.base)
        pen = ImageDraw.Draw(mask)
        for stroke in self.strokes:
            points = [(x * width, y * height) for x, y in stroke["points"]]
            if stroke["tool"] == "outline":
                if len(points) > 2:
                    pen.polygon(points, fill=1)
                continue
            value, radius = int(stroke["tool"] == "brush"), max(0.5, stroke["size"] * width / 2)
            pen.line(points, fill=value, width=max(1, round(2 * radius)))
            for x, y in points:  # round ends and joints
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=value)
        return np.asarray(mask)

    def take(self, name: str, path: Path) -> None:
        """Takes a mask file in place of what was painted.

        Raises:
            ImageError: the file cannot be read.
            SettingError: it has another size than the photo.
        """
        with named((name, path)):
            mask = as_mask(path, self.size)
        self.base, self.strokes = (mask == 1).numpy().astype(np.uint8), []


@dataclass(eq=False)
class Category:
    """A class of a tab.

    Attributes:
        name: as the user wrote it.
        examples: photos that show it, with its masks.
        given: what a class file shows of it; examples take its place.
    """

    name: str
    examples: list[Example] = field(default_factory=list)
    given: Shown | None = None

    def pairs(self) -> list[tuple[Path, np.ndarray]]:
        """The files of the examples and their masks (H, W) uint8, 0 or 1.

        Raises:
            SettingError: there is no example, or one without a mask.
        """
        if not self.examples:
            raise SettingError(f"Add at least one example of {self.name!r}: drop a photo that shows it, and paint it.")
        pairs = [(example.path, example.mask()) for example in self.examples]
        for example, (_, mask) in zip(self.examples, pairs, strict=True):
            if not mask.any():
                raise SettingError(f"{example.name} has no mask: paint the object, or upload its mask.")
        return pairs


class Piece(NamedTuple):
    """The scores of a tile of a photo, or of a whole one.

    Attributes:
        rows: where the tile begins and ends, and where its own part does, see `tiles.steps`.
        columns: likewise.
        scores: (C, h, w) of the C classes in 0..1, at the network's size.
    """

    rows: tuple[int, int, int, int]
    columns: tuple[int, int, int, int]
    scores: Tensor


@dataclass
class Photo(Upload):
    """A photo to segment.

    Attributes:
        pieces: what was found; empty before it was segmented.
        small: the scores (C, h, w) at the size of the preview.
        presences: of each class, see `Result.presences`.
        seconds: that segmenting took.
    """

    pieces: list[Piece] = field(default_factory=list)
    small: np.ndarray | None = None
    presences: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def mask(self, threshold: float, absent: bool = False) -> np.ndarray:
        """(H, W) uint8: 0 = none, k = the k-th class.

        Args:
            threshold: a pixel is in the mask of the class with the largest score, if that is larger; 0..1.
            absent: keep the masks of classes that are probably not in the photo.
        """
        return self.above(joined(self.pieces, self.size), threshold, absent)

    def overlay(self, threshold: float, absent: bool = False) -> tuple[Image.Image, list[float]]:
        """The preview with the masks in colour, and the share of the photo that each class covers."""
        if self.small is None:
            return self.preview, []
        mask = self.above(self.small, threshold, absent)
        counts = np.bincount(mask.ravel(), minlength=1 + len(self.small))[1:]
        return overlay(self.preview, mask, PREVIEW), (counts / mask.size).tolist()

    def large(self, threshold: float, absent: bool = False) -> Image.Image:
        """The photo, at most `LARGE` pixels wide and high, with the masks in colour."""
        photo = Image.fromarray(as_image(self.path).permute(1, 2, 0).numpy())
        mask = self.mask(threshold, absent) if self.pieces else np.zeros(self.size, np.uint8)
        return overlay(photo, mask, LARGE)

    def above(self, scores: np.ndarray, threshold: float, absent: bool) -> np.ndarray:
        shown = [k for k, presence in enumerate(self.presences) if absent or presence >= PRESENT]
        if not shown:
            return np.zeros(scores.shape[1:], np.uint8)
        label = np.array(shown, np.uint8)[scores[shown].argmax(0)] + 1
        return np.where(scores[shown].max(0) > threshold, label, 0).astype(np.uint8)

    def forget(self) -> None:
        """Forgets what was found."""
        self.pieces, self.small, self.presences = [], None, []


class Session:
    """The classes and photos of one tab.

    Args:
        segmenter: its method serves all sessions; what each shows it stays apart.
        folder: for the session's files.
        lock: held while the method computes, so that it does one thing at a time.

    Attributes:
        categories: the classes, at least one.
        changed: whether the examples changed since they were last shown to the method.
    """

    def __init__(self, segmenter: Segmenter, folder: Path, lock: Lock) -> None:
        self.segmenter = showing(segmenter, segmenter.shown)
        self.categories = [Category(name, given=shown) for name, shown in segmenter.shown.items()] or [Category(NEW)]
        self.folder, self.lock = folder, lock
        self.folder.mkdir(parents=True)
        self.photos: list[Photo] = []
        self.changed = False
        self.count = 0

    @property
    def ready(self) -> bool:
        """Whether photos can be segmented without showing anything first."""
        return bool(self.segmenter.classes) and not self.changed

    @property
    def examples(self) -> list[Example]:
        """Those of all classes."""
        return [example for category in self.categories for example in category.examples]

    def place(self) -> Path:
        """Where to store the next upload: under a number, as its name is the user's."""
        self.count += 1
        return self.folder / f"{self.count:04d}"

    def add_category(self) -> None:
        """Adds a class without a name of its own or examples."""
        names = {category.name for category in self.categories}
        number = len(names) + 1
        while f"{NEW} {number}" in names:
            number += 1
        self.categories.append(Category(f"{NEW} {number}"))
        self.changed = True

    def remove_category(self, category: Category) -> None:
        """Removes a class; what was found is forgotten, as the classes after it have other numbers now."""
        self.categories.remove(category)
        self.changed = True
        for photo in self.photos:
            photo.forget()

    def add_examples(self, category: Category, files: list[tuple[str, Path]]) -> None:
        """Adds photos of a class, and masks whose names say which photo they belong to.

        Args:
            files: name and place of each upload.

        Raises:
            ImageError: a file cannot be read; those before it are added.
            SettingError: a mask has another size than its photo, or there are too many examples.
        """
        names = [example.name for example in category.examples] + [name for name, _ in files]
        masks = {name for name in names if any(is_mask_of(name, other) for other in names)}
        for name, path in sorted(files, key=lambda file: file[0] in masks):
            of_name = [example for example in category.examples if is_mask_of(name, example.name)]
            if name in masks and of_name:
                self.add_mask(of_name[-1], name, path)
                continue
            if len(self.examples) >= MAX_FILES:
                raise SettingError(f"At most {MAX_FILES} examples fit: {name} was left out.")
            category.examples.append(Example.read(name, path))
            self.changed = True

    def add_mask(self, example: Example, name: str, path: Path) -> None:
        """Raises ImageError or SettingError, see `Example.take`."""
        example.take(name, path)
        self.changed = True

    def add_photos(self, files: list[tuple[str, Path]]) -> None:
        """Raises ImageError where a file cannot be read, SettingError if there are too many; those before are added."""
        for name, path in files:
            if len(self.photos) >= MAX_FILES:
                raise SettingError(f"At most {MAX_FILES} photos fit: {name} was left out.")
            self.photos.append(Photo.read(name, path))

    def names(self) -> list[str]:
        """The names of the classes.

        Raises:
            SettingError: a class has no name, or two have the same.
        """
        names = [category.name.strip() for category in self.categories]
        if "" in names:
            raise SettingError(f"Class {1 + names.index('')} has no name: write one.")
        if twice := [name for k, name in enumerate(names) if name in names[:k]]:
            raise SettingError(f"Two classes have the name {twice[0]}: rename one.")
        return names

    def fit(self) -> None:
        """Shows the examples to the method; what was found before is forgotten.

        Raises:
            SettingError: a class has no example, or no name of its own; or an example has no mask.
        """
        names = self.names()
        supports = {
            name: category.pairs()
            for name, category in zip(names, self.categories, strict=True)
            if category.examples or not category.given
        }
        self.changed = False
        try:
            with self.lock, named(*((example.name, example.path) for example in self.examples)):
                fitted = showing(self.segmenter, {})
                if supports:
                    fitted.fit(supports)
                # copies, as other tabs have the same
                given = {n: copy.copy(c.given) for n, c in zip(names, self.categories, strict=True) if c.given}
                fitted.shown = {name: fitted.shown.get(name) or given[name] for name in names}
                if given and supports:
                    fitted.calibrate()  # on each other's supports
            self.segmenter = fitted
        except Exception:
            self.changed = True
            raise
        for photo in self.photos:
            photo.forget()

    def segment(self, photo: Photo) -> None:
        """Segments a photo."""
        fitted = self.segmenter
        with self.lock:
            image, begun = as_image(photo.path), time.perf_counter()
            pieces, presences = found(fitted, image)
            seconds = time.perf_counter() - begun
        scores = torch.from_numpy(joined(pieces, photo.size))
        size = (photo.preview.height, photo.preview.width)
        small = interpolate(scores[None], size, mode="area")[0].numpy()
        if fitted is self.segmenter and len(presences) == len(self.categories):  # nothing else was asked meanwhile
            photo.pieces, photo.small, photo.presences, photo.seconds = pieces, small, presences, seconds

    def masks(self, threshold: float, absent: bool = False) -> Path:
        """A zip file with NAME.png for each photo, at its size: 0 = none, k = the k-th class.

        With several classes, classes.txt has their names, one a line.

        Raises:
            SettingError: no photo was segmented.
        """
        done = [photo for photo in self.photos if photo.pieces]
        if not done:
            raise SettingError("There are no masks yet: drop photos and press Segment.")
        file = self.folder / "masks.zip"
        with zipfile.ZipFile(file, "w") as archive:
            for photo, name in zip(done, mask_names([photo.name for photo in done]), strict=True):
                path = photo.path.with_suffix(".mask.png")
                write_mask(path, photo.mask(threshold, absent))
                archive.write(path, name)
            if len(done[0].presences) > 1:
                archive.writestr("classes.txt", "".join(f"{name}\n" for name in self.names()[: len(done[0].presences)]))
        return file

    def class_file(self) -> Path:
        """A class file, see `Segmenter.save`.

        Raises:
            SettingError: a class has no example, or no name of its own; or an example has no mask.
        """
        if not self.ready:
            self.fit()
        names = self.names()
        name = re.sub(r"[^\w-]+", "_", "-".join(names))[:80]
        file = self.folder / f"{name}.safetensors"
        renamed = dict(zip(names, self.segmenter.shown.values(), strict=True))
        showing(self.segmenter, renamed).save(file)
        return file


@torch.no_grad()
def found(segmenter: Segmenter, image: Tensor) -> tuple[list[Piece], list[float]]:
    """As `Segmenter.predict`, which decides at once: the scores of each class, and whether the photo shows it.

    Args:
        segmenter: C classes were shown to it.
        image: (3, H, W) uint8.
    """
    side = segmenter.tile_side(image, "auto")
    shown = [each.at(side) for each in segmenter.shown.values()]
    pieces, presences = [], [0.0] * len(shown)
    for rows, columns in product(*(tiles.steps(length, side or length) for length in image.shape[-2:])):
        tile = image[:, rows[0] : rows[1], columns[0] : columns[1]]
        feats = segmenter.features(segmenter.frame.image(tile))
        scores_CHW = torch.stack([segmenter.score(feats, each.seen) for each in shown])
        for k, each in enumerate(shown):
            of_tile = evidence(scores_CHW[k], segmenter.deepest(feats)[0], each.prototype)
            presences[k] = max(presences[k], each.presence(of_tile) if each.presence else 1.0)
        height, width = segmenter.frame.inside((tile.shape[-2], tile.shape[-1]))
        pieces.append(Piece(rows, columns, scores_CHW[:, :height, :width].cpu()))
    return pieces, presences


def joined(pieces: list[Piece], size: tuple[int, int]) -> np.ndarray:
    """The scores (C, H, W) float32 of a photo of `size` H, W."""
    scores = np.empty((len(pieces[0].scores), *size), np.float32)
    for (top, bottom, upper, lower), (left, right, first, last), small in pieces:
        tile = interpolate(small[None], (bottom - top, right - left), mode="bilinear")[0].numpy()
        scores[:, upper:lower, first:last] = tile[:, upper - top : lower - top, first - left : last - left]
    return scores


def showing(segmenter: Segmenter, shown: Mapping[str, Shown]) -> Segmenter:
    """A segmenter with the same method that was shown other classes."""
    other = copy.copy(segmenter)
    other.shown = dict(shown)
    return other


@contextmanager
def named(*files: tuple[str, Path]) -> Iterator[None]:
    """In messages, an upload's name takes the place of the path where it was stored."""
    try:
        yield
    except PMNetError as error:
        message = str(error)
        for name, path in files:
            message = message.replace(str(path), name)
        raise type(error)(message) from error


def is_mask_of(name: str, photo: str) -> bool:
    """Whether a file name is that of the mask of a photo.

    Example:
        >>> is_mask_of("cow_mask.png", "cow.jpg"), is_mask_of("cow.png", "cow.jpg"), is_mask_of("cow.png", "cow.png")
        (True, True, False)
    """
    mask, image = Path(name), Path(photo)
    plain = re.sub(r"[_-]mask$", "", mask.stem)
    return mask.suffix.lower() == ".png" and plain == image.stem and (plain != mask.stem or image.suffix != mask.suffix)


def mask_names(photos: list[str]) -> list[str]:
    """The masks' names, each of them once.

    Example:
        >>> mask_names(["a.jpg", "b.jpg", "b.png", "a_2.jpg", "a.jpg"])
        ['a.png', 'b.png', 'b_2.png', 'a_2.png', 'a_3.png']
    """
    names: list[str] = []
    for stem in (Path(photo).stem for photo in photos):
        free = (f"{stem}.png" if n == 1 else f"{stem}_{n}.png" for n in count(1))
        names.append(next(name for name in free if name not in names))
    return names


# What the browser shows


def jpeg(image: Image.Image) -> str:
    """A photo as the address of an <img>."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def colour(number: int) -> tuple[int, int, int]:
    """Red, green and blue of the masks of the `number`-th class, from 1 on, 0..255."""
    red, green, blue = (int(value) for value in tints()[number])
    return red, green, blue


def tinted(mask: np.ndarray, size: tuple[int, int], tint: tuple[int, int, int]) -> str:
    """A mask (H, W) as the address of an <img>: coloured where it is 1, transparent elsewhere.

    Args:
        size: width and height of the image.
        tint: red, green and blue, 0..255.
    """
    alpha = Image.fromarray(mask * 255).resize(size, Image.Resampling.NEAREST)
    image = Image.new("RGB", size, tint)
    image.putalpha(alpha)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
