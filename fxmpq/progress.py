"""Progress bars for work that takes longer than a few seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

Item = TypeVar("Item")


class Tracked:
    """Long work that shows how far it is, if it is to.

    Args:
        shown: Whether to show progress bars.
    """

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown

    @property
    def shown(self) -> bool:
        """Whether progress bars are shown."""
        return self._shown

    def track(
        self, items: Iterable[Item], description: str, *, total: int | None = None
    ) -> Iterator[Item]:
        """Iterate with a progress bar; see `track`."""
        return track(items, description, total=total, shown=self._shown)


def track(
    items: Iterable[Item], description: str, *, total: int | None = None, shown: bool = True
) -> Iterator[Item]:
    """Iterate with a progress bar on standard error, when that is a terminal.

    Args:
        items: What to iterate over.
        description: What is being done.
        total: Number of items, where `items` has no length.
        shown: `False` shows nothing.

    Yields:
        The items, unchanged.

    Examples:
        >>> list(track([1, 2], "counting", shown=False))
        [1, 2]
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    yield from rich_track(
        items,
        description=description,
        total=total,
        console=Console(stderr=True),
        transient=True,
        disable=not (shown and sys.stderr.isatty()),
    )
