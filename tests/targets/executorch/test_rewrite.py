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


def test_dead_channels_and_float_results_run(calibrated: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    candidates = [Precision.parse(name) for name in ("w8a8", "fp32")]
    graph = calibrated(trace(Chain(), x), [x], "executorch", candidates=candidates)
    plan = with_choices(graph, {"first": "w8a8", "dead": "w8a8", "last": "fp32"})
    form = to_xnnpack_form(plan, EXECUTORCH.rules)
    # Nothing quantizes what the last layer reads, so no integer kernel can compute it.
    first, dead, _ = calls(form, aten.linear.default)
    assert dead.args[1].op == "get_attr"
    # The bias fits an int32 in units of the scales, and results are as they were.
    scales = get_tensor(form, first.args[1].args[1].target)
    units = get_tensor(form, first.args[2].target).abs() / (scales * first.args[0].args[1])
    assert float(units.max()) <= 2**30 * 1.001
    made = convert(plan, verify=False)
    assert agreement_db(list(run_batch(plan, x)), made.run(x)) > 35
    rows = {row.layer: (row.kernel, row.reason) for row in made.layers}
    assert rows["first"] == ("Fully Connected (NC, QS8, QC8W) GEMM", "")
    assert rows["dead"][0] == "Fully Connected (NC, F32) GEMM"
    assert rows["dead"][1].startswith("XNNPACK has no kernel from codes")


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
