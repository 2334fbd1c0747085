"""The user's own images, in any format that `pmnet.segment.formats` reads. The format is detected by content.

The two simplest layouts; the docs list all:

    root/classes.txt          one class name per line; line k names the mask value k
    root/images/NAME.jpg      or .png, .bmp, .gif, .tif, .webp
    root/masks/NAME.png       one channel: 0 = none of the classes, k = class of line k, 255 = ignore

    root/CLASS/NAME.jpg       one folder per class, as in FSS-1000
    root/CLASS/NAME.png       black and white
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.episodes.dataset import FewShotDataset, Fold, Split
from datamodules.episodes.episode import IGNORE
from datamodules.episodes.sampler import json_hash
from datamodules.errors import DatasetError
from datamodules.inventory import Inventory, Pixels, Remembered, counted
from pmnet.errors import SettingError
from pmnet.segment.formats import Annotated, masks, read_folder
from pmnet.segment.formats.annotated import listed as class_names  # noqa: F401
from pmnet.segment.images import one_error


class FolderDataset(FewShotDataset):
    """A folder of images and masks.

    All files are read at the first start, so that a broken file is found before training; later, those that are new
    or changed.

    Args:
        root: the folder, in any format of `pmnet.segment.formats`.
        folds: number of folds, which splits the classes in order into parts of nearly equal size; or the names of
            each fold's novel classes, such as [["cat", "dog"], ["bus"]].
        min_area: an image is used for a class only if the class covers at least this share of its pixels, 0..1.
        test_fraction: share of the images used only for testing, 0..1: the last by name, of each class folder or
            other sub-folder of images. 0 uses all images for both, so novel classes are tested on training images.

    Raises:
        DatasetError: the folder, a mask or the names of the classes are missing or invalid.
        ImageError: a file cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as root:
        ...     for name in ("cat", "dog"):
        ...         (Path(root) / name).mkdir()
        ...         for i in range(3):
        ...             Image.new("RGB", (64, 48)).save(f"{root}/{name}/{i}.jpg")
        ...             Image.new("L", (64, 48), 255).save(f"{root}/{name}/{i}.png")
        ...     dataset = FolderDataset(root, folds=2, min_area=0.01)
        ...     mask = dataset.read_mask("dog/2", class_id=1)
        >>> dataset.classes, dataset.novel_classes(0), dataset.images_of(1, "test"), mask.shape
        (['cat', 'dog'], [0], ['dog/0', 'dog/1', 'dog/2'], torch.Size([48, 64]))
    """

    name = "folder"
    leaves_out_rare = True

    def __init__(
        self, root: str | None, folds: int | Sequence[Sequence[str]], min_area: float, test_fraction: float = 0.0
    ) -> None:
        if root is None:
            raise DatasetError(
                "No data chosen. Set dataset.root=/path/to/folder to use your own images (docs/own-images.md shows the "
                "layouts), or try `python run.py experiment=quickstart`, which needs no data."
            )
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DatasetError(f"There is no folder {self.root.absolute()}. Check dataset.root.")
        self.min_area = min_area
        title = Path(os.path.abspath(self.root)).name
        try:
            counts = Remembered(self.root, masks.counted)
            self.files = {each.name: each for each in read_folder(self.root, counts)}
            counts.keep()
            self.stamps = {path: stamp(path) for each in self.files.values() for path in (each.path, each.source)}
            self.counts = self.scan(title)
        except SettingError as error:
            raise DatasetError(str(error)) from error
        self.classes = list(next(iter(self.files.values())).classes)
        self.folds = cut_folds(self.classes, folds)
        self.splits = f"images of {title}/ where the class covers at least {min_area:.2%} of the pixels; " + (
            f"last {test_fraction:.0%} by name for testing" if test_fraction else "all for training and testing"
        )
        self.names = self.split_images(self.counts, test_fraction)

    def scan(self, title: str) -> dict[str, Pixels]:
        """Reads and checks the images and masks that no earlier start has read.

        Args:
            title: the folder's name, for the progress bar.

        Returns:
            Name -> number of pixels of each value in the mask.

        Raises:
            SettingError: an annotation is invalid, or its size differs from that of its image.
            ImageError: a file cannot be read.
        """
        files = {name: (each.path, each.source) for name, each in self.files.items()}
        meanings = {name: each.meaning for name, each in self.files.items()}
        inventory = Inventory([str(self.root.absolute()), *next(iter(self.files.values())).classes])
        return inventory.pixels(files, lambda name: examine(self.files[name]), f"Reading {title}", meanings)

    def pixels(self, names: Iterable[str]) -> dict[str, Pixels]:
        return {name: self.counts[name] for name in names}

    def split_images(self, pixels: Mapping[str, Pixels], test_fraction: float) -> dict[Split, list[list[str]]]:
        """The names of the images that show each class, for each split.

        Args:
            pixels: image -> number of pixels of each value in its mask.
            test_fraction: as in the class's arguments.
        """
        held_out = set(self.last_names(test_fraction))
        names: dict[Split, list[list[str]]] = {s: [[] for _ in self.classes] for s in ("train", "test")}
        for name, counts in pixels.items():
            least = max(1, self.min_area * sum(counts.values()))
            for class_id, count in areas(counts).items():
                if count >= least and (name in held_out or not held_out):
                    names["test"][class_id].append(name)
                if count >= least and name not in held_out:
                    names["train"][class_id].append(name)
        return names

    def last_names(self, fraction: float) -> Iterator[str]:
        """The last images by name of each sub-folder."""
        groups: dict[str, list[str]] = {}
        for name in sorted(self.files):
            groups.setdefault(name.rpartition("/")[0], []).append(name)
        for group in groups.values():
            yield from group[len(group) - math.ceil(fraction * len(group)) :]

    def target_classes(self, source: FewShotDataset, fold: Fold) -> list[int]:
        """All classes; those with too few images for an episode are left out later, as their number depends on K."""
        return self.novel_classes("all")

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        return self.names[split][class_id]

    def read_image(self, name: str) -> Tensor:
        self.check_unchanged(self.files[name].path)
        return self.files[name].pixels()

    def read_index(self, name: str) -> Tensor:
        each = self.files[name]
        if each.source.suffix.lower() != ".json":  # whose shapes are in memory
            self.check_unchanged(each.source)
        return torch.from_numpy(each.masks())

    def check_unchanged(self, path: Path) -> None:
        """Checks that a file is the one that the run began with: numbers of a mixture could not be repeated.

        Raises:
            DatasetError: it was replaced or edited.
            ImageError: it is gone.
        """
        if stamp(path) != self.stamps[path]:
            raise DatasetError(
                f"{path} was changed while the run was using it. If its content differs, start again with "
                "resume=false; if not, run the same command again to resume."
            )

    def fingerprint(self) -> str:
        return json_hash([str(self.root.absolute()), list(self.stamps.values())])

    def advice(self) -> str:
        return (
            f"Images in which the class covers less than {self.min_area:.2%} are not used. Lower dataset.min_area, or "
            "add images."
        )


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change. Raises ImageError if there is no such file."""
    with one_error(path):
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns


def examine(each: Annotated) -> Pixels:
    """Reads an image and its mask, and counts the pixels of each value in the mask; errors as those of `scan`."""
    each.pixels()
    return counted(each.masks())


def areas(counts: Pixels) -> Pixels:
    """Class id -> number of its pixels."""
    return {value - 1: count for value, count in counts.items() if 0 < value < IGNORE}


def cut_folds(classes: Sequence[str], folds: int | Sequence[Sequence[str]]) -> list[list[int]]:
    """Splits the classes into folds.

    Args:
        classes: names of all classes.
        folds: number of folds, for consecutive parts whose sizes differ by at most one; or the class names per fold.

    Returns:
        Ids of the novel classes of each fold.

    Raises:
        DatasetError: a name in `folds` is not a class.

    Example:
        >>> cut_folds(["cat", "dog", "bus"], 2), cut_folds(["cat", "dog", "bus"], [["bus", "cat"]])
        ([[0, 1], [2]], [[2, 0]])
    """
    if isinstance(folds, int):
        return [part.tolist() for part in np.array_split(np.arange(len(classes)), max(folds, 1))]
    if any(isinstance(fold, str) for fold in folds):
        raise DatasetError("dataset.folds must be a number or lists of class names, such as [[cat,dog],[bus]].")
    unknown = sorted({n for fold in folds for n in fold} - set(classes))
    if unknown:
        raise DatasetError(
            f"dataset.folds names '{unknown[0]}', which is not a class. Choose from: {', '.join(classes)}."
        )
    return [[classes.index(n) for n in fold] for fold in folds]
