"""Mask files: index masks, masks in colours, and black and white ones."""

import csv
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pmnet.errors import SettingError
from pmnet.segment.formats.annotated import Annotated, classes_of, lines_of, listed, numbered, valid
from pmnet.segment.formats.pairs import Pair
from pmnet.segment.images import IGNORE, decode, flat_mask, white_first

VOID = (224, 224, 192)  # PASCAL VOC's colour of pixels that are ignored
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
COLOUR = re.compile(r"(?P<name>[^#].*?)\s*[\s:,;]\s*(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})\s*(:.*)?")
BATCH = 64  # masks read at a time
NEARLY_BLACK, NEARLY_WHITE = 24, 232  # the greys that smoothing leaves at edges lie between


class Legend(NamedTuple):
    """What the values of index masks stand for.

    Attributes:
        path: the file that says it.
        table: (256,) int, mask value -> index; -1 = unknown.
    """

    path: Path
    classes: Sequence[str]
    table: np.ndarray

    def read(self, mask: Path) -> np.ndarray:
        """The index mask (H, W) uint8 of a file. Raises SettingError if a value stands for no class."""
        values = index_values(mask)
        index = self.table[values]
        if (index < 0).any():
            unknown = values[index < 0].min()
            lossy = " JPEG changes values: save masks as PNG." if mask.suffix.lower() in (".jpg", ".jpeg") else ""
            raise SettingError(
                f"{mask} has the value {unknown}, but {self.path.name} names only {len(self.classes)} classes (values "
                f"{', '.join(map(str, short(np.flatnonzero((self.table > 0) & (self.table < IGNORE)))))}; 0 = none, "
                f"255 = ignore).{lossy} Correct the mask, or add the class to {self.path.name}."
            )
        return index.astype(np.uint8)


class Colours(NamedTuple):
    """What the colours of masks stand for.

    Attributes:
        path: the file that says it.
        codes: (N,) int, sorted: red * 65536 + green * 256 + blue.
        values: (N,) uint8, their values in index masks.
    """

    path: Path
    classes: Sequence[str]
    codes: np.ndarray
    values: np.ndarray

    def read(self, mask: Path) -> np.ndarray:
        """The index mask (H, W) uint8 of a file. Raises SettingError if a colour stands for no class."""
        red, green, blue = np.moveaxis(np.asarray(decode(mask).convert("RGB")).astype(np.int32), -1, 0)
        codes = red << 16 | green << 8 | blue
        at = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        if (unknown := codes != self.codes[at]).any():
            code = int(codes[unknown][0])
            raise SettingError(
                f"{mask} has the colour {code >> 16, code >> 8 & 255, code & 255} in {unknown.sum()} pixels, which "
                f"{self.path.name} does not name. Add it there, or save masks as PNG without smoothing."
            )
        return self.values[at]


def short(values: np.ndarray) -> list[object]:
    """The values, with dots for the middle of many."""
    return values.tolist() if len(values) < 4 else [values[0], values[1], "...", values[-1]]


def read_indexed(
    roots: Mapping[Path, Mapping[str, Pair]], root: Path, count: Callable[[Path], np.ndarray]
) -> list[Annotated]:
    """The images of folders with one mask for all classes.

    Args:
        roots: folder that holds the names of the classes -> name -> image and mask.
        root: the folder that is read.
        count: as `counted`.

    Raises:
        SettingError: names of the classes are missing or invalid, or masks cannot tell the classes apart.
    """
    found = []
    for folder, pairs in roots.items():
        title = Path(os.path.abspath(root)).name
        legend = legend_of(folder) or legend_of(root)
        classes, read = reader_of(folder, legend, [pair.mask for pair in pairs.values()], title, count)
        meaning = f"{read.__qualname__} {legend}"
        prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        found += [
            Annotated(f"{prefix}{name}", pair.image, pair.mask, partial(read, pair.mask), classes, meaning)
            for name, pair in pairs.items()
        ]
    if len({tuple(each.classes) for each in found}) > 1:
        raise SettingError(f"The folders {', '.join(map(str, roots))} have different classes. Read them one by one.")
    return found


def reader_of(
    folder: Path,
    legend: Legend | Colours | None,
    masks: Sequence[Path],
    title: str,
    count: Callable[[Path], np.ndarray],
) -> tuple[Sequence[str], Callable[[Path], np.ndarray]]:
    """The classes of a folder, and what makes an index mask of a mask file."""
    if isinstance(legend, Colours):
        return legend.classes, legend.read
    voc = masks[0].parent.name.lower().startswith("segmentationclass")
    counts = counts_of(masks, bool(legend) or voc, count)
    values = set(np.flatnonzero(counts).tolist())
    one_class = not voc and (legend is None or len(legend.classes) == 1)
    black_and_white = values - {0} == {IGNORE} or (one_class and smoothed(counts))
    if legend is None and voc and not black_and_white:
        legend = by_value(dict(enumerate(VOC, start=1)), Path("the list of PASCAL VOC's classes"))
    if legend is None and not black_and_white and values - {0, 1, IGNORE}:
        raise SettingError(
            f"There is no {folder / 'classes.txt'}. Create it: one class name per line; line k names mask value k (the "
            f"masks have values up to {max(values - {IGNORE})})."
        )
    legend = legend or by_value({1: title}, folder)
    if black_and_white and len(legend.classes) > 1:
        raise SettingError(
            f"Every mask in {masks[0].parent} has only the values 0 and 255, so it does not say which of the "
            f"{len(legend.classes)} classes in {legend.path.name} is where. Save value k for the class of line k (255 "
            "= ignore); for one class, keep only its line; or use one folder per class (CLASS/NAME.jpg, "
            "CLASS/NAME.png)."
        )
    return legend.classes, white if black_and_white else legend.read


def counts_of(masks: Sequence[Path], enough: bool, count: Callable[[Path], np.ndarray]) -> np.ndarray:
    """(256,): how many pixels of the masks have each value.

    Args:
        enough: stop at the first values that are neither 0 nor 255.
        count: as `counted`.
    """
    counts = np.zeros(IGNORE + 1, np.int64)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(masks), BATCH):
            counts += sum(pool.map(count, masks[start : start + BATCH]))
            if enough and counts[1:IGNORE].any():
                break
    return counts


def counted(mask: Path) -> np.ndarray:
    """(256,): how many pixels of a mask have each value."""
    return np.bincount(index_values(mask).ravel(), minlength=IGNORE + 1)


# Names of the classes


def legend_of(folder: Path) -> Legend | Colours | None:
    """What the files of a folder say about the values or colours of its masks; None if they say nothing.

    Raises:
        SettingError: such a file is invalid.
    """
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in (".txt", ".csv")):
        if colours := colours_in(path):
            return by_colour(colours, path)
    if (path := folder / "_classes.csv").is_file():
        with valid(path, "the list of classes"):
            rows = [row for row in csv.reader(lines_of(path)[1:]) if row]
            return by_value({int(value): name.strip() for value, name, *_ in rows}, path)
    for name in ("classes.txt", "class_names.txt"):
        if (path := folder / name).is_file():
            return by_value(dict(enumerate(listed(path), start=1)), path)
    return None


def colours_in(path: Path) -> list[tuple[str, tuple[int, int, int]]]:
    """The lines `name r g b`, `name,r,g,b` or CVAT's `name:r,g,b:parts:actions` of a file; empty if it has others.

    Raises:
        SettingError: it is named labelmap.txt, but has others.
    """
    named = path.stem.lower().replace("_", "") == "labelmap"
    if path.stat().st_size > 100_000 and not named:
        return []
    try:
        lines = [line for line in lines_of(path) if line and not line.startswith("#")]
    except SettingError:
        return []
    matches = [COLOUR.fullmatch(line) for line in lines]
    if path.suffix.lower() == ".csv" and matches and not matches[0]:  # its header
        del matches[0], lines[0]
    found = []
    for line, match in zip(lines, matches, strict=True):
        red, green, blue = (int(match[number]) for number in (2, 3, 4)) if match else (256, 256, 256)
        if not match or max(red, green, blue) > 255:
            if named:
                raise SettingError(f"{path}: the line {line!r} is none of `name r g b` and `name:r,g,b:parts:actions`.")
            return []
        found.append((match["name"], (red, green, blue)))
    return found


def by_value(names: Mapping[int, str], path: Path) -> Legend:
    """Raises SettingError if there are no names, or too many."""
    with valid(path, "the list of classes"):
        values, table = numbered(names.values(), path), np.full(IGNORE + 1, -1)
        table[0], table[IGNORE] = 0, IGNORE
        for value, name in names.items():
            if not 0 <= value <= IGNORE:
                raise ValueError(f"the value {value} does not fit into 8 bits")
            table[value] = values[name]
        return Legend(path, classes_of(values), table)


def by_colour(colours: Iterable[tuple[str, tuple[int, int, int]]], path: Path) -> Colours:
    """Raises SettingError if there are no names, or too many, or two of one colour."""
    colours = list(colours)
    values = numbered((name for name, _ in colours), path)
    meaning = {VOID: IGNORE, (0, 0, 0): 0}
    if len({colour for _, colour in colours}) < len(colours):
        raise SettingError(f"{path} gives one colour to two classes.")
    meaning |= {colour: values[name] for name, colour in colours}
    codes = sorted((red << 16 | green << 8 | blue, value) for (red, green, blue), value in meaning.items())
    return Colours(path, classes_of(values), np.array([c for c, _ in codes]), np.array([v for _, v in codes], np.uint8))


# Files


def index_values(path: Path) -> np.ndarray:
    """Reads an index mask: (H, W) uint8 values, by index if it has a palette.

    A mask of 1 bit, or with a palette of white and black, holds 0 and 255.

    Raises:
        SettingError: it has colours, transparency or more than 8 bits.
        ImageError: it cannot be read.
    """
    mask = decode(path)
    values = np.array(mask.convert("L") if mask.mode == "1" or white_first(mask) else mask)
    if mask.mode in ("LA", "RGBA") and (values[..., -1] == 255).all():
        values = values[..., :-1]
    if mask.mode in ("LA", "RGB", "RGBA") and (values == values[..., :1]).all():
        values = values[..., 0]  # grey, saved with several equal channels
    if values.ndim != 2 or mask.mode == "F" or values.max(initial=0) > IGNORE:
        raise SettingError(
            f"{path} is not an index mask (mode {mask.mode}). Save it with one channel of 8 bits: "
            "0 = none, k = class of line k in classes.txt, 255 = ignore. If its colours are the classes, add a "
            "labelmap.txt with a line `name r g b` for each."
        )
    return values.astype(np.uint8)


def white(path: Path) -> np.ndarray:
    """Reads a mask of black and white: (H, W) uint8, 1 where it is 128 or more."""
    return (index_values(path) >= 128).astype(np.uint8)


def smoothed(counts: np.ndarray) -> bool:
    """Whether masks are black and white but for greys at edges, as JPEG and resizing leave them.

    Args:
        counts: (256,), how many pixels have each value.
    """
    greys, whites = counts[NEARLY_BLACK:NEARLY_WHITE], counts[NEARLY_WHITE:].sum()
    return bool(np.count_nonzero(counts[1:IGNORE]) >= 8 and greys.sum() < min(whites, 0.1 * counts.sum()))


def foreground(path: Path) -> np.ndarray:
    """Reads a mask of one class: (H, W) bool.

    The class is where the mask is not black if it has only one other value or a palette of colours; otherwise where it
    is 128 or more.

    Raises:
        ImageError: it cannot be read.
    """
    mask = decode(path)
    if mask.mode == "P" and np.ptp(colours := np.asarray(mask.convert("RGB")), -1).any():
        return np.asarray(colours.any(-1))
    if mask.mode in ("1", "P"):
        mask = mask.convert("L")
    values = np.asarray(flat_mask(mask) if len(mask.getbands()) > 1 else mask)
    marked = values[values != 0]
    one_value = marked.size == 0 or marked.min() == marked.max()
    return np.asarray(values >= (1 if one_value else 128))


def of_class(mask: Path, value: int) -> np.ndarray:
    """The index mask (H, W) uint8 of a mask of one class."""
    return foreground(mask).astype(np.uint8) * np.uint8(value)
