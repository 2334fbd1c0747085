"""Prepared folders: built and verified in a temporary folder, then moved into place; can be checked at any time."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock

from datamodules.benchmarks.base import Areas, Benchmark
from datamodules.episodes.dataset import Split
from datamodules.episodes.sampler import json_hash
from datamodules.errors import DatasetError
from datamodules.prepare.download import fetch
from datamodules.prepare.source import Source, sha256_of
from datamodules.progress import track
from pmnet.errors import ImageError
from pmnet.segment.images import verify

VERSION = 1  # of the preparation rules
MANIFEST, DIGESTS = "manifest.json", "files.sha256"


def prepare(
    kind: type[Benchmark], sources: Sequence[Path], root: Path, splits: Path | None, download: bool
) -> dict[str, Any]:
    """Prepares the folder `root/<name>` of a benchmark. A complete existing folder is verified and left unchanged.

    Args:
        kind: class of the benchmark.
        sources: the downloaded archives or folders.
        root: parent of the prepared folder; it is created if missing.
        splits: folder with the published lists (<splits>/<name>/... or <splits>/...); None if you do not have them.
        download: download the published lists, and the sources too if none are given and no login is needed.

    Returns:
        The manifest: sources, rules, lists, counts and checksums.

    Raises:
        DatasetError: a file is missing or broken. `root/<name>` is then not created; downloaded and unpacked files are
            kept for the next attempt.
    """
    ready, part = root / kind.name, root / f".{kind.name}.part"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{kind.name}.lock"):
        if ready.exists():
            shutil.rmtree(part, ignore_errors=True)
            return check(kind, ready)
        if download and not sources:
            sources = [fetch(d, root / "downloads" / kind.name) for d in kind.downloads]
        if not sources:
            raise DatasetError(f"{kind.title} needs --source <downloaded files>. Download {kind.obtain}")
        filled, given = part / "ready", ", ".join(map(str, sources))
        published = published_lists(kind(str(filled)), splits, root if download else None)
        source = Source(sources, kind.wanted, part / "unpacked")
        shutil.rmtree(filled, ignore_errors=True)  # left by an earlier attempt; unpacked archives are kept
        rules = kind.fill(source, filled)
        dataset = kind(str(filled))
        names = dataset.found()
        if not names:
            raise DatasetError(f"No image with a mask in {given}. Download {kind.obtain}")
        try:
            areas, odd = scan(dataset, names)
        except (DatasetError, ImageError) as error:
            raise DatasetError(f"{error} (This path is a copy: fix the file in {given}.)") from error
        if odd:
            rules.append(
                f"{len(odd)} masks of another size than their image, resized separately: {', '.join(odd[:20])}"
            )
        lists, origin = published or (dataset.build_lists(areas), f"built: {kind.list_rule}")
        dataset.write_lists(lists, filled / "splits")
        dataset = kind(str(filled))
        missing = dataset.missing(listed_images(dataset))
        if missing:
            path, name = next(iter(missing.items()))
            raise DatasetError(
                f"The lists ({origin}) name '{name}', but {Path(path).name} is not in {given} ({len(missing)} files "
                "are missing). Complete the download, or use lists of the same version."
            )
        manifest = {
            "dataset": kind.name,
            "title": kind.title,
            "version": VERSION,
            "sources": source.archives or [{"name": str(p)} for p in sources],
            "rules": rules,
            "lists": {"origin": origin, "sha256": json_hash(lists)},
            "counts": {"pairs": len(names), "images_per_class": images_per_class(dataset)},
            "files": write_digests(filled),
        }
        (filled / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        filled.rename(ready)
        shutil.rmtree(part)
        return manifest


def published_lists(dataset: Benchmark, splits: Path | None, download_to: Path | None) -> tuple[Any, str] | None:
    """Reads the published lists of a benchmark.

    Args:
        dataset: the benchmark.
        splits: folder that contains the lists; None downloads them.
        download_to: parent of the folder to download to; None downloads nothing.

    Returns:
        The lists and their origin; None if there are no published lists, or neither folder is given.

    Raises:
        DatasetError: a list is missing, or the downloaded lists are not the published ones.
    """
    if not dataset.published or not (splits or download_to):
        return None
    if splits:
        folder, origin = splits / dataset.name if (splits / dataset.name).is_dir() else splits, f"given ({splits})"
    else:
        folder = download_to / "downloads" / dataset.name / "splits"  # type: ignore[operator]
        for path, download in dataset.list_downloads.items():
            fetch(download, (folder / path).parent)
        origin = f"downloaded ({next(iter(dataset.list_downloads.values())).url.rsplit('/', 2)[0]})"
    lists = dataset.read_lists(folder)
    digest = json_hash(lists)
    if digest == dataset.published:
        return lists, f"{origin}; the published lists (same sha256)"
    if not splits:
        raise DatasetError(
            f"The lists in {folder} are not the published ones (sha256 {digest[:12]}, not {dataset.published[:12]}). "
            "Remove this folder and try again, or pass the lists with --splits."
        )
    return lists, f"{origin}; not the published lists (different sha256)"


def scan(dataset: Benchmark, names: Sequence[str]) -> tuple[Areas, list[str]]:
    """Reads and verifies every image and mask, on all CPU cores.

    Args:
        dataset: the benchmark.
        names: names of the images.

    Returns:
        The number of pixels of each class in each mask, and the images whose mask has another size.

    Raises:
        DatasetError: a mask is invalid, or differs in size from its image in a benchmark with `same_size`.
        ImageError: a file cannot be read.
    """

    def examine(name: str) -> tuple[dict[int, int], bool]:
        verify(dataset.image_path(name))
        verify(dataset.mask_path(name))
        image, index = dataset.read_image(name), dataset.read_index(name)
        odd = image.shape[1:] != index.shape
        if odd and dataset.same_size:
            raise DatasetError(
                f"{dataset.image_path(name)} and {dataset.mask_path(name)} differ in size: "
                f"{tuple(image.shape[1:])} and {tuple(index.shape)}. Download them again."
            )
        pixels = index.flatten().bincount(minlength=256)[1:255]
        return {c: int(pixels[c]) for c in pixels.nonzero().flatten().tolist()}, odd

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(track(pool.map(examine, names), f"Verifying {dataset.name}", len(names)))
    areas = {name: area for name, (area, _) in zip(names, found, strict=True)}
    return areas, [name for name, (_, odd) in zip(names, found, strict=True) if odd]


def check(kind: type[Benchmark], ready: Path) -> dict[str, Any]:
    """Verifies every file of a prepared folder by its sha256.

    Args:
        kind: class of the benchmark.
        ready: the prepared folder.

    Returns:
        The manifest.

    Raises:
        DatasetError: the folder does not exist or was not prepared by this version; a file is missing, new or changed.
    """
    if not ready.is_dir():
        raise DatasetError(f"{kind.title} is not at {ready.absolute()}. Prepare it, or check --root.")
    try:
        manifest = json.loads((ready / MANIFEST).read_text())
        digests = (ready / DIGESTS).read_text()
        whole = hashlib.sha256(digests.encode()).hexdigest() == manifest["files"]["sha256"]
        prepared_as = (manifest["dataset"], manifest["version"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"{ready.absolute()} has no manifest of a prepared folder ({error!r}). Move the folder away, then "
            "prepare it again."
        ) from error
    if prepared_as != (kind.name, VERSION):
        raise DatasetError(
            f"{ready.absolute()} was prepared as {prepared_as[0]}, version {prepared_as[1]}, but this program needs "
            f"{kind.name}, version {VERSION}. Move the folder away, then prepare it again."
        )
    lines = digests.splitlines() if whole else []
    kept = {path: digest for digest, _, path in (line.partition("  ") for line in lines)}
    now = digests_of(ready)
    wrong = dict.fromkeys(kept.keys() - now.keys(), "is missing") | dict.fromkeys(now.keys() - kept.keys(), "was added")
    wrong |= {p: "was changed" for p in kept.keys() & now.keys() if kept[p] != now[p]}
    if wrong:
        path = min(wrong)
        what = f"{path} {wrong[path]} ({len(wrong)} such files)" if whole else f"{DIGESTS} was changed"
        raise DatasetError(
            f"{ready.absolute()} differs from what was prepared: {what}. Move the folder away, then prepare it again."
        )
    return manifest


def listed_images(dataset: Benchmark) -> set[str]:
    """Names of all images in the lists."""
    splits: tuple[Split, ...] = ("train", "test")
    return {n for c in range(len(dataset.classes)) for s in splits for n in dataset.images_of(c, s)}


def images_per_class(dataset: Benchmark) -> dict[str, list[int]]:
    """Class name -> number of images [to train, to test]; [to test] for a test-only benchmark."""
    splits: tuple[Split, ...] = ("test",) if dataset.test_only else ("train", "test")
    return {name: [len(dataset.images_of(c, s)) for s in splits] for c, name in enumerate(dataset.classes)}


def digests_of(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file except manifest.json and files.sha256."""
    paths = sorted(os.path.relpath(os.path.join(at, f), folder) for at, _, files in os.walk(folder) for f in files)
    paths = [path for path in paths if path not in (MANIFEST, DIGESTS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda path: sha256_of(folder / path), paths)
        return dict(zip(paths, track(digests, "Computing sha256", len(paths)), strict=True))


def write_digests(folder: Path) -> dict[str, Any]:
    """Writes files.sha256 in the format of sha256sum; returns the number of files, their bytes, and its own sha256."""
    digests = digests_of(folder)
    text = "".join(f"{digest}  {path}\n" for path, digest in digests.items())
    (folder / DIGESTS).write_text(text)
    size = sum((folder / path).stat().st_size for path in digests)
    return {"count": len(digests), "bytes": size, "sha256": hashlib.sha256(text.encode()).hexdigest()}
