from __future__ import annotations

from typing import Any

import pytest

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.candidates import read_candidates


def test_names_and_precisions_are_read() -> None:
    assert read_candidates(["w4a8", Precision(8, 8)]) == (Precision(4, 8), Precision(8, 8))
    assert read_candidates(("fp32",)) == (Precision(),)
    assert read_candidates(None) is None


@pytest.mark.parametrize(
    ("alone", "instead"),
    [
        ("w4a8", r"\['w4a8'\]"),
        (Precision(4, 8), r"\['w4a8'\]"),
        ("w4a8, w8a8", r"\['w4a8', 'w8a8'\]"),
    ],
)
def test_one_precision_alone_is_refused(alone: str | Precision, instead: str) -> None:
    with pytest.raises(PrecisionError, match=f"candidates is a list .* write {instead}"):
        read_candidates(alone)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (8, "is a list of precisions, .* found 8"),
        (["w4a8", 8], "holds precisions, as 'w4a8'; found 8"),
        ([], "is empty; name precisions"),
    ],
)
def test_what_is_no_list_of_precisions_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(PrecisionError, match=f"candidates {message}"):
        read_candidates(wrong)


def test_what_is_no_precision_is_refused() -> None:
    with pytest.raises(PrecisionError, match="cannot read the precision 'four'"):
        read_candidates(["w4a8", "four"])
