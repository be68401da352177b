from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.costs.cost import count
from fxmpq.formats import Precision
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert

Made = Callable[..., fx.GraphModule]


@pytest.mark.parametrize(
    ("target", "name"),
    [("onnxruntime", "w2a8"), ("onnxruntime", "w4"), ("tensorrt", "w8a8"), ("tensorrt", "fp32")],
)
def test_parts_add_up_to_the_file_and_weights_are_what_the_plan_says(
    calibrated: Made,
    uniform: Made,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    tmp_path: Path,
    target: str,
    name: str,
) -> None:
    candidates = [Precision.parse(name)]
    graph = uniform(calibrated(conv_graph, images, target, candidates=candidates))
    made = convert(graph, output=tmp_path, verify=False)
    parts = made.parts
    assert parts is not None
    assert parts.weights + parts.parameters + parts.graph == made.files[0].stat().st_size
    predicted = count(graph).total("weights", require(graph, stage="calibrated").choices)
    assert parts.weights == predicted
    layers = [layer for group in require(graph, stage="prepared").groups for layer in group.layers]
    assert parts.parameters == sum(4 * layer.weight_shape[0] for layer in layers)
    assert 0 < parts.graph < 8_000
    assert convert(graph, verify=False).parts == parts


def test_layers_left_in_float_are_weights_too(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    left = uniform(calibrated(conv_graph, images, "onnxruntime", exclude=["fc", "conv1"]))
    parts = convert(left, verify=False).parts
    predicted = count(left).total("weights", require(left, stage="calibrated").choices)
    assert parts is not None
    assert parts.weights == predicted


class Tables(nn.Module):
    """Holds integers, and numbers whose names begin as those of stored weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4, bias=False)
        self.scale_all = nn.Parameter(torch.rand(4))
        self.codes_of = nn.Parameter(torch.rand(2, 4))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.codes_of[(x[:, 0] > 0).long()]
        return (self.fc(x) * self.scale_all + rows)[:, self.order]


def test_other_tensors_are_parameters_whatever_their_names(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    graph = uniform(calibrated(trace(Tables(), x), [x], "tensorrt"))
    parts = convert(graph, verify=[x]).parts
    assert parts is not None
    predicted = count(graph).total("weights", require(graph, stage="calibrated").choices)
    assert parts.weights == predicted
    # The layer got a bias, which corrects for its weights' rounding.
    assert parts.parameters == 4 * (4 + 8 + 4) + 8 * 4
