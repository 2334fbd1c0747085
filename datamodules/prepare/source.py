"""What was downloaded, archives or folders alike: unpacked safely, searched by folder names."""

import hashlib
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.errors import DatasetError
from datamodules.progress import track

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError)


class Source:
    """Files as their publisher ships them.

    Args:
        paths: archives, or folders that hold files or archives.
        wanted: patterns of paths inside; nothing else is unpacked.
        unpacked: folder for what archives hold; an archive that is there already is not unpacked again.

    Raises:
        DatasetError: no such path; an archive that is damaged, partial, or would write outside its folder.
    """

    def __init__(self, paths: Sequence[Path], wanted: Sequence[str], unpacked: Path) -> None:
        self.paths, self.wanted, self.unpacked = list(paths), tuple(wanted), unpacked
        self.archives: list[dict[str, Any]] = []
        self.roots = [root for path in paths for root in self.roots_of(path)]

    def roots_of(self, path: Path) -> Iterator[Path]:
        if path.is_dir():
            yield path
            archives = sorted(p for p in path.iterdir() if is_archive(p))
            yield from (self.unpack(p) for p in archives)
        elif path.is_file() and is_archive(path):
            yield self.unpack(path)
        elif path.exists():
            raise DatasetError(f"{path} is neither a folder nor an archive ({', '.join(ARCHIVES)}).")
        else:
            raise DatasetError(f"There is no {path.absolute()}: check --source.")

    def unpack(self, archive: Path) -> Path:
        digest = sha256_of(archive)
        self.archives.append({"name": archive.name, "bytes": archive.stat().st_size, "sha256": digest})
        folder = self.unpacked / f"{archive.name}-{digest[:12]}"
        if not folder.exists():
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            with readable(archive):
                (unzip if archive.suffix == ".zip" else untar)(archive, self.wanted, part)
            part.rename(folder)
        return folder

    def folders(self, place: str, suffix: str) -> Iterator[Path]:
        """Every folder with such files whose path ends in `place`, the outermost first."""
        names = PurePosixPath(place).parts
        for root in self.roots:
            walk = ((Path(at), files) for at, _, files in os.walk(root))
            found = [at for at, files in walk if at.parts[-len(names) :] == names and any_ends(files, suffix)]
            found = [at for at in found if not is_junk(str(at.relative_to(root)))]
            yield from sorted(found, key=lambda path: (len(path.parts), path))

    def need(self, place: str, suffix: str, of: str) -> Path:
        """The first such folder, or a DatasetError that says where it was looked for and what it is part of."""
        folder = next(self.folders(place, suffix), None)
        if folder is None:
            places = ", ".join(str(p) for p in self.paths)
            raise DatasetError(f"There is no folder {place}/ with files *{suffix} in {places}: it is part of {of}.")
        return folder

    def files(self, suffix: str) -> Iterator[Path]:
        """Every file whose name ends so."""
        for root in self.roots:
            for at, _, files in os.walk(root):
                yield from (Path(at) / file for file in files if file.endswith(suffix) and not is_junk(f"{at}/{file}"))


def any_ends(files: Sequence[str], suffix: str) -> bool:
    return any(file.endswith(suffix) for file in files)


def is_junk(path: str) -> bool:
    """What a Mac adds to folders and archives: __MACOSX/, ._1.jpg, .DS_Store."""
    return "__MACOSX" in path or path.rsplit("/", 1)[-1].startswith(".")


def visible(folder: Path, suffix: str) -> list[Path]:
    """Files of a folder whose names end so, sorted."""
    return sorted(p for p in folder.glob(f"*{suffix}") if not is_junk(p.name))


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(ARCHIVES)


@contextmanager
def readable(archive: Path) -> Iterator[None]:
    """Says in one message what is wrong with an archive."""
    try:
        yield
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the archive
            raise DatasetError(f"{archive} cannot be unpacked: {error}.") from error
        raise DatasetError(
            f"{archive} is damaged, or not downloaded to its end ({error or type(error).__name__}): download it again."
        ) from error


def unzip(archive: Path, wanted: Sequence[str], folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for name in chosen(archive, file.namelist(), wanted):
            if not name.endswith("/"):
                file.extract(name, folder)


def untar(archive: Path, wanted: Sequence[str], folder: Path) -> None:
    with tarfile.open(archive) as file:  # one pass: a compressed archive cannot be read out of order
        for member in track(file, f"Unpacking {archive.name}", total=None):
            inside(archive, member.name)
            if member.isfile() and is_wanted(member.name, wanted):
                file.extract(member, folder, filter="data")


def chosen(archive: Path, names: Sequence[str], wanted: Sequence[str]) -> Iterable[str]:
    for name in names:
        inside(archive, name)
    good = [name for name in names if is_wanted(name, wanted)]
    return track(good, f"Unpacking {archive.name}")


def is_wanted(name: str, wanted: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in wanted) and not is_junk(name)


def inside(archive: Path, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[:1]:
        raise DatasetError(f"{archive} holds '{name}', which would be written outside its folder: do not trust it.")


def place(file: Path, to: Path) -> None:
    """Puts a file in its place, whole or not at all: a second name for it where the disk allows, else a copy."""
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(to.name + ".part")
    part.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), part)
    except OSError:
        shutil.copyfile(file, part)
    os.replace(part, to)
    part.unlink(missing_ok=True)  # two names of one file: nothing was replaced


def place_all(files: Iterable[Path], folder: Path, what: str) -> int:
    """Puts files into a folder under their own names; returns their number."""
    files = list(files)
    for file in track(files, f"Placing {what}"):
        place(file, folder / file.name)
    return len(files)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
