"""How many pixels of each value masks have, kept from one start to the next, so that files are decoded once.

The counts of a folder are one JSON file in the user's cache folder (`~/.cache/pmnet` on Linux), or in the folder that
the variable `PMNET_CACHE` names. It may be deleted at any time.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path

from datamodules.episodes.sampler import json_hash
from datamodules.progress import track
from pmnet.replacing import replacing
from pmnet.segment.images import one_error

log = logging.getLogger(__name__)
READERS = ("pmnet/segment/images.py", "pmnet/segment/formats/*.py", "datamodules/benchmarks/*.py")
Pixels = dict[int, int]  # value in a mask -> number of its pixels
Entry = tuple[list[str | int], Pixels]  # what the counts depend on, and the counts


class Inventory:
    """The counts of a dataset's masks. They hold as long as sizes and times of the files and the code of readers do.

    Args:
        of: what all counts depend on besides the files, as plain values: the folder, the names of the classes.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.png"
        ...     _ = file.write_bytes(b"...")
        ...     first = Inventory(folder).pixels({"a": [file]}, lambda name: {0: 9, 1: 3}, "Reading")
        ...     again = Inventory(folder).pixels({"a": [file]}, lambda name: {}, "Reading")
        >>> again
        {'a': {0: 9, 1: 3}}
    """

    def __init__(self, of: object) -> None:
        try:
            folder = Path(os.environ.get("PMNET_CACHE") or user_cache_path("pmnet")).expanduser()
        except RuntimeError:  # a user without a home
            folder = None
        self.path = folder / f"masks-{json_hash([hash_of_readers(), of])}.json" if folder else None

    def pixels(
        self,
        files: Mapping[str, Sequence[Path]],
        examine: Callable[[str], Pixels],
        what: str,
        meanings: Mapping[str, str] | None = None,
    ) -> dict[str, Pixels]:
        """The counts of some masks, on all CPU cores where they are not known.

        Args:
            files: name -> the files that `examine` reads.
            examine: counts the pixels of a name's mask; its errors pass through.
            what: what is read, for the progress bar.
            meanings: name -> what else its counts depend on.

        Returns:
            Name -> number of pixels of each value.

        Raises:
            ImageError: a file is missing.
        """
        meanings = meanings or {}
        stamps = {name: [meanings.get(name, ""), *stamps_of(paths)] for name, paths in files.items()}
        known = self.read()
        new = [name for name in files if name not in known or known[name][0] != stamps[name]]
        found: dict[str, Entry] = {}
        try:
            for name, counts in zip(new, in_threads(examine, new, what), strict=True):
                found[name] = stamps[name], counts
        finally:
            self.add(found)
        return {name: (found.get(name) or known[name])[1] for name in files}

    def read(self) -> dict[str, Entry]:
        """What is known; nothing if the file is missing or damaged."""
        try:
            content = json.loads(self.path.read_bytes()) if self.path else {}
            return {
                name: (list(stamps), {int(value): int(n) for value, n in counts.items()})
                for name, (stamps, counts) in content.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def add(self, found: Mapping[str, Entry]) -> None:
        """Keeps what was found, beside what other processes have added."""
        if not found or not self.path:
            return
        try:
            with replacing(self.path) as part:
                part.write_text(json.dumps(self.read() | dict(found)))
        except OSError as error:
            log.info(
                "What was read cannot be kept in %s (%s): the next start reads it again. Set PMNET_CACHE to a folder "
                "that can be written.",
                *(self.path.parent, error),
            )


class Remembered:
    """A function of a file that counts its values, which looks up what it has counted before.

    Args:
        of: the folder that holds the files.
        count: the counts (256,) of a file.
    """

    def __init__(self, of: Path, count: Callable[[Path], np.ndarray]) -> None:
        self.inventory, self.count = Inventory(["values", str(of.absolute())]), count
        self.known = self.inventory.read()
        self.found: dict[str, Entry] = {}

    def __call__(self, path: Path) -> np.ndarray:
        stamps, counts = stamps_of([path]), np.zeros(256, np.int64)
        entry = self.known.get(str(path))
        if entry is None or entry[0] != stamps:
            entry = self.found[str(path)] = stamps, sparse(self.count(path))
        counts[list(entry[1])] = list(entry[1].values())
        return counts

    def keep(self) -> None:
        self.inventory.add(self.found)


def in_threads(function: Callable[[str], Pixels], names: Sequence[str], what: str) -> Iterable[Pixels]:
    """The function's results, in order, on all CPU cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from track(pool.map(function, names), what, len(names))


def stamps_of(paths: Iterable[Path]) -> list[str | int]:
    """Sizes and times of files. Raises ImageError if there is no such file."""
    numbers: list[str | int] = []
    for path in paths:
        with one_error(path):
            stat = path.stat()
            numbers += [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return numbers


def counted(index: np.ndarray) -> Pixels:
    """The pixels of each value in an index mask (H, W) uint8."""
    return sparse(np.bincount(index.ravel()))


def sparse(counts: np.ndarray) -> Pixels:
    return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}


@cache
def hash_of_readers() -> str:
    """A hash of the code that makes index masks of files."""
    root = Path(__file__).parents[1]
    sources = [path.read_bytes() for pattern in READERS for path in sorted(root.glob(pattern))]
    return hashlib.sha256(b"".join(sources)).hexdigest()
