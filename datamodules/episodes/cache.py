"""A cache of resized images in one memory-mapped file, for training that is limited by image decoding."""

import hashlib
import logging
import os
import shutil
import zlib
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
    """Maps an image name to its resized (3, H, W) uint8 image and (H, W) uint8 index mask.

    The cache is one file, `<dataset>-<H>x<W>-<key>.npy`, which holds a (N, 4, H, W) uint8 array. The first process
    builds it while the others wait; afterwards it is only read. The key is a hash of the image names and of the
    dataset's fingerprint, so a changed dataset gets a new file. A second file, `....sums`, holds a CRC-32 of each
    row: a file of the wrong size is built again, a damaged row is replaced by the image itself.

    Args:
        folder: folder of the cache file, preferably on a local disk. It is created if missing.
        dataset: the dataset that reads the images.
        names: names of all images to cache, in any order.
        size: (H, W) of the resized images.

    Raises:
        DatasetError: the disk has too little free space.
        ImageError: an image cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from datamodules.own.synthetic import SyntheticDataset
        >>> dataset = SyntheticDataset(size=64, images_per_class=3, seed=0)
        >>> names = dataset.images_of(0, "train")
        >>> with TemporaryDirectory() as folder:
        ...     cache = ImageCache(Path(folder), dataset, names, (32, 32))
        ...     image, index = cache[names[0]]
        >>> image.shape, index.shape, image.dtype
        (torch.Size([3, 32, 32]), torch.Size([32, 32]), torch.uint8)
    """

    def __init__(self, folder: Path, dataset: FewShotDataset, names: Iterable[str], size: tuple[int, int]) -> None:
        self.names = sorted(set(names), key=str.encode)
        key = hashlib.sha256("\n".join([dataset.fingerprint(), *self.names]).encode()).hexdigest()
        self.dataset, self.size, self.shape = dataset, size, (len(self.names), 4, *size)
        self.path = folder / f"{dataset.name}-{size[0]}x{size[1]}-{key[:16]}.npy"
        self.encoded = np.array([n.encode() for n in self.names], dtype=np.bytes_)  # sorted; row i holds image i
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            if not self.is_whole():
                self.build()
        self.names = []  # reading a list of strings copies its memory into every worker

    @property
    def sums_path(self) -> Path:
        return self.path.with_suffix(".sums")

    def is_whole(self) -> bool:
        """Whether both files are there and have the right size."""
        try:
            rows, sums = np.load(self.path, mmap_mode="r"), np.load(self.sums_path)
        except FileNotFoundError:
            return False
        except Exception as error:  # whatever damage makes NumPy raise
            log.warning("The image cache %s is damaged (%s) and is built again.", self.path, error)
            return False
        return rows.shape == self.shape and sums.shape == self.shape[:1]

    def build(self) -> None:
        dataset, size = self.dataset, self.size
        need, free = int(np.prod(self.shape)), shutil.disk_usage(self.path.parent).free
        if need > 0.95 * free:
            raise DatasetError(
                f"The cache of {len(self.names)} images of {dataset.name} needs {need / 1e9:.1f} GB in "
                f"{self.path.parent}, but only {free / 1e9:.1f} GB are free. Set episodes.cache to a folder on another "
                "disk, reduce episodes.image_size, or disable the cache with episodes.cache=null."
            )
        log.info(
            "Caching %d resized images of %s (%.1f GB) in %s", len(self.names), dataset.name, need / 1e9, self.path
        )
        part = self.path.with_suffix(f".{os.getpid()}.part")
        sums = np.zeros(len(self.names), np.uint32)
        try:
            rows = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=self.shape)

            def fill(i: int) -> None:
                image, index = resized(dataset, self.names[i], size)
                rows[i, :3], rows[i, 3] = image, index
                sums[i] = zlib.crc32(rows[i].tobytes())

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(track(pool.map(fill, range(len(rows))), f"Caching {dataset.name}", len(rows)))
            rows.flush()
            self.path.unlink(missing_ok=True)  # never old rows beside new sums
            with part.with_suffix(".sums").open("wb") as file:
                np.save(file, sums)
            os.replace(part.with_suffix(".sums"), self.sums_path)
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
            part.with_suffix(".sums").unlink(missing_ok=True)

    @cached_property
    def rows(self) -> np.ndarray:
        """The memory-mapped array. Each process opens its own, because pickling would copy the pixels."""
        return np.load(self.path, mmap_mode="r")

    @cached_property
    def sums(self) -> np.ndarray:
        """The CRC-32 of each row."""
        return np.load(self.sums_path)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("rows", "sums")}

    def __getitem__(self, name: str) -> Pair:
        i = int(np.searchsorted(self.encoded, name.encode()))
        if i == len(self.encoded) or self.encoded[i] != name.encode():
            raise KeyError(name)
        row = np.array(self.rows[i])
        if zlib.crc32(row.tobytes()) != self.sums[i]:
            log.warning("The image cache %s is damaged at %s, which is read from its file.", self.path, name)
            return resized(self.dataset, name, self.size)
        both = torch.from_numpy(row)
        return both[:3], both[3]

    def __len__(self) -> int:
        return len(self.encoded)

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self.encoded)
