"""Further costs by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxmpq
from fxmpq.costs.cost import count
from fxmpq.costs.further import (
    FURTHER,
    FurtherMetric,
    Subject,
    check_further,
    further_metrics,
    units_of,
    with_further,
)
from fxmpq.costs.latency.runtime import Runtime
from fxmpq.costs.parts import MetricParts
from fxmpq.costs.terms import Edge, Moment
from fxmpq.errors import FxmpqError
from fxmpq.targets.reference import REFERENCE

_NAMES = ("w4a8", "w8a8")
_EDGE = Edge("0", "1", {a: {b: 2 * (a != b) for b in _NAMES} for a in _NAMES})
_SUM = MetricParts({g: {"w4a8": 3, "w8a8": 5} for g in "01"}, 1, 20, edges=(_EDGE,))
_PEAK = MetricParts(moments=(Moment("n", 2, {"0": {"w4a8": 3, "w8a8": 5}}),), float_total=9)


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Subject:
    """Two layers, and two further metrics of theirs."""
    table = {
        "sum": FurtherMetric(lambda _: _SUM, "ms"),
        "peak": FurtherMetric(lambda _: _PEAK, "B"),
    }
    monkeypatch.setattr("fxmpq.costs.further.FURTHER", {**FURTHER, **table})
    graph = fxmpq.trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(2, 2))
    prepared = fxmpq.prepare(graph, REFERENCE, candidates=_NAMES)
    return Subject(prepared, REFERENCE.rules, REFERENCE.convert)


def test_sums_and_peaks_are_added(subject: Subject) -> None:
    before = count(subject.graph)
    table = with_further(before, ["sum", "peak"], subject)
    assert table.metrics == (*before.metrics, "sum", "peak")
    assert table.total("sum", {"0": "w4a8", "1": "w8a8"}) == 1 + 3 + 5 + 2
    assert table.total("peak", {"0": "w4a8", "1": "w8a8"}) == 5
    assert (table.float_total["sum"], table.float_total["peak"]) == (20, 9)
    assert "peak" not in table.fixed
    assert table.fingerprint == before.fingerprint


def test_what_the_table_has_is_left_as_it_is(subject: Subject) -> None:
    table = with_further(count(subject.graph), ["sum"], subject)
    assert with_further(table, ["sum"], subject) == table


def test_nothing_asked_for_adds_nothing(subject: Subject) -> None:
    table = count(subject.graph)
    assert with_further(table, [], subject) == table


def test_names_are_read() -> None:
    assert further_metrics(None) == ()
    assert further_metrics(["latency", "latency"]) == ("latency",)
    with pytest.raises(FxmpqError, match="no further cost 'latenzy'.*latency"):
        further_metrics("latenzy")


def test_a_targets_own_metric_of_the_same_name_has_an_unknown_unit() -> None:
    metrics = ["weights", "energy", "latency", "cycles"]
    assert units_of(metrics, own=()) == {"energy": "pJ", "latency": "ms"}
    assert units_of(metrics, own=["cycles", "energy"]) == {"latency": "ms"}


def test_where_nothing_runs_nothing_is_measured() -> None:
    with pytest.raises(FxmpqError, match="latency cannot be measured for target 'npu'.*read_costs"):
        check_further(["latency"], "npu", None)
    check_further(["latency"], "cpu", Runtime("cpu", lambda graph: print, ()))
    check_further([], "npu", None)
