from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from torch import fx, nn

from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.onnxruntime import convert as converter
from fxmpq.targets.onnxruntime.float_layers import keep_float_layers
from fxmpq.targets.target import Converted

Made = Callable[..., fx.GraphModule]


@pytest.fixture(scope="module")
def planned(calibrated: Made, uniform: Made) -> fx.GraphModule:
    """The second of three convolutions stays float, between the codes of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    x = torch.randn(4, 3, 12, 12)
    graph = calibrated(trace(model, x), [x], "onnxruntime", exclude=["2"])
    return uniform(graph, 2)


def kernels(made: Converted) -> dict[str, str]:
    return {row.layer: row.kernel for row in made.layers}


def test_a_float_layer_between_integer_ones_stays_float(planned: fx.GraphModule) -> None:
    made = convert(planned)
    assert kernels(made) == {"0": "QLinearConv", "2": "float Conv", "3": "QLinearConv"}
    batch = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    found = {entry.layer: entry.sqnr_db for entry in layer_agreements(planned, made, batch)}
    assert found["2"] > 60


def test_without_the_copy_the_runtime_quantizes_it_and_the_report_says_so(
    planned: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "keep_float_layers", lambda model: None)
    found = kernels(convert(planned, verify=False))
    assert found["2"] == "QLinearConv on weights that the runtime quantized"


def value(name: str, *, stored: bool = False) -> ir.Value:
    tensor = ir.tensor([1.0], name=name) if stored else None
    return ir.Value(name=name, const_value=tensor)


@pytest.mark.parametrize(
    ("operator", "domain", "is_stored", "is_dequantized", "copies"),
    [
        ("Conv", "", True, True, 1),
        ("Gemm", "", True, True, 1),
        ("Conv", "", False, True, 0),
        ("Conv", "", True, False, 0),
        ("MatMul", "", True, True, 0),
        ("Conv", "com.microsoft", True, True, 0),
    ],
)
def test_only_float_weights_on_codes_get_a_copy(
    operator: str, domain: str, *, is_stored: bool, is_dequantized: bool, copies: int
) -> None:
    x, weight = value("x"), value("w", stored=is_stored)
    before = ir.node("DequantizeLinear" if is_dequantized else "Neg", [x])
    layer = ir.node(operator, [before.outputs[0], weight], domain=domain)
    stored = [weight] if is_stored else []
    inputs = [x] if is_stored else [x, weight]
    graph = ir.Graph(inputs, layer.outputs, nodes=[before, layer], initializers=stored)
    keep_float_layers(ir.Model(graph, ir_version=10))
    assert [node.op_type for node in graph].count("Max") == copies
    source = layer.inputs[0]
    assert source is not None
    producer = source.producer()
    assert producer is not None
    assert (producer.op_type == "Max") == bool(copies)
