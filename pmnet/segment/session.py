"""What one browser tab of `pmnet serve` works on: examples, photos, and what was found in them.

The page itself is `page.py`; nothing here knows of a browser.
"""

import base64
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Self, TypedDict

import numpy as np
import torch
from PIL import Image, ImageDraw

from pmnet.errors import PMNetError, SettingError
from pmnet.segment.folder import overlay, write_mask
from pmnet.segment.images import as_image, as_mask
from pmnet.segment.presence import PRESENT
from pmnet.segment.recipe import Built
from pmnet.segment.segmenter import Segmenter

MAX_FILES = 50  # examples, and photos
PREVIEW, LARGE = 800, 2000  # pixels of the longer side of what the page shows
TINT = (255, 40, 40)  # of masks that are painted


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


@dataclass
class Photo(Upload):
    """A photo to segment.

    Attributes:
        score: the file with the score (H, W) of each pixel; None before it was segmented.
        small: the score at the size of the preview.
        presence: see `Result.presence`.
        seconds: see `Result.seconds`.
    """

    score: Path | None = None
    small: np.ndarray | None = None
    presence: float = 0.0
    seconds: float = 0.0

    def mask(self, threshold: float, absent: bool = False) -> np.ndarray:
        """(H, W) uint8, 0 or 1.

        Args:
            threshold: a pixel is in the mask if its score is larger, 0..1.
            absent: keep the mask where the class is probably not in the photo.
        """
        assert self.score is not None
        return self.above(np.load(self.score), threshold, absent)

    def overlay(self, threshold: float, absent: bool = False) -> tuple[Image.Image, float]:
        """The preview with the mask in colour, and the share of the photo that the mask covers."""
        if self.small is None:
            return self.preview, 0.0
        mask = self.above(self.small, threshold, absent)
        return overlay(self.preview, mask, PREVIEW), float(mask.mean())

    def large(self, threshold: float, absent: bool = False) -> Image.Image:
        """The photo, at most `LARGE` pixels wide and high, with the mask in colour."""
        photo = Image.fromarray(as_image(self.path).permute(1, 2, 0).numpy())
        mask = np.zeros(self.size, np.uint8) if self.score is None else self.mask(threshold, absent)
        return overlay(photo, mask, LARGE)

    def above(self, score: np.ndarray, threshold: float, absent: bool) -> np.ndarray:
        return ((score > threshold) & (absent or self.presence >= PRESENT)).astype(np.uint8)


class Session:
    """The examples and photos of one tab.

    Args:
        segmenter: its method serves all sessions; what each shows it stays apart.
        folder: for the session's files.
        lock: held while the method computes, so that it does one thing at a time.

    Attributes:
        changed: whether the examples changed since they were last shown to the method.
    """

    def __init__(self, segmenter: Segmenter, folder: Path, lock: Lock) -> None:
        self.segmenter = Segmenter(
            Built(segmenter.method, segmenter.recipe), str(segmenter.device), segmenter.frame.keep_aspect
        )
        self.segmenter.shown = dict(segmenter.shown)
        self.name = segmenter.classes[0] if segmenter.classes else "object"
        self.folder, self.lock = folder, lock
        self.folder.mkdir(parents=True)
        self.examples: list[Example] = []
        self.photos: list[Photo] = []
        self.changed = False
        self.count = 0

    @property
    def ready(self) -> bool:
        """Whether photos can be segmented without showing anything first."""
        return bool(self.segmenter.classes) and not self.changed

    def place(self) -> Path:
        """Where to store the next upload: under a number, as its name is the user's."""
        self.count += 1
        return self.folder / f"{self.count:04d}"

    def add_examples(self, files: list[tuple[str, Path]]) -> None:
        """Adds photos, and masks whose names say which photo they belong to.

        Args:
            files: name and place of each upload.

        Raises:
            ImageError: a file cannot be read; those before it are added.
            SettingError: a mask has another size than its photo, or there are too many examples.
        """
        names = [example.name for example in self.examples] + [name for name, _ in files]
        masks = {name for name in names if any(is_mask_of(name, other) for other in names)}
        for name, path in sorted(files, key=lambda file: file[0] in masks):
            if name in masks:
                self.add_mask(next(e for e in reversed(self.examples) if is_mask_of(name, e.name)), name, path)
                continue
            if len(self.examples) >= MAX_FILES:
                raise SettingError(f"At most {MAX_FILES} examples fit: {name} was left out.")
            self.examples.append(Example.read(name, path))
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

    def fit(self) -> None:
        """Shows the examples to the method; what was found before is forgotten.

        Raises:
            SettingError: there is no example, or one without a mask.
        """
        if not self.examples:
            raise SettingError("Add at least one example: drop a photo that shows the object, and paint the object.")
        pairs = []
        for example in self.examples:
            pairs.append((example.path, example.mask()))
            if not pairs[-1][1].any():
                raise SettingError(f"{example.name} has no mask: paint the object, or upload its mask.")
        self.changed = False
        try:
            with self.lock, named(*((example.name, example.path) for example in self.examples)):
                self.segmenter.fit({self.name: pairs})
        except PMNetError:
            self.changed = True
            raise
        for photo in self.photos:
            photo.score = photo.small = None

    def segment(self, photo: Photo) -> None:
        """Segments a photo; the score of each pixel goes into a file."""
        with self.lock:
            result = self.segmenter.predict(photo.path, gate=False)  # the page gates, so that it can show both
        path = photo.path.with_suffix(".npy")
        np.save(path, result.score)
        small = torch.from_numpy(result.score)[None, None].float()
        size = (photo.preview.height, photo.preview.width)
        photo.small = torch.nn.functional.interpolate(small, size, mode="area")[0, 0].numpy()
        photo.score, photo.presence, photo.seconds = path, result.presence, result.seconds

    def masks(self, threshold: float, absent: bool = False) -> Path:
        """A zip file with NAME.png for each photo: 0 or 1, at the photo's size.

        Raises:
            SettingError: no photo was segmented.
        """
        done = [photo for photo in self.photos if photo.score]
        if not done:
            raise SettingError("There are no masks yet: drop photos and press Segment.")
        file = self.folder / "masks.zip"
        with zipfile.ZipFile(file, "w") as archive:
            for photo, name in zip(done, mask_names([photo.name for photo in done]), strict=True):
                path = photo.path.with_suffix(".mask.png")
                write_mask(path, photo.mask(threshold, absent))
                archive.write(path, name)
        return file

    def class_file(self) -> Path:
        """A class file, see `Segmenter.save`.

        Raises:
            SettingError: there is no example, or one without a mask.
        """
        if not self.ready:
            self.fit()
        name = re.sub(r"[^\w-]+", "_", self.name)
        file = self.folder / f"{name}.safetensors"
        self.segmenter.save(file)
        return file


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
        >>> mask_names(["a.jpg", "b.jpg", "b.png", "a.jpg"])
        ['a.png', 'b.png', 'b_2.png', 'a_2.png']
    """
    seen: Counter[str] = Counter()
    names = []
    for stem in (Path(photo).stem for photo in photos):
        seen[stem] += 1
        names.append(f"{stem}.png" if seen[stem] == 1 else f"{stem}_{seen[stem]}.png")
    return names


# What the browser shows


def jpeg(image: Image.Image) -> str:
    """A photo as the address of an <img>."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tinted(mask: np.ndarray, size: tuple[int, int]) -> str:
    """A mask (H, W) as the address of an <img>: coloured where it is 1, transparent elsewhere.

    Args:
        size: width and height of the image.
    """
    alpha = Image.fromarray(mask * 255).resize(size, Image.Resampling.NEAREST)
    image = Image.new("RGB", size, TINT)
    image.putalpha(alpha)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
