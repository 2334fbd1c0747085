"""The fixtures of the benchmarks: what each one holds, and how they are found.

The fixture of a benchmark is the module `tests/data/<name>.py`, where <name> is the `name` of its dataset class. It is
found by its file name. Once it exists, tests/datamodules/benchmarks/test_every.py tests the benchmark.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from datamodules.benchmarks.base import Benchmark
from datamodules.episodes.dataset import Split
from datamodules.registry import all_datasets


class Fixture(Protocol):
    """A module that writes a tiny copy of one benchmark in its publisher's format and knows what is in it.

    The expected values are computed without the benchmark's own code, because the tests compare the two.

    Attributes:
        NEEDED: what the error names if the source folder holds none of the benchmark's files.
        PARTIAL: files to delete from an unpacked source (pattern for `rglob`) -> expected error (regular expression).
        NOTES: parts of the rules in the manifest.
    """

    NEEDED: str
    PARTIAL: dict[str, str]
    NOTES: list[str]

    def write(self, root: Path, archives: bool = True) -> Path:
        """Writes the publisher's files into `root`, as archives or unpacked, and returns `root`."""

    def truth(self) -> dict[str, np.ndarray]:
        """Name of each image with a mask -> (H, W) uint8: class id + 1, 0 = no class, 255 = ignore."""

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        """Names of the images that the built lists hold for a class, in any order."""

    def file_of(self, source: Path, image: str) -> Path:
        """The publisher's file that shows an image, in an unpacked source."""

    def pixels(self, source: Path, image: str) -> np.ndarray:
        """(H, W, 3) uint8: the image in that file."""


KINDS = {name: kind for name, kind in all_datasets().items() if issubclass(kind, Benchmark)}
FIXTURES: dict[str, Fixture] = {
    name: import_module(f"tests.data.{name}") for name in KINDS if find_spec(f"tests.data.{name}")
}
