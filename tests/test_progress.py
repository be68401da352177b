from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest

from fxmpq.progress import track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def become_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called inside the tests, since pytest puts its own standard error back before each."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setenv("TERM", "xterm")
    return found


def test_items_pass_unchanged_and_nothing_is_shown_outside_a_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert list(track([3, 1, 2], "counting")) == [3, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_a_terminal_sees_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = become_terminal(monkeypatch)
    assert list(track([1, 2], "counting sheep")) == [1, 2]
    assert "counting sheep" in terminal.getvalue()


def test_a_bar_can_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = become_terminal(monkeypatch)
    assert list(track([1, 2], "counting", shown=False)) == [1, 2]
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("total", [None, 3])
def test_generators_are_consumed_one_by_one(
    monkeypatch: pytest.MonkeyPatch, total: int | None
) -> None:
    become_terminal(monkeypatch)
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(3):
            taken.append(item)
            yield item

    tracked = track(items(), "counting", total=total)
    assert next(tracked) == 0
    assert taken == [0]
    assert list(tracked) == [1, 2]


def test_an_error_inside_leaves_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    become_terminal(monkeypatch)

    def fails() -> Iterator[int]:
        yield 1
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        list(track(fails(), "counting"))
    assert list(track([1], "again")) == [1]
