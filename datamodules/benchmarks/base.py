"""The base class of the published benchmarks: a prepared folder, image lists, and mask files."""

import hashlib
import json
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.episodes.dataset import FewShotDataset, Split
from datamodules.episodes.episode import IGNORE, EpisodeSpec
from datamodules.episodes.sampler import Draw, Names, draw_in_turn, json_hash
from datamodules.errors import DatasetError
from datamodules.inventory import Inventory, Pixels, counted
from datamodules.prepare.download import Download
from datamodules.prepare.source import Source, visible
from pmnet.replacing import replacing
from pmnet.segment.images import decode, load_image

MIN_AREA = 2 * 32 * 32  # an image is used for a class only if the class covers this many pixels of the original mask
Areas = dict[str, dict[int, int]]  # image -> class id -> number of its pixels in the mask


class Benchmark(FewShotDataset):
    """A published benchmark in a folder prepared by `python -m datamodules.prepare`.

    A subclass describes its files: it sets the attributes and implements `fill`, `found`, `image_path` and `mask_path`.
    By default, a benchmark is for testing only and has one list of images per class.

    Args:
        root: the prepared folder.
        splits: folder with lists to use instead of the prepared ones: <splits>/<name>/..., or <splits>/...

    Attributes:
        title: name of the benchmark as printed in papers.
        obtain: what to download and from where, for messages.
        wanted: glob patterns of the paths to unpack from the published archives.
        downloads: files that can be downloaded without a login.
        list_downloads: path under the lists' folder -> download, for each file of the published lists.
        published: sha256 of the published lists as JSON; None if no lists are published.
        list_rule: how lists are built if the published ones are not available.
        same_size: if True, a mask of another size than its image is an error; if False, it is recorded in the manifest,
            and image and mask are resized separately.
    """

    title: ClassVar[str]
    obtain: ClassVar[str]
    wanted: ClassVar[Sequence[str]]
    downloads: ClassVar[Sequence[Download]] = ()
    list_downloads: ClassVar[dict[str, Download]] = {}
    published: ClassVar[str | None] = None
    list_rule: ClassVar[str] = f"for each class, the images in which it covers at least {MIN_AREA:,} pixels of the mask"
    same_size: ClassVar[bool] = False
    test_only = True
    folds: Sequence[Sequence[int]] = ()
    test_length = 600

    def __init__(self, root: str, splits: str | None = None) -> None:
        self.root = Path(root).expanduser()
        self.list_folder = self.root / "splits"
        if splits is not None:
            given = Path(splits).expanduser()
            self.list_folder = given / self.name if (given / self.name).is_dir() else given

    # Preparation

    @classmethod
    @abstractmethod
    def fill(cls, source: Source, ready: Path) -> list[str]:
        """Fills the folder to prepare with images and masks from the published files.

        Args:
            source: the published files.
            ready: the folder to fill.

        Returns:
            Notes on what was done, for the manifest.

        Raises:
            DatasetError: a file is missing or invalid.
        """

    @abstractmethod
    def found(self) -> list[str]:
        """Names of all images in the folder that have a mask, sorted."""

    def build_lists(self, areas: Areas) -> Any:
        """Builds the lists by `list_rule`.

        Args:
            areas: number of pixels of each class in each mask.

        Returns:
            The lists as plain values, as `read_lists` returns them.
        """
        return {
            name: [image for image, found in areas.items() if found.get(c, 0) >= MIN_AREA]
            for c, name in enumerate(self.classes)
        }

    def write_lists(self, lists: Any, folder: Path) -> None:
        """Writes the lists into a folder, in the form that `read_lists` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "test.json").write_text(json.dumps(lists, indent=0) + "\n")

    def read_lists(self, folder: Path) -> Any:
        """Reads the lists from a folder, as plain values. Raises DatasetError if one is missing or invalid."""
        path = folder / "test.json"
        try:
            lists = json.loads(self.list_text(path))
        except (ValueError, RecursionError) as error:
            raise self.invalid(path, error) from error
        names = [lists.get(name) for name in self.classes] if isinstance(lists, dict) else [None]
        if not all(
            isinstance(n, list) and all(isinstance(image, str) and image.isprintable() for image in n) for n in names
        ):
            raise self.invalid(path, "it must hold the names of the images of each class")
        return lists

    def list_text(self, path: Path) -> str:
        """Text of a list file. Raises DatasetError if it does not exist or is not text."""
        try:
            return path.read_text()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self.absent(path) from error
        except (OSError, UnicodeDecodeError) as error:
            raise self.invalid(path, error) from error

    def invalid(self, path: Path, why: object) -> DatasetError:
        """The error for a damaged list, with instructions."""
        return DatasetError(f"{path} is not a list of {self.title} ({why}). {self.how_to_prepare()}")

    def absent(self, path: Path) -> DatasetError:
        """The error for a missing list or folder, with instructions."""
        prepared = self.root.is_dir() or not path.is_relative_to(self.root)
        what = f"has no list {path.absolute()}" if prepared else f"is not at {self.root.absolute()}"
        return DatasetError(f"{self.title} {what}. {self.how_to_prepare()}")

    def how_to_prepare(self) -> str:
        """Instructions for preparing the benchmark; the end of an error message."""
        return (
            f"Prepare it: python -m datamodules.prepare {self.name} --source <downloaded files> --root "
            f"{self.root.parent}; without --source, this prints what to download. If the benchmark is elsewhere, set "
            "data=/path/to/data."
        )

    # Reading

    @cached_property
    def lists(self) -> Any:
        """The lists in use, as plain values."""
        return self.read_lists(self.list_folder)

    @cached_property
    def splits(self) -> str:  # type: ignore[override]
        digest = json_hash(self.lists)
        if digest == self.published:
            return "published lists"
        kind = "lists built from the files" if self.list_folder == self.root / "splits" else "lists given"
        return f"{kind} (sha256 {digest[:12]})"

    @cached_property
    def _images(self) -> dict[int, Names]:
        return {c: Names(self.lists[name]) for c, name in enumerate(self.classes)}

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        return self._images[class_id]

    def test_episodes(
        self, class_ids: Sequence[int], count: int, shot: int, repeats: bool | None = None, seed: int = 0
    ) -> list[EpisodeSpec]:
        draw = Draw(repeats is not False, seed)
        images = self.images(class_ids, "test", 1 if draw.repeats else shot)
        return self.draw(class_ids, images, count, shot, draw)

    def draw(
        self, class_ids: Sequence[int], images: dict[int, Sequence[str]], count: int, shot: int, draw: Draw
    ) -> list[EpisodeSpec]:
        """Samples test episodes in the order of the published program, here: classes in turn, queries at random."""
        return draw_in_turn(images, count, shot, draw)

    @abstractmethod
    def image_path(self, name: str) -> Path:
        """Path of an image."""

    @abstractmethod
    def mask_path(self, name: str) -> Path:
        """Path of the mask of an image."""

    def read_image(self, name: str) -> Tensor:
        return load_image(self.image_path(name), turn=False)

    def read_index(self, name: str) -> Tensor:
        path = self.mask_path(name)
        mask = decode(path)
        known = mask.mode in ("L", "P")  # one channel of 8 bits
        index = np.array(mask) if known else np.zeros(0)
        if not known or ((index > len(self.classes)) & (index != IGNORE)).any():
            unknown = (index > len(self.classes)) & (index != IGNORE) if known else None
            what = "is not an index mask" if unknown is None else f"has the value {index[unknown][0]}"
            raise DatasetError(
                f"{path} {what}. It must have one channel with values 0 to {len(self.classes)} or 255. Prepare the "
                "benchmark again."
            )
        return torch.from_numpy(index)

    def pixels(self, names: Iterable[str]) -> dict[str, Pixels]:
        files = {name: [self.mask_path(name)] for name in names}
        inventory = Inventory([self.name, str(self.root.absolute()), self.splits])
        return inventory.pixels(
            files, lambda name: counted(self.read_index(name).numpy()), f"Reading masks of {self.name}"
        )

    def check(self, names: Iterable[str]) -> None:
        if not self.root.is_dir():
            raise self.absent(self.root)
        missing = self.missing(names)
        if missing:
            path, name = next(iter(missing.items()))
            raise DatasetError(
                f"The lists of {self.title} ({self.list_folder}) name '{name}', but there is no {path} ({len(missing)} "
                f"files are missing). Complete the download, or use lists of the same version. {self.how_to_prepare()}"
            )

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """Finds missing files by listing folders; opens no image.

        Args:
            names: names of images.

        Returns:
            Path of each missing image or mask file -> name of the image that needs it.
        """
        wanted: dict[str, dict[str, str]] = defaultdict(dict)  # folder -> file -> image
        for name in set(names):
            for path in (self.image_path(name), self.mask_path(name)):
                folder, file = os.path.split(path)
                wanted[folder][file] = name
        missing: dict[str, str] = {}
        for folder, files in sorted(wanted.items()):
            there = {entry.name for entry in os.scandir(folder)} if os.path.isdir(folder) else set()
            missing |= {os.path.join(folder, file): files[file] for file in sorted(files.keys() - there)}
        return missing

    def fingerprint(self) -> str:
        manifest = self.root / "manifest.json"
        if manifest.exists():
            return hashlib.sha256(manifest.read_bytes()).hexdigest()
        names = self.found()
        stats = [p.stat() for n in names for p in (self.image_path(n), self.mask_path(n))]
        return json_hash([names, [(s.st_size, s.st_mtime_ns) for s in stats]])

    def advice(self) -> str:
        return f"Images in which the class covers less than {MIN_AREA:,} pixels are not used. {self.how_to_prepare()}"


def binary_mask(path: Path) -> Tensor:
    """Reads a black and white mask: (H, W) uint8, 1 where it is 128 or more. Raises ImageError if it cannot be read."""
    return torch.from_numpy((np.asarray(decode(path).convert("L")) >= 128).astype(np.uint8))


def stems(folder: Path, suffix: str) -> list[str]:
    """Names of the files in a folder that end with `suffix`, without the suffix, sorted."""
    return sorted(p.name[: -len(suffix)] for p in visible(folder, suffix))


def write_png(pixels: np.ndarray, path: Path) -> None:
    """Writes (H, W) or (H, W, 3) uint8 pixels as PNG; an interrupted call leaves no partial file at `path`."""
    with replacing(path) as part:
        Image.fromarray(pixels).save(part, format="PNG")
