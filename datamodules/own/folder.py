"""The user's own images, in one of two folder layouts. The layout is detected automatically.

Index masks, as in CamVid and Cityscapes and as written by most labelling tools:

    root/classes.txt          one class name per line; line k names the mask value k
    root/images/NAME.jpg      or .png, .bmp, .tif, .webp
    root/masks/NAME.png       one channel: 0 = none of the classes, k = class of line k, 255 = ignore

One folder per class, as in FSS-1000:

    root/CLASS/NAME.jpg
    root/CLASS/NAME.png       black and white: values of 128 or more are the class (0/1 masks also work)
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.episodes.dataset import FewShotDataset, Split
from datamodules.episodes.episode import IGNORE
from datamodules.episodes.sampler import json_hash
from datamodules.errors import DatasetError
from datamodules.progress import track
from pmnet.segment.images import decode, load_image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


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

    def __init__(
        self, root: str | None, folds: int | Sequence[Sequence[str]], min_area: float, test_fraction: float = 0.0
    ) -> None:
        if root is None:
            raise DatasetError(
                "No data chosen. Set dataset.root=/path/to/folder to use your own images (see README.md for the "
                "layouts), or try `python run.py experiment=quickstart`, which needs no data."
            )
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DatasetError(f"There is no folder {self.root.absolute()}. Check dataset.root.")
        self.min_area = min_area
        self.indexed = (self.root / "images").is_dir() and (self.root / "masks").is_dir()
        self.files = dict(self.find_indexed() if self.indexed else self.find_by_class())
        self.classes = self.read_class_names() if self.indexed else sorted({n.split("/")[0] for n in self.files})
        self.folds = cut_folds(self.classes, folds)
        self.splits = f"images of {self.root.name}/ where the class covers at least {min_area:.2%} of the pixels; " + (
            f"last {test_fraction:.0%} by name for testing" if test_fraction else "all for training and testing"
        )
        self.names: dict[Split, list[list[str]]] = self.scan(test_fraction)

    def find_indexed(self) -> Iterator[tuple[str, tuple[Path, Path]]]:
        """Pairs of image and mask in the layout with index masks."""
        images, masks = (by_stem(self.root / part, IMAGE_SUFFIXES) for part in ("images", "masks"))
        if not images:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise DatasetError(f"{self.root / 'images'} contains no images. Add files with the suffixes {suffixes}.")
        for files, other, partners in ((images, "masks", masks), (masks, "images", images)):
            unpaired = sorted(files.keys() - partners.keys())
            if unpaired:
                kind = "mask" if other == "masks" else "image"
                raise DatasetError(
                    f"{files[unpaired[0]]} has no {kind} {self.root / other}/{unpaired[0]}.* "
                    f"({len(unpaired)} unpaired files). Add the {kind}, or remove the file."
                )
        for stem in sorted(images):
            yield stem, (images[stem], masks[stem])

    def find_by_class(self) -> Iterator[tuple[str, tuple[Path, Path]]]:
        """Pairs of image and mask in the layout with one folder per class."""
        found = False
        for folder in sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")):
            images, masks = by_stem(folder, IMAGE_SUFFIXES - {".png"}), by_stem(folder, {".png"})
            if images.keys() != masks.keys():
                stem = sorted(images.keys() ^ masks.keys())[0]
                file, missing = (images[stem], "mask .png") if stem in images else (masks[stem], "image .jpg")
                raise DatasetError(f"{file} has no {missing} beside it. Add it, or remove the file.")
            for stem in sorted(images):
                found = True
                yield f"{folder.name}/{stem}", (images[stem], masks[stem])
        if not found:
            raise DatasetError(
                f"{self.root.absolute()} matches neither supported layout: images/, masks/ and classes.txt, or one "
                "folder per class with pairs NAME.jpg and NAME.png. Arrange the files in one of them (see README.md), "
                "or check dataset.root."
            )

    def read_class_names(self) -> list[str]:
        """The names in `classes.txt`. Raises DatasetError if the file is missing or invalid."""
        path = self.root / "classes.txt"
        if not path.is_file():
            raise DatasetError(f"There is no {path}. Create it: one class name per line; line k names mask value k.")
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

    def scan(self, test_fraction: float) -> dict[Split, list[list[str]]]:
        """Reads and checks every file; returns the names of the images that show each class, for each split."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(self.classes_in, self.files)
            shown = list(track(found, f"Reading {self.root.name}", len(self.files)))
        held_out = set(self.last_names(test_fraction))
        names: dict[Split, list[list[str]]] = {s: [[] for _ in self.classes] for s in ("train", "test")}
        for name, class_ids in zip(self.files, shown, strict=True):
            for class_id in class_ids:
                if name in held_out or not held_out:
                    names["test"][class_id].append(name)
                if name not in held_out:
                    names["train"][class_id].append(name)
        return names

    def last_names(self, fraction: float) -> Iterator[str]:
        """The last images by name: of each class folder, or of the whole `images/` folder."""
        groups: dict[str, list[str]] = {}
        for name in self.files:
            groups.setdefault("" if self.indexed else name.split("/")[0], []).append(name)
        for group in groups.values():
            yield from group[len(group) - math.ceil(fraction * len(group)) :]

    def classes_in(self, name: str) -> list[int]:
        """Ids of the classes that cover enough of an image. Raises an error if the image or mask is invalid."""
        image, mask = load_image(self.files[name][0]), self.read_index(name)
        if image.shape[1:] != mask.shape:
            (h, w), (mh, mw) = image.shape[1:], mask.shape
            raise DatasetError(
                f"{self.files[name][1]} is {mw}x{mh} pixels, but its image {self.files[name][0].name} is {w}x{h}. "
                "Save both with the same size."
            )
        counts = torch.bincount(mask.flatten().int(), minlength=256)
        unknown = [v for v in counts.nonzero().flatten().tolist() if len(self.classes) < v < IGNORE]
        if unknown:
            raise DatasetError(
                f"{self.files[name][1]} has the value {unknown[0]}, but classes.txt names only "
                f"{len(self.classes)} classes (values 1 to {len(self.classes)}; 0 = none, 255 = ignore). "
                "Correct the mask, or add the class to classes.txt."
            )
        return [c for c in range(len(self.classes)) if counts[c + 1] >= max(1, self.min_area * mask.numel())]

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        return self.names[split][class_id]

    def read_image(self, name: str) -> Tensor:
        return load_image(self.files[name][0])

    def read_index(self, name: str) -> Tensor:
        path = self.files[name][1]
        mask = decode(path)
        if self.indexed:
            return self.index_values(mask, path)
        values = np.asarray(mask.convert("L"))
        foreground = values >= (128 if values.max() > 1 else 1)
        return torch.from_numpy(foreground * np.uint8(self.classes.index(name.split("/")[0]) + 1))

    def index_values(self, mask: Image.Image, path: Path) -> Tensor:
        """(H, W) uint8 values of an index mask. Raises DatasetError if it is not one."""
        values = np.array(mask)
        if values.ndim != 2 or mask.mode in ("1", "F") or values.max(initial=0) > 255:
            raise DatasetError(
                f"{path} is not an index mask (mode {mask.mode}). Save it with one channel of 8 bits: "
                "0 = none, k = class of line k in classes.txt, 255 = ignore."
            )
        return torch.from_numpy(values.astype(np.uint8))

    def fingerprint(self) -> str:
        stats = [path.stat() for pair in self.files.values() for path in pair]
        return json_hash([str(self.root.absolute()), [(s.st_size, s.st_mtime_ns) for s in stats]])

    def advice(self) -> str:
        return (
            f"Images in which the class covers less than {self.min_area:.2%} are not used. Lower dataset.min_area, use "
            "fewer shots, or add images."
        )


def by_stem(folder: Path, suffixes: set[str]) -> dict[str, Path]:
    """Stem -> file, sorted, of the files with these suffixes. Raises DatasetError if two files share a stem."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)
    stems = {p.stem: p for p in files}
    if len(stems) < len(files):
        twin = next(p for p in files if stems[p.stem] != p)
        raise DatasetError(f"{twin} and {stems[twin.stem].name} have the same name. Keep one of them.")
    return stems


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
