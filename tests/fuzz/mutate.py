"""Damage to files: to their bytes, and to the values that they hold. The same random numbers give the same damage."""

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Random = np.random.Generator
ODD_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
ODD_TEXT = (b"\0", b"..", b"/", b"../../evil", b"-1", b"1e999", b"NaN", b"null", b"[" * 5000, b"9" * 5000, b"\xff\xfe")
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**70, 1e308, float("nan"), "", "x", "..", "../../evil", "/etc/passwd", "a\0b"),
    *("x" * 5000, [], {}, [[]], {"": None}, ["a", 1], "é\ud800"),
)


def damage(content: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """Damages a file in one to four places.

    Args:
        content: the file.
        others: files that parts may come from.
    """
    kinds: list[Callable[[bytes, Random], bytes]] = [flip, odd_number, odd_number, odd_text, cut, drop, repeat, swap]
    for _ in range(random.integers(1, 5)):
        if others and random.random() < 0.1:
            content = splice(content, others[random.integers(len(others))], random)
        else:
            content = kinds[random.integers(len(kinds))](content, random)
    return content


def place(content: bytes, random: Random) -> int:
    """A place in the file; half of the time in its first or last 100 bytes, where headers and directories are."""
    size = len(content)
    near = int(random.integers(min(size, 100) + 1))
    return (near, size - near, *random.integers(size + 1, size=2).tolist())[random.integers(4)]


def span(content: bytes, random: Random) -> tuple[int, int]:
    """First and last place of a short part."""
    start = place(content, random)
    return start, min(len(content), start + int(random.integers(1, 64)))


def flip(content: bytes, random: Random) -> bytes:
    """Flips one bit in each of up to eight bytes."""
    array = bytearray(content)
    for _ in range(random.integers(1, 9) if array else 0):
        array[min(place(content, random), len(array) - 1)] ^= 1 << int(random.integers(8))
    return bytes(array)


def odd_number(content: bytes, random: Random) -> bytes:
    """Overwrites 1, 2, 4 or 8 bytes with an extreme number: many of them are lengths, offsets and counts."""
    width, number = 2 ** int(random.integers(4)), ODD_NUMBERS[random.integers(len(ODD_NUMBERS))]
    order = ("little", "big")[random.integers(2)]
    at = place(content, random)
    return content[:at] + (number % 256**width).to_bytes(width, order) + content[at + width :]  # type: ignore[arg-type]


def odd_text(content: bytes, random: Random) -> bytes:
    """Inserts text that readers stumble over."""
    at = place(content, random)
    return content[:at] + ODD_TEXT[random.integers(len(ODD_TEXT))] + content[at:]


def cut(content: bytes, random: Random) -> bytes:
    """Keeps the first part."""
    return content[: place(content, random)]


def drop(content: bytes, random: Random) -> bytes:
    """Removes a short part."""
    start, end = span(content, random)
    return content[:start] + content[end:]


def repeat(content: bytes, random: Random) -> bytes:
    """Repeats a short part up to 1,000 times."""
    start, end = span(content, random)
    return content[:end] + content[start:end] * int(random.choice([1, 10, 1000])) + content[end:]


def swap(content: bytes, random: Random) -> bytes:
    """Exchanges two short parts."""
    (a, b), (c, d) = sorted([span(content, random), span(content, random)])
    c, d = max(b, c), max(b, d)
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def splice(content: bytes, other: bytes, random: Random) -> bytes:
    """The start of one file, then the end of another."""
    return content[: place(content, random)] + other[place(other, random) :]


def change(value: Any, random: Random) -> Any:
    """Replaces, removes, renames or nests up to three of the values in nested lists and dictionaries."""
    for _ in range(random.integers(1, 4)):
        value = change_one(value, random)
    return value


def change_one(value: Any, random: Random) -> Any:
    if isinstance(value, dict | list) and value and random.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[random.integers(len(keys))]
        copy = value.copy()
        match random.integers(10):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, dict):
                copy[ODD_VALUES[random.integers(15)]] = copy.pop(key)
            case _:
                copy[key] = change_one(value[key], random)
        return copy
    odd = ODD_VALUES[random.integers(len(ODD_VALUES))]
    return {0: [value], 1: {"x": value}}.get(int(random.integers(8)), odd)


def right_checksums(content: bytes) -> bytes:
    """Corrects the checksums of a PNG file's chunks, so that damage reaches the decoder."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    at, array = 8, bytearray(content)
    while at + 12 <= len(array):
        end = at + 8 + struct.unpack_from(">I", array, at)[0]
        if end + 4 > len(array):
            break
        struct.pack_into(">I", array, end, zlib.crc32(array[at + 4 : end]))
        at = end + 4
    return bytes(array)
