from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fxmpq.errors import FileFormatError, FxmpqError, PrecisionError
from fxmpq.formats import Precision
from fxmpq.sensitivity.sensitivity import Sensitivity

PRECISIONS = ["w2a8", "w4a8", "w8a8", "w4", "w16a16", "fp32"]
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def sensitivities(draw: st.DrawFn, *, projected: bool | None = None) -> Sensitivity:
    row = st.dictionaries(st.sampled_from(PRECISIONS), finite, min_size=1, max_size=3)
    values = draw(st.dictionaries(st.text(max_size=8), row, min_size=1, max_size=4))
    projections = None
    if draw(st.booleans()) if projected is None else projected:
        shape = (draw(st.integers(1, 4)), sum(map(len, values.values())))
        seed = draw(st.integers(0, 2**32 - 1))
        scale = 10.0 ** draw(st.integers(-8, 4))
        projections = scale * np.random.default_rng(seed).standard_normal(shape)
    method = draw(st.sampled_from(["sqnr", "projected"]))
    fingerprint = draw(st.none() | st.text("0123456789abcdef", min_size=8, max_size=8))
    return Sensitivity(values, method, fingerprint, projections)


@given(sensitivities())
def test_json_round_trip_is_exact(sensitivity: Sensitivity) -> None:
    back = Sensitivity.from_json(sensitivity.to_json())
    assert back.values == sensitivity.values
    assert back.entries == sensitivity.entries
    assert (back.method, back.fingerprint) == (sensitivity.method, sensitivity.fingerprint)
    if sensitivity.projections is None:
        assert back.projections is None
    else:
        assert back.projections is not None
        np.testing.assert_array_equal(back.projections, sensitivity.projections)


def test_a_file_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    text = Sensitivity({"a": {"w4a8": 0.1}}).to_json(path)
    assert path.read_text() == text
    assert Sensitivity.from_json(path).values == {"a": {"w4a8": 0.1}}


def test_entries_follow_the_order_of_the_values() -> None:
    sensitivity = Sensitivity({"b": {"w8a8": 1, "w4a8": 2}, "a": {"W2A8": 3}})
    assert sensitivity.entries == (("b", "w8a8"), ("b", "w4a8"), ("a", "w2a8"))
    assert sensitivity.value("a", Precision(2, 8)) == sensitivity.value("a", "w2a8") == 3.0


@pytest.mark.parametrize(
    ("value", "decibels"), [(1.0, 0.0), (0.01, 20.0), (2.0, -3.0103), (1e-9, 90)]
)
def test_sqnr_in_decibels(value: float, decibels: float) -> None:
    sensitivity = Sensitivity({"a": {"w4a8": value}})
    assert sensitivity.sqnr_db("a", "w4a8") == pytest.approx(decibels, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, -1e-12])
def test_no_loss_is_infinite_sqnr(value: float) -> None:
    assert Sensitivity({"a": {"w8a8": value}}).sqnr_db("a", "w8a8") == math.inf


@given(sensitivities(projected=True), st.integers(0, 2**32 - 1))
def test_pairs_are_symmetric_and_positive_semi_definite(
    sensitivity: Sensitivity, seed: int
) -> None:
    pairs = sensitivity.pairs()
    size = len(sensitivity.entries)
    assert pairs.shape == (size, size)
    np.testing.assert_array_equal(pairs, pairs.T)
    lowest = np.linalg.eigvalsh(pairs).min()
    assert lowest >= -1e-12 * np.trace(pairs)
    choice = np.random.default_rng(seed).integers(0, 2, size).astype(np.float64)
    assert sensitivity.projections is not None
    noise = (sensitivity.projections @ choice) ** 2
    assert choice @ pairs @ choice == pytest.approx(noise.mean(), rel=1e-9)


def test_pairs_of_hand_made_projections() -> None:
    projections = np.array([[1.0, 2.0], [3.0, -1.0]])
    sensitivity = Sensitivity({"a": {"w4a8": 5.0}, "b": {"w4a8": 2.5}}, projections=projections)
    np.testing.assert_allclose(sensitivity.pairs(), [[5.0, -0.5], [-0.5, 2.5]])


def test_pairs_without_projections_name_the_method_that_has_them() -> None:
    with pytest.raises(FxmpqError, match=r"method 'sqnr' measures no interactions.*'projected'"):
        Sensitivity({"a": {"w4a8": 0.1}}, "sqnr").pairs()


def test_an_unknown_group_shows_the_closest() -> None:
    sensitivity = Sensitivity({"layer1.conv1": {"w4a8": 0.1}, "head": {"w8a8": 0.2}})
    with pytest.raises(FxmpqError, match=r"no group 'layer1.conv'; closest: 'layer1\.conv1'"):
        sensitivity.value("layer1.conv", "w4a8")


def test_an_unknown_precision_shows_what_there_is() -> None:
    sensitivity = Sensitivity({"a": {"w4a8": 0.1, "w8a8": 0.0}})
    with pytest.raises(FxmpqError, match="group 'a' has no w2a8; it has w4a8, w8a8"):
        sensitivity.sqnr_db("a", "w2a8")
    with pytest.raises(PrecisionError, match="cannot read the precision 'four'"):
        sensitivity.value("a", "four")


@pytest.mark.parametrize("values", [{}, {"a": {}}, {"a": {"w4a8": 1.0}, "b": {}}])
def test_empty_values_are_refused(values: dict[str, dict[str, float]]) -> None:
    with pytest.raises(FxmpqError, match="at least one group, each with a precision"):
        Sensitivity(values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    with pytest.raises(FxmpqError, match=r"sensitivity of group 'b' at w4a8 is .*must be finite"):
        Sensitivity({"a": {"w4a8": 1.0}, "b": {"w8a8": 0.0, "w4a8": value}})


@pytest.mark.parametrize(
    ("projections", "message"),
    [
        (np.zeros((3, 1)), r"shape \(3, 1\); expected \[draws, 2\]"),
        (np.zeros((0, 2)), r"shape \(0, 2\); expected \[draws, 2\]"),
        (np.zeros(2), r"shape \(2,\); expected \[draws, 2\]"),
        (np.array([[1.0, math.nan]]), "projections must be finite"),
    ],
)
def test_projections_that_do_not_fit_are_refused(
    projections: NDArray[np.float64], message: str
) -> None:
    with pytest.raises(FxmpqError, match=message):
        Sensitivity({"a": {"w4a8": 1.0, "w8a8": 0.5}}, projections=projections)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "fxmpq.plan"}, "expected the schema 'fxmpq.sensitivity'; found 'fxmpq.plan'"),
        ({"version": 2}, "expected version 1 .* found 2"),
        ({"colour": 1}, r"unknown fields \['colour'\]"),
        ({"values": {"a": {"w4a8": math.nan}}}, "NaN"),
        ({"values": {"a": {"w4a8": "much"}}}, "much"),
        ({"values": {"a": {"w9a8": 1.0}}}, "no 9-bit"),
        ({"values": {"a": 3}}, "fxmpq.sensitivity: "),
        ({"values": [1, 2]}, "fxmpq.sensitivity: "),
        ({"projections": [[1.0, 2.0]]}, r"shape \(1, 2\)"),
        ({"projections": [[1.0], [1.0, 2.0]]}, "fxmpq.sensitivity: "),
    ],
)
def test_a_file_that_holds_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    found = json.loads(Sensitivity({"a": {"w4a8": 0.5}}).to_json())
    with pytest.raises(FileFormatError, match=message):
        Sensitivity.from_json(json.dumps(found | changes))


def test_a_file_without_values_is_refused() -> None:
    with pytest.raises(FileFormatError, match=r"missing fields \['values'\]"):
        Sensitivity.from_json('{"schema": "fxmpq.sensitivity", "version": 1}')


@pytest.mark.parametrize("unit", ["loss", "score"])
def test_units_are_kept_and_only_noise_has_decibels(unit: str) -> None:
    sensitivity = Sensitivity({"a": {"w8a8": 0.01}}, "entropy", unit=unit)
    assert Sensitivity.from_json(sensitivity.to_json()).unit == unit
    with pytest.raises(FxmpqError, match=f"'entropy' measures a {unit}, which is no noise power"):
        sensitivity.sqnr_db("a", "w8a8")
    with pytest.raises(FxmpqError, match="no unit 'nats' of sensitivity"):
        Sensitivity({"a": {"w8a8": 0.01}}, unit="nats")
