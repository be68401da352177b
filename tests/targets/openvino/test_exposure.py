from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.qdq import active_quantizers, computed_by
from fxmpq.targets.target import Converted

Made = Callable[..., fx.GraphModule]


@pytest.fixture(scope="module")
def ready(calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]) -> fx.GraphModule:
    return calibrated(conv_graph, images, "openvino")


@pytest.fixture(scope="module")
def planned(ready: fx.GraphModule, uniform: Made) -> fx.GraphModule:
    return uniform(ready, 2)


@pytest.fixture(scope="module")
def made(planned: fx.GraphModule) -> Converted:
    return convert(planned, verify=False)


def test_quantized_tensors_belong_to_the_layer_before_them(planned: fx.GraphModule) -> None:
    found = computed_by(planned)
    first, *others = active_quantizers(planned)
    # Nothing computes what comes in.
    assert first not in found
    assert list(found) == others
    # Sums come after the later of their operands, and so does the mean of the last.
    layers = ["stem.0", "conv1", "conv2", "downsample.0", "downsample.0"]
    assert list(found.values()) == layers


def test_values_are_what_the_runtime_computed(
    made: Converted, planned: fx.GraphModule, images: list[Tensor]
) -> None:
    assert made.layer_values is not None
    *values, outputs = made.layer_values(images[0])
    assert (outputs.layer, outputs.node) == ("", "")
    assert [(entry.node, entry.layer) for entry in values] == list(computed_by(planned).items())
    for entry, found in zip(values, layer_agreements(planned, made, images[0]), strict=False):
        assert len(entry.value) == len(images[0])
        assert found.layer == entry.layer
        assert found.sqnr_db > 50
    # What it shows comes on top of what the model returns, which is as before.
    assert torch.allclose(made.run(images[0])[0], run_batch(planned, images[0])[0], atol=1e-3)


def test_the_layer_that_differs_is_found(
    made: Converted, ready: fx.GraphModule, planned: fx.GraphModule, images: list[Tensor]
) -> None:
    groups = require(planned, stage="calibrated").groups
    (group,) = [group.name for group in groups if "conv2" in [x.name for x in group.layers]]
    other = with_choices(ready, {**require(planned, stage="calibrated").choices, group: "w2a8"})
    agreements = layer_agreements(other, made, images[0])
    assert [entry.layer for entry in agreements if entry.sqnr_db < 35] == ["conv2"]


class Returned(nn.Module):
    """Returns what it also hands on, behind an activation that bounds on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.relu6(self.first(x))
        return y, self.second(y).mean((2, 3))


def test_what_the_model_returns_is_shown_too(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    graph = uniform(calibrated(trace(Returned(), x), [x], "openvino"), 4)
    # The runtime clamps codes between two quantizations wrongly, so these run as one kernel.
    assert [fusion.name for fusion in require(graph, stage="calibrated").fusions] == ["conv-relu6"]
    made = convert(graph, verify=False)
    assert made.layer_values is not None
    shown = made.layer_values(x)
    assert [entry.layer for entry in shown] == ["first", "second", "", ""]
    assert torch.equal(shown[2].value, made.run(x)[0])
    assert torch.equal(shown[0].value, made.run(x)[0])
    assert all(entry.sqnr_db > 50 for entry in layer_agreements(graph, made, x))
