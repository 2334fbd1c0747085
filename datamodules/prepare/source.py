"""Downloaded archives and folders: safe unpacking, and search by folder name.

Links inside a given folder are followed, as people's data often lies behind links. Links inside an archive are not
unpacked.
"""

import hashlib
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.errors import DatasetError
from datamodules.progress import track

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
MOST_FILES = 150_000  # in an archive; the largest published one has 82,783
LONGEST_HEADER = 1 << 20  # bytes of the name and the attributes of one file in a tar archive


class Source:
    """The files of a benchmark as published: archives are unpacked, folders are used in place.

    Args:
        paths: archives, or folders that contain files or archives.
        wanted: glob patterns of the paths to unpack from archives.
        unpacked: folder to unpack into. An archive that was unpacked before is not unpacked again.

    Attributes:
        archives: name, size in bytes and sha256 of each archive.
        roots: the folders to search.

    Raises:
        DatasetError: a path does not exist; an archive is damaged, incomplete, or would write outside its folder.
    """

    def __init__(self, paths: Sequence[Path], wanted: Sequence[str], unpacked: Path) -> None:
        self.paths, self.wanted, self.unpacked = list(paths), tuple(wanted), unpacked
        self.archives: list[dict[str, Any]] = []
        self.roots = [root for path in paths for root in self.roots_of(path)]

    def roots_of(self, path: Path) -> Iterator[Path]:
        """The folders to search for one given path."""
        if path.is_dir():
            yield path
            archives = sorted(p for p in path.iterdir() if is_archive(p))
            yield from (self.unpack(p) for p in archives)
        elif path.is_file() and is_archive(path):
            yield self.unpack(path)
        elif path.exists():
            raise DatasetError(f"{path} is neither a folder nor an archive ({', '.join(ARCHIVES)}). Check --source.")
        else:
            raise DatasetError(f"There is no {path.absolute()}: check --source.")

    def unpack(self, archive: Path) -> Path:
        """Unpacks the wanted files of an archive, completely or not at all; returns their folder."""
        digest = sha256_of(archive)
        self.archives.append({"name": archive.name, "bytes": archive.stat().st_size, "sha256": digest})
        folder = self.unpacked / f"{archive.name}-{digest[:12]}"
        if not folder.exists():
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            with archive_errors(archive):
                (unzip if archive.suffix == ".zip" else untar)(archive, self.wanted, part)
            part.rename(folder)
        return folder

    def folders(self, place: str, suffix: str) -> Iterator[Path]:
        """Finds folders by the end of their path.

        Args:
            place: last parts of the folder's path, such as "dataset/cls".
            suffix: a folder must contain a file whose name ends with this.

        Returns:
            The folders, outermost first; only one of several paths to the same folder.
        """
        names, seen = PurePosixPath(place).parts, set[Path]()
        for root in self.roots:
            found = [at for at, files in walk(root) if at.parts[-len(names) :] == names and any_ends(files, suffix)]
            found = [at for at in found if not is_junk(str(at.relative_to(root)))]
            for at in sorted(found, key=lambda path: (len(path.parts), path)):
                if at.resolve() not in seen:
                    seen.add(at.resolve())
                    yield at

    def need(self, place: str, suffix: str, of: str) -> Path:
        """The first folder that `folders` finds.

        Args:
            place: last parts of the folder's path.
            suffix: ending of the names of its files.
            of: the download that contains the folder, for the error message.

        Raises:
            DatasetError: there is no such folder.
        """
        folder = next(self.folders(place, suffix), None)
        if folder is None:
            places = ", ".join(str(p) for p in self.paths)
            raise DatasetError(f"There is no folder {place}/ with files *{suffix} in {places}. It is part of {of}.")
        return folder

    def files(self, suffix: str) -> Iterator[Path]:
        """All files whose name ends with `suffix`."""
        for root in self.roots:
            for at, files in walk(root):
                yield from (at / file for file in files if file.endswith(suffix) and not is_junk(f"{at}/{file}"))


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """All folders under `root`, each with the names of its files. Follows links, except to a folder that contains them.

    Unpacked archives are walked in the same way: they contain no links.
    """
    above: dict[str, tuple[Path, ...]] = {str(root): (root.resolve(),)}  # folder -> the real folders on the way to it
    for at, folders, files in os.walk(root, followlinks=True):
        way = above.pop(at)
        real = {name: Path(at, name).resolve() for name in folders}
        folders[:] = [name for name in folders if not any(up.is_relative_to(real[name]) for up in way)]
        above |= {os.path.join(at, name): (*way, real[name]) for name in folders}
        yield Path(at), files


def any_ends(files: Sequence[str], suffix: str) -> bool:
    return any(file.endswith(suffix) for file in files)


def is_junk(path: str) -> bool:
    """Whether macOS added the file to a folder or archive: __MACOSX/, ._1.jpg, .DS_Store."""
    return "__MACOSX" in path or path.rsplit("/", 1)[-1].startswith(".")


def visible(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder whose name ends with `suffix`, sorted, without hidden files."""
    return sorted(p for p in folder.glob(f"*{suffix}") if not is_junk(p.name))


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(ARCHIVES)


@contextmanager
def archive_errors(archive: Path) -> Iterator[None]:
    """Turns any error while unpacking into one DatasetError that names the archive."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:  # a damaged or malicious archive can raise anything
        if isinstance(error, OSError) and error.errno is not None:  # the disk failed, not the archive
            raise DatasetError(
                f"{archive} cannot be unpacked: {error}. Check free space and permissions, then run the command again."
            ) from error
        raise DatasetError(
            f"{archive} is damaged or incomplete ({error or type(error).__name__}). Download it again."
        ) from error


def unzip(archive: Path, wanted: Sequence[str], folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        check_count(archive, len(file.namelist()))
        names = select(archive, file.namelist(), wanted)
        check_room(archive, sum(file.getinfo(name).file_size for name in names), folder)
        for name in track(names, f"Unpacking {archive.name}"):
            if not name.endswith("/"):
                file.extract(name, folder)


def untar(archive: Path, wanted: Sequence[str], folder: Path) -> None:
    with tarfile.open(archive, tarinfo=Header) as file:  # one pass: a compressed tar cannot be read out of order
        for count, member in enumerate(track(file, f"Unpacking {archive.name}", total=None), start=1):
            check_count(archive, count)
            check_inside(archive, member.name)
            if member.isfile() and not member.issparse() and is_wanted(member.name, wanted):
                check_room(archive, member.size, folder)
                file.extract(member, folder, filter="data")


class Header(tarfile.TarInfo):
    """A header in a tar archive. It refuses gigabytes of attributes, which tarfile would read into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in HEADERS and header.size > LONGEST_HEADER:
            raise tarfile.HeaderError(f"a header of {header.size:,} bytes")
        return header


def check_count(archive: Path, count: int) -> None:
    """Raises DatasetError if an archive holds more files than any published one."""
    if count > MOST_FILES:
        raise DatasetError(
            f"{archive} holds more than {MOST_FILES:,} files. Check that it is the published one, or unpack it and "
            "give the folder."
        )


def check_room(archive: Path, size: int, folder: Path) -> None:
    """Raises DatasetError if the disk is too small for what an archive says it holds."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DatasetError(
            f"{archive} holds {size / 1e9:,.1f} GB to unpack, but the disk of {folder.parent} has {free / 1e9:,.1f} GB "
            "free. Free some space, and check that the archive is the published one."
        )


def select(archive: Path, names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The wanted names of an archive. Raises DatasetError if any name points outside the folder."""
    for name in names:
        check_inside(archive, name)
    return [name for name in names if is_wanted(name, wanted)]


def is_wanted(name: str, wanted: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in wanted) and not is_junk(name)


def check_inside(archive: Path, name: str) -> None:
    """Raises DatasetError if a name in an archive points outside the folder to unpack into."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[:1]:
        raise DatasetError(f"{archive} contains '{name}', which would be written outside its folder. Do not trust it.")


def place(file: Path, to: Path) -> None:
    """Hard-links `file` to the path `to`, or copies it if the disk does not support links; leaves no partial file."""
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(to.name + ".part")
    part.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), part)
    except OSError as error:
        if not file.exists():
            raise DatasetError(f"{file} is a link to a file that does not exist. Restore the file.") from error
        shutil.copyfile(file, part)
    os.replace(part, to)
    part.unlink(missing_ok=True)  # replacing a link by another link to the same file does nothing


def place_all(files: Iterable[Path], folder: Path, what: str) -> int:
    """Hard-links or copies files into a folder under their own names.

    Args:
        files: the files.
        folder: where to put them; it is created if missing.
        what: what the files are, for the progress bar.

    Returns:
        Number of files.
    """
    files = list(files)
    for file in track(files, f"Placing {what}"):
        place(file, folder / file.name)
    return len(files)


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
