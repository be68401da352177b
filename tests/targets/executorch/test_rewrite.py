from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.run import run_batch
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import BiasCorrection
from fxmpq.targets.convert import convert
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.executorch import EXECUTORCH
from fxmpq.targets.executorch.rewrite import stored_names, to_xnnpack_form
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]
Samples = list[tuple[Tensor, Tensor]]
decomposed = torch.ops.quantized_decomposed
aten = torch.ops.aten


@pytest.fixture(scope="module")
def rewritten(net_plan: fx.GraphModule) -> fx.GraphModule:
    return to_xnnpack_form(net_plan, EXECUTORCH.rules)


def calls(graph: fx.GraphModule, target: object) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="call_function", target=target))


def test_it_computes_what_the_simulation_does(
    rewritten: fx.GraphModule, net_plan: fx.GraphModule, samples: Samples
) -> None:
    for one, other in zip(rewritten(*samples[0]), run_batch(net_plan, samples[0]), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_layers_stand_between_codes(rewritten: fx.GraphModule) -> None:
    layers = calls(rewritten, aten.conv2d.default) + calls(rewritten, aten.linear.default)
    assert len(layers) == 6
    for node in layers[:-1]:
        assert node.args[0].target is decomposed.dequantize_per_tensor.default
        assert node.args[1].target is decomposed.dequantize_per_channel.default
    (pool,) = calls(rewritten, aten.max_pool2d.default)
    (again,) = pool.users
    assert again.target is decomposed.quantize_per_tensor.default
    assert again.args[1:] == pool.args[0].args[1:]


def test_only_rows_of_even_numbers_of_codes_are_marked_as_4_bit(rewritten: fx.GraphModule) -> None:
    even, odd = (node.args[1] for node in calls(rewritten, aten.linear.default)[:2])
    assert even.args[4:6] == (-8, 7)
    assert odd.args[4:6] == (-128, 127)


def test_weights_are_known_by_their_names(
    rewritten: fx.GraphModule, net_plan: fx.GraphModule
) -> None:
    assert stored_names(net_plan, rewritten) == {
        "first": "codes_first_weight",
        "second": "codes_second_weight",
        "depthwise": "codes_depthwise_weight",
        "even": "codes_even_weight",
        "table": "packed_codes_table_weight",
        "odd": "codes_odd_weight",
        "kept": "kept.weight",
    }


class Chain(nn.Module):
    """Ends in channels of nearly dead weights, in front of a layer that may stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dead, self.last = (nn.Linear(4, 4) for _ in range(3))
        with torch.no_grad():
            self.first.weight[1] *= 1e-12
            self.first.weight[2] = 0.0
            self.first.bias.copy_(torch.tensor([0.3, 0.9, -0.7, 0.2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dead(self.first(x)))


def test_dead_channels_run_and_float_layers_read_codes(calibrated: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    candidates = [Precision.parse(name) for name in ("w8a8", "fp32")]
    graph = calibrated(trace(Chain(), x), [x], "executorch", candidates=candidates)
    plan = with_choices(graph, {"first": "w8a8", "dead": "w8a8", "last": "fp32"})
    form = to_xnnpack_form(plan, EXECUTORCH.rules)
    # A layer stores its result as its own precision says, whoever reads it.
    first, dead, last = calls(form, aten.linear.default)
    assert dead.args[1].target is decomposed.dequantize_per_channel.default
    assert last.args[0].target is decomposed.dequantize_per_tensor.default
    # Codes on the grid that they are on already are not made again.
    assert len(calls(form, decomposed.quantize_per_tensor.default)) == 3
    # The bias fits an int32 in units of the scales, and results are as they were.
    scales = get_tensor(form, first.args[1].args[1].target)
    units = get_tensor(form, first.args[2].target).abs() / (scales * first.args[0].args[1])
    assert float(units.max()) <= 2**30 * 1.001
    made = convert(plan, verify=False)
    assert agreement_db(list(run_batch(plan, x)), made.run(x)) > 35
    rows = {row.layer: (row.kernel, row.reason) for row in made.layers}
    assert rows["first"] == ("Fully Connected (NC, QS8, QC8W) GEMM", "")
    assert rows["dead"] == rows["first"]


class Shifted(nn.Module):
    """A convolution and a linear layer with biases that the input decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 4, 1, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.conv2d(x, self.conv.weight, x.sum((0, 1, 2))).mean((2, 3))
        return nn.functional.linear(y, self.linear.weight, x.sum((0, 1, 2))[:3])


def test_layers_without_an_integer_kernel_multiply_real_numbers(
    calibrated: Made, uniform: Made
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4)
    candidates = [Precision.parse("w8a8")]
    plan = uniform(calibrated(trace(Shifted(), x), [x], "executorch", candidates=candidates))
    form = to_xnnpack_form(plan, EXECUTORCH.rules)
    (conv,) = calls(form, aten.conv2d.default)
    (linear,) = calls(form, aten.linear.default)
    assert conv.args[1].op == "get_attr"
    assert get_tensor(form, conv.args[1].target).dtype is torch.float32
    # XNNPACK multiplies real numbers by codes in linear layers; the bias comes behind.
    assert linear.args[1].target is decomposed.dequantize_per_channel.default
    assert len(linear.args) == 2
    (sum_,) = linear.users
    assert sum_.target is aten.add.Tensor
    assert torch.allclose(form(x), run_batch(plan, x)[0], atol=1e-5)


class Rows(nn.Module):
    """Linear layers, normalisation between sums, and a layer of an odd number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
        self.d, self.e, self.f = nn.Linear(32, 33), nn.Linear(33, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.b(torch.relu(self.a(x))))
        return self.f(torch.relu(self.e(self.d(torch.tanh(self.c(x))))))


CHOICES = {"a": "w8a8dt", "b": "w8a8", "c": "w4b32a8dt", "d": "w4", "e": "w4a8dt", "f": "w8"}


@pytest.fixture(scope="module")
def mixed(calibrated: Made) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 64) + 0.5
    candidates = [Precision.parse(name) for name in dict.fromkeys(CHOICES.values())]
    graph = calibrated(trace(Rows().eval(), x), [x], "executorch", candidates=candidates)
    return with_choices(graph, CHOICES), x


def test_each_kind_of_range_has_its_form(mixed: tuple[fx.GraphModule, Tensor]) -> None:
    plan, x = mixed
    form = to_xnnpack_form(plan, EXECUTORCH.rules)
    # Torch finds ranges of rows in float64.
    assert agreement_db(list(run_batch(plan, x)), [form(x)]) > 35
    rows, real = decomposed.dequantize_per_token.default, decomposed.dequantize_per_tensor.default
    layers = calls(form, aten.linear.default)
    read = [node.args[0].target for node in layers]
    assert read == [rows, real, rows, aten.tanh.default, rows, aten.relu.default]
    # Behind weight-only layers the bias is added.
    assert [len(node.args) for node in layers] == [3, 3, 3, 2, 3, 2]
    blocks, channels = (
        getattr(decomposed, f"dequantize_per_channel{ending}").default for ending in ("_group", "")
    )
    assert [node.args[1].target is blocks for node in layers] == [False, False, True] + [False] * 3
    assert all(node.args[1].target in (blocks, channels) for node in layers)
    assert layers[4].args[1].args[4:6] == (-128, 127)
    shown = [node.meta["layer"] for node in form.graph.nodes if "layer" in node.meta]
    assert shown == [node.name for node in layers if node is not layers[1]]


def test_ranges_of_rows_and_weight_only_layers_run(mixed: tuple[fx.GraphModule, Tensor]) -> None:
    plan, x = mixed
    made = convert(plan, verify=[x])
    rows = {row.layer: row.kernel for row in made.layers}
    assert rows == {
        "a": "Fully Connected (NC, QDU8, F32, QC8W) GEMM",
        "b": "Fully Connected (NC, QS8, QC8W) GEMM",
        "c": "Fully Connected (NC, QDU8, F32, QB4W) GEMM",
        "d": "Fully Connected (NC, F32, QC4W) GEMM",
        "e": "Fully Connected (NC, QDU8, F32, QC8W) GEMM",
        "f": "Fully Connected (NC, F32, QC8W) GEMM",
    }
    reasons = [row.reason for row in made.layers if row.reason]
    assert reasons == ["stored in 8 bits: XNNPACK takes 4-bit weights of even numbers of inputs"]
    agreements = layer_agreements(plan, made, x)
    assert {entry.layer for entry in agreements} == {*CHOICES, ""}
    # Scales of blocks are stored in bfloat16.
    assert all(entry.sqnr_db > (50 if entry.layer == "c" else 60) for entry in agreements)


class Pruned(nn.Module):
    """Channels without weights, and a layer whose results are far finer than its sums."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 2)
        self.last = nn.Linear(3, 2)
        with torch.no_grad():
            self.second.weight[1] = 0.0
            self.second.bias[1] = 0.7
            self.last.weight[1] = 0.0
            self.last.bias[1] = 300.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("offset", [100.0, 1e6])
def test_channels_without_weights_keep_their_biases(
    calibrated: Made, uniform: Made, offset: float
) -> None:
    torch.manual_seed(0)
    net, x = Pruned().eval(), torch.randn(4, 1, 4, 4)
    with torch.no_grad():
        net.first.bias[0] = offset
        net.second.weight[:, 0] *= 1e-7
    candidates = [Precision.parse("w8a8")]
    plan = uniform(calibrated(trace(net, x), [x], "executorch", candidates=candidates))
    made = convert(plan, verify=[x])
    assert made.sqnr_db > 35
    kernels = {row.layer: row.kernel for row in made.layers}
    assert kernels["last"] == "Fully Connected (NC, QS8, QC8W) GEMM"
    # XNNPACK scales no sum by 256 or more.
    is_too_fine = offset > 1e4
    assert kernels["second"] == f"Convolution (NHWC, {'F32' if is_too_fine else 'QC8'}) IGEMM"
    assert all(row.sqnr_db > 35 for row in layer_agreements(plan, made, x))


def test_a_bias_that_nothing_corrects_is_read_without_gradients(
    calibrated: Made, uniform: Made
) -> None:
    x, candidates = torch.randn(4, 6), [Precision.parse("w8a8")]
    plan = uniform(calibrated(trace(nn.Linear(6, 4), x), [x], "executorch", candidates=candidates))
    for module in plan.modules():
        if isinstance(module, BiasCorrection):
            module.activate(None)
    to_xnnpack_form(plan, EXECUTORCH.rules)


class Signal(nn.Module):
    """Convolutions over one dimension, the middle ones in float, and a count of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kept = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3, padding=1)
        self.up, self.last = nn.ConvTranspose1d(4, 4, 3, stride=2), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.last(self.up(self.kept(self.first(x).relu())))
        return {"samples": x.shape[0], "y": y, "none": None}


def test_float_convolutions_over_one_dimension_stand_between_codes(
    calibrated: Made, uniform: Made
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12)
    graph = calibrated(trace(Signal().eval(), x), [x], "executorch", exclude=["kept"])
    plan = uniform(graph)
    made = convert(plan, verify=[x])
    assert made.sqnr_db > 40
    rows = {row.layer: row.kernel for row in made.layers}
    assert rows["first"] == "Convolution (NHWC, QC8) IGEMM"
    assert rows["kept"] == "Convolution (NHWC, F32) IGEMM"
    assert rows["up"].startswith("Deconvolution (NHWC, F32)")
    # What is no tensor is not returned, and does not keep a batch from being cut.
    more = x.repeat(5, 1, 1)
    (found,) = made.run(more)
    assert agreement_db([plan(more)["y"]], [found]) > 40
    assert all(entry.sqnr_db > 40 for entry in layer_agreements(plan, made, x))
