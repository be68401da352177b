"""Graphs that sizes and times are found on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.costs.measurable import calibrated_on_example, with_float
from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.graph.switch import with_choices
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer

# One value that rules other than the extremes clip.
X = torch.linspace(0, 0.1, 128).reshape(2, 64)
X[1, 3] = 4.0


@pytest.fixture
def prepared() -> fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    graph = fxmpq.trace(model, X)
    return fxmpq.prepare(graph, "reference", candidates=["w4a8", "w8a8"], keep={"2": "fp32"})


def test_ranges_are_those_of_the_example(prepared: fx.GraphModule) -> None:
    before = state_of(prepared)
    graph = calibrated_on_example(prepared)
    assert state_of(graph).calibrated
    assert state_of(prepared) is before
    assert not before.calibrated
    layer = state_of(graph).groups[0].layers[0]
    weight = graph.get_submodule(str(layer.weight_quantizer))
    assert isinstance(weight, WeightQuantizer)
    rows = prepared.get_parameter("0.weight")
    unclipped = torch.maximum(rows.amax(1) / 127, rows.amin(1) / -128)
    torch.testing.assert_close(weight.scale(NumberFormat(8)).flatten(), unclipped)
    (activation,) = (m for m in graph.modules() if isinstance(m, ActivationQuantizer))
    (found,) = activation.ranges.values()
    assert found.scale == pytest.approx(4 / 255)


def test_biases_are_made_where_they_are_asked_for(prepared: fx.GraphModule) -> None:
    def shift(graph: fx.GraphModule) -> Tensor | None:
        name = state_of(graph).groups[0].layers[0].bias_correction
        found = graph.get_submodule(str(name))
        assert isinstance(found, BiasCorrection)
        return found.shift(NumberFormat(4))

    assert shift(calibrated_on_example(prepared)) is None
    made = shift(calibrated_on_example(prepared, bias_correction=True))
    assert made is not None
    assert made.shape == (4,)


def test_every_group_may_be_float_once(prepared: fx.GraphModule) -> None:
    calibrated = calibrated_on_example(prepared)
    before = state_of(calibrated)
    graph = with_float(with_float(calibrated))
    assert state_of(calibrated) is before
    assert [[str(entry) for entry in group.candidates] for group in state_of(graph).groups] == [
        ["w4a8", "w8a8", "fp32"],
        ["fp32"],
    ]
    planned = with_choices(graph, {"0": "fp32", "2": "fp32"})
    (found,), (expected,) = run_batch(planned, X), run_batch(prepared, X)
    assert torch.equal(found, expected)
    with pytest.raises(FxmpqError, match="fp32"):
        with_choices(calibrated, {"0": "fp32", "2": "fp32"})
