"""A reader of MATLAB 5 files in pure Python, for masks: scipy.io.loadmat crashes on damaged ones."""

import struct
import zlib
from collections.abc import Iterator

import numpy as np

MATRIX, COMPRESSED, STRUCT = 14, 15, 2
NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
LARGEST = 1 << 26  # bytes of a variable


def variables(content: bytes) -> dict[str, bytes]:
    """The variables of a file: name -> content of its matrix. Raises ValueError, struct.error or zlib.error."""
    if content[126:128] != b"IM":
        raise ValueError("it is not a MATLAB 5 file of a little-endian machine")
    found = {}
    for kind, body in elements(content[128:]):
        if kind == COMPRESSED:
            (kind, body), *_ = elements(zlib.decompressobj().decompress(body, LARGEST))
        if kind == MATRIX:
            _, _, (_, name), *_ = elements(body)
            found[name.decode("ascii")] = body
    return found


def fields(matrix: bytes) -> dict[str, bytes]:
    """The fields of a struct: name -> content of its matrix."""
    (_, flags), _, _, (_, length), (_, names), *values = elements(matrix)
    if flags[0] != STRUCT:
        raise ValueError("a variable is not a struct")
    step = int.from_bytes(length, "little")
    keys = [names[i : i + step].split(b"\0")[0].decode("ascii") for i in range(0, len(names), step)]
    return {key: body for key, (_, body) in zip(keys, values, strict=False)}


def numbers(matrix: bytes) -> np.ndarray:
    """The numbers of a numeric matrix, in its shape."""
    _, (_, shape), _, (kind, values), *_ = elements(matrix)
    if kind not in NUMBERS:
        raise ValueError("a variable is not a matrix of numbers")
    return np.frombuffer(values, NUMBERS[kind]).reshape(np.frombuffer(shape, "<i4").tolist(), order="F")


def elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each of the elements that follow one another."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from("<II", content, at)
        start = at + 8
        if kind >> 16:  # a short element, in one word with its size
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(content):
            raise ValueError("it is cut off")
        yield kind, content[start : start + size]
        at = start + size
        at += 0 if kind == COMPRESSED else -at % 8
