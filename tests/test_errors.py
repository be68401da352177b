from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq import errors
from fxmpq.errors import FxmpqError, closest

NAMES = st.lists(st.text("abcdefg._0123456789", min_size=1, max_size=12), unique=True, max_size=12)


@pytest.mark.parametrize(
    "kind",
    [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and value.__module__ == errors.__name__
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_error_is_an_fxmpq_error_and_a_value_error(kind: type[Exception]) -> None:
    assert issubclass(kind, FxmpqError)
    with pytest.raises(ValueError, match=r"^asked, found, would work$"):
        raise kind("asked, found, would work")


def test_an_infeasible_budget_is_a_budget_error() -> None:
    assert issubclass(errors.InfeasibleBudgetError, errors.BudgetError)


def test_closest_lists_the_nearest_first() -> None:
    known = ["layer4.conv1", "layer1.conv2", "head"]
    assert closest("layer1.conv", known).split(", ")[0] == "'layer1.conv2'"
    assert "head" not in closest("layer1.conv", known)


def test_closest_shows_legal_values_when_nothing_is_near() -> None:
    assert closest("zzz", ["alpha", "beta", "gamma"], limit=2) == "'alpha', 'beta'"


def test_closest_of_nothing_says_so() -> None:
    assert closest("anything", []) == "nothing"


@given(name=st.text(max_size=12), known=NAMES, limit=st.integers(1, 6))
def test_closest_names_only_legal_values_within_the_limit(
    name: str, known: list[str], limit: int
) -> None:
    listed = closest(name, iter(known), limit).split(", ")
    if not known:
        assert listed == ["nothing"]
    else:
        assert 1 <= len(listed) <= limit
        assert set(listed) <= {repr(entry) for entry in known}


@given(known=NAMES.filter(bool), index=st.integers(0))
def test_closest_puts_an_exact_match_first(known: list[str], index: int) -> None:
    name = known[index % len(known)]
    assert closest(name, known).split(", ")[0] == repr(name)
