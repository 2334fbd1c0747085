"""Downloads published files that need no login; resumes interrupted downloads and verifies checksums."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from datamodules.errors import DatasetError

CHUNK = 1 << 16


@dataclass(frozen=True)
class Download:
    """A file to download.

    Attributes:
        url: address of the file.
        digest: "md5:..." or "sha256:..." of the whole file; "" if none is published.

    Example:
        >>> Download("https://example.org/files/train.zip").name
        'train.zip'
    """

    url: str
    digest: str = ""

    @property
    def name(self) -> str:
        """File name: the last part of the address."""
        return self.url.rsplit("/", 1)[1]


def fetch(download: Download, folder: Path) -> Path:
    """Downloads a file into a folder. An existing file is reused, and a partial download is resumed.

    Args:
        download: what to download.
        folder: where to save the file; it is created if missing.

    Returns:
        Path of the file.

    Raises:
        DatasetError: the connection fails, the server refuses, or the checksum differs from the published one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / download.name, folder / (download.name + ".part")
    if path.exists():
        return path
    try:
        receive(download.url, part)
    except (requests.RequestException, OSError, ValueError) as error:  # ValueError: headers that make no sense
        kept = f" Run the same command again to resume after {part.stat().st_size:,} bytes." if part.exists() else ""
        raise DatasetError(
            f"{download.url} cannot be downloaded ({error}).{kept} Or download it by hand; use --source or --splits."
        ) from error
    verify(download, part)
    part.rename(path)
    return path


def receive(url: str, part: Path) -> None:
    """Downloads `url` to `part` and appends to what is already there. Raises OSError if the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {"Accept-Encoding": "identity"}
    with requests.get(url, stream=True, timeout=60, headers=headers) as answer:
        if have and answer.status_code == requests.codes.requested_range_not_satisfiable:
            return  # already complete
        answer.raise_for_status()
        resumed = answer.status_code == requests.codes.partial_content
        have = have if resumed else 0  # a server without range support starts over
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        console = Console(stderr=True)
        if not console.is_terminal:
            console.print(f"Downloading {url}" + (f" ({total / 1e6:,.0f} MB)" if total else ""), highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        with bar as progress, part.open("ab" if resumed else "wb") as file:
            task = progress.add_task(url.rsplit("/", 1)[1], total=total, completed=have)
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)
                progress.advance(task, len(chunk))
    if total is not None and part.stat().st_size < total:
        raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")


def verify(download: Download, part: Path) -> None:
    """Deletes `part` and raises DatasetError if its checksum is not the published one."""
    kind, _, expected = download.digest.partition(":")
    if not kind:
        return
    with part.open("rb") as file:
        have = hashlib.file_digest(file, kind).hexdigest()
    if have != expected:
        part.unlink()
        raise DatasetError(
            f"{download.url} is not the published file ({kind} {have}, published {expected}) and was deleted. Try "
            "again; if the error stays, the publisher has changed the file."
        )
