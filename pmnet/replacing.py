"""Writing files: a file under its own name is whole."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write beside `path`, which takes its name when the block ends.

    If the block fails, `path` is as it was and the new file is removed. Several processes may write the same `path`.
    Makes the folder.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "masks" / "a.txt") as part:
        ...         _ = part.write_text("whole")
        ...     (Path(folder) / "masks" / "a.txt").read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}.part")  # short: the name of `path` may be as long as the disk allows
    try:
        yield part
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # a read-only disk: what the block raised says more
            part.unlink()
        raise
