from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer, require
from fxmpq.targets.inductor.compiled import CompiledGraph
from fxmpq.targets.inductor.kernels import Kernels, read_kernels
from fxmpq.targets.target import Converted

aten, onednn = torch.ops.aten, torch.ops.onednn


@pytest.fixture
def layer(planned: fx.GraphModule) -> Layer:
    return require(planned, stage="calibrated").groups[0].layers[0]


def test_kernels_of_a_compiled_graph_are_read(made: Converted) -> None:
    assert isinstance(made.module, CompiledGraph)
    assert made.module.kernels.found == {
        "stem.0": ["onednn.qconv_pointwise relu to uint8"],
        "conv1": ["onednn.qconv_pointwise relu to uint8"],
        "conv2": ["onednn.qconv_pointwise to uint8"],
        "downsample.0": ["onednn.qconv2d_pointwise sum relu to float32"],
    }


def test_a_layer_that_the_compiler_leaves_in_float_says_so(layer: Layer) -> None:
    kernel, reason = Kernels().of_quantized(layer, Precision(8, 8))
    assert kernel == "float"
    assert "no integer kernel" in reason


def test_an_embedding_that_is_not_found_is_a_constant(layer: Layer) -> None:
    kernel, reason = Kernels().of_quantized(replace(layer, kind="embedding"), Precision(8))
    assert kernel == "float32 constant"
    assert reason.startswith("it looks up rows that are fixed")


def test_fewer_bits_are_held_in_int8(layer: Layer) -> None:
    kernels = Kernels({layer.name: ["one", "other"]})
    assert kernels.of_quantized(layer, Precision(8, 8)) == ("one, other", "")
    kernel, reason = kernels.of_quantized(layer, Precision(2, 8))
    assert kernel == "one, other"
    assert reason.startswith("its 2-bit codes are held in int8")


def test_layers_are_known_by_the_constants_they_read() -> None:
    root = nn.Module()
    for name in ("x", "weight", "scales", "others", "zeros", "table"):
        root.register_buffer(name, torch.zeros(3))
    graph = fx.Graph(root)
    x, weight, scales, others, zeros, table = map(graph.get_attr, root._buffers)
    tail = (1.0, 0, torch.uint8, "gelu", [], "tanh")
    for found in (scales, others, scales, x.graph.call_function(aten.neg.default, (scales,))):
        operands = (x, 0.1, 3, weight, found, zeros, None)
        graph.call_function(onednn.qlinear_pointwise.default, (*operands, *tail))
    graph.call_function(aten.embedding.default, (table, x))
    graph.call_function(aten.embedding.default, (scales, x))
    root.table = root.table.to(torch.int8)
    graph.owning_module = root
    marks = {root.scales.data_ptr(): ["fc", "tied"], root.table.data_ptr(): ["table"]}
    text = "onednn.qlinear_pointwise gelu tanh to uint8"
    assert read_kernels(graph, marks).found == {
        "fc": [text],
        "tied": [text],
        # Its scales are looked up too; that is no kernel.
        "table": ["aten.embedding of int8 codes"],
    }
