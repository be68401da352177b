from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import BitConfig, BitModel

from fxmpq.graph.layers import find_layers
from fxmpq.graph.passes.fold_constants import fold_constants
from fxmpq.graph.trace import trace

aten = torch.ops.aten


def targets(graph: fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def batch(samples: int = 3) -> Tensor:
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(2))


class Computed(nn.Module):
    """Weights that are normalized, sliced and scaled before each use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.normed = weight_norm(nn.Linear(6, 6))
        self.joint = nn.Parameter(torch.randn(12, 6))
        self.gain = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.joint.chunk(2)
        x = nn.functional.linear(self.normed(x), first, self.gain * 2)
        return nn.functional.linear(x, second)


def test_computed_weights_are_stored_under_their_layers_names() -> None:
    model = Computed().eval()
    graph = trace(model, batch())
    names = {layer.weight for layer in find_layers(graph).layers}
    assert names == {"normed.weight", "weight", "weight_2"}
    assert targets(graph) == [aten.linear.default] * 3
    assert find_layers(graph).left_float == ()
    for samples in (2, 5):
        assert torch.equal(graph(batch(samples)), model(batch(samples)))


def test_what_they_were_computed_from_is_gone() -> None:
    graph = trace(Computed().eval(), batch())
    assert set(graph.state_dict()) == {"normed.weight", "normed.bias", "weight", "weight_2", "bias"}


def test_standardized_convolutions_are_found_under_their_own_names() -> None:
    torch.manual_seed(0)
    config = BitConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4, layer_type="bottleneck"
    )
    model = BitModel(config).eval()
    images = torch.randn(2, 3, 32, 32)
    graph = trace(model, images)
    found = find_layers(graph)
    assert not found.left_float
    assert {layer.weight for layer in found.layers} <= set(dict(model.named_parameters()))
    assert torch.equal(graph(images).pooler_output, model(images).pooler_output)


class Chance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        noisy = nn.functional.dropout(self.weight, training=True)
        return nn.functional.linear(x, noisy) + nn.functional.linear(x, self.weight * x.mean())


def test_a_weight_that_changes_is_not_stored() -> None:
    graph = trace(Chance().eval(), batch())
    reasons = [left.reason for left in find_layers(graph).left_float]
    assert reasons == ["its weight is computed, not stored"] * 2


def test_a_source_with_other_readers_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(
                torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
            )

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight) + nn.functional.linear(x, self.weight * 2)

    model = Shared().eval()
    graph = trace(model, batch())
    assert set(graph.state_dict()) == {"weight", "weight_2"}
    assert torch.equal(graph(batch()), model(batch()))


def test_it_says_how_many_it_stored() -> None:
    program = torch.export.export(Computed().eval(), (batch(),), strict=False)
    graph = program.module(check_guards=False)
    assert fold_constants(graph) == 4
    assert fold_constants(graph) == 0


def test_a_weight_computed_anew_for_each_call_is_stored_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.normed = weight_norm(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.normed(torch.relu(self.normed(x)))

    model = Twice().eval()
    graph = trace(model, batch())
    assert [layer.name for layer in find_layers(graph).layers] == ["normed", "normed#2"]
    assert set(graph.state_dict()) == {"normed.weight", "normed.bias"}
    assert torch.equal(graph(batch()), model(batch()))


def test_different_slices_of_one_tensor_stay_different() -> None:
    graph = trace(Computed().eval(), batch())
    assert not torch.equal(graph.weight, graph.weight_2)


def test_a_stored_weight_is_trainable_where_what_it_was_computed_from_is() -> None:
    model = Computed().eval()
    model.joint.requires_grad_(False)
    model.normed.parametrizations.weight.original0.requires_grad_(False)
    graph = trace(model, batch())
    trained = {name for name, parameter in graph.named_parameters() if parameter.requires_grad}
    assert trained == {"normed.weight", "normed.bias", "bias"}


def test_long_calculations_are_folded_too() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(batch(4))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight
            for _ in range(600):
                weight = weight + weight * 1e-3
            return nn.functional.linear(x, weight)

    model = Long().eval()
    graph = trace(model, batch())
    assert targets(graph) == [aten.linear.default]
    assert torch.equal(graph(batch()), model(batch()))


def test_control_flow_is_no_constant() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(batch(4))
            self.register_buffer("flag", torch.tensor(1))

        def forward(self, x: Tensor) -> Tensor:
            def same(weight: Tensor) -> Tensor:
                return weight * 1.0

            def twice(weight: Tensor) -> Tensor:
                return weight * 2.0

            weight = torch.cond(self.flag > 0, same, twice, (self.weight,))
            return nn.functional.linear(x, weight)

    model = Branching().eval()
    graph = trace(model, batch())
    assert [left.reason for left in find_layers(graph).left_float] == [
        "its weight is computed, not stored"
    ]
    assert torch.equal(graph(batch()), model(batch()))
