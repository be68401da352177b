from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor, fx, nn

from fxmpq.calibration.calibrate import calibrate
from fxmpq.errors import PrecisionError, TargetError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import state_of
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.steps import cost
from fxmpq.targets.convert import convert
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.target import Converted, agreement_db
from fxmpq.targets.tensorrt import TENSORRT, lint
from fxmpq.targets.tensorrt.convert import _check

Made = Callable[..., fx.GraphModule]
Batches = Sequence[Tensor] | Sequence[dict[str, Tensor]]


@pytest.fixture(scope="module")
def planned_for(calibrated: Made, in_turn: Made) -> Made:
    """Calibrates, and gives the groups their candidates in turn."""

    def make(graph: fx.GraphModule, batches: Batches, *candidates: str) -> fx.GraphModule:
        wanted = [Precision.parse(name) for name in candidates]
        return in_turn(calibrated(graph, batches, "tensorrt", candidates=wanted))

    return make


@pytest.fixture(scope="module")
def planned(planned_for: Made, conv_graph: fx.GraphModule, images: list[Tensor]) -> fx.GraphModule:
    """int8, E4M3 and float in turn."""
    return planned_for(conv_graph, images, "w8a8", "we4m3tae4m3", "fp32")


@pytest.fixture(scope="module")
def made(
    planned: fx.GraphModule, images: list[Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    return convert(planned, output=tmp_path_factory.mktemp("onnx"), verify=images)


class Blocks(nn.Module):
    """A linear layer on two samples' rows, one behind it, and an embedding, which stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 128)
        self.wide, self.narrow = nn.Linear(128, 64), nn.Linear(64, 5, bias=False)

    def forward(self, indices: Tensor) -> Tensor:
        return self.narrow(torch.nn.functional.gelu(self.wide(self.table(indices))))


@pytest.fixture(scope="module")
def blocks(planned_for: Made, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    torch.manual_seed(0)
    indices = torch.arange(24).reshape(4, 6)
    graph = planned_for(trace(Blocks().eval(), indices), [indices], "w4b64", "w8a8")
    plan = {"table": "fp32", "wide": "w4b64", "narrow": "w8a8"}
    return convert(with_choices(graph, plan), output=tmp_path_factory.mktemp("blocks"))


def test_a_mixed_plan_agrees_and_keeps_the_rules(made: Converted) -> None:
    assert made.sqnr_db > 100
    assert lint(made.files[0]) == ()
    model = onnx.load(made.files[0])
    assert {entry.domain for entry in model.opset_import} <= {"", "pkg.torch.onnx"} | {"ai.onnx"}
    assert {node.domain for node in model.graph.node} == {""}
    kinds = {onnx.TensorProto.DataType.Name(e.data_type) for e in model.graph.initializer}
    assert kinds == {"FLOAT", "INT8", "INT64", "FLOAT8E4M3FN"}


def test_the_report_says_what_is_written_and_that_it_was_not_run(
    made: Converted, planned: fx.GraphModule
) -> None:
    rows = {row.layer: row for row in made.layers}
    assert set(rows) == {layer.name for g in state_of(planned).groups for layer in g.layers}
    asked = {row.asked: row.kernel for row in rows.values()}
    assert asked["w8a8"].endswith("of int8 and int8: written for TensorRT, not run on it")
    assert asked["we4m3tae4m3"].endswith("of e4m3 and e4m3: written for TensorRT, not run on it")
    assert asked["fp32"] == "float"
    assert not [row.reason for row in rows.values() if row.asked != "fp32" and row.reason]


def test_layers_are_told_apart(
    made: Converted, planned: fx.GraphModule, images: list[Tensor]
) -> None:
    found = layer_agreements(planned, made, images[1])
    assert {entry.layer for entry in found} == {row.layer for row in made.layers} | {""}
    assert min(entry.sqnr_db for entry in found) > 100


def test_weights_of_four_bits_are_packed_in_blocks_along_the_input(blocks: Converted) -> None:
    assert blocks.sqnr_db > 100
    assert lint(blocks.files[0]) == ()
    model = onnx.load(blocks.files[0])
    stored = {entry.name: entry for entry in model.graph.initializer}
    packed = stored["codes_4bit_wide_weight"]
    assert (packed.data_type, tuple(packed.dims)) == (onnx.TensorProto.INT4, (128, 64))
    assert len(packed.raw_data) == 128 * 64 // 2
    assert tuple(stored["scale_wide_weight"].dims) == (2, 64)
    (node,) = (node for node in model.graph.node if packed.name in node.input)
    assert {e.name: e.i for e in node.attribute} == {"axis": 0, "block_size": 64}
    assert not model.graph.value_info
    rows = {row.layer: row for row in blocks.layers}
    assert rows["wide"].kernel.startswith("linear of float and int4 in blocks of 64: ")
    assert "no quantized embedding" in rows["table"].reason


def test_onnxs_own_evaluator_computes_the_same(blocks: Converted) -> None:
    """In numpy, and for another batch size."""
    indices = torch.arange(12).reshape(2, 6)
    (value,) = blocks.run(indices)
    evaluator = onnx.reference.ReferenceEvaluator(str(blocks.files[0]))
    (expected,) = evaluator.run(None, {evaluator.input_names[0]: indices.numpy()})
    assert np.allclose(expected, value.numpy(), atol=1e-4)


@pytest.mark.parametrize("precision", ["w8a8", "we4m3tae4m3", "w4b128"])
def test_a_file_is_as_large_as_the_plan_says(
    planned_for: Made, precision: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 512)
    graph = trace(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)), x)
    planned = planned_for(graph, [x], precision)
    predicted = cost(planned).total("weights", state_of(planned).choices)
    found = convert(planned, output=tmp_path)
    assert found.files[0].stat().st_size == pytest.approx(predicted, rel=0.03)
    assert found.sqnr_db > 100
    if precision == "w8a8":
        # With its fusions, ONNX Runtime computes it on integers.
        session = onnxruntime.InferenceSession(found.files[0])
        (fused,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert agreement_db(found.run(x), [torch.from_numpy(fused)]) > 60


def test_products_of_two_activations_are_quantized_too() -> None:
    class Similarity(nn.Module):
        """The first value is read three times, so it is dequantized three times."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.fc(x) @ x.transpose(1, 2)).softmax(-1)

    torch.manual_seed(0)
    x = torch.randn(3, 8, 8)
    wanted = [Precision.parse("w8a8")]
    graph = trace(Similarity().eval(), x)
    graph = insert_quantizers(graph, TENSORRT.rules, candidates=wanted, products=True)
    graph = calibrate(graph, [x], progress=False)
    choices = {group.name: str(group.candidates[0]) for group in state_of(graph).groups}
    found = convert(with_choices(graph, choices))
    assert found.sqnr_db > 100
    kernels = [row.kernel for row in found.layers if row.asked == "a8"]
    assert kernels == ["matmul of int8 and int8: written for TensorRT, not run on it"] * 2


def test_blocks_that_are_not_whole_are_refused_before_calibration() -> None:
    graph = trace(nn.Linear(96, 4), torch.randn(2, 96))
    words = r"runs on layer .* has 96 weights a channel, no whole number of blocks of w4b64"
    with pytest.raises(PrecisionError, match=words):
        insert_quantizers(graph, TENSORRT.rules, candidates=[Precision.parse("w4b64")])


def test_layers_that_no_candidate_runs_on_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 4))
    candidates = [Precision.parse(name) for name in ("w4b64", "fp32")]
    graph = trace(model.eval(), torch.randn(2, 3, 6, 6))
    graph = insert_quantizers(graph, TENSORRT.rules, candidates=candidates, keep={"3": Precision()})
    assert [(entry.name, entry.reason) for entry in state_of(graph).left_float] == [
        ("0", "of the candidates only fp32 runs on it"),
        ("3", "kept in float by the user"),
    ]


@pytest.mark.parametrize("name", ["w4a8", "w4", "w8", "w8b64", "w4b32", "w4b64a8", "we4m3ae4m3"])
def test_what_the_rules_do_not_hold_is_refused(name: str) -> None:
    with pytest.raises(PrecisionError, match=f"target 'tensorrt' cannot run {name}; it runs conv"):
        TENSORRT.rules.check([Precision.parse(name)])


def test_a_model_that_breaks_rules_is_refused() -> None:
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["y"], name=f"relu {index}", domain="ours")
        for index in range(7)
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    with pytest.raises(TargetError, match="relu 3 breaks 'standard operators' .*; and 3 more"):
        _check(model)


class Reader(CalibrationDataReader):
    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self.left = [{name: batch.numpy()} for batch in batches]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def test_files_for_onnx_runtime_break_rules(
    images: list[Tensor], conv_net: nn.Module, tmp_path: Path
) -> None:
    """Its own quantizer's: unsigned codes, zero points and integer biases."""
    file, quantized = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    torch.onnx.export(conv_net, (images[0],), file, dynamo=True, opset_version=21, verbose=False)
    name = onnx.load(file).graph.input[0].name
    quantize_static(file, quantized, Reader(name, images), activation_type=QuantType.QUInt8)
    assert lint(file) == ()
    assert {found.rule for found in lint(quantized)} >= {
        "quantized types",
        "no zero points",
        "float bias",
    }
