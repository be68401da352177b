from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import TargetError
from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.onnxruntime.session import OnnxModel
from fxmpq.targets.target import Converted

Made = Callable[..., fx.GraphModule]
Check = Callable[[Converted, fx.GraphModule, float], None]


@pytest.fixture(scope="module")
def planned(
    calibrated: Made, in_turn: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return in_turn(calibrated(conv_graph, images, "onnxruntime"))


@pytest.fixture(scope="module")
def made(
    planned: fx.GraphModule, images: list[Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    return convert(planned, output=tmp_path_factory.mktemp("onnx"), verify=images)


@pytest.fixture(scope="module")
def planned_bert(
    in_turn: Made,
    calibrated: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> fx.GraphModule:
    return in_turn(calibrated(bert_graph, token_batches, "onnxruntime"))


@pytest.fixture(scope="module")
def made_bert(
    planned_bert: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Converted:
    return convert(planned_bert, output=tmp_path_factory.mktemp("bert"), verify=token_batches)


def widened(bits: int) -> str:
    return f"stored in {bits} bits, widened to 8 when the file is loaded"


def executed(made: Converted) -> list[str]:
    assert isinstance(made.module, OnnxModel)
    return [node.op_type for node in made.module.executed.graph.node]


def test_the_file_is_valid_and_stands_alone(made: Converted, images: list[Tensor]) -> None:
    (file,) = made.files
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert not any(node.metadata_props for node in model.graph.node)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    for batch in (images[0], images[1][:1]):
        (found,) = session.run(None, {entry.name: batch.numpy()})
        np.testing.assert_array_equal(found, made.run(batch)[0].numpy())


def test_the_runtime_agrees_with_the_simulation(made: Converted) -> None:
    assert made.sqnr_db > 35


def test_any_batch_size_runs(
    made: Converted, planned: fx.GraphModule, check_batch_sizes: Check
) -> None:
    check_batch_sizes(made, planned, 30)


def test_the_residual_network_stays_in_integers(made: Converted) -> None:
    operators = executed(made)
    assert operators.count("QLinearConv") == 4
    assert operators.count("QLinearAdd") == 1
    assert operators.count("MatMulIntegerToFloat") == 1
    assert "Conv" not in operators
    # One quantization of the input, and one of the pooled features, which are a float mean.
    assert operators.count("QuantizeLinear") == 2
    assert operators.count("DequantizeLinear") == 1


def test_every_layer_is_reported(made: Converted) -> None:
    assert [(row.layer, row.asked, row.kernel, row.reason) for row in made.layers] == [
        ("stem.0", "w2a8", "QLinearConv", widened(2)),
        ("conv1", "w4a8", "QLinearConv", widened(4)),
        ("downsample.0", "w4a8", "QLinearConv", widened(4)),
        ("conv2", "w8a8", "QLinearConv", ""),
        ("fc", "w2a8", "MatMulIntegerToFloat", widened(2)),
    ]


def test_bert_runs_on_integer_kernels_with_masks_and_lengths(
    made_bert: Converted, planned_bert: fx.GraphModule, check_masks_and_lengths: Check
) -> None:
    assert made_bert.sqnr_db > 35
    operators = executed(made_bert)
    assert operators.count("MatMulIntegerToFloat") == 2 * 6 + 2
    check_masks_and_lengths(made_bert, planned_bert, 30)


def test_tables_are_looked_up_in_codes(made_bert: Converted) -> None:
    rows = {row.layer: row for row in made_bert.layers}
    table = rows["bert.embeddings.word_embeddings"]
    assert (table.asked, table.kernel, table.reason) == ("w2", "Gather", widened(2))
    floats = [row for row in made_bert.layers if row.kernel == "float"]
    assert len(floats) == 2
    assert all("fused attention" in row.reason for row in floats)


@pytest.fixture(scope="module")
def wide() -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 200)
    return trace(nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 4)), x), x


def test_fewer_bits_make_a_smaller_file(
    calibrated: Made, uniform: Made, wide: tuple[fx.GraphModule, Tensor], tmp_path: Path
) -> None:
    graph, x = wide
    ready = calibrated(graph, [x], "onnxruntime")
    sizes = [
        convert(uniform(ready, index), output=tmp_path / str(index)).files[0].stat().st_size
        for index in range(3)
    ]
    weights = 200 * 200 + 200 * 4
    assert sizes[2] - sizes[1] == pytest.approx(weights * 4 / 8, abs=1500)
    assert sizes[1] - sizes[0] == pytest.approx(weights * 2 / 8, abs=1500)
    assert sizes[0] < weights * 4 / 8


def test_options_unused_inputs_and_integer_outputs(check_options: Callable[[str], None]) -> None:
    check_options("onnxruntime")


class Branches(nn.Module):
    """What runtimes meet between convolutions: concatenation, gates, a float layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.upsample = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), self.right(x)], 1)
        x = nn.functional.relu6(self.depthwise(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.last(self.upsample(x)).mean((2, 3))


def test_branches_gates_and_a_layer_the_user_keeps(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    graph = calibrated(trace(Branches().eval(), x), [x], "onnxruntime", exclude=["gate"])
    made = convert(uniform(graph, 2))
    assert made.sqnr_db > 35
    rows = {row.layer: row for row in made.layers}
    for name in ("left", "right", "depthwise", "last"):
        assert rows[name].kernel == "QLinearConv"
    assert (rows["gate"].kernel, rows["gate"].reason) == ("float Conv", "kept in float by the user")
    assert (rows["upsample"].asked, rows["upsample"].kernel) == ("w8", "float ConvTranspose")
    expected = "no integer kernel: stored in 8 bits, float when the file is loaded"
    assert rows["upsample"].reason == expected
    assert "DequantizeLinear" not in {
        node.op_type for node in made.module.executed.graph.node if "upsample" in str(node.input)
    }
    assert "QLinearConcat" in executed(made)


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_other_ranks(
    convolutions_of_rank: Callable[[int, str], Converted], rank: int
) -> None:
    made = convolutions_of_rank(rank, "onnxruntime")
    assert made.sqnr_db > 35
    assert executed(made).count("QLinearConv") == 2


def test_candidates_that_a_layer_cannot_run_are_refused_before_conversion(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(ValueError, match="no candidate among w4b16 runs on layer 'stem.0'"):
        calibrated(conv_graph, images, "onnxruntime", candidates=[Precision.parse("w4b16")])


def test_a_float_plan_runs_in_float(all_in_float: Callable[[str], Converted]) -> None:
    made = all_in_float("onnxruntime")
    assert made.sqnr_db > 100
    assert not any("Quantize" in name or "QLinear" in name for name in executed(made))


def test_the_planned_graph_is_left_alone(
    made: Converted, planned: fx.GraphModule, images: list[Tensor]
) -> None:
    names = set(planned.state_dict())
    assert not any(name.startswith(("codes_", "bias_codes", "quantizers.codes")) for name in names)
    assert {node.op for node in planned.graph.nodes} >= {"call_module", "get_attr"}
    assert len(made.run(images[0])) == 1


class Bessel(nn.Linear):
    """Computes what ONNX has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().forward(x))


def test_an_operator_without_a_translation_is_named(calibrated: Made, uniform: Made) -> None:
    x = torch.randn(4, 8)
    planned = uniform(calibrated(trace(Bessel(8, 4), x), [x], "onnxruntime"))
    with pytest.raises(TargetError, match=r"cannot write this model: .*node %bessel_j0.*No ONNX"):
        convert(planned)


def test_linear_layers_run_on_ranges_found_at_run_time(
    in_turn: Made,
    calibrated: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    candidates = [Precision.parse(name) for name in ("w4a8d", "w8a8d")]
    planned = in_turn(calibrated(bert_graph, token_batches, "onnxruntime", candidates=candidates))
    made = convert(planned, verify=token_batches)
    assert made.sqnr_db > 35
    operators = executed(made)
    # Query, key and value read what is quantized once; a sole reader quantizes by itself.
    assert operators.count("DynamicQuantizeLinear") == 2
    assert operators.count("MatMulIntegerToFloat") == 2 * 3
    assert operators.count("DynamicQuantizeMatMul") == 2 * 3 + 2
    kernels = {row.kernel for row in made.layers if "a8d" in row.asked}
    assert kernels == {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    batch = {name: tensor[:1, :5] for name, tensor in token_batches[0].items()}
    (found,), (expected,) = made.run(batch), run_batch(planned, batch)
    assert isinstance(expected, Tensor)
    assert torch.allclose(found, expected, rtol=0.02, atol=0.02)
