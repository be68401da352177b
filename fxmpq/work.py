"""Long work in units: shown as it goes on, and kept so that an interruption loses one unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxmpq.journal import Journal
from fxmpq.progress import Tracked


class Work(Tracked):
    """How a method shows its progress, and where it keeps what it has done.

    Args:
        shown: Whether to show progress bars.
        journal: Where finished units are recorded; `None` keeps nothing.

    Examples:
        >>> work = Work()
        >>> sum(work.unit(f"row {row}", lambda: [2.0])[0] for row in work.track([1, 2], "rows"))
        4.0
    """

    def __init__(self, *, shown: bool = False, journal: Journal | None = None) -> None:
        super().__init__(shown=shown)
        self._journal = journal

    def unit(self, name: str, compute: Callable[[], Sequence[float]]) -> list[float]:
        """The numbers of one unit of work: recorded ones, else computed now and recorded.

        Args:
            name: Identifies the unit within its run.
            compute: Does the work; called only if nothing is recorded.

        Returns:
            The numbers, to the last bit the same in both cases.
        """
        if self._journal is None:
            return [float(number) for number in compute()]
        if name not in self._journal.done:
            self._journal.record(name, compute())
        return self._journal.done[name]
