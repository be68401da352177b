from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, fx

from fxmpq.costs.cost import count
from fxmpq.formats import Precision
from fxmpq.graph.state import require
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
