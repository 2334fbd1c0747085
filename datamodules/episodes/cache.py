"""Resized images in one memory-mapped file, for training that would else wait for decoding."""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from datamodules.episodes.dataset import FewShotDataset, resized
from datamodules.errors import DatasetError
from datamodules.progress import track

log = logging.getLogger(__name__)
Pair = tuple[Tensor, Tensor]


class ImageCache(Mapping[str, Pair]):
    """Image name -> (3, H, W) uint8 image and (H, W) uint8 index mask, as `resized` gives them.

    One file, `<dataset>-<H>x<W>-<key>.npy` of (N, 4, H, W) uint8, built by the first process that asks while
    others wait, and only read from then on. The key is made from the names, the size and the dataset's
    files, so that a changed dataset gets a new file.

    Args:
        folder: where the file is, or will be; on a local disk.
        names: of all images that will be asked for, in any order.

    Raises:
        DatasetError: no room on the disk; a broken image.
    """

    def __init__(self, folder: Path, dataset: FewShotDataset, names: Iterable[str], size: tuple[int, int]) -> None:
        self.names = sorted(set(names), key=str.encode)
        key = hashlib.sha256("\n".join([dataset.fingerprint(), *self.names]).encode()).hexdigest()
        self.path = folder / f"{dataset.name}-{size[0]}x{size[1]}-{key[:16]}.npy"
        self.places = np.array([n.encode() for n in self.names], dtype=np.bytes_)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            if not self.path.exists():
                self.build(dataset, size)
        self.names = []  # a list of strings would grow in each worker

    def build(self, dataset: FewShotDataset, size: tuple[int, int]) -> None:
        shape = (len(self.names), 4, *size)
        need, free = int(np.prod(shape)), shutil.disk_usage(self.path.parent).free
        if need > 0.95 * free:
            raise DatasetError(
                f"The cache of {len(self.names)} images of {dataset.name} needs {need / 1e9:.1f} GB in "
                f"{self.path.parent}, where {free / 1e9:.1f} GB are free: choose another folder by episodes.cache, "
                "a smaller episodes.image_size, or episodes.cache=null."
            )
        log.info(
            "Caching %d resized images of %s (%.1f GB) in %s", len(self.names), dataset.name, need / 1e9, self.path
        )
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            rows = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)

            def fill(i: int) -> None:
                image, index = resized(dataset, self.names[i], size)
                rows[i, :3], rows[i, 3] = image, index

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(track(pool.map(fill, range(len(rows))), f"Caching {dataset.name}", len(rows)))
            rows.flush()
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)

    @cached_property
    def rows(self) -> np.ndarray:
        """Opened by each process for itself: a memory map does not travel to workers."""
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def __getitem__(self, name: str) -> Pair:
        place = int(np.searchsorted(self.places, name.encode()))
        if place == len(self.places) or self.places[place] != name.encode():
            raise KeyError(name)
        row = torch.from_numpy(np.array(self.rows[place]))
        return row[:3], row[3]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self.places)
