"""The user's own images, in one of two layouts, found out from the folder.

Index masks (as CamVid, Cityscapes and most labelling tools give them):

    root/classes.txt          one class name a line; line k is the value k in the masks
    root/images/NAME.jpg      any format that Pillow reads
    root/masks/NAME.png       one channel: 0 = none of the classes, k = class of line k, 255 = ignore

A folder a class (as FSS-1000):

    root/CLASS/NAME.jpg
    root/CLASS/NAME.png       black and white: the class is where the value is 128 or more (0/1 works too)
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
    """Few-shot episodes from a folder of images and masks.

    Every image is read once at the start, so that a broken one shows before any time is spent.

    Args:
        root: the folder.
        folds: number of folds, cut from the classes in their order, or the names of each fold's novel
            classes.
        min_area: an image counts for a class where the class covers at least this share of its pixels.
        test_fraction: the last images in the order of their names are kept for testing alone, this share
            of each class's or of all; 0 tests novel classes on the images that base classes trained on.

    Raises:
        DatasetError: what is missing or broken, and what to do.
    """

    name = "folder"

    def __init__(
        self, root: str | None, folds: int | Sequence[Sequence[str]], min_area: float, test_fraction: float = 0.0
    ) -> None:
        if root is None:
            raise DatasetError(
                "No data chosen. Say where your images are: dataset.root=/path/to/folder (layouts: README.md), "
                "or try `python run.py experiment=quickstart`, which needs no data."
            )
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DatasetError(f"There is no folder {self.root.absolute()}: check dataset.root.")
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
        images, masks = (by_stem(self.root / part, IMAGE_SUFFIXES) for part in ("images", "masks"))
        if not images:
            raise DatasetError(f"{self.root / 'images'} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        for lonely, other, have in ((images, "masks", masks), (masks, "images", images)):
            alone = sorted(lonely.keys() - have.keys())
            if alone:
                kind = "mask" if other == "masks" else "image"
                raise DatasetError(
                    f"{lonely[alone[0]]} has no {kind} {self.root / other}/{alone[0]}.* "
                    f"({len(alone)} such): add the {kind}, or take the file away."
                )
        for stem in sorted(images):
            yield stem, (images[stem], masks[stem])

    def find_by_class(self) -> Iterator[tuple[str, tuple[Path, Path]]]:
        found = False
        for folder in sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")):
            images, masks = by_stem(folder, IMAGE_SUFFIXES - {".png"}), by_stem(folder, {".png"})
            if images.keys() != masks.keys():
                stem = sorted(images.keys() ^ masks.keys())[0]
                have, lack = (images[stem], "mask .png") if stem in images else (masks[stem], "image .jpg")
                raise DatasetError(f"{have} has no {lack} beside it: add it, or take the file away.")
            for stem in sorted(images):
                found = True
                yield f"{folder.name}/{stem}", (images[stem], masks[stem])
        if not found:
            raise DatasetError(
                f"{self.root.absolute()} has neither images/, masks/ and classes.txt, nor folders <class>/ with pairs "
                "NAME.jpg and NAME.png: see the two layouts in README.md."
            )

    def read_class_names(self) -> list[str]:
        path = self.root / "classes.txt"
        if not path.is_file():
            raise DatasetError(f"There is no {path}: write one class name a line; line k names the masks' value k.")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DatasetError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8.") from error
        names = [line.strip() for line in text.rstrip().splitlines()]
        if not 0 < len(names) < IGNORE or len(set(names)) < len(names) or "" in names:
            raise DatasetError(
                f"{path} must name 1 to {IGNORE - 1} classes, a line each, none twice, no line empty "
                "(line k is the value k in the masks)."
            )
        return names

    def scan(self, test_fraction: float) -> dict[Split, list[list[str]]]:
        """For each split and class, the names of the images that show it; reads and checks every file."""
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
        """The last images by name: of the whole folder, or of each class where classes have folders."""
        groups: dict[str, list[str]] = {}
        for name in self.files:
            groups.setdefault("" if self.indexed else name.split("/")[0], []).append(name)
        for group in groups.values():
            yield from group[len(group) - math.ceil(fraction * len(group)) :]

    def classes_in(self, name: str) -> list[int]:
        """Class ids that cover enough of an image, whose files are checked on the way."""
        image, mask = load_image(self.files[name][0]), self.read_index(name)
        if image.shape[1:] != mask.shape:
            (h, w), (mh, mw) = image.shape[1:], mask.shape
            raise DatasetError(
                f"{self.files[name][1]} is {mw}x{mh} pixels, but its image {self.files[name][0].name} is {w}x{h}: "
                "they must have the same size."
            )
        counts = torch.bincount(mask.flatten().int(), minlength=256)
        unknown = [v for v in counts.nonzero().flatten().tolist() if len(self.classes) < v < IGNORE]
        if unknown:
            raise DatasetError(
                f"{self.files[name][1]} has the value {unknown[0]}, but classes.txt names only "
                f"{len(self.classes)} classes (values 1 to {len(self.classes)}; 0 = none, 255 = ignore)."
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
        values = np.array(mask)
        if values.ndim != 2 or mask.mode in ("1", "F") or values.max(initial=0) > 255:
            raise DatasetError(
                f"{path} is no index mask (mode {mask.mode}): want one channel of 8 bits, "
                "0 = none, k = the class of line k in classes.txt, 255 = ignore."
            )
        return torch.from_numpy(values.astype(np.uint8))

    def fingerprint(self) -> str:
        stats = [path.stat() for pair in self.files.values() for path in pair]
        return json_hash([str(self.root.absolute()), [(s.st_size, s.st_mtime_ns) for s in stats]])

    def advice(self) -> str:
        return (
            f"Images where the class covers under {self.min_area:.2%} are left out: lower dataset.min_area, use "
            "fewer shots, or add images."
        )


def by_stem(folder: Path, suffixes: set[str]) -> dict[str, Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)
    stems = {p.stem: p for p in files}
    if len(stems) < len(files):
        twice = next(p for p in files if stems[p.stem] != p)
        raise DatasetError(f"{twice} and {stems[twice.stem].name} share one name: keep one of them.")
    return stems


def cut_folds(classes: Sequence[str], folds: int | Sequence[Sequence[str]]) -> list[list[int]]:
    """Class ids of each fold: consecutive parts whose sizes differ by one at most, or as named.

    Raises:
        DatasetError: a name that is no class.
    """
    if isinstance(folds, int):
        return [part.tolist() for part in np.array_split(np.arange(len(classes)), max(folds, 1))]
    if any(isinstance(fold, str) for fold in folds):
        raise DatasetError("dataset.folds is a number, or a list of lists of class names: [[cat,dog],[bus]].")
    unknown = sorted({n for fold in folds for n in fold} - set(classes))
    if unknown:
        raise DatasetError(f"dataset.folds names '{unknown[0]}', which is no class. Classes: {', '.join(classes)}.")
    return [[classes.index(n) for n in fold] for fold in folds]
