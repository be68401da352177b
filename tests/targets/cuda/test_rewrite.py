from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.trace import trace
from fxmpq.targets.cuda.activations import ActivationCodes
from fxmpq.targets.cuda.device import DeviceFacts
from fxmpq.targets.cuda.rewrite import rewrite_layer
from fxmpq.targets.cuda.weighted import read_layer
from fxmpq.targets.lowering import finish, lower
from fxmpq.targets.qdq import layers_of
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]


class Shapes(nn.Module):
    """A convolution, a pointwise one, one in groups, an embedding and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 36)
        self.conv = nn.Conv2d(1, 6, 3, padding=1, stride=2)
        self.point = nn.Conv2d(6, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 3, groups=2)
        self.first = nn.Linear(6, 64)
        self.second = nn.Linear(64, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).reshape(-1, 1, 6, 6)
        x = self.grouped(self.point(self.conv(x).relu())).mean((2, 3))
        return self.second(self.first(x))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(20, (6, 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def planned(calibrated: Made, uniform: Made, ids: Tensor) -> Callable[[str], fx.GraphModule]:
    torch.manual_seed(0)
    graph = trace(Shapes(), ids)
    made: dict[str, fx.GraphModule] = {}

    def make(precision: str) -> fx.GraphModule:
        if precision not in made:
            candidates = [Precision.parse(precision)]
            made[precision] = uniform(calibrated(graph, [ids], "cuda", candidates=candidates))
        return made[precision]

    return make


def rewritten(
    planned: fx.GraphModule, device: DeviceFacts
) -> tuple[fx.GraphModule, dict[str, tuple[str, str]]]:
    graph = lower(planned)
    nodes = {node.name: node for node in graph.graph.nodes}
    codes = ActivationCodes(graph)
    outcomes = {}
    for layer, precision in layers_of(planned):
        found = read_layer(graph, nodes[layer.node], layer, precision)
        assert found is not None
        outcomes[layer.name] = rewrite_layer(graph, found, codes, device)
    finish(graph)
    return graph, outcomes


def agreement(one: fx.GraphModule, other: fx.GraphModule, ids: Tensor) -> float:
    first, second = (
        [leaf for leaf in run_batch(graph, ids) if isinstance(leaf, Tensor)]
        for graph in (one, other)
    )
    return agreement_db(first, second)


def test_layers_run_on_codes_where_rules_allow_it(
    planned: Callable[[str], fx.GraphModule], ids: Tensor
) -> None:
    graph, outcomes = rewritten(planned("w8a8"), DeviceFacts("cpu"))
    assert outcomes == {
        "table": ("look-up of int8 codes", ""),
        "conv": ("_int_mm on cpu, patches of 3x3", ""),
        "point": ("_int_mm on cpu", ""),
        "grouped": (
            "float on dequantized int8 weights, uint8 input",
            "_int_mm is one matrix product; this convolution has 2 groups",
        ),
        "first": ("_int_mm on cpu", ""),
        "second": ("_int_mm on cpu", ""),
    }
    assert agreement(planned("w8a8"), graph, ids) > 110
    # Weights lie there as codes only.
    shapes = {
        tensor.dtype: tensor.shape for tensor in graph.state_dict().values() if tensor.dim() > 1
    }
    assert set(shapes) == {torch.int8}


def test_a_gpus_capability_decides(planned: Callable[[str], fx.GraphModule], ids: Tensor) -> None:
    """Of the rules only: what a GPU would not run is dequantized here as there."""
    graph, outcomes = rewritten(planned("we4m3ae4m3"), DeviceFacts("cuda", (8, 0)))
    kernel, reason = outcomes["first"]
    assert kernel == "float on dequantized fp8_e4m3 weights, fp8_e4m3t input"
    assert reason == "_scaled_mm needs compute capability 8.9 or above, this is cuda sm_80"
    assert agreement(planned("we4m3ae4m3"), graph, ids) > 110
    _, outcomes = rewritten(planned("we4m3ae4m3"), DeviceFacts("cuda", (8, 9)))
    assert outcomes["first"] == ("_scaled_mm on cuda sm_89", "")


def test_weight_only_layers_read_packed_codes(
    planned: Callable[[str], fx.GraphModule], ids: Tensor
) -> None:
    graph, outcomes = rewritten(planned("w4"), DeviceFacts("cpu"))
    on_codes = {name for name, (_, reason) in outcomes.items() if not reason}
    assert on_codes == {"table", "point", "first", "second"}
    assert outcomes["conv"][1].endswith("would repeat 9 times")
    assert agreement(planned("w4"), graph, ids) > 40


@pytest.mark.parametrize("message", ["no kernel for this shape", None])
def test_a_kernel_that_fails_its_trial_is_not_used(
    message: str | None,
    planned: Callable[[str], fx.GraphModule],
    ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(a: Tensor, b: Tensor) -> Tensor:
        if message is not None:
            raise RuntimeError(message)
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32)

    monkeypatch.setattr(torch, "_int_mm", fails)
    graph, outcomes = rewritten(planned("w8a8"), DeviceFacts("cpu"))
    expected = f"_int_mm does not take it on cpu: {message or 'it returns wrong numbers'}"
    for name in ("conv", "point", "first", "second"):
        assert outcomes[name] == ("float on dequantized int8 weights, uint8 input", expected)
    assert agreement(planned("w8a8"), graph, ids) > 110


def test_computed_biases_and_missing_ranges_are_told(
    planned: Callable[[str], fx.GraphModule],
) -> None:
    layers = {layer.name: (layer, precision) for layer, precision in layers_of(planned("w8a8"))}
    layer, precision = layers["first"]
    reasons = []
    for place in (2, 0):
        graph = lower(planned("w8a8"))
        node = next(node for node in graph.graph.nodes if node.name == layer.node)
        source = node.args[place]
        assert isinstance(source, fx.Node)
        with graph.graph.inserting_before(node):
            node.update_arg(place, graph.graph.call_function(torch.neg, (source,)))
        found = read_layer(graph, node, layer, precision)
        assert found is not None
        reasons.append(rewrite_layer(graph, found, ActivationCodes(graph), DeviceFacts("cpu"))[1])
    assert reasons == ["its bias is computed, not stored", "its input has no stored range"]
