"""Latency costs, on a machine whose times are known."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import fxmpq
from fxmpq.costs.latency.cost import latency_cost
from fxmpq.costs.measurable import calibrated_on_example
from fxmpq.costs.parts import MetricParts
from fxmpq.costs.table import CostTable
from fxmpq.graph.state import state_of
from fxmpq.graph.switch import with_choices
from fxmpq.targets.onnxruntime import ONNXRUNTIME

from .conftest import CALL, CODES_LAYER, CONVERSION, FLOAT_LAYER, Machine, time_of

RULES = ONNXRUNTIME.rules


@dataclass(frozen=True)
class Measured:
    """What was found of the chain, in which folder, and what it took."""

    parts: MetricParts
    cache: Path
    loaded: list[tuple[str, ...]]

    @property
    def table(self) -> CostTable:
        assert self.parts.rows is not None
        return CostTable(
            {"latency": self.parts.rows},
            fixed={"latency": self.parts.fixed},
            edges={"latency": self.parts.edges},
        )


@pytest.fixture(scope="module")
def measured(prepared: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The chain's costs, measured once."""
    machine, cache = Machine(), tmp_path_factory.mktemp("measured")
    before = state_of(prepared), prepared.code
    weights = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXMPQ_CACHE", str(cache))
        parts = latency_cost(prepared, RULES, machine.runtime, clock=machine.clock)
    # The graph is left as it was.
    assert (state_of(prepared), prepared.code) == before
    after = prepared.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    return Measured(parts, cache, machine.loaded)


def test_every_mixed_plan_is_predicted(prepared: fx.GraphModule, measured: Measured) -> None:
    calibrated = calibrated_on_example(prepared)
    table = measured.table
    for names in product(["w8a8", "fp32"], repeat=3):
        choices = dict(zip(table.groups, names, strict=True))
        expected = 1000 * time_of(with_choices(calibrated, choices))
        # A layer next to one that falls back to float finds its neighbour's codes as they were.
        assert table.total("latency", choices) == pytest.approx(expected, rel=0.06)


def test_uniform_plans_cost_what_was_measured(measured: Measured) -> None:
    table = measured.table
    in_float = CALL + 3 * FLOAT_LAYER
    in_codes = CALL + 3 * CODES_LAYER + 2 * CONVERSION
    assert measured.parts.float_total == pytest.approx(1000 * in_float)
    for name, seconds in (("fp32", in_float), ("w8a8", in_codes)):
        found = table.total("latency", table.uniform(name))
        assert found == pytest.approx(1000 * seconds)


def test_an_edge_costs_what_falls_back_to_float(measured: Measured) -> None:
    found = {(edge.producer, edge.reader): edge.costs for edge in measured.parts.edges}
    assert set(found) == {("0", "2"), ("2", "4")}
    for row in found.values():
        assert row["w8a8"]["w8a8"] == row["fp32"]["fp32"] == 0
        assert row["w8a8"]["fp32"] >= 1000 * (FLOAT_LAYER - CODES_LAYER)
        assert row["fp32"]["w8a8"] == pytest.approx(1000 * CONVERSION)


def test_layers_of_equal_shape_are_measured_once(measured: Measured) -> None:
    sizes = [len(choices) for choices in measured.loaded]
    # Two layers at two precisions and the tiny one; two pairs at four; the model at two.
    assert (sizes.count(1), sizes.count(2), sizes.count(3)) == (5, 8, 2)


def test_nothing_is_measured_twice(
    prepared: fx.GraphModule, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXMPQ_CACHE", str(measured.cache))
    again = Machine()
    parts = latency_cost(prepared, RULES, again.runtime, clock=again.clock)
    assert (parts, again.loaded) == (measured.parts, [])
    for file in sorted((measured.cache / "latency").iterdir())[:1]:
        file.write_text("{")
    parts = latency_cost(prepared, RULES, again.runtime, clock=again.clock)
    assert (parts, len(again.loaded)) == (measured.parts, 1)


def test_where_no_group_may_be_float_only_codes_are_measured(machine: Machine) -> None:
    graph = fxmpq.trace(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)), _images())
    graph = fxmpq.prepare(graph, ONNXRUNTIME, candidates=["w4a8", "w8a8"])
    parts = latency_cost(graph, RULES, machine.runtime, clock=machine.clock)
    assert parts.rows is not None
    assert parts.edges == ()
    # In float only the tiny layer and the whole model.
    assert [names for names in machine.loaded if "fp32" in names] == [("fp32", "fp32"), ("fp32",)]
    assert parts.rows["0"]["w4a8"] == pytest.approx(parts.rows["0"]["w8a8"])


def test_an_edge_leads_to_weights_alone_in_low_bits_too(machine: Machine) -> None:
    graph = fxmpq.trace(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)), _images())
    graph = fxmpq.prepare(graph, ONNXRUNTIME, candidates=["w8", "w8a8"])
    parts = latency_cost(graph, RULES, machine.runtime, clock=machine.clock)
    (edge,) = parts.edges
    assert edge.costs["w8a8"]["w8"] > 0
    assert edge.costs["w8a8"]["w8a8"] == edge.costs["w8"]["w8"] == 0


def _images() -> torch.Tensor:
    return torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
