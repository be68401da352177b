from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.errors import FxmpqError
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.graph.weight_share import WeightShare, weight_share
from fxmpq.targets.reference import REFERENCE

Forward = Callable[["Stored", Tensor], Tensor]


class Stored(nn.Module):
    """A matrix, a vector and what a test does with them."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.vector = nn.Parameter(torch.randn(6))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def share_of(forward: Forward) -> WeightShare:
    return weight_share(trace(Stored(forward).eval(), torch.randn(2, 3, 6)))


@settings(max_examples=10)
@given(widths=st.lists(st.integers(1, 8), min_size=2, max_size=4))
def test_all_weights_of_linear_layers_can_be_quantized(widths: list[int]) -> None:
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    share = weight_share(trace(nn.Sequential(*layers), torch.randn(2, widths[0])))
    expected = sum(a * b for a, b in pairwise(widths) if a * b > 1)
    assert (share.quantizable, share.total, share.left) == (expected, expected, ())
    assert share.fraction == 1.0


def test_a_network_of_convolutions_and_a_transformer(
    conv_graph: fx.GraphModule, bert_graph: fx.GraphModule
) -> None:
    for graph in (conv_graph, bert_graph):
        share = weight_share(graph)
        assert share.left == ()
        assert share.quantizable == share.total > 0


NO_PRODUCT: dict[str, Forward] = {
    "summand": lambda model, x: x + model.weight[:3],
    "mask": lambda model, x: functional.scaled_dot_product_attention(x, x, x, model.weight[:3, :3]),
    "norm": lambda model, x: functional.layer_norm(x, (6,), model.vector),
    "rows": lambda model, x: functional.embedding(x.argmax(-1), model.weight),
    "query": lambda model, x: x * functional.linear(model.vector, torch.ones(6, 6) * x.sum()),
}


@pytest.mark.parametrize("form", NO_PRODUCT)
def test_what_is_in_no_product_is_not_counted(form: str) -> None:
    share = share_of(NO_PRODUCT[form])
    assert (share.quantizable, share.total) == (0, 0)
    assert share.fraction == 1.0


LEFT: dict[str, tuple[Forward, str, int, str]] = {
    "computed": (
        lambda model, x: torch.mv(x[0], model.vector.exp()),
        "exp",
        6,
        "computed from stored tensors",
    ),
    "product": (lambda model, x: x @ model.vector, "vector", 6, "product with a stored tensor"),
    "vector": (
        lambda model, x: torch.mv(x[0], model.vector),
        "vector",
        6,
        "a product with a vector",
    ),
    "moved": (
        lambda model, x: torch.tensordot(x, model.weight[:3].T.reshape(6, 3), ([2], [0])),
        "weight",
        36,
        "tensordot is computed in float",
    ),
    "attention": (
        lambda model, x: functional.scaled_dot_product_attention(
            x, model.weight.expand(2, 6, 6), model.weight.expand(2, 6, 6)
        ),
        "weight",
        36,
        "fused attention",
    ),
}


@pytest.mark.parametrize("form", LEFT)
def test_what_is_left_is_named_with_the_reason(form: str) -> None:
    forward, name, size, reason = LEFT[form]
    share = share_of(forward)
    assert (share.quantizable, share.total) == (0, size)
    assert share.fraction == 0.0
    assert [(entry[0], entry[1]) for entry in share.left] == [(name, size)]
    assert reason in share.left[0][2]


def test_a_weight_counts_once_and_whole() -> None:
    share = share_of(lambda model, x: functional.linear(x, model.weight) @ model.weight.T)
    assert (share.quantizable, share.total, share.left) == (36, 36, ())


def test_of_a_recurrent_layer_only_matrices_count() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0]

    share = weight_share(trace(Recurrent().eval(), torch.randn(2, 3, 6)))
    assert (share.quantizable, share.total) == (0, 12 * (6 + 4))
    assert [entry[0] for entry in share.left] == ["gru.weight_ih_l0", "gru.weight_hh_l0"]


def test_of_a_prepared_graph_what_the_target_quantizes(bert_graph: fx.GraphModule) -> None:
    whole = weight_share(bert_graph)
    prepared = insert_quantizers(bert_graph, REFERENCE.rules, exclude=["classifier"])
    share = weight_share(prepared)
    assert share.total == whole.total
    size = whole.total - share.quantizable
    assert share.left == (("classifier.weight", size, "kept in float by the user"),)
    assert size == state_of(prepared).groups[-1].layers[0].macs


def test_a_graph_that_was_not_traced_is_refused() -> None:
    with pytest.raises(FxmpqError, match="fxmpq.trace"):
        weight_share(fx.symbolic_trace(nn.Linear(2, 2)))
