"""Reading files of tensors: nothing in them is executed, whatever they are."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from pmnet.errors import WeightsError


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and plain values of a .safetensors, .pth or .ckpt file, and a safetensors file's metadata.

    Raises:
        WeightsError: there is no such file, it is damaged, or it holds more than tensors and plain values.
    """
    if not path.is_file():
        raise WeightsError(f"There is no file {path.absolute()}.")
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            content: Any = safetensors.torch.load_file(path)
        else:
            check_size(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or malicious file makes the readers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path} is not a readable file of weights: {reason}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no weights: it must hold a dictionary of tensors.")
    return content, metadata


def check_size(path: Path) -> None:
    """Raises ValueError if torch.load would need much more memory than the file's size, as no sound file does."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
            if size > path.stat().st_size:
                raise ValueError(f"it is compressed, {size:,} bytes in {path.stat().st_size:,}")
            pickles = [file.read(name) for name in file.namelist() if name.endswith(".pkl")]
    else:  # PyTorch before 1.6
        pickles = [path.read_bytes()]
    if any(b"\nbytearray\n" in content for content in pickles):  # weights_only allows it, of any length
        raise ValueError("it asks for memory that it does not fill")


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
