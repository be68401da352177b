"""Units of work: computed once, and never again after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxmpq.journal import Journal
from fxmpq.work import Work


def test_without_a_journal_every_unit_is_computed() -> None:
    """Nothing is kept between two calls."""
    calls: list[str] = []
    work = Work()
    for _ in range(2):
        assert work.unit("a", lambda: calls.append("a") or [1]) == [1.0]  # type: ignore[func-returns-value]
    assert calls == ["a", "a"]


def test_an_interrupted_run_resumes_after_its_last_unit(tmp_path: Path) -> None:
    """Only the unit that was being computed is lost."""
    path = tmp_path / "run.journal"
    calls: list[int] = []

    def compute(index: int, fails_at: int | None) -> list[float]:
        if index == fails_at:
            raise KeyboardInterrupt
        calls.append(index)
        return [index / 3]

    def run(fails_at: int | None) -> list[float]:
        work = Work(journal=Journal(path, {"method": "test"}))
        return [work.unit(f"unit {i}", lambda i=i: compute(i, fails_at))[0] for i in range(5)]  # type: ignore[misc]

    with pytest.raises(KeyboardInterrupt):
        run(fails_at=3)
    assert run(fails_at=None) == [index / 3 for index in range(5)]
    assert calls == [0, 1, 2, 3, 4]
    assert "unit 4" in Journal(path, {"method": "test"}).done


def test_tracking_yields_the_items_unchanged() -> None:
    """With and without a bar."""
    assert list(Work().track(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert list(Work(shown=True).track([1, 2], "numbers")) == [1, 2]
    assert Work(shown=True).shown
