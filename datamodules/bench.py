"""Measures how many episodes per second one CPU core reads with a plain Pillow loop, this package, and its cache.

python -m datamodules.bench
python -m datamodules.bench --images 100 1000 10000

The second one measures how long folders of that many photos take to open: the first time, and later.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from datamodules.episodes.cache import ImageCache
from datamodules.episodes.dataset import Episodes
from datamodules.episodes.episode import EpisodeSpec
from datamodules.episodes.module import names_of
from datamodules.own.folder import FolderDataset
from datamodules.own.synthetic import CLASSES, draw
from datamodules.progress import track

LINKS = 30_000  # to one file; ext4 allows 65,000
HEIGHT, WIDTH, SIZE, EPISODES, ROUNDS = 375, 500, (384, 384), 100, 7


def write_images(root: Path, count: int) -> FolderDataset:
    """Writes `count` noisy synthetic images as JPEGs of PASCAL's typical size, with index masks."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for i in track(range(count), "Writing images"):
        image, index = draw(f"{CLASSES[i % 5]} {i:07d}", WIDTH, seed=0)
        Image.fromarray(image[:HEIGHT]).save(root / "images" / f"{i:04d}.jpg", quality=95)
        Image.fromarray(index[:HEIGHT]).save(root / "masks" / f"{i:04d}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return FolderDataset(str(root), folds=4, min_area=0.01)


def plain(root: Path, spec: EpisodeSpec) -> list[tuple[Tensor, Tensor]]:
    """Reads an episode as a straightforward loader does: Pillow for decoding, resizing and masks.

    Returns:
        The query, then the supports: pairs of a (3, H, W) uint8 image and an (H, W) bool mask.
    """
    read = []
    for name in (spec.query, *spec.supports):
        image = Image.open(root / "images" / f"{name}.jpg").convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR)
        mask = Image.open(root / "masks" / f"{name}.png").resize(SIZE[::-1], Image.Resampling.NEAREST)
        pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
        read.append((pixels, torch.from_numpy(np.array(mask) == spec.class_id + 1)))
    return read


def seconds(readers: dict[str, Callable[[int], object]]) -> dict[str, float]:
    """Median seconds per episode of each reader; the readers alternate so that they share the machine's noise."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in track(range(ROUNDS), "Measuring"):
        for name, read in readers.items():
            start = time.perf_counter()
            for i in range(EPISODES):
                read(i)
            times[name].append((time.perf_counter() - start) / EPISODES)
    return {name: float(np.median(t)) for name, t in times.items()}


def starts(images: int) -> tuple[float, float]:
    """Seconds that `FolderDataset` takes to open a folder of so many photos of 320x240: the first time, and again.

    The photos are links to copies of one file with one mask. Each of them is decoded, as if it were a file of its own,
    but read from memory.
    """
    taken = []
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, PMNET_CACHE=f"{folder}/cache"):
        one, index = draw(f"{CLASSES[0]} 0000000", 320, seed=0)
        for part, pixels, kind in (("images", one, "jpg"), ("masks", index, "png")):
            place = Path(folder, "data", part)
            place.mkdir(parents=True)
            for i in range(images):
                first = i - i % LINKS
                if i == first:
                    Image.fromarray(pixels[:240]).save(place / f"{i:06d}.{kind}")
                else:
                    os.link(place / f"{first:06d}.{kind}", place / f"{i:06d}.{kind}")
        Path(folder, "data", "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        for _ in ("first", "again"):
            start = time.perf_counter()
            FolderDataset(f"{folder}/data", folds=4, min_area=0.01)
            taken.append(time.perf_counter() - start)
    return taken[0], taken[1]


def main() -> None:
    parser = argparse.ArgumentParser("python -m datamodules.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shot", type=int, default=1, help="support images per episode, K (default: 1)")
    parser.add_argument("--images", type=int, nargs="+", metavar="N", help="time to open folders of N photos")
    options = parser.parse_args()
    if options.images:
        if min(options.images) < 1:
            parser.error("--images: give numbers of photos, 1 or more.")
        rows = [(f"{count:,}", *(f"{taken:.2f}" for taken in starts(count))) for count in options.images]
        Console().print(table("Opening a folder", ["photos of 320x240", "first, s", "again, s"], rows))
    else:
        episodes(options.shot)


def table(title: str, headers: list[str], rows: Iterable[Iterable[str]]) -> Table:
    made = Table(title=title)
    for header in headers:
        made.add_column(header, justify="left" if not header else "right")
    for row in rows:
        made.add_row(*row)
    return made


def episodes(shot: int) -> None:
    """Prints episodes per second."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dataset = write_images(root / "data", EPISODES)
        specs = dataset.test_episodes(range(5), EPISODES, shot)
        cached = ImageCache(root / "cache", dataset, names_of(specs), SIZE)
        read = Episodes(dataset, specs, SIZE)
        from_cache = Episodes(dataset, specs, SIZE, cache=cached)
        taken = seconds(
            {
                "plain Pillow loop": lambda i: plain(root / "data", specs[i]),
                "Episodes": read.__getitem__,
                "Episodes, cached": from_cache.__getitem__,
            }
        )
    title = f"{shot}-shot episodes of {WIDTH}x{HEIGHT} JPEGs at {SIZE[0]}x{SIZE[1]}, one core"
    rows = [(name, f"{1 / t:.0f}", f"{taken['plain Pillow loop'] / t:.1f}") for name, t in taken.items()]
    Console().print(table(title, ["", "episodes / s", "x plain loop"], rows))


if __name__ == "__main__":
    main()
