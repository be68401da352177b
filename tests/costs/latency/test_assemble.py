"""The arithmetic of latency."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.costs.latency.assemble import Joint, Times, anchored, assemble, has_codes
from fxmpq.costs.latency.places import Junction, Unit
from fxmpq.costs.terms import Edge
from fxmpq.formats import Precision
from fxmpq.graph.state import Group, Layer

_NAMES = ("w4a8", "w8a8", "fp32")
_TIMES = st.floats(0.1, 10)


def _layer(name: str) -> Layer:
    return Layer(name, "conv", name, f"{name}.weight", 1, (1, 1, 1, 1), 0)


def _model() -> tuple[list[Group], dict[Unit, str], list[Joint]]:
    candidates = tuple(map(Precision.parse, _NAMES))
    groups = [Group(name, (_layer(name),), candidates) for name in "ab"]
    units = {Unit(group.layers[0], group.name, (group.name,)): group.name for group in groups}
    producer, reader = units
    return groups, units, [Joint(Junction(producer, reader, (), "b"), "ab", ("w8a8", "w8a8"))]


def test_by_hand() -> None:
    groups, units, joints = _model()
    alone = {"w4a8": 0.012, "w8a8": 0.013, "fp32": 0.041}
    pieces = {(name, (entry,)): time for name in "ab" for entry, time in alone.items()}
    # Without the call's 1 ms: 18 of 12 + 12, 80 of 40 + 40, 58 and 55 of 12 + 40.
    both = {("w8a8", "w8a8"): 0.019, ("fp32", "fp32"): 0.081}
    mixed = {("w8a8", "fp32"): 0.059, ("fp32", "w8a8"): 0.056}
    pieces |= {("ab", choice): time for choice, time in (both | mixed).items()}
    whole = {("w8a8", "w8a8"): 0.023, ("fp32", "fp32"): 0.085}
    found = assemble(groups, units, joints, Times(pieces, 0.001, whole), list(whole))
    assert found.rows is not None
    # Each loses half of the 6 ms that the two need not convert.
    for row in found.rows.values():
        assert row == pytest.approx({"w4a8": 8, "w8a8": 9, "fp32": 40})
    assert found.fixed == pytest.approx(5)
    assert found.float_total == 85
    (edge,) = found.edges
    assert edge.costs["w4a8"] == pytest.approx({"w4a8": 0, "w8a8": 0, "fp32": 58 - 9 - 40})
    assert edge.costs["fp32"] == pytest.approx({"w4a8": 6, "w8a8": 6, "fp32": 0})


def test_a_producer_behind_its_reader_takes_what_was_measured_so() -> None:
    groups, units, (joint,) = _model()
    junction = replace(joint.junction, is_reader_first=True)
    pieces = {(name, (entry,)): 4.0 for name in "ab" for entry in _NAMES}
    # The reader's precision is named first.
    pieces |= {("ab", ("fp32", "w8a8")): 9.0, ("ab", ("w8a8", "fp32")): 11.0}
    times = Times(pieces, 0.0, {("fp32", "fp32"): 12.0})
    (edge,) = assemble(groups, units, [replace(joint, junction=junction)], times, []).edges
    assert (edge.costs["w8a8"]["fp32"], edge.costs["fp32"]["w8a8"]) == (1000, 3000)


def test_several_readers_in_a_group_change_a_tensor_once() -> None:
    groups, units, joints = _model()
    second = Unit(_layer("c"), "b", ("c",))
    junction = Junction(joints[0].junction.producer, second, (), "c")
    joints.append(Joint(junction, "ab", joints[0].codes))
    alone = {"w4a8": 2.0, "w8a8": 2.0, "fp32": 4.0}
    pieces = {(name, (entry,)): time for name in "abc" for entry, time in alone.items()}
    mixed = {("w8a8", "fp32"): 9.0, ("fp32", "w8a8"): 7.0}
    both = {("w8a8", "w8a8"): 4.0, ("fp32", "fp32"): 8.0}
    pieces |= {("ab", choice): time for choice, time in (both | mixed).items()}
    times = Times(pieces, 0.0, {("fp32", "fp32"): 12.0})
    (edge,) = assemble(groups, {**units, second: "c"}, joints, times, []).edges
    assert edge.costs["w8a8"]["fp32"] == pytest.approx(3000)
    assert edge.costs["fp32"]["w8a8"] == pytest.approx(1000)


@pytest.mark.parametrize(("second", "saved"), [("sum", 6.0), ("b", 3.0)])
def test_what_a_layer_reads_and_what_is_added_to_it_save_time_each(
    second: str, saved: float
) -> None:
    groups, units, (joint,) = _model()
    reader = joint.junction.reader
    other = Unit(_layer("c"), "c", ("c",))
    groups.append(replace(groups[0], name="c", layers=(_layer("c"),)))
    joints = [joint, Joint(Junction(other, reader, (), second), "cb", joint.codes)]
    pieces = {(name, (entry,)): 40.0 for name in "abc" for entry in _NAMES}
    pieces |= {(pair, ("w8a8", "w8a8")): 74.0 for pair in ("ab", "cb")}
    # One that is the other's alternative saves as much as the two together.
    times = Times(pieces, 0.0, {("fp32",) * 3: 200.0})
    rows = assemble(groups, {**units, other: "c"}, joints, times, []).rows
    assert rows is not None
    found = {name: row["w8a8"] / 1000 for name, row in rows.items()}
    assert found == pytest.approx({"a": 37, "b": 40 - saved, "c": 37})


@given(st.lists(_TIMES, min_size=20, max_size=20), st.lists(_TIMES, min_size=3, max_size=3))
def test_costs_are_costs_whatever_was_measured(numbers: list[float], totals: list[float]) -> None:
    groups, units, joints = _model()
    given_times = iter(numbers)
    pieces = {(name, (entry,)): next(given_times) for name in "ab" for entry in _NAMES}
    codes_or_not = [(a, b) for a in ("w8a8", "fp32") for b in ("w8a8", "fp32")]
    pieces |= {("ab", choice): next(given_times) for choice in codes_or_not}
    anchors = [(name, name) for name in _NAMES]
    times = Times(pieces, 0.05, dict(zip(anchors, totals, strict=True)))
    found = assemble(groups, units, joints, times, anchors)
    assert found.rows is not None
    values = [value for row in found.rows.values() for value in row.values()]
    values += [v for e in found.edges for row in e.costs.values() for v in row.values()]
    assert all(math.isfinite(value) and value >= 0 for value in [*values, found.fixed])


@given(
    st.lists(_TIMES, min_size=6, max_size=6),
    st.lists(_TIMES, min_size=3, max_size=3),
    st.floats(0, 5),
)
def test_plans_that_were_measured_cost_what_was_measured(
    numbers: list[float], totals: list[float], change: float
) -> None:
    values = iter(numbers)
    rows = {group: {name: next(values) for name in _NAMES} for group in "ab"}
    edge = Edge("a", "b", {a: {b: change * (a != b) for b in _NAMES} for a in _NAMES})
    # Longer than the edges and a small share of the groups, as whole models are.
    plans = [({"a": n, "b": n}, t + 1.0) for n, t in zip(_NAMES, totals, strict=True)]
    found, fixed = anchored(rows, [edge], plans)
    for plan, time in plans:
        assert fixed + sum(found[g][n] for g, n in plan.items()) == pytest.approx(time)


def test_a_plan_scales_only_what_no_plan_before_it_has() -> None:
    rows = {"a": {"w8a8": 2.0, "fp32": 6.0}, "b": {"w8": 1.0}}
    plans = [({"a": "fp32", "b": "w8"}, 9.0), ({"a": "w8a8", "b": "w8"}, 4.5)]
    found, fixed = anchored(rows, [], plans)
    assert fixed == 1.5
    assert found["b"]["w8"] == pytest.approx(7.5 / 7)
    assert found["a"]["fp32"] == pytest.approx(6 * 7.5 / 7)
    assert found["a"]["w8a8"] == pytest.approx(3 - 7.5 / 7)


def test_without_anchors_nothing_is_scaled() -> None:
    assert anchored({"a": {"w8a8": 2.0}}, [], []) == ({"a": {"w8a8": 2.0}}, 0.0)


def test_ranges_that_each_run_finds_are_of_real_numbers() -> None:
    found = {name: has_codes(Precision.parse(name)) for name in ("w8a8", "w8a8d", "w8", "fp32")}
    assert found == {"w8a8": True, "w8a8d": False, "w8": False, "fp32": False}
