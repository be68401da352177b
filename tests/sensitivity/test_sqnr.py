from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torchmetrics import Metric

from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import switch_group
from fxmpq.graph.trace import trace
from fxmpq.journal import Journal
from fxmpq.sensitivity.sqnr import sqnr
from fxmpq.work import Work

Calibrated = Callable[..., fx.GraphModule]


def naive(graph: fx.GraphModule, batches: list[object]) -> dict[str, dict[str, float]]:
    """The sweep by definition: a whole pass per (group, precision)."""
    graph = copy_graph(graph)

    def outputs() -> Tensor:
        found = [
            leaf.double().flatten()
            for batch in batches
            for leaf in run_batch(graph, batch)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        return torch.cat(found)

    exact = outputs()
    values: dict[str, dict[str, float]] = {}
    for group in require(graph, stage="calibrated").groups:
        for candidate in group.candidates:
            switch_group(graph, group, candidate)
            noise = (outputs() - exact).square().sum() / exact.square().sum()
            values.setdefault(group.name, {})[str(candidate)] = float(noise)
        switch_group(graph, group, Precision())
    return values


def assert_equals_naive(graph: fx.GraphModule, batches: list[object]) -> None:
    expected, found = naive(graph, batches), sqnr(graph, batches)
    assert found.method == "sqnr"
    assert found.projections is None
    assert found.fingerprint == require(graph, stage="calibrated").fingerprint
    assert list(found.values) == list(expected)
    for group, row in expected.items():
        assert found.values[group] == pytest.approx(row, rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_a_residual_network(
    calibrated: Calibrated, conv_graph: fx.GraphModule, images: list[Tensor], target: str
) -> None:
    assert_equals_naive(calibrated(conv_graph, images, target), images)


def test_bert_with_masks_and_two_lengths(
    calibrated: Calibrated, bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    graph = calibrated(
        bert_graph, token_batches, candidates=[Precision(2, 8), Precision(4, 4), Precision(8, 8)]
    )
    assert_equals_naive(graph, token_batches)


class Two(nn.Module):
    """Two outputs, one of which skips most layers, and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.first(self.first(x).relu())
        logits = self.second(hidden.relu())
        return logits, hidden, logits.argmax(-1)


def test_several_outputs_and_a_layer_called_twice(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 6), torch.randn(3, 6)]
    graph = calibrated(trace(Two(), batches[0]), batches)
    assert_equals_naive(graph, batches)


def test_excluded_groups_have_no_noise_and_the_graph_is_left_switched_off(
    calibrated: Calibrated, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, exclude=["conv1"])
    found = sqnr(graph, images)
    assert found.values["conv1"] == {"fp32": 0.0}
    assert all(value > 0 for name in ("fc", "conv2") for value in found.values[name].values())
    assert torch.equal(run_batch(graph, images[0])[0], run_batch(conv_graph, images[0])[0])


def test_an_uncalibrated_graph_is_an_error(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        sqnr(conv_graph, images)


class Base(nn.Module):
    """A group whose name is that of a unit of work might be."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x).relu())


class Weighted(Metric):
    """Takes a mapping as its target."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, target: dict[str, Tensor]) -> None:
        self.total += (outputs * target["weights"]).sum()

    def compute(self) -> Tensor:
        return self.total


def test_a_metric_is_recorded_for_groups_of_any_name(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    """The unchanged model's value is no group's, and nested targets reach the metric."""
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    graph = calibrated(trace(Base(), x), [x], candidates=[Precision(2, 8), Precision(8, 8)])
    batches = [(x, {"weights": torch.randn(6, 3)})]
    expected = sqnr(graph, batches, score=Weighted())
    for _ in range(2):
        work = Work(journal=Journal(tmp_path / "journal", {}))
        assert sqnr(graph, batches, score=Weighted(), work=work).values == expected.values
    assert len(Journal(tmp_path / "journal", {}).done) == 3
