"""Attention on integers: products of two activations in OpenVINO's fused kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.targets.convert import convert
from fxmpq.targets.target import Converted

Made = Callable[..., fx.GraphModule]


@pytest.fixture(scope="module")
def planned(
    calibrated: Made,
    uniform: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> fx.GraphModule:
    candidates = [Precision(8, 8)]
    graph = calibrated(bert_graph, token_batches, "openvino", candidates=candidates, products=True)
    return uniform(graph)


@pytest.fixture(scope="module")
def made(planned: fx.GraphModule, token_batches: list[dict[str, Tensor]]) -> Converted:
    return convert(planned, verify=token_batches)


def products(made: Converted) -> list[tuple[str, str, str]]:
    return [
        (row.layer.split(".")[-1], row.kernel, row.reason)
        for row in made.layers
        if row.asked == "a8"
    ]


def test_the_whole_attention_is_one_integer_kernel(made: Converted) -> None:
    found = products(made)
    assert [name for name, _, _ in found] == ["scores", "context"] * 2
    for _, kernel, reason in found:
        assert kernel.startswith("Subgraph ")
        assert kernel.lower().endswith("i8")
        assert reason == ""


def test_it_computes_what_is_simulated(
    made: Converted, planned: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    assert made.sqnr_db > 60
    batch = {name: tensor[:2, :5] for name, tensor in token_batches[0].items()}
    (found,), (expected,) = made.run(batch), run_batch(planned, batch)
    assert isinstance(expected, Tensor)
    assert float((found - expected).square().sum() / expected.square().sum()) < 1e-3


def test_what_products_compute_is_told_as_theirs(
    made: Converted, planned: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    assert made.layer_values is not None
    sources = {node.name: node.args[0] for node in planned.graph.nodes if node.args}
    told = {entry.node: entry.layer for entry in made.layer_values(token_batches[0]) if entry.layer}
    behind = {"softmax": "scores", "_safe_softmax": "scores", "reshape": "context"}
    found = [
        (layer.split(".")[-1], behind[kind])
        for quantizer, layer in told.items()
        if (kind := str(sources[quantizer].target).split(".")[1]) in behind
    ]
    assert len(found) == 2 * 2
    assert all(name == expected for name, expected in found)


def test_operands_are_signed_but_for_weights_of_a_softmax(planned: fx.GraphModule) -> None:
    """The layers before write them: nothing but the model's own views comes in between."""
    grids: dict[str, list[int]] = {}
    for node in planned.graph.nodes:
        module = planned.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            source = node.args[0]
            kind = str(source.target).split(".")[1] if source.op == "call_function" else source.op
            grids.setdefault(kind, []).append(module.ranges["uint8"].zero_point)
    softmax = grids.pop("softmax", []) + grids.pop("_safe_softmax", [])
    assert softmax == [0, 0]
    assert grids["linear"].count(128) == 2 * 3
    assert len(grids["linear"]) == 2 * 3


def test_a_product_of_other_tensors_has_an_integer_kernel(calibrated: Made, uniform: Made) -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc(x)
            return torch.matmul(y, x.transpose(-1, -2)), torch.matmul(y, y[0, 0])

    torch.manual_seed(0)
    x = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    graph = calibrated(
        trace(Gram(), x), [x], "openvino", candidates=[Precision(8, 8)], products=True
    )
    converted = convert(uniform(graph), verify=[x])
    ((name, kernel, reason),) = products(converted)
    assert (name, reason) == ("matmul", "")
    assert kernel.startswith("MatMul ")
    assert kernel.lower().endswith("i8")


class Clipped(nn.Module):
    """A product of two tensors without negative values."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x).relu().view(2, -1, 4, 16).transpose(1, 2)
        right = self.right(x).sigmoid().view(2, -1, 4, 16).permute(0, 2, 3, 1)
        return torch.matmul(left, right)


def test_the_first_operand_is_unsigned_where_it_is_never_negative(
    calibrated: Made, uniform: Made
) -> None:
    """The second one is signed: there is no integer kernel for an unsigned one."""
    torch.manual_seed(0)
    x = torch.randn(2, 32, 64)
    candidates = [Precision(8, 8)]
    traced = trace(Clipped().eval(), x)
    graph = uniform(calibrated(traced, [x], "openvino", candidates=candidates, products=True))
    ranges = {
        str(node.args[0].name): graph.get_submodule(str(node.target)).ranges["uint8"].zero_point
        for node in graph.graph.nodes
        if node.op == "call_module"
        and isinstance(graph.get_submodule(str(node.target)), ActivationQuantizer)
    }
    assert (ranges["relu"], ranges["sigmoid"]) == (0, 128)
    converted = convert(graph, verify=[x])
    ((name, kernel, reason),) = products(converted)
    assert (name, reason) == ("matmul", "")
    assert kernel.lower().endswith("i8")
    assert converted.sqnr_db > 100
