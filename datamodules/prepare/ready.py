"""A ready folder: filled beside its place, verified, and only then put there; checked again whenever asked."""

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

VERSION = 1  # of the rules by which folders are made
MANIFEST, DIGESTS = "manifest.json", "files.sha256"


def prepare(
    kind: type[Benchmark], sources: Sequence[Path], root: Path, splits: Path | None, download: bool
) -> dict[str, Any]:
    """Makes `root/<name>` and returns its manifest; one that is there and whole is left as it is.

    Args:
        sources: what was downloaded, archives or folders.
        splits: published lists in a folder, (<splits>/<name>/... or <splits>/...), if they are at hand.
        download: fetch what is freely to be had and not given.

    Raises:
        DatasetError: what is missing or broken; `root/<name>` is then not there. What was fetched and unpacked stays
            for the next attempt.
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
            raise DatasetError(f"{kind.title} needs --source <what you downloaded>. Wanted: {kind.obtain}")
        filled, given = part / "ready", ", ".join(map(str, sources))
        published = published_lists(kind(str(filled)), splits, root if download else None)
        source = Source(sources, kind.wanted, part / "unpacked")
        shutil.rmtree(filled, ignore_errors=True)  # of an attempt with other sources, perhaps; archives stay unpacked
        rules = kind.fill(source, filled)
        dataset = kind(str(filled))
        names = dataset.found()
        if not names:
            raise DatasetError(f"No image with a mask in {given}. Wanted: {kind.obtain}")
        try:
            areas, odd = scan(dataset, names)
        except (DatasetError, ImageError) as error:
            raise DatasetError(f"{error} (That path is a copy; mend the file in {given}.)") from error
        if odd:
            rules.append(f"{len(odd)} masks of another size than their image, resized apart: {', '.join(odd[:20])}")
        lists, origin = published or (dataset.build_lists(areas), f"built: {kind.list_rule}")
        dataset.write_lists(lists, filled / "splits")
        dataset = kind(str(filled))
        missing = dataset.missing(listed(dataset))
        if missing:
            path, name = next(iter(missing.items()))
            raise DatasetError(
                f"The lists ({origin}) name '{name}', but {Path(path).name} is not in {given} ({len(missing)} files "
                "are missing): a partial download, or lists of another version?"
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


def published_lists(dataset: Benchmark, splits: Path | None, fetch_to: Path | None) -> tuple[Any, str] | None:
    """(lists, where they come from): given, or fetched; None where neither is asked for, or none are published."""
    if not dataset.published or not (splits or fetch_to):
        return None
    if splits:
        folder, origin = splits / dataset.name if (splits / dataset.name).is_dir() else splits, f"given ({splits})"
    else:
        folder = fetch_to / "downloads" / dataset.name / "splits"  # type: ignore[operator]
        for path, download in dataset.list_downloads.items():
            fetch(download, (folder / path).parent)
        origin = f"fetched ({next(iter(dataset.list_downloads.values())).url.rsplit('/', 2)[0]})"
    lists = dataset.read_lists(folder)
    digest = json_hash(lists)
    if digest == dataset.published:
        return lists, f"{origin}; the published lists, by their sha256"
    if not splits:
        raise DatasetError(
            f"The lists in {folder} are not the published ones (sha256 {digest[:12]}, not {dataset.published[:12]}). "
            "Take that folder away and try again, or give the lists by --splits."
        )
    return lists, f"{origin}; not the published lists, by their sha256"


def scan(dataset: Benchmark, names: Sequence[str]) -> tuple[Areas, list[str]]:
    """Opens every image and mask, on all cores.

    Returns:
        The pixels of each class in each mask, and the images whose mask has another size.

    Raises:
        DatasetError: a broken file; a mask of another size, where the benchmark has none.
    """

    def look(name: str) -> tuple[dict[int, int], bool]:
        verify(dataset.image_path(name))
        verify(dataset.mask_path(name))
        image, index = dataset.read_image(name), dataset.read_index(name)
        odd = image.shape[1:] != index.shape
        if odd and dataset.same_size:
            raise DatasetError(
                f"{dataset.image_path(name)} and {dataset.mask_path(name)} differ in size: "
                f"{tuple(image.shape[1:])} and {tuple(index.shape)}."
            )
        pixels = index.flatten().bincount(minlength=256)[1:255]
        return {c: int(pixels[c]) for c in pixels.nonzero().flatten().tolist()}, odd

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(track(pool.map(look, names), f"Verifying {dataset.name}", len(names)))
    areas = {name: area for name, (area, _) in zip(names, found, strict=True)}
    return areas, [name for name, (_, odd) in zip(names, found, strict=True) if odd]


def check(kind: type[Benchmark], ready: Path) -> dict[str, Any]:
    """Verifies every file of a prepared folder by its sha256; returns the manifest. Raises DatasetError."""
    if not ready.is_dir():
        raise DatasetError(f"{kind.title} is not at {ready.absolute()}: prepare it, or check --root.")
    try:
        manifest = json.loads((ready / MANIFEST).read_text())
        digests = (ready / DIGESTS).read_text()
        whole = hashlib.sha256(digests.encode()).hexdigest() == manifest["files"]["sha256"]
        made_as = (manifest["dataset"], manifest["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{ready.absolute()} has no manifest of a prepared folder ({error!r}). If not needed, move it away and "
            "prepare it anew."
        ) from error
    if made_as != (kind.name, VERSION):
        raise DatasetError(
            f"{ready.absolute()} was made as {made_as[0]}, version {made_as[1]}; this program makes {kind.name}, "
            f"version {VERSION}. Move it away and prepare it anew."
        )
    kept = {path: digest for digest, path in (line.split("  ", 1) for line in digests.splitlines())} if whole else {}
    now = digests_of(ready)
    wrong = dict.fromkeys(kept.keys() - now.keys(), "is missing") | dict.fromkeys(now.keys() - kept.keys(), "was added")
    wrong |= {p: "was changed" for p in kept.keys() & now.keys() if kept[p] != now[p]}
    if wrong:
        path = min(wrong)
        what = f"{path} {wrong[path]} ({len(wrong)} such files)" if whole else f"{DIGESTS} was changed"
        raise DatasetError(f"{ready.absolute()} is not as it was prepared: {what}. Move it away and prepare it anew.")
    return manifest


def listed(dataset: Benchmark) -> set[str]:
    """Every image that a list names."""
    splits: tuple[Split, ...] = ("train", "test")
    return {n for c in range(len(dataset.classes)) for s in splits for n in dataset.images_of(c, s)}


def images_per_class(dataset: Benchmark) -> dict[str, list[int]]:
    """Class -> [to train on, to test]."""
    splits: tuple[Split, ...] = ("test",) if dataset.test_only else ("train", "test")
    return {name: [len(dataset.images_of(c, s)) for s in splits] for c, name in enumerate(dataset.classes)}


def digests_of(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file, but for the two that hold them."""
    paths = sorted(os.path.relpath(os.path.join(at, f), folder) for at, _, files in os.walk(folder) for f in files)
    paths = [path for path in paths if path not in (MANIFEST, DIGESTS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda path: sha256_of(folder / path), paths)
        return dict(zip(paths, track(digests, "Computing sha256", len(paths)), strict=True))


def write_digests(folder: Path) -> dict[str, Any]:
    """Writes files.sha256, as sha256sum does; returns number and bytes of the files, and its own sha256."""
    digests = digests_of(folder)
    text = "".join(f"{digest}  {path}\n" for path, digest in digests.items())
    (folder / DIGESTS).write_text(text)
    size = sum((folder / path).stat().st_size for path in digests)
    return {"count": len(digests), "bytes": size, "sha256": hashlib.sha256(text.encode()).hexdigest()}
