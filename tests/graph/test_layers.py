from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.graph.layers import find_layers, is_real_tensor, layer_name, place_of
from fxmpq.graph.trace import trace


def test_layers_have_the_models_names(conv_graph: fx.GraphModule) -> None:
    found = find_layers(conv_graph)
    assert [(layer.name, layer.kind) for layer in found.layers] == [
        ("stem.0", "conv"),
        ("conv1", "conv"),
        ("conv2", "conv"),
        ("downsample.0", "conv"),
        ("fc", "linear"),
    ]
    assert found.left_float == ()


def test_multiply_accumulates_are_those_of_one_sample(conv_graph: fx.GraphModule) -> None:
    macs = {layer.name: layer.macs for layer in find_layers(conv_graph).layers}
    assert macs == {
        "stem.0": 16 * 16 * 8 * 3 * 9,
        "conv1": 4 * 4 * 16 * 8 * 9,
        "conv2": 4 * 4 * 16 * 16 * 9,
        "downsample.0": 4 * 4 * 16 * 8,
        "fc": 16 * 5,
    }


def test_attention_stays_float_and_is_counted(bert_graph: fx.GraphModule) -> None:
    found = find_layers(bert_graph)
    assert len(found.layers) == 3 + 2 * 6 + 2
    assert {layer.kind for layer in found.layers} == {"embedding", "linear"}
    assert len(found.left_float) == 2
    for index, entry in enumerate(found.left_float):
        assert entry.name.startswith(f"bert.encoder.layer.{index}.attention.self.")
        assert "fused attention is computed in float" in entry.reason
        # Two heads, 8 x 8 positions, 8 channels each for scores and for values.
        assert entry.macs == 2 * 8 * 8 * (8 + 8)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(self.fc(x)))


@pytest.mark.parametrize(
    ("kind", "reason"), [("stored", "product with a stored tensor"), ("both", "two activations")]
)
def test_a_product_with_a_stored_tensor_is_told_from_one_of_activations(
    kind: str, reason: str
) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vector = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.vector if kind == "stored" else x.sum((0, 1)))

    (entry,) = find_layers(trace(Product(), torch.ones(2, 3, 4))).left_float
    assert entry.name == "matmul"
    assert reason in entry.reason


def test_further_calls_of_a_weight_are_numbered() -> None:
    layers = find_layers(trace(Twice(), torch.ones(2, 4))).layers
    assert [layer.name for layer in layers] == ["fc", "fc#2", "fc#3"]
    assert {layer.weight for layer in layers} == {"fc.weight"}
    assert len({layer.node for layer in layers}) == 3


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 4))
        self.kernel = nn.Parameter(torch.ones(2, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x, self.weight * x.mean())
        return functional.conv1d(hidden.unsqueeze(1), self.kernel / x.std(), padding=1)


def test_computed_weights_stay_float_and_are_counted() -> None:
    found = find_layers(trace(Computed(), torch.ones(2, 4)))
    assert found.layers == ()
    assert [entry.reason for entry in found.left_float] == [
        "its weight is computed, not stored"
    ] * 2
    assert [entry.macs for entry in found.left_float] == [6 * 4, 2 * 6 * 3]


class Products(nn.Module):
    """Each product of two activations, by the name that `kind` tells."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:  # noqa: PLR0911  (a case an operator)
        other = x.transpose(1, 2)
        match self.kind:
            case "matmul":
                return x @ other
            case "bmm":
                return torch.bmm(x, other)
            case "mm":
                return torch.mm(x[:, 0], x[0].T)
            case "addmm":
                return torch.addmm(torch.ones(3), x[:, 0], x[0].T)
            case "baddbmm":
                return torch.baddbmm(torch.ones(1, 3, 3), x, other)
            case "einsum":
                return torch.einsum("bij,bkj->bik", x, x)
            case "mv":
                return torch.mv(x[:, 0], x[0, 0])
            case "tensordot":
                return torch.tensordot(x, x[0], ([2], [1]))
            case "bilinear":
                return nn.functional.bilinear(x, x, torch.ones(4, 5, 5))
            case _:
                return torch.einsum("...ij,j->...i", x, torch.ones(5))


@pytest.mark.parametrize(
    ("kind", "macs"),
    [
        ("matmul", 3 * 3 * 5),
        ("bmm", 3 * 3 * 5),
        ("mm", 3 * 5),
        ("addmm", 3 * 5),
        ("baddbmm", 3 * 3 * 5),
        ("einsum", 3 * 3 * 5),
        ("einsum ellipsis", 3 * 5),
        ("mv", 5),
        ("tensordot", 3 * 3 * 5),
        ("bilinear", 3 * 4 * 5 * 5),
    ],
)
def test_products_that_stay_float(kind: str, macs: int) -> None:
    found = find_layers(trace(Products(kind), torch.ones(2, 3, 5)))
    assert found.layers == ()
    assert [entry.macs for entry in found.left_float] == [macs]


def test_a_transposed_convolution_is_a_layer_of_its_inputs() -> None:
    model = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    [layer] = find_layers(trace(model, torch.ones(2, 4, 3, 5))).layers
    assert (layer.kind, layer.channel_axis) == ("conv_transpose", 1)
    # Each of 4 x 15 inputs meets its group's 3 output channels and 9 kernel positions.
    assert layer.macs == 4 * 15 * 3 * 9


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_stay_float(kind: type[nn.RNNBase]) -> None:
    layer = kind(6, 4, num_layers=2, bidirectional=True, batch_first=True)
    found = find_layers(trace(layer.eval(), torch.ones(2, 3, 6)))
    assert found.layers == ()
    matrices = [weight for weight in layer.parameters() if weight.dim() == 2]
    # Three positions, each of which meets all matrices, be they of either direction or layer.
    expected = 3 * sum(weight.numel() for weight in matrices)
    assert [(entry.reason, entry.macs) for entry in found.left_float] == [
        ("recurrent layers are computed in float", expected)
    ]


def test_attention_of_several_sizes() -> None:
    class Attends(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(query, key, value)

    batch = (torch.ones(2, 2, 5, 4), torch.ones(2, 2, 7, 4), torch.ones(2, 2, 7, 6))
    (entry,) = find_layers(trace(Attends(), batch)).left_float
    assert entry.macs == 2 * 5 * 7 * (4 + 6)


@pytest.mark.parametrize(
    ("weight", "layer"),
    [("a.b.weight", "a.b"), ("kernel", "kernel"), ("a.in_proj_weight", "a.in_proj_weight")],
)
def test_a_layer_is_named_after_its_weight(weight: str, layer: str) -> None:
    assert layer_name(weight) == layer


def test_places_are_module_paths(conv_graph: fx.GraphModule) -> None:
    places = [place_of(node) for node in conv_graph.graph.nodes]
    assert places[-2:] == ["fc.linear", "output"]
    assert any(place.startswith("stem.2.relu") for place in places)


def test_real_tensors(bert_graph: fx.GraphModule) -> None:
    real = {node.name: is_real_tensor(node) for node in bert_graph.graph.nodes}
    assert not real["input_ids"]
    assert real["linear"]
    assert not real["output"]
