"""What the published benchmarks share: a prepared folder, lists of images, masks in files."""

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
from datamodules.prepare.download import Download
from datamodules.prepare.source import Source, visible
from pmnet.segment.images import decode, load_image

MIN_AREA = 2 * 32 * 32  # pixels of the original mask that a class covers in an image that counts for it
Areas = dict[str, dict[int, int]]  # image -> class id -> pixels of its mask


class Benchmark(FewShotDataset):
    """A published benchmark in the folder that `python -m datamodules.prepare` leaves.

    A subclass says what its files look like. By default it is only tested on, with a list of images for each class.

    Args:
        root: the prepared folder.
        splits: a folder of other lists than the prepared ones: <splits>/<name>/..., or <splits>/...

    Attributes:
        title: the benchmark's name as papers print it.
        obtain: what to download, from where.
        wanted: patterns of the paths that are needed, in the publisher's archives.
        downloads: what can be fetched without a login.
        list_downloads: published lists, by the file's place under the lists' folder.
        published: sha256 of the published lists as JSON; None where none are published.
        list_rule: how lists are built where the published ones are not to be had.
        same_size: whether a mask of another size than its image's is an error; else it is noted, and resized apart.
    """

    title: ClassVar[str]
    obtain: ClassVar[str]
    wanted: ClassVar[Sequence[str]]
    downloads: ClassVar[Sequence[Download]] = ()
    list_downloads: ClassVar[dict[str, Download]] = {}
    published: ClassVar[str | None] = None
    list_rule: ClassVar[str] = f"the images of each class where it covers {MIN_AREA:,} pixels of the mask"
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

    # The publisher's files -> the prepared folder

    @classmethod
    @abstractmethod
    def fill(cls, source: Source, ready: Path) -> list[str]:
        """Brings the publisher's files to their places; returns the rules applied, for the manifest."""

    @abstractmethod
    def found(self) -> list[str]:
        """Names of all images with a mask that are in the folder, sorted."""

    def build_lists(self, areas: Areas) -> Any:
        """Lists by `list_rule`, as plain values."""
        return {
            name: [image for image, found in areas.items() if found.get(c, 0) >= MIN_AREA]
            for c, name in enumerate(self.classes)
        }

    def write_lists(self, lists: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "test.json").write_text(json.dumps(lists, indent=0) + "\n")

    def read_lists(self, folder: Path) -> Any:
        """The lists as plain values. Raises DatasetError."""
        return json.loads(self.list_text(folder / "test.json"))

    def list_text(self, path: Path) -> str:
        """Raises DatasetError where there is no such list."""
        try:
            return path.read_text()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self.absent(path) from error

    def absent(self, path: Path) -> DatasetError:
        """What to do where there is no such list or folder."""
        prepared = self.root.is_dir() or not path.is_relative_to(self.root)
        what = f"has no list {path.absolute()}" if prepared else f"is not at {self.root.absolute()}"
        return DatasetError(f"{self.title} {what}. {self.how_to_prepare()}")

    def how_to_prepare(self) -> str:
        return (
            f"Prepare it: python -m datamodules.prepare {self.name} --source <what you downloaded> --root "
            f"{self.root.parent}; without --source it says what to download. If it is elsewhere: data=/path/to/data."
        )

    # Reading

    @cached_property
    def lists(self) -> Any:
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
        self, class_ids: Sequence[int], count: int, shot: int, repeats: bool | None = None
    ) -> list[EpisodeSpec]:
        draw = Draw(repeats is not False)
        images = self.images(class_ids, "test", 1 if draw.repeats else shot)
        return self.draw(class_ids, images, count, shot, draw)

    def draw(
        self, class_ids: Sequence[int], images: dict[int, Sequence[str]], count: int, shot: int, draw: Draw
    ) -> list[EpisodeSpec]:
        """The published order of draws."""
        return draw_in_turn(images, count, shot, draw)

    @abstractmethod
    def image_path(self, name: str) -> Path: ...

    @abstractmethod
    def mask_path(self, name: str) -> Path: ...

    def read_image(self, name: str) -> Tensor:
        return load_image(self.image_path(name), turn=False)

    def read_index(self, name: str) -> Tensor:
        path = self.mask_path(name)
        index = np.array(decode(path))
        known = index.ndim == 2 and index.dtype == np.uint8
        if not known or ((index > len(self.classes)) & (index != IGNORE)).any():
            what = (
                f"the value {index[(index > len(self.classes)) & (index != IGNORE)][0]}" if known else "no index mask"
            )
            raise DatasetError(
                f"{path} has {what}: want one channel, 0 to {len(self.classes)} or 255. Prepare it anew."
            )
        return torch.from_numpy(index)

    def check(self, names: Iterable[str]) -> None:
        if not self.root.is_dir():
            raise self.absent(self.root)
        missing = self.missing(names)
        if missing:
            path, name = next(iter(missing.items()))
            raise DatasetError(
                f"The lists of {self.title} ({self.list_folder}) name '{name}', but there is no {path} ({len(missing)} "
                f"files are missing). A partial download, or lists of another version? {self.how_to_prepare()}"
            )

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """Image and mask files that are not there -> the image that needs them; looks at folders alone."""
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
        return f"Images where the class covers under {MIN_AREA:,} pixels are left out. {self.how_to_prepare()}"


def binary_mask(path: Path) -> Tensor:
    """(H, W) uint8: 1 where a grey mask is 128 or more. Raises DatasetError."""
    return torch.from_numpy((np.asarray(decode(path).convert("L")) >= 128).astype(np.uint8))


def stems(folder: Path, suffix: str) -> list[str]:
    """Names without the suffix, sorted."""
    return sorted(p.name[: -len(suffix)] for p in visible(folder, suffix))


def write_png(pixels: np.ndarray, path: Path) -> None:
    """(H, W) or (H, W, 3) uint8 as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    Image.fromarray(pixels).save(part, format="PNG")
    part.replace(path)
