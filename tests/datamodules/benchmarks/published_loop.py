"""How the published loaders draw test episodes, and the golden lists of what they drew."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.benchmarks.base import Benchmark


def supports_as_published(names: Sequence[Any], query: Any, shot: int) -> list[str]:
    """The loop of the published loaders, on NumPy's global generator."""
    found = []
    while len(found) < shot:
        name = np.random.choice(names, 1, replace=False)[0]
        if name != query:
            found.append(str(name))
    return found


def rows(dataset: Benchmark, class_ids: Sequence[int], shot: int, count: int | None = None, **options) -> list[list]:
    """[query, supports, class id] of each test episode."""
    return [e.row() for e in dataset.test_episodes(class_ids, count or dataset.test_length, shot, **options)]


def golden(shared: Path, name: str) -> list[list]:
    """The same rows, as the published program drew them."""
    return json.loads(gzip.decompress((shared / "golden" / f"episodes_{name}.json.gz").read_bytes()))
