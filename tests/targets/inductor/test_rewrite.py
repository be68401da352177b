from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.run import run_batch
from fxmpq.graph.trace import trace
from fxmpq.targets.decomposed import to_decomposed
from fxmpq.targets.inductor.rewrite import (
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    rewrite_for_compiler,
    separate_uses,
)
from fxmpq.targets.lowering import finish

Made = Callable[..., fx.GraphModule]
aten = torch.ops.aten


def rewritten(planned: fx.GraphModule, batch: Tensor) -> fx.GraphModule:
    """Rewrites a planned graph and checks that it computes the same, up to the order of sums."""
    graph = to_decomposed(planned, signed=False)
    rewrite_for_compiler(graph)
    finish(graph)
    torch.testing.assert_close(run_batch(graph, batch)[0], run_batch(planned, batch)[0])
    return graph


def calls(graph: fx.GraphModule, target: object) -> list[fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=target)


class Pools(nn.Module):
    """Two poolings, of codes and of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(x).relu(), 2)
        return nn.functional.max_pool2d(self.second(x), 2)


def test_pooled_codes_are_codes_of_the_same_grid(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 14, 14)
    graph = rewritten(uniform(calibrated(trace(Pools(), x), [x], "inductor")), x)
    codes, floats = calls(graph, aten.max_pool2d.default)
    (again,) = codes.users
    assert again.target is QUANTIZE
    assert again.args[1:] == codes.args[0].args[1:]
    assert [(node.target, node.args[1:]) for node in again.users] == [(DEQUANTIZE, again.args[1:])]
    assert [node.op for node in floats.users] == ["output"]


def test_zero_points_are_what_kernels_take(planned: fx.GraphModule, images: list[Tensor]) -> None:
    tensors = rewritten(planned, images[0]).state_dict()
    found = [tensor.dtype for name, tensor in tensors.items() if name.startswith("zero_points")]
    assert found
    assert set(found) == {torch.int32}


def test_linear_layers_read_codes_in_c_order(calibrated: Made, uniform: Made) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.transpose(1, 2))

    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    graph = rewritten(uniform(calibrated(trace(Transposed(), x), [x], "inductor")), x)
    (linear,) = calls(graph, aten.linear.default)
    codes = linear.args[0].args[0]
    assert (linear.args[0].target, codes.target) == (DEQUANTIZE, aten.contiguous.default)
    assert codes.args[0].target is QUANTIZE


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 2, "stride": 2, "dilation": 3}, {"padding": "same"}, {"groups": 2}],
    ids=str,
)
def test_convolutions_over_one_dimension_are_over_two(
    calibrated: Made, uniform: Made, options: dict[str, object]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 11)
    layers = nn.Sequential(nn.Conv1d(4, 6, 3, **options), nn.ReLU(), nn.Conv1d(6, 2, 1))
    planned = uniform(calibrated(trace(layers, x), [x], "inductor"))
    graph = rewritten(planned, x)
    assert not any("conv1d" in str(node.target) for node in graph.graph.nodes)
    weights = [node.args[0] for node in calls(graph, DEQUANTIZE_WEIGHT)]
    shapes = [graph.get_buffer(str(node.target)).shape for node in weights]
    assert [tuple(shape) for shape in shapes] == [
        (6, 4 // options.get("groups", 1), 1, 3),
        (2, 6, 1, 1),
    ]


class Twice(nn.Module):
    """A layer that is used twice beside one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.other(self.fc(x).relu()))


def test_each_use_of_a_weight_has_scales_of_its_own(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    graph = to_decomposed(uniform(calibrated(trace(Twice(), x), [x], "inductor")), signed=False)
    before = run_batch(graph, x)[0]
    separate_uses(graph)
    graph.recompile()
    names = [str(node.args[1].target) for node in calls(graph, DEQUANTIZE_WEIGHT)]
    assert len(set(names)) == 3
    first, other, again = (graph.get_buffer(name) for name in names)
    assert torch.equal(first, again)
    assert first.data_ptr() != again.data_ptr()
    assert names[1] == "scales_other_weight"
    assert len(other) == 4
    assert torch.equal(run_batch(graph, x)[0], before)


def test_float_layers_stay_as_they_are(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 11)
    layers = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Linear(9, 2))
    planned = uniform(calibrated(trace(layers, x), [x], "inductor"), -1)
    graph = rewritten(planned, x)
    kinds = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert kinds == ["aten.conv1d.default", "aten.linear.default"]


def test_float_convolutions_that_read_codes_stay_as_they_are() -> None:
    root = nn.Module()
    root.register_buffer("weight", torch.zeros(2, 4, 3))
    graph = fx.Graph(root)
    codes, weight = graph.placeholder("codes"), graph.get_attr("weight")
    real = graph.call_function(DEQUANTIZE, (codes, 0.1, 3, 0, 255, torch.uint8))
    graph.output(graph.call_function(aten.conv1d.default, (real, weight)))
    module = fx.GraphModule(root, graph)
    before = [node.name for node in module.graph.nodes]
    rewrite_for_compiler(module)
    assert [node.name for node in module.graph.nodes] == before


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_single_channel_gets_another_of_weight_zero(
    calibrated: Made, uniform: Made, kind: type[nn.Conv1d | nn.Conv2d]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(1, 1, 3), nn.ReLU(), kind(1, 4, 3))
    x = torch.randn(2, 1, *[9] * (1 if kind is nn.Conv1d else 2))
    graph = rewritten(uniform(calibrated(trace(model, x), [x], "inductor")), x)
    convs = calls(graph, aten.conv2d.default)
    weights = [graph.get_buffer(conv.args[1].args[0].target) for conv in convs]
    assert [weight.shape[1] for weight in weights] == [2, 2]
    assert not any(weight[:, 1].any() for weight in weights)


def test_a_single_channel_a_group_is_left(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    model = nn.Conv2d(3, 3, 3, groups=3)
    graph = rewritten(uniform(calibrated(trace(model, x), [x], "inductor")), x)
    (conv,) = calls(graph, aten.conv2d.default)
    assert graph.get_buffer(conv.args[1].args[0].target).shape[1] == 1
