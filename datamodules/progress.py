"""Progress bars on stderr, so that they never mix with a command's output on stdout."""

from collections.abc import Iterable
from typing import TypeVar

from rich import progress
from rich.console import Console

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Iterates over `items` and shows a progress bar if stderr is a terminal.

    Args:
        items: what to iterate over.
        what: label of the bar.
        total: number of items; needed only if `items` has no length.

    Returns:
        The same items.
    """
    console = Console(stderr=True)
    return progress.track(items, what, total, console=console, transient=True, disable=not console.is_terminal)
