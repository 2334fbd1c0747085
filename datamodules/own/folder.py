"""The user's own images, in one of two folder layouts. The layout is detected automatically.

Index masks, as in CamVid and Cityscapes and as written by most labelling tools:

    root/classes.txt          one class name per line; line k names the mask value k
    root/images/NAME.jpg      or .png, .bmp, .gif, .tif, .webp
    root/masks/NAME.png       one channel: 0 = none of the classes, k = class of line k, 255 = ignore

With one class, `classes.txt` may be absent, and the masks may be black and white (0 and 255).

One folder per class, as in FSS-1000; other names of the files are in `layouts.py`:

    root/CLASS/NAME.jpg
    root/CLASS/NAME.png       black and white: values of 128 or more are the class (0/1 masks also work)
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from datamodules.episodes.dataset import FewShotDataset, Fold, Split
from datamodules.episodes.episode import IGNORE
from datamodules.episodes.sampler import json_hash
from datamodules.errors import DatasetError
from datamodules.own.layouts import has_index_masks, pairs_by_class, pairs_of_index_masks
from datamodules.own.scan import Pixels, foreground, index_values, scan
from pmnet.segment.images import load_image


class FolderDataset(FewShotDataset):
    """A folder of images and masks.

    All files are read once at the start, so that a broken file is found before training.

    Args:
        root: the folder, in one of the two layouts above.
        folds: number of folds, which splits the classes in order into parts of nearly equal size; or the names of
            each fold's novel classes, such as [["cat", "dog"], ["bus"]].
        min_area: an image is used for a class only if the class covers at least this share of its pixels, 0..1.
        test_fraction: share of the images used only for testing, 0..1: the last by name, of each class folder or of
            the whole `images/` folder. 0 uses all images for both, so novel classes are tested on training images.

    Raises:
        DatasetError: the folder, a mask or `classes.txt` is missing or invalid.
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
        self.indexed = has_index_masks(self.root)
        self.files = pairs_of_index_masks(self.root) if self.indexed else pairs_by_class(self.root)
        title = Path(os.path.abspath(self.root)).name
        pixels = scan(self.files, index_values if self.indexed else foreground, title)
        values = {value for counts in pixels.values() for value in counts}
        self.black_and_white = self.indexed and values - {0} == {IGNORE}
        if self.indexed:
            self.classes = self.read_classes(values, title)
        else:
            self.classes = sorted({name.split("/")[0] for name in self.files})
        self.folds = cut_folds(self.classes, folds)
        self.splits = f"images of {title}/ where the class covers at least {min_area:.2%} of the pixels; " + (
            f"last {test_fraction:.0%} by name for testing" if test_fraction else "all for training and testing"
        )
        self.names = self.split_images(pixels, test_fraction)

    def read_classes(self, values: set[int], title: str) -> list[str]:
        """The class names of index masks: those in `classes.txt`, or without it the folder's name for a single class.

        Args:
            values: all values in the masks.
            title: the folder's name.

        Raises:
            DatasetError: the file is invalid, or the masks need it, or they cannot tell its classes apart.
        """
        path = self.root / "classes.txt"
        names = class_names(path) if path.is_file() else [title]
        if not path.is_file() and not self.black_and_white and values - {0, 1, IGNORE}:
            raise DatasetError(
                f"There is no {path}. Create it: one class name per line; line k names mask value k (the masks have "
                f"values up to {max(values - {IGNORE})})."
            )
        if self.black_and_white and len(names) > 1:
            raise DatasetError(
                f"Every mask in {self.root / 'masks'} has only the values 0 and 255, so it does not say which of the "
                f"{len(names)} classes in classes.txt is where. Save value k for the class of line k (255 = ignore); "
                "for one class, keep only its line; or use one folder per class (CLASS/NAME.jpg, CLASS/NAME.png)."
            )
        return names

    def split_images(self, pixels: Mapping[str, Pixels], test_fraction: float) -> dict[Split, list[list[str]]]:
        """The names of the images that show each class, for each split.

        Args:
            pixels: image -> number of pixels of each value in its mask.
            test_fraction: as in the class's arguments.

        Raises:
            DatasetError: a mask has a value that stands for no class.
        """
        held_out = set(self.last_names(test_fraction))
        names: dict[Split, list[list[str]]] = {s: [[] for _ in self.classes] for s in ("train", "test")}
        for name, counts in pixels.items():
            least = max(1, self.min_area * sum(counts.values()))
            for class_id, count in self.areas(name, counts).items():
                if count >= least and (name in held_out or not held_out):
                    names["test"][class_id].append(name)
                if count >= least and name not in held_out:
                    names["train"][class_id].append(name)
        return names

    def areas(self, name: str, counts: Pixels) -> Pixels:
        """Class id -> number of its pixels. Raises DatasetError if a value of the mask stands for no class."""
        if not self.indexed:
            return {self.class_of(name): counts.get(1, 0)}
        if self.black_and_white:
            return {0: counts.get(IGNORE, 0)}
        unknown = [value for value in counts if len(self.classes) < value < IGNORE]
        if unknown:
            path = self.files[name].mask
            lossy = " JPEG changes values: save masks as PNG." if path.suffix.lower() in (".jpg", ".jpeg") else ""
            raise DatasetError(
                f"{path} has the value {unknown[0]}, but classes.txt names only {len(self.classes)} classes (values 1 "
                f"to {len(self.classes)}; 0 = none, 255 = ignore).{lossy} Correct the mask, or add the class to "
                "classes.txt."
            )
        return {value - 1: count for value, count in counts.items() if 0 < value < IGNORE}

    def class_of(self, name: str) -> int:
        """Id of the class whose folder contains an image."""
        return self.classes.index(name.split("/")[0])

    def last_names(self, fraction: float) -> Iterator[str]:
        """The last images by name: of each class folder, or of the whole `images/` folder."""
        groups: dict[str, list[str]] = {}
        for name in self.files:
            groups.setdefault("" if self.indexed else name.split("/")[0], []).append(name)
        for group in groups.values():
            yield from group[len(group) - math.ceil(fraction * len(group)) :]

    def target_classes(self, source: FewShotDataset, fold: Fold) -> list[int]:
        """All classes; those with too few images for an episode are left out later, as their number depends on K."""
        return self.novel_classes("all")

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        return self.names[split][class_id]

    def read_image(self, name: str) -> Tensor:
        return load_image(self.files[name].image)

    def read_index(self, name: str) -> Tensor:
        path = self.files[name].mask
        if not self.indexed:
            return foreground(path) * (self.class_of(name) + 1)
        values = index_values(path)
        return (values == IGNORE).to(values.dtype) if self.black_and_white else values

    def fingerprint(self) -> str:
        stats = [path.stat() for pair in self.files.values() for path in pair]
        return json_hash([str(self.root.absolute()), [(s.st_size, s.st_mtime_ns) for s in stats]])

    def advice(self) -> str:
        return (
            f"Images in which the class covers less than {self.min_area:.2%} are not used. Lower dataset.min_area, or "
            "add images."
        )


def class_names(path: Path) -> list[str]:
    """The names in `classes.txt`. Raises DatasetError if the file is invalid."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    if not 0 < len(names) < IGNORE or len(set(names)) < len(names) or "" in names:
        raise DatasetError(
            f"{path} must contain 1 to {IGNORE - 1} different class names, one per line, without empty lines "
            "(line k names mask value k)."
        )
    return names


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
