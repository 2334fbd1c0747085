"""How many pixels of each value masks have, kept from one start to the next, so that files are decoded once.

The counts of a folder are one JSON file in the user's cache folder (`~/.cache/pmnet`, or where the variable
`PMNET_CACHE` says). It may be deleted at any time.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path

from datamodules.episodes.sampler import json_hash
from datamodules.progress import track
from pmnet import __version__
from pmnet.replacing import replacing
from pmnet.segment.images import one_error

log = logging.getLogger(__name__)
Pixels = dict[int, int]  # value in a mask -> number of its pixels
Entry = tuple[list[int], Pixels]  # sizes and times of the files, and what was found in them


class Inventory:
    """The counts of a dataset's masks. A count holds as long as sizes and times of its files stay the same.

    Args:
        of: what the counts depend on besides these files, as plain values: the folder, the names of the classes.

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
        folder = os.environ.get("PMNET_CACHE") or user_cache_path("pmnet")
        self.path = Path(folder).expanduser() / f"masks-{json_hash([__version__, of])}.json"

    def pixels(
        self, files: Mapping[str, Sequence[Path]], examine: Callable[[str], Pixels], what: str
    ) -> dict[str, Pixels]:
        """The counts of some masks, on all CPU cores where they are not known.

        Args:
            files: name -> the files that `examine` reads.
            examine: counts the pixels of a name's mask; its errors pass through.
            what: what is read, for the progress bar.

        Returns:
            Name -> number of pixels of each value.

        Raises:
            ImageError: a file is missing.
        """
        stamps = {name: [number for path in paths for number in stamp(path)] for name, paths in files.items()}
        known = self.read()
        new = [name for name in files if name not in known or known[name][0] != stamps[name]]
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for name, counts in zip(new, track(pool.map(examine, new), what, len(new)), strict=True):
                    known[name] = stamps[name], counts
        finally:
            if new:
                self.write(known)
        return {name: known[name][1] for name in files}

    def read(self) -> dict[str, Entry]:
        """What is known; nothing if the file is missing or damaged."""
        try:
            content = json.loads(self.path.read_bytes())
            return {
                name: ([int(number) for number in stamps], {int(value): int(n) for value, n in counts.items()})
                for name, (stamps, counts) in content.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def write(self, known: Mapping[str, Entry]) -> None:
        """Keeps what is known, if the disk allows it: without it, the next start reads the files again."""
        try:
            with replacing(self.path) as part:
                part.write_text(json.dumps(known))
        except OSError as error:
            log.debug("%s is not kept: %s", self.path, error)


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change. Raises ImageError if there is no such file."""
    with one_error(path):
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns


def counted(index: np.ndarray) -> Pixels:
    """The pixels of each value in an index mask (H, W) uint8."""
    counts = np.bincount(index.ravel())
    return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}
