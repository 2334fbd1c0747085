"""Progress of long work: on a terminal, and beside what a command writes, not in it."""

from collections.abc import Iterable
from typing import TypeVar

from rich import progress
from rich.console import Console

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The items, with a bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    return progress.track(items, what, total, console=console, transient=True, disable=not console.is_terminal)
