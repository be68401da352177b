from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC

from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import switch_group
from fxmpq.graph.trace import trace
from fxmpq.journal import Journal
from fxmpq.sensitivity.layer_loss import layer_loss
from fxmpq.work import Work

from .conftest import cross_entropy, four_layers, labelled_batches

Calibrated = Callable[..., fx.GraphModule]
Rows = dict[str, dict[str, float]]
WIDEST = {"0": "w8a8", "2": "w8a8", "4": "fp32", "6": "w8a8"}
MIXED = {"0": "w4a8", "2": "w8a8", "4": "fp32", "6": "w2a8"}


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    return labelled_batches()


@pytest.fixture(scope="module")
def graph(calibrated: Calibrated, batches: list[tuple[Tensor, Tensor]]) -> fx.GraphModule:
    inputs = [x for x, _ in batches]
    return calibrated(trace(four_layers(), inputs[0]), inputs, exclude=["4"])


def rises(
    graph: fx.GraphModule, base: dict[str, str], score: Callable[[fx.GraphModule], float]
) -> Rows:
    """The increase over the base by definition, each graph switched as a whole."""
    graph = copy_graph(graph)
    groups = require(graph, stage="calibrated").groups
    for group in groups:
        switch_group(graph, group, Precision.parse(base[group.name]))
    with torch.no_grad():
        start = score(graph)
        found: Rows = {}
        for group in groups:
            for candidate in group.candidates:
                switch_group(graph, group, candidate)
                found.setdefault(group.name, {})[str(candidate)] = score(graph) - start
            switch_group(graph, group, Precision.parse(base[group.name]))
    return found


def floored(rows: Rows, base: dict[str, str], floor: float) -> Rows:
    return {
        group: {
            name: 0.0 if base[group] == name else max(value, floor) for name, value in row.items()
        }
        for group, row in rows.items()
    }


Score = tuple[Any, Callable[[fx.GraphModule], float]]


@pytest.fixture(params=["kl", "noise", "loss", "metric"])
def score(
    request: pytest.FixtureRequest, graph: fx.GraphModule, batches: list[tuple[Tensor, Tensor]]
) -> Score:
    """What to ask for, and the score of a whole graph by definition."""
    x, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    exact = graph(x).detach().double()

    def divergence(graph: fx.GraphModule) -> float:
        found = graph(x).double().log_softmax(-1)
        target = exact.log_softmax(-1)
        return float(functional.kl_div(found, target, reduction="batchmean", log_target=True))

    def noise(graph: fx.GraphModule) -> float:
        return float((graph(x).double() - exact).square().sum() / exact.square().sum())

    def loss(graph: fx.GraphModule) -> float:
        return float(functional.cross_entropy(graph(x).double(), labels))

    def worse(graph: fx.GraphModule) -> float:
        metric = MulticlassAUROC(3)
        metric.update(graph(x), labels)
        return -float(metric.compute())

    return {
        "kl": ("kl", divergence),
        "noise": ("noise", noise),
        "loss": (cross_entropy, loss),
        "metric": (MulticlassAUROC(3), worse),
    }[request.param]


def data(asked: object, batches: list[tuple[Tensor, Tensor]]) -> list[object]:
    return [x for x, _ in batches] if isinstance(asked, str) else list(batches)


@pytest.mark.parametrize("base", [None, MIXED, {"0": "W4A8", "6": "w2a8"}])
def test_it_equals_the_naive_sweep_around_the_base(
    graph: fx.GraphModule,
    batches: list[tuple[Tensor, Tensor]],
    score: Score,
    base: dict[str, str] | None,
) -> None:
    asked, by_definition = score
    around = WIDEST if base is None else MIXED
    expected = floored(rises(graph, around, by_definition), around, 1e-6)
    found = layer_loss(graph, data(asked, batches), score=asked, base=base)
    assert found.method == "layer_loss"
    assert found.unit == "loss"  # of noise too, as the base adds some that is in no value
    assert found.projections is None
    assert found.fingerprint == require(graph, stage="calibrated").fingerprint
    assert list(found.values) == list(expected)
    for group, row in expected.items():
        # Metrics compute in single precision.
        slack = 1e-6 if isinstance(asked, Metric) else 1e-9
        assert found.values[group] == pytest.approx(row, rel=1e-5, abs=slack)
    assert found.values["4"] == {"fp32": 0.0}


@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.5])
def test_nothing_but_the_base_lies_below_the_floor(
    graph: fx.GraphModule, batches: list[tuple[Tensor, Tensor]], floor: float
) -> None:
    found = layer_loss(graph, batches, score=cross_entropy, base=MIXED, floor=floor)
    for group, row in found.values.items():
        assert row[MIXED[group]] == 0.0
        assert all(value >= floor for name, value in row.items() if name != MIXED[group])
    lifted = layer_loss(graph, batches, score=cross_entropy, base=MIXED, floor=1.0)
    assert lifted.values["0"]["w2a8"] == 1.0


def test_bad_requests_are_errors(
    graph: fx.GraphModule, batches: list[tuple[Tensor, Tensor]]
) -> None:
    inputs = [x for x, _ in batches]
    for floor in (-1e-9, float("nan"), float("inf")):
        with pytest.raises(FxmpqError, match="the floor of an increase is 0 or more"):
            layer_loss(graph, inputs, floor=floor)
    with pytest.raises(FxmpqError, match="no group '3'"):
        layer_loss(graph, inputs, base={"3": "w8a8"})
    with pytest.raises(FxmpqError, match="has no candidate w16a16"):
        layer_loss(graph, inputs, base={"0": "w16a16"})
    with pytest.raises(FxmpqError, match="no score 'cross-entropy'"):
        layer_loss(graph, inputs, score="cross-entropy")
    with pytest.raises(CalibrationError, match="is empty"):
        layer_loss(graph, [])


@pytest.mark.parametrize("finished", [0, 2, 5])
def test_an_interrupted_run_goes_on_bit_for_bit(
    graph: fx.GraphModule, batches: list[tuple[Tensor, Tensor]], tmp_path: Path, finished: int
) -> None:
    inputs = [x for x, _ in batches]
    expected = layer_loss(graph, inputs)
    path = tmp_path / "journal"
    layer_loss(graph, inputs, work=Work(journal=Journal(path, {})))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 1 + finished]))
    resumed = layer_loss(graph, inputs, work=Work(journal=Journal(path, {})))
    assert resumed.values == expected.values
    assert path.read_text().splitlines(keepends=True) == lines
