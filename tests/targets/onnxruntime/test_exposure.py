from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

from fxmpq.errors import TargetError
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.onnxruntime import convert as converter
from fxmpq.targets.onnxruntime.exposure import ExposedModel
from fxmpq.targets.onnxruntime.session import OnnxModel
from fxmpq.targets.onnxruntime.storage import narrow_codes

Made = Callable[..., fx.GraphModule]


def layer_names(graph: fx.GraphModule) -> set[str]:
    groups = require(graph, stage="calibrated").groups
    return {layer.name for group in groups for layer in group.layers}


@pytest.mark.parametrize("index", [0, 2])
def test_every_layer_is_seen_and_agrees_on_its_own_inputs(
    calibrated: Made,
    uniform: Made,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    bert_graph: fx.GraphModule,
    token_batches: list[Batch],
    index: int,
) -> None:
    for graph, batches in ((conv_graph, images), (bert_graph, token_batches)):
        planned = uniform(calibrated(graph, batches, "onnxruntime"), index)
        found = layer_agreements(planned, convert(planned), batches[1])
        assert {entry.layer for entry in found} == {*layer_names(planned), ""}
        assert min(entry.sqnr_db for entry in found) > 45


def test_the_file_and_its_outputs_stay_as_they_are(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images, "onnxruntime"))
    made = convert(planned)
    before = made.run(images[0])
    assert made.layer_values is not None
    last = next(entry for entry in made.layer_values(images[0]) if entry.layer == "fc")
    assert torch.equal(last.value, before[0])
    assert torch.equal(made.run(images[0])[0], before[0])
    assert isinstance(made.module, OnnxModel)
    assert len(made.module.session.get_outputs()) == 1


class Gated(nn.Module):
    """A float layer whose bias the runtime fuses with what follows, before one on integers."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.kept(x))).tanh()


def test_a_result_that_would_change_a_kernel_is_not_shown(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16)
    graph = calibrated(trace(Gated(), x), [x], "onnxruntime", exclude=["kept"])
    planned = uniform(graph, 2)
    made = convert(planned)
    assert isinstance(made.module, OnnxModel)
    assert "BiasGelu" in [node.op_type for node in made.module.executed.graph.node]
    assert made.layer_values is not None
    assert [entry.layer for entry in made.layer_values(x)] == ["last"]


def test_a_model_in_which_no_layer_is_found_shows_none(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    graph = uniform(calibrated(trace(nn.Linear(6, 2), x), [x], "onnxruntime"))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 6]) for name in "xy"]
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    other = helper.make_model(
        helper.make_graph(nodes, "graph", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    ).SerializeToString()
    assert ExposedModel(graph, other, OnnxModel(other), threads=1)(x) == []


Break = Callable[[ir.Model], None]


def scaled(name: str, factor: float) -> Break:
    """Multiplies a stored tensor."""

    def change(model: ir.Model) -> None:
        stored = model.graph.initializers[name]
        assert stored.const_value is not None
        stored.const_value = ir.tensor(stored.const_value.numpy() * np.float32(factor), name=name)

    return change


def broken(monkeypatch: pytest.MonkeyPatch, change: Break) -> None:
    """Has every model that is written from now on changed."""

    def narrow_wrongly(model: ir.Model) -> None:
        change(model)
        narrow_codes(model)

    monkeypatch.setattr(converter, "narrow_codes", narrow_wrongly)


@pytest.mark.parametrize(
    ("name", "factor", "layer", "before"),
    [
        ("scale_stem_0_weight", 0.5, "stem.0", "no layer comes before it"),
        ("scale_conv2_weight", 1.5, "conv2", "dB at 'conv1' just before it"),
        ("bias_fc_weight", -1.0, "fc", "dB at 'downsample.0' just before it"),
    ],
)
def test_a_wrong_number_in_the_file_is_found_at_its_layer(
    calibrated: Made,
    uniform: Made,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    factor: float,
    layer: str,
    before: str,
) -> None:
    planned = uniform(calibrated(conv_graph, images, "onnxruntime"), 1)
    broken(monkeypatch, scaled(name, factor))
    with pytest.raises(TargetError, match=f"Layer '{layer}' diverges first: ") as error:
        convert(planned, verify=images)
    assert before in str(error.value)


def test_a_wrong_number_in_a_transformer_is_found_at_its_layer(
    calibrated: Made,
    uniform: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = uniform(calibrated(bert_graph, token_batches, "onnxruntime"), 2)
    layer = "bert.encoder.layer.1.intermediate.dense"
    broken(monkeypatch, scaled(f"scale_{layer.replace('.', '_')}_weight", 0.8))
    with pytest.raises(TargetError, match=f"Layer '{layer}' diverges first: "):
        convert(planned)
    assert math.isnan(convert(planned, verify=False).sqnr_db)
