from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.errors import FileFormatError, FxmpqError

PUBLISHED = Path(__file__).parents[1] / "data" / "published.json"
PRECISIONS = ["w2a8", "w3a8", "w4a8", "w8a8", "w4", "fp32"]
METRICS = ["weights", "bops", "latency"]
number = st.integers(0, 10**15) | st.floats(0, 1e12)


@st.composite
def tables(draw: st.DrawFn) -> CostTable:
    metrics = draw(st.lists(st.sampled_from(METRICS), min_size=1, unique=True))
    names = st.lists(st.sampled_from(PRECISIONS), min_size=1, max_size=3, unique=True)
    groups = draw(st.dictionaries(st.text(max_size=8), names, min_size=1, max_size=3))
    costs = {
        metric: {group: {name: draw(number) for name in row} for group, row in groups.items()}
        for metric in metrics
    }
    totals = st.dictionaries(st.sampled_from(metrics), number)
    return CostTable(costs, draw(totals), draw(totals), draw(st.none() | st.text(max_size=8)))


@given(tables())
def test_json_round_trip_is_exact_to_the_type(table: CostTable) -> None:
    back = CostTable.from_json(table.to_json())
    assert back == table
    for metric, rows in table.costs.items():
        for group, row in rows.items():
            for name, value in row.items():
                assert type(back.cost(metric, group, name)) is type(value)


@given(tables())
def test_smallest_and_largest_are_those_of_all_choices(table: CostTable) -> None:
    choices = [
        dict(zip(table.groups, names, strict=True))
        for names in itertools.product(*map(table.precisions, table.groups))
    ]
    for metric in table.metrics:
        totals = [table.total(metric, choice) for choice in choices]
        assert table.smallest(metric) == min(totals)
        assert table.largest(metric) == max(totals)


def test_totals_hold_what_is_in_no_group() -> None:
    table = CostTable(
        {"bops": {"a": {"w4a8": 1, "w8a8": 2}, "b": {"w8a8": 4}}}, fixed={"bops": 100}
    )
    assert table.total("bops", {"b": "w8a8", "a": "w4a8"}) == 105
    assert (table.smallest("bops"), table.largest("bops")) == (105, 106)


def test_integers_stay_exact_beyond_what_a_float_holds() -> None:
    large = 2**60 + 1
    table = CostTable({"bops": {"a": {"w8a8": large}, "b": {"w8a8": large}}})
    total = table.total("bops", {"a": "w8a8", "b": "w8a8"})
    assert total == 2**61 + 2
    assert isinstance(total, int)


def test_fractions_are_summed_without_rounding_on_the_way() -> None:
    table = CostTable({"latency": {str(index): {"w8a8": 0.1} for index in range(10)}})
    assert table.smallest("latency") == table.total("latency", table.uniform("w8a8")) == 1.0


def test_numbers_of_numpy_become_plain_ones() -> None:
    table = CostTable({"weights": {"a": {"w4a8": np.int64(3), "w8a8": np.float32(0.5)}}})
    assert json.loads(table.to_json())["costs"] == {"weights": {"a": {"w4a8": 3, "w8a8": 0.5}}}


def test_names_of_precisions_are_read_as_people_write_them() -> None:
    table = CostTable({"weights": {"a": {"W4A8": 1, " fp32 ": 8}}})
    assert table.precisions("a") == ("w4a8", "fp32")
    assert table.cost("weights", "a", "W4a8") == 1


@pytest.mark.parametrize(
    ("wanted", "candidates", "expected"),
    [
        ("w4a8", ["w2a8", "w4a8", "w8a8"], "w4a8"),
        ("w4a8", ["w8a8", "w4"], "w4"),
        ("w3a8", ["w2a8", "w8a8"], "w2a8"),
        ("w6a8", ["w2a8", "w8a8"], "w8a8"),
        ("w8a8", ["w2a8", "fp32"], "w2a8"),
        ("fp32", ["w2a8", "w8a8"], "w8a8"),
        ("w2a8", ["fp32"], "fp32"),
    ],
)
def test_uniform_takes_the_nearest_candidate(
    wanted: str, candidates: list[str], expected: str
) -> None:
    table = CostTable({"weights": {"a": dict.fromkeys(candidates, 1)}})
    assert table.uniform(wanted) == {"a": expected}


@pytest.mark.parametrize("label", ["3.0", "3.5", "4.0", "4.5", "5.0", "5.5"])
def test_the_published_sizes_of_resnet18(label: str) -> None:
    """Weights, two numbers a channel and batch norm, and the classifier's bias."""
    published = json.loads(PUBLISHED.read_text())["ompq_resnet18"]["bits"][label]
    scalars = [3 * 49 * 64 + 2 * 64]
    channels = 64
    for stage, wide in enumerate((64, 128, 256, 512)):
        for block in range(2):
            scalars.append(9 * channels * wide + 2 * wide)
            downsample = channels * wide + 2 * wide if stage and not block else 0
            scalars.append(9 * wide * wide + 2 * wide + downsample)
            channels = wide
    scalars.append(512 * 1000 + 1000)
    table = CostTable(
        {
            "weight_bits": {
                str(index): {f"w{bits}": bits * count for bits in (2, 3, 4)}
                for index, count in enumerate(scalars)
            }
        }
    )
    choices = {str(index): f"w{bits}" for index, bits in enumerate(published)}
    assert table.total("weight_bits", choices) / 8 / 2**20 == pytest.approx(float(label), abs=0.002)


def test_what_is_not_there_is_named_with_what_is() -> None:
    table = CostTable({"weights": {"conv1": {"w4a8": 1, "w8a8": 2}}})
    with pytest.raises(FxmpqError, match="no cost 'wieghts'; there are 'weights'"):
        table.smallest("wieghts")
    with pytest.raises(FxmpqError, match="no group 'conv'; closest: 'conv1'"):
        table.precisions("conv")
    with pytest.raises(FxmpqError, match="group 'conv1' has no w2a8; it has w4a8, w8a8"):
        table.total("weights", {"conv1": "w2a8"})
    with pytest.raises(FxmpqError, match="the choices name no precision for conv1"):
        table.total("weights", {"conv2": "w4a8"})


@pytest.mark.parametrize("costs", [{}, {"weights": {}}])
def test_an_empty_table_is_refused(costs: dict[str, dict[str, dict[str, float]]]) -> None:
    with pytest.raises(FxmpqError, match="at least one metric with one group"):
        CostTable(costs)


def test_a_group_without_precisions_is_refused() -> None:
    with pytest.raises(FxmpqError, match="group 'b' has no precision"):
        CostTable({"weights": {"a": {"w4a8": 1}, "b": {}}})


@pytest.mark.parametrize(
    "bops", [{"a": {"w4a8": 1}}, {"b": {"w4a8": 1, "w8a8": 1}}, {"a": {"w4a8": 1, "w2a8": 1}}]
)
def test_metrics_that_cover_different_entries_are_refused(bops: dict[str, dict[str, int]]) -> None:
    with pytest.raises(FxmpqError, match="'bops' and 'weights' do not cover the same"):
        CostTable({"weights": {"a": {"w4a8": 1, "w8a8": 2}}, "bops": bops})


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "3", None])
def test_a_cost_that_is_none_is_refused_by_name(value: Any) -> None:
    message = f"is {value!r}; costs are finite numbers and not negative"
    with pytest.raises(FxmpqError, match="the cost 'weights' of group 'a' at w4a8") as caught:
        CostTable({"weights": {"a": {"w4a8": value}}})
    assert message in str(caught.value)
    with pytest.raises(FxmpqError, match="float_total of 'weights'"):
        CostTable({"weights": {"a": {"w4a8": 1}}}, float_total={"weights": value})
    with pytest.raises(FxmpqError, match="fixed of 'weights'"):
        CostTable({"weights": {"a": {"w4a8": 1}}}, fixed={"weights": value})


def test_a_total_for_no_metric_is_refused() -> None:
    with pytest.raises(FxmpqError, match=r"float_total names 'weight'.*there are 'weights'"):
        CostTable({"weights": {"a": {"w4a8": 1}}}, float_total={"weight": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "fxmpq.plan"}, "expected the schema 'fxmpq.costs'; found 'fxmpq.plan'"),
        ({"version": 0}, "expected version 1 .* found 0"),
        ({"colour": 1}, r"unknown fields \['colour'\]"),
        ({"fixed": {"weights": math.nan}}, "NaN"),
        ({"costs": {"weights": {"a": {"w4a8": -1}}}}, "not negative"),
        ({"costs": {"weights": {"a": {"w4a8": "1"}}}}, "finite numbers"),
        ({"costs": {"weights": {"a": {"w5c8": 1}}}}, "cannot read the precision"),
        ({"costs": {"weights": 3}}, "fxmpq.costs: "),
        ({"costs": 3}, "fxmpq.costs: "),
        ({"fixed": 3}, "fxmpq.costs: "),
    ],
)
def test_a_file_that_holds_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    found = json.loads(CostTable({"weights": {"a": {"w4a8": 1}}}).to_json())
    with pytest.raises(FileFormatError, match=message):
        CostTable.from_json(json.dumps(found | changes))


def test_a_file_without_costs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"schema": "fxmpq.costs", "version": 1}')
    with pytest.raises(FileFormatError, match=r"missing fields \['costs'\]"):
        CostTable.from_json(path)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("w8a8", "a8"), ("w4a4", "a4"), ("w2a5", "a4"), ("w8a16", "a8"), ("w4", "fp32")],
)
def test_a_uniform_plan_takes_the_nearest_activations_of_products(wanted: str, found: str) -> None:
    table = CostTable({"bops": {"fc": {wanted: 1}, "scores": {"a4": 1, "a8": 4, "fp32": 9}}})
    assert table.uniform(wanted) == {"fc": wanted, "scores": found}
