from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge, FormatChange, Moment, plain_cost
from fxmpq.errors import FileFormatError, FxmpqError

NAMES = ("w2a8", "w4a8", "w8a8", "fp32")
number = st.integers(0, 10**12) | st.floats(0, 1e9)

# The cost of changing between codes and float.
CHANGE = {"w8a8": {"w8a8": 0, "fp32": 7}, "fp32": {"w8a8": 5, "fp32": 0}}
ROWS = {group: {"w8a8": 10, "fp32": 30} for group in ("a", "b", "c")}
EDGES = (Edge("a", "b", CHANGE), Edge("b", "c", CHANGE))
MOMENTS = (
    Moment("first", 1, {"a": {"w8a8": 4, "fp32": 16}}),
    Moment("second", 2, {"b": {"w8a8": 9, "fp32": 3}, "c": {"w8a8": 1, "fp32": 8}}),
)
TABLE = CostTable({"us": ROWS}, fixed={"us": 100}, edges={"us": EDGES}, moments={"peak": MOMENTS})


@st.composite
def tables(draw: st.DrawFn) -> CostTable:
    names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)
    groups = {f"g{index}": draw(names) for index in range(draw(st.integers(2, 4)))}
    pairs = list(itertools.permutations(groups, 2))

    def row(group: str) -> dict[str, Any]:
        return {name: draw(number) for name in groups[group]}

    edges = [
        Edge(left, right, {name: row(right) for name in groups[left]})
        for left, right in draw(st.lists(st.sampled_from(pairs), max_size=4))
    ]
    moments = [
        Moment(f"n{index}", draw(number), {group: row(group) for group in alive})
        for index, alive in enumerate(
            draw(st.lists(st.sets(st.sampled_from(list(groups))), min_size=1, max_size=3))
        )
    ]
    return CostTable(
        {"us": {group: row(group) for group in groups}},
        {"peak": draw(number)},
        {"us": draw(number)},
        edges={"us": edges},
        moments={"peak": moments},
    )


def every_choice(table: CostTable) -> list[dict[str, str]]:
    return [
        dict(zip(table.groups, names, strict=True))
        for names in itertools.product(*map(table.precisions, table.groups))
    ]


@given(tables())
def test_a_round_trip_through_json_changes_nothing(table: CostTable) -> None:
    back = CostTable.from_json(table.to_json())
    assert back == table
    for choices in every_choice(table)[:4]:
        for metric in table.metrics:
            total = table.total(metric, choices)
            assert back.total(metric, choices) == total
            assert type(back.total(metric, choices)) is type(total)


@given(tables())
def test_no_choice_is_outside_the_bounds(table: CostTable) -> None:
    choices = every_choice(table)
    for metric in table.metrics:
        totals = [table.total(metric, choice) for choice in choices]
        assert table.smallest(metric) <= min(totals) * (1 + 1e-12)
        assert max(totals) <= table.largest(metric) * (1 + 1e-12)
    # The largest of all moments is reached in every term at once.
    assert table.largest("peak") == max(table.total("peak", choice) for choice in choices)


@given(tables())
def test_totals_are_the_sums_that_they_are_defined_as(table: CostTable) -> None:
    for choices in every_choice(table):
        own = sum(table.cost("us", group, name) for group, name in choices.items())
        between = [change.cost for change in table.format_changes("us", choices)]
        assert between == sorted(between, reverse=True)
        expected = table.fixed["us"] + own + sum(between)
        assert table.total("us", choices) == pytest.approx(expected, rel=1e-12)
        alive = [
            moment.fixed + sum(row[choices[group]] for group, row in moment.rows.items())
            for moment in table.moments["peak"]
        ]
        assert table.total("peak", choices) == pytest.approx(max(alive), rel=1e-12)


def test_totals_by_hand() -> None:
    choices = {"a": "w8a8", "b": "fp32", "c": "W8A8"}
    assert TABLE.total("us", choices) == 100 + 10 + 30 + 10 + 7 + 5
    assert TABLE.format_changes("us", choices) == (
        FormatChange("a", "b", 7),
        FormatChange("b", "c", 5),
    )
    assert TABLE.format_changes("peak", choices) == ()
    assert TABLE.format_changes("us", TABLE.uniform("fp32")) == ()
    assert [moment.total(choices) for moment in MOMENTS] == [5, 2 + 3 + 1]
    assert TABLE.total("peak", choices) == 6
    assert (TABLE.smallest("us"), TABLE.largest("us")) == (130, 204)
    assert (TABLE.smallest("peak"), TABLE.largest("peak")) == (6, 19)


def test_metrics_are_sums_first_and_then_peaks() -> None:
    assert TABLE.metrics == ("us", "peak")
    assert TABLE.groups == ("a", "b", "c")


def test_edges_of_no_length_are_no_edges() -> None:
    table = CostTable({"us": ROWS}, edges={"us": ()})
    assert table.edges == {}
    assert table.separable("us") == ROWS


def test_what_is_no_sum_over_groups_is_refused_where_one_is_needed() -> None:
    with pytest.raises(FxmpqError, match=r"'us' is no sum over groups alone: 2 edges"):
        TABLE.separable("us")
    with pytest.raises(FxmpqError, match=r"'peak' is a peak, the largest of 2 moments"):
        TABLE.separable("peak")
    with pytest.raises(FxmpqError, match=r"'peak' is a peak"):
        TABLE.cost("peak", "a", "w8a8")
    with pytest.raises(FxmpqError, match=r"no cost 'peek'; there are .*'peak'"):
        TABLE.total("peek", TABLE.uniform("w8a8"))


def test_a_choice_that_no_moment_names_is_checked_too() -> None:
    table = CostTable({"us": ROWS}, moments={"peak": MOMENTS[:1]})
    with pytest.raises(FxmpqError, match="group 'c' has no w2a8"):
        table.total("peak", {"a": "w8a8", "b": "w8a8", "c": "w2a8"})
    with pytest.raises(FxmpqError, match="no precision for b, c"):
        table.total("peak", {"a": "w8a8"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": {"ms": EDGES}}, "edges are given for 'ms', which has no costs"),
        (
            {"edges": {"us": [Edge("a", "d", CHANGE)]}},
            "the edge 'a' to 'd' of 'us' at w8a8 names no group 'd'; closest",
        ),
        ({"edges": {"us": [Edge("d", "a", CHANGE)]}}, "'us' names no group 'd'; closest"),
        (
            {"edges": {"us": [Edge("a", "b", {"w8a8": CHANGE["w8a8"]})]}},
            "of 'us' must give a cost for every precision of 'a': w8a8, fp32; missing: fp32",
        ),
        (
            {"edges": {"us": [Edge("a", "b", CHANGE | {"w8a8": {"w8a8": 0}})]}},
            "at w8a8 must give a cost for every precision of 'b': w8a8, fp32; missing: fp32",
        ),
        (
            {"edges": {"us": [Edge("a", "b", CHANGE | {"w4a8": CHANGE["w8a8"]})]}},
            "missing: none, unknown: w4a8",
        ),
        ({"moments": {"us": MOMENTS}}, "'us' is both a sum of costs and a peak"),
        ({"moments": {"peak": ()}}, "'peak' has no moments"),
        (
            {"moments": {"peak": MOMENTS}, "fixed": {"peak": 3}},
            "fixed names 'peak', which is a peak; each of its moments",
        ),
        (
            {"moments": {"peak": [Moment("n", 0, {"d": {"w8a8": 1, "fp32": 4}})]}},
            "the moment 'n' of 'peak' names no group 'd'; closest",
        ),
        (
            {"moments": {"peak": [Moment("n", 0, {"a": {"w8a8": 1}})]}},
            "the moment 'n' of 'peak' must give a cost for every precision of 'a'",
        ),
        ({"float_total": {"peak": 3}}, "float_total names 'peak', which has no costs"),
    ],
)
def test_terms_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FxmpqError) as caught:
        CostTable({"us": ROWS}, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "3", None])
def test_numbers_that_are_no_costs_are_refused(value: Any) -> None:
    with pytest.raises(FxmpqError, match=r"the edge 'a' to 'b' at w8a8 to fp32 is"):
        Edge("a", "b", {"w8a8": {"fp32": value}})
    with pytest.raises(FxmpqError, match=r"the moment 'n' for 'a' at w8a8 is"):
        Moment("n", 0, {"a": {"w8a8": value}})
    with pytest.raises(FxmpqError, match=r"the fixed part of the moment 'n' is"):
        Moment("n", value, {})
    with pytest.raises(FxmpqError, match=r"my cost is .*; costs are finite"):
        plain_cost("my cost", value)


def test_an_edge_from_a_group_to_itself_is_refused() -> None:
    with pytest.raises(FxmpqError, match="from group 'a' to itself"):
        Edge("a", "a", CHANGE)


def test_precisions_are_read_however_they_are_written() -> None:
    assert Edge("a", "b", {"W8A8": {" fp32": 1}}).costs == {"w8a8": {"fp32": 1}}
    assert Moment("n", 0, {"a": {"W8A8": 1}}).rows == {"a": {"w8a8": 1}}
    assert EDGES[0].cost({"a": "W8A8", "b": "FP32"}) == 7


def test_a_file_without_terms_is_as_it_was() -> None:
    assert set(json.loads(CostTable({"us": ROWS}).to_json())) == {
        "schema",
        "version",
        "fingerprint",
        "float_total",
        "fixed",
        "costs",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": []}, "'edges' must be an object of lists by metric"),
        ({"moments": {"peak": {}}}, "'moments' of 'peak' must be a list of objects"),
        ({"moments": {"peak": [3]}}, "'moments' of 'peak' must be a list of objects"),
        ({"edges": {"us": [{"producer": "a"}]}}, "missing 2 required positional arguments"),
        (
            {"edges": {"us": [{"producer": "a", "reader": "a", "costs": {}}]}},
            "from group 'a' to itself",
        ),
        ({"edges": {"us": [{"producer": "a", "reader": "b", "costs": 3}]}}, "fxmpq.costs: "),
        ({"moments": {"peak": []}}, "'peak' has no moments"),
    ],
)
def test_files_with_other_terms_are_refused(changes: dict[str, Any], message: str) -> None:
    found = json.loads(CostTable({"us": ROWS}).to_json())
    with pytest.raises(FileFormatError) as caught:
        CostTable.from_json(json.dumps(found | changes))
    assert message in str(caught.value)
