"""Segmentation of one's own images: `Segmenter`, and `Box`, `Points` and `Scribble` in place of masks.

What is exported here is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmnet.segment.marks import Box, Points, Scribble
    from pmnet.segment.segmenter import Result, Segmenter

HOMES = {
    "Box": "pmnet.segment.marks",
    "Points": "pmnet.segment.marks",
    "Result": "pmnet.segment.segmenter",
    "Scribble": "pmnet.segment.marks",
    "Segmenter": "pmnet.segment.segmenter",
}
__all__ = ["Box", "Points", "Result", "Scribble", "Segmenter"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'pmnet.segment' has no attribute '{name}'")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
