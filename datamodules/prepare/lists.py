"""Published split lists: where they are, and how a pickle is read without trusting it."""

import pickle
from pathlib import Path
from typing import Any

from datamodules.errors import DatasetError
from datamodules.prepare.download import Download

HSNET = "https://github.com/juhongm999/hsnet/raw/6b1bc12/data/splits"
PATNET = "https://github.com/slei109/PATNet/raw/0155c5fe9212f46ce98c6c32c495008e92bb4795/data"


def hsnet(path: str) -> Download:
    """A list of HSNet's repository, at a fixed commit; its content is verified once read."""
    return Download(f"{HSNET}/{path}")


def patnet(path: str) -> Download:
    return Download(f"{PATNET}/{path}")


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path: Path) -> Any:
    """Raises DatasetError where the file is no pickle of plain values."""
    try:
        with path.open("rb") as file:
            return PlainUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, OSError) as error:
        raise DatasetError(
            f"{path} is not read: {error or type(error).__name__}. Plain values are wanted; do not trust this file."
        ) from error
