"""Published split lists: their addresses, and a safe reader for pickled lists."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from datamodules.errors import DatasetError
from datamodules.prepare.download import Download

HSNET = "https://github.com/juhongm999/hsnet/raw/6b1bc12/data/splits"
PATNET = "https://github.com/slei109/PATNet/raw/0155c5fe9212f46ce98c6c32c495008e92bb4795/data"


def hsnet(path: str) -> Download:
    """A list from HSNet's repository at a fixed commit. Its content is verified after reading."""
    return Download(f"{HSNET}/{path}")


def patnet(path: str) -> Download:
    """A list from PATNet's repository at a fixed commit. Its content is verified after reading."""
    return Download(f"{PATNET}/{path}")


class PlainUnpickler(pickle.Unpickler):
    """An unpickler for containers, strings and numbers. It refuses a pickle that refers to anything else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_pickle(path: Path) -> Any:
    """Reads a pickle of plain values without executing code from it.

    Raises:
        DatasetError: the file is damaged, or holds anything but containers, strings and numbers.
    """
    try:
        content = path.read_bytes()
        for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
            if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:
                raise pickle.UnpicklingError("it asks for more memory than its content needs")
        return PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged or malicious file can raise anything
        raise DatasetError(
            f"{path} cannot be loaded: {error or type(error).__name__}. It is damaged, or not a list of plain values. "
            "Do not trust it; download it again."
        ) from error
