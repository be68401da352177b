from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.calibration.observe import Observations
from fxmpq.errors import BatchError, CalibrationError, FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.trace import trace
from fxmpq.targets.reference import REFERENCE


@pytest.fixture(scope="module")
def prepared(conv_graph: fx.GraphModule) -> fx.GraphModule:
    return insert_quantizers(conv_graph, REFERENCE.rules)


def test_histograms_hold_what_the_layers_read(
    prepared: fx.GraphModule, conv_net: nn.Module, images: list[Tensor]
) -> None:
    seen: list[Tensor] = []
    handle = conv_net.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            for batch in images:
                conv_net(batch)
    finally:
        handle.remove()
    observations = Observations(prepared)
    observations.observe(images)
    (name,) = require(prepared, stage="prepared").group("fc").activation_quantizers
    histogram = observations.histograms[name]
    values = torch.cat(seen)
    assert float(histogram.counts.sum()) == values.numel()
    assert histogram.minimum == pytest.approx(float(values.min()), abs=1e-5)
    assert histogram.maximum == pytest.approx(float(values.max()), abs=1e-5)
    mean = float(histogram.counts @ histogram.centres) / values.numel()
    assert mean == pytest.approx(float(values.mean()), abs=1e-3)


def test_means_hold_the_sum_of_what_the_layers_read(
    prepared: fx.GraphModule, images: list[Tensor]
) -> None:
    observations = Observations(prepared)
    observations.observe(images)
    stem = require(prepared, stage="prepared").group("stem.0").layers[0]
    ((total, count),) = observations.means[stem.node].totals()
    assert count == 12
    assert torch.allclose(total, torch.cat(images).sum(0), atol=1e-4)
    assert len(observations.means) == 5


def test_an_embedding_has_no_mean(bert_graph: fx.GraphModule) -> None:
    observations = Observations(insert_quantizers(bert_graph, REFERENCE.rules))
    assert len(observations.means) == 2 * 6 + 2


def test_no_batches_is_an_error(prepared: fx.GraphModule) -> None:
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        Observations(prepared).observe([])


def test_an_unprepared_graph_is_an_error(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        Observations(conv_graph)


def test_a_batch_that_does_not_fit_is_an_error(prepared: fx.GraphModule) -> None:
    with pytest.raises(BatchError, match="must have shape"):
        Observations(prepared).observe([torch.ones(2, 3, 8, 8)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_input_is_named_with_its_batch(
    prepared: fx.GraphModule, images: list[Tensor], bad: float
) -> None:
    broken = images[1].clone()
    broken[3, 0, 5, 5] = bad
    with pytest.raises(
        CalibrationError,
        match="the model's input 'x', which layer 'stem.0' reads .* calibration batch 2; check",
    ):
        Observations(prepared).observe([images[0], broken])


def with_nan_in(graph: fx.GraphModule, weight: str) -> fx.GraphModule:
    broken = copy_graph(graph)
    owner, _, leaf = weight.rpartition(".")
    value = getattr(broken.get_submodule(owner), leaf).detach().clone()
    value.reshape(-1)[0] = float("nan")
    setattr(broken.get_submodule(owner), leaf, nn.Parameter(value))
    return broken


def test_a_bad_activation_names_what_made_it_and_who_reads_it(
    prepared: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(CalibrationError, match=r"the output of 'relu', which layer 'conv2' reads"):
        Observations(with_nan_in(prepared, "conv1.weight")).observe(images)


def test_a_bad_output_names_where_it_came_from(
    prepared: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(
        CalibrationError,
        match=r"the model's output holds NaN .* batch 1, first in its stored tensor 'fc.bias'",
    ):
        Observations(with_nan_in(prepared, "fc.bias")).observe(images)


class Overflows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        masked = torch.zeros(3).masked_fill(torch.tensor([True, False, False]), -torch.inf)
        return (self.fc(x) + masked).exp() * 1e38


def test_an_infinite_output_is_an_error_and_an_infinite_mask_is_not() -> None:
    model = Overflows()
    nn.init.zeros_(model.fc.weight)
    graph = insert_quantizers(trace(model, torch.ones(2, 3)), REFERENCE.rules)
    Observations(graph).observe([torch.ones(2, 3)])
    model.fc.bias.data.fill_(50.0)
    graph = insert_quantizers(trace(model, torch.ones(2, 3)), REFERENCE.rules)
    with pytest.raises(CalibrationError, match="the model's output holds NaN or infinite values"):
        Observations(graph).observe([torch.ones(2, 3)])


def test_weight_only_layers_are_named_by_the_output_check(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = insert_quantizers(conv_graph, REFERENCE.rules, candidates=[Precision(4)])
    broken = images[0].clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="first in the model's input 'x'"):
        Observations(graph).observe([broken])
    with pytest.raises(CalibrationError, match="first in its stored tensor 'conv1.weight'"):
        Observations(with_nan_in(graph, "conv1.weight")).observe(images)


def test_an_operator_that_makes_nan_is_named() -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.fc(x) * x) / x.sum(1, keepdim=True)

    graph = insert_quantizers(trace(Divides(), torch.ones(2, 3)), REFERENCE.rules)
    with pytest.raises(CalibrationError, match="batch 2, first in 'div'"):
        Observations(graph).observe([torch.ones(2, 3), torch.zeros(2, 3)])
