from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.formats import Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.onnxruntime.rewrite import _units_that_hold, to_integer_operators
from fxmpq.targets.onnxruntime.session import OnnxModel
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]


def rewritten(graph: fx.GraphModule) -> fx.GraphModule:
    return to_integer_operators(graph, ONNXRUNTIME.rules)


def operators(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if "fxmpq" in str(node.target)]


def agreement(graph: fx.GraphModule, batch: object) -> float:
    expected, found = run_batch(graph, batch), run_batch(rewritten(graph), batch)
    return agreement_db(
        [leaf for leaf in expected if isinstance(leaf, Tensor)],
        [leaf for leaf in found if isinstance(leaf, Tensor)],
    )


@pytest.fixture(scope="module")
def planned(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return uniform(calibrated(conv_graph, images, "onnxruntime"), 1)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_integer_operators_compute_what_the_simulation_does(
    calibrated: Made,
    uniform: Made,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
    index: int,
) -> None:
    convs = uniform(calibrated(conv_graph, images, "onnxruntime"), index)
    bert = uniform(calibrated(bert_graph, token_batches, "onnxruntime"), index)
    assert agreement(convs, images[1]) > 35
    assert agreement(bert, token_batches[1]) > 60


def test_no_module_is_left_and_codes_are_integers(planned: fx.GraphModule) -> None:
    graph = rewritten(planned)
    assert not any(node.op == "call_module" for node in graph.graph.nodes)
    tensors = graph.state_dict()
    codes = {name: tensor for name, tensor in tensors.items() if name.startswith("codes_4bit")}
    assert len(codes) == 5
    for name, tensor in codes.items():
        assert tensor.dtype is torch.int8
        # A convolution's are multiples of 8, so that its bias has finer units.
        factor = 1 if "fc" in name else 8
        assert name.startswith("codes_4bit_" if factor == 1 else "codes_4bit8_")
        assert not (tensor % factor).any()
        assert -8 * factor <= int(tensor.min()) <= int(tensor.max()) <= 7 * factor
    # What is left in float are scales and biases, which the runtime rounds when it loads them.
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    biases = [tensor for name, tensor in floats.items() if not name.startswith("scale_")]
    assert len(biases) == 5
    assert all(tensor.dim() == 1 for tensor in biases)


def test_quantizations_are_repeated_behind_pooling(planned: fx.GraphModule) -> None:
    graph = rewritten(planned)
    (pool,) = [n for n in graph.graph.nodes if n.target is torch.ops.aten.max_pool2d.default]
    before, (after,) = pool.args[0], pool.users
    assert "dequantize" in str(before.target)
    assert "quantize" in str(after.target)
    assert after.args[1:] == before.args[1:]


def test_the_planned_graph_is_left_alone(planned: fx.GraphModule, images: list[Tensor]) -> None:
    before, names = run_batch(planned, images[0])[0], set(planned.state_dict())
    rewritten(planned)
    assert torch.equal(run_batch(planned, images[0])[0], before)
    assert set(planned.state_dict()) == names


def test_excluded_layers_stay_as_they_are(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = rewritten(uniform(calibrated(conv_graph, images, "onnxruntime", exclude=["fc"])))
    assert "fxmpq.integer_linear.default" not in operators(graph)
    assert torch.equal(get_tensor(graph, "fc.weight"), get_tensor(conv_graph, "fc.weight"))


@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-38, 1e-20, 1e-6])
def test_nearly_dead_channels_keep_their_bias(
    calibrated: Made, uniform: Made, magnitude: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight[1] *= magnitude
        model[0].bias[1] = 0.537
    x = torch.randn(4, 3, 8, 8)
    graph = uniform(calibrated(trace(model, x), [x], "onnxruntime"), 2)
    assert agreement(graph, x) > 45
    made = convert(graph, verify=[x])
    assert made.sqnr_db > 45
    assert [row.kernel for row in made.layers] == ["QLinearConv"] * 2
    # The runtime's own rounding of biases stays within its accumulator.
    assert isinstance(made.module, OnnxModel)
    stored = made.module.executed.graph.initializer
    codes = [numpy_helper.to_array(e) for e in stored if e.data_type == onnx.TensorProto.INT32]
    assert sorted(len(entry) for entry in codes) == [2, 4]
    assert max(int(np.abs(entry.astype(np.int64)).max()) for entry in codes) <= 2**30 + 128


@given(
    st.sampled_from([2, 4, 8]),
    st.lists(st.floats(-50, 50), min_size=4, max_size=4),
    st.lists(st.floats(-12, 2), min_size=4, max_size=4),
    st.floats(1e-3, 1.0),
)
def test_units_hold_the_bias_and_are_as_fine_as_they_can(
    bits: int, bias: list[float], exponents: list[float], input_scale: float
) -> None:
    scale, biases = torch.tensor(10.0) ** torch.tensor(exponents), torch.tensor(bias)
    codes = torch.tensor([[0, 0], [1, -2], [1, 1], [-1, 0]])
    finest = 2 ** (7 - bits) if bits < 8 else 1
    factor, coarse = _units_that_hold(biases, codes, scale, input_scale, finest)
    assert factor in {2**power for power in range(6)}
    units = biases.double() / (coarse.double() / factor * input_scale)
    assert float(units.abs().max()) <= 2**30 * (1 + 1e-6)
    live = coarse[1:] >= scale[1:] * (1 - 1e-6)
    assert bool(live.all())
    if factor < finest:
        # A factor twice as large would not hold the bias at these scales.
        held = 2 * factor * biases.double().abs() / (input_scale * 2**30)
        assert bool((held[1:] > scale[1:].double() * (1 - 1e-6)).any())


@pytest.mark.parametrize("input_scale", [1e-6, 0.01, 1.0, 1e6])
def test_units_are_never_lost_in_float32(input_scale: float) -> None:
    codes, scale = torch.tensor([[0], [1], [1]]), torch.tensor([0.0, 1e-45, 1e-38])
    factor, coarse = _units_that_hold(torch.zeros(3), codes, scale, input_scale, 32)
    units = (coarse / factor) * torch.tensor(input_scale)
    assert bool((units >= torch.finfo(torch.float32).tiny).all())


class ComputedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
        self.kernel, self.offset = nn.Parameter(torch.randn(2, 1, 3)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.weight, self.bias * x.mean())
        return functional.conv1d(x.unsqueeze(1), self.kernel, self.offset * x.std(), padding=1)


class SharedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(self.fc(x).relu() * 5).unsqueeze(1)
        return self.conv(self.conv(x) * 3)


class TiedTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (ComputedBias, torch.randn(6, 4)),
        (SharedLayer, torch.randn(6, 4)),
        (TiedTable, torch.arange(8).reshape(2, 4)),
    ],
)
def test_unusual_layers(
    calibrated: Made, uniform: Made, model: type[nn.Module], batch: Tensor
) -> None:
    torch.manual_seed(0)
    graph = uniform(calibrated(trace(model(), batch), [batch], "onnxruntime"), 2)
    assert agreement(graph, batch) > 40


@pytest.fixture(scope="module")
def pooled() -> fx.GraphModule:
    """Two linear layers on one tensor, one of them behind a pooling that moves codes."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 4), nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.other(functional.max_pool2d(x, (1, 2)))

    torch.manual_seed(0)
    return trace(Pooled(), torch.randn(2, 3, 5, 8))


def test_a_range_is_found_once_for_all_that_read_it(
    calibrated: Made, uniform: Made, pooled: fx.GraphModule
) -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    candidates = [Precision.parse("w8a8d")]
    planned = uniform(calibrated(pooled, [x], "onnxruntime", candidates=candidates))
    graph = rewritten(planned)
    found = [name.split(".")[1] for name in operators(graph)]
    assert sorted(found) == ["dynamic_linear", "dynamic_linear", "dynamic_quantize"]
    (pool,) = [n for n in graph.graph.nodes if n.target is torch.ops.aten.max_pool2d.default]
    assert pool.args[0].args[1] == 0
    assert agreement(planned, x) > 100
    converted = convert(planned)
    assert converted.sqnr_db is None or converted.sqnr_db > 100
    wanted = run_batch(planned, x * 3)
    for one, other in zip(converted.run(x * 3), wanted, strict=True):
        assert isinstance(other, Tensor)
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_only_convolutions_are_stored_in_codes_and_run_in_float(
    calibrated: Made,
    uniform: Made,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    tmp_path: Path,
    bits: int,
) -> None:
    candidates = [Precision(bits)]
    planned = uniform(calibrated(conv_graph, images, "onnxruntime", candidates=candidates))
    made = convert(planned, output=tmp_path, verify=images)
    assert made.sqnr_db > 100
    *convolutions, linear = made.layers
    assert {row.kernel for row in convolutions} <= {"float Conv", "float FusedConv"}
    reason = f"no integer kernel: stored in {bits} bits, float when the file is loaded"
    assert {row.reason for row in convolutions} == {reason}
    assert linear.kernel == "MatMulNBits"
    assert isinstance(made.module, OnnxModel)
    executed = {node.op_type for node in made.module.executed.graph.node}
    assert executed.isdisjoint({"DequantizeLinear", "Cast", "Mul", "QuantizeLinear"})
    # One stored tensor of codes a convolution, and no float copy of its weights.
    stored = {entry.name: entry for entry in onnx.load(made.files[0]).graph.initializer}
    for row in convolutions:
        name = row.layer.replace(".", "_")
        assert f"codes_{bits}bit_{name}_weight" in stored
        assert f"{name}_weight" not in stored


@pytest.mark.parametrize("first", [0, 1])
def test_weight_only_convolutions_go_between_integer_ones(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor], first: int
) -> None:
    candidates = [Precision(4), Precision(8, 8)]
    graph = calibrated(conv_graph, images, "onnxruntime", candidates=candidates)
    groups = require(graph, stage="calibrated").groups
    choices = {
        group.name: str(candidates[(index + first) % 2]) for index, group in enumerate(groups)
    }
    made = convert(with_choices(graph, choices), verify=images)
    assert made.sqnr_db > 60
    assert "QLinearConv" in {row.kernel for row in made.layers}
    assert "float Conv" in {row.kernel for row in made.layers}
