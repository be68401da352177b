from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.trace import trace
from fxmpq.targets.cuda.shape_rules import ProductShape
from fxmpq.targets.cuda.weighted import WeightedLayer, Window, has_computed_bias, read_layer
from fxmpq.targets.lowering import lower
from fxmpq.targets.qdq import layers_of

Made = Callable[..., fx.GraphModule]
W4A8, E4M3 = Precision.parse("w4a8"), Precision.parse("we4m3ae4m3")


def read(planned: fx.GraphModule) -> dict[str, WeightedLayer]:
    lowered = lower(planned)
    nodes = {node.name: node for node in lowered.graph.nodes}
    found = {
        layer.name: read_layer(lowered, nodes[layer.node], layer, precision)
        for layer, precision in layers_of(planned)
    }
    return {name: entry for name, entry in found.items() if entry is not None}


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(2, 4, 3, bias=False)
        self.odd = nn.Conv2d(4, 4, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2)
        self.same = nn.Conv1d(4, 4, 4, dilation=3, padding="same")
        self.valid = nn.Conv1d(4, 3, 1, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        return self.valid(self.same(self.odd(self.plain(x)).flatten(2)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_windows_are_read_from_calls(calibrated: Made, uniform: Made) -> None:
    x = torch.randn(2, 2, 8, 9, generator=torch.Generator().manual_seed(0))
    graph = calibrated(trace(Windows(), x), [x], "cuda", candidates=[W4A8])
    found = read(uniform(graph))
    windows = {name: entry.window for name, entry in found.items()}
    assert windows == {
        "plain": Window((3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1),
        # The last dimension comes first.
        "odd": Window((3, 2), (1, 2), (0, 0, 1, 1), (2, 1), 2),
        # Of 9, the larger half lies behind.
        "same": Window((4,), (1,), (4, 5), (3,), 1),
        "valid": Window((1,), (1,), (0, 0), (1,), 1),
    }
    assert found["plain"].shape == ProductShape(18, 4, 1, 9)
    assert found["odd"].shape == ProductShape(12, 4, 2, 6)
    assert found["valid"].shape == ProductShape(4, 3, 1, 1)
    assert not any(has_computed_bias(entry.node) for entry in found.values())


def test_codes_scales_and_biases_are_those_of_the_plan(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, "cuda", candidates=[W4A8, E4M3])
    linear = read(uniform(graph))["fc"]
    assert (linear.window, linear.block, linear.codes.dtype) == (None, None, torch.int8)
    assert linear.codes.shape == linear.rows.shape == (5, 16)
    assert linear.codes.min() >= -8
    assert linear.codes.max() <= 7
    assert linear.scale.shape == (5,)
    assert linear.bias is not None
    assert linear.dtype is torch.float32
    # Bit patterns of floats are bytes.
    assert read(uniform(graph, 1))["fc"].codes.dtype is torch.uint8


def test_float_layers_are_none(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, "cuda", candidates=[W4A8], exclude=["conv*"])
    assert set(read(uniform(graph))) == {"stem.0", "downsample.0", "fc"}


def test_a_bias_may_be_computed() -> None:
    graph = fx.Graph()
    x, weight, bias = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    linear = torch.ops.aten.linear.default
    assert has_computed_bias(graph.call_function(linear, (x, weight, bias)))
    assert not has_computed_bias(graph.call_function(linear, (x, weight)))
    assert not has_computed_bias(graph.call_function(linear, (x, weight, None)))
    stored = graph.create_node("get_attr", "bias")
    assert not has_computed_bias(graph.call_function(linear, (x, weight, stored)))
