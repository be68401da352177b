from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import fx

from fxmpq.errors import PatternError, PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.asked_products import NO_PRODUCTS, AskedProducts, ask_products
from fxmpq.graph.layers import find_layers
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import copy_graph, state_of
from fxmpq.targets.reference import REFERENCE

W8A8 = Precision(8, 8)
FUSED = torch.ops.aten.scaled_dot_product_attention.default


def ask(
    graph: fx.GraphModule,
    candidates: Sequence[Precision] = (W8A8,),
    keep: Mapping[str, Precision] | None = None,
    exclude: Sequence[str] = (),
) -> tuple[AskedProducts, int]:
    """The products, and how many attentions stay fused."""
    copied = copy_graph(graph)
    found = ask_products(copied, REFERENCE.rules, candidates, keep or {}, exclude)
    return found, len(copied.graph.find_nodes(op="call_function", target=FUSED))


def test_all_attention_is_taken_apart(bert_graph: fx.GraphModule) -> None:
    found, fused = ask(bert_graph)
    place = "bert.encoder.layer.{}.attention.self.{}"
    names = [place.format(layer, part) for layer in (0, 1) for part in ("scores", "context")]
    assert [product.name for product in found.products] == names
    assert (found.fused, fused) == ((), 0)


@pytest.mark.parametrize(
    ("keep", "exclude", "fused"),
    [
        ({}, ["*.layer.0.attention*"], 1),
        ({}, ["*.scores", "*.context"], 2),
        ({}, ["*.scores"], 0),
        ({"*.layer.1.*": Precision()}, [], 1),
        ({"*.layer.1.*": Precision(), "*.context": Precision(None, 8)}, [], 0),
        ({"*": W8A8}, ["bert.*"], 2),
    ],
)
def test_attention_of_which_nothing_is_quantized_stays_fused(
    bert_graph: fx.GraphModule, keep: dict[str, Precision], exclude: list[str], fused: int
) -> None:
    found, left = ask(bert_graph, keep=keep, exclude=exclude)
    assert left == fused
    assert (len(found.products), len(found.fused)) == (4 - 2 * fused, 2 * fused)


def test_what_stays_fused_is_named_by_patterns_all_the_same(bert_graph: fx.GraphModule) -> None:
    prepared = insert_quantizers(
        bert_graph,
        REFERENCE.rules,
        candidates=[W8A8],
        exclude=["*.layer.0.attention.self.scores", "*.layer.0.attention.self.context"],
        products=True,
    )
    state = state_of(prepared)
    assert sum(len(group.products) for group in state.groups) == 2
    reasons = {entry.name: entry.reason for entry in state.left_float}
    assert [reason for name, reason in reasons.items() if "layer.0" in name] == [
        "fused attention is computed in float"
    ]
    with pytest.raises(PatternError, match="no layer matches 'scores'"):
        insert_quantizers(
            bert_graph, REFERENCE.rules, candidates=[W8A8], exclude=["scores"], products=True
        )


def test_products_are_no_longer_left_in_float(bert_graph: fx.GraphModule) -> None:
    copied = copy_graph(bert_graph)
    found = ask_products(copied, REFERENCE.rules, [W8A8], {}, [])
    left = find_layers(copied).left_float
    assert len(left) == 4
    assert found.without(left, copied) == []
    assert NO_PRODUCTS.without(left, copied) == list(left)


def test_a_target_without_products_refuses_them(bert_graph: fx.GraphModule) -> None:
    operators = {"linear": REFERENCE.rules.operators["linear"]}
    rules = replace(REFERENCE.rules, name="chip", operators=operators)
    with pytest.raises(PrecisionError, match="'chip' has no quantized product .* linear: weights"):
        ask_products(copy_graph(bert_graph), rules, [W8A8], {}, [])


def test_candidates_without_activations_are_refused(bert_graph: fx.GraphModule) -> None:
    with pytest.raises(PrecisionError, match="none of w4, fp32 does; .* 'a8' for products"):
        ask(bert_graph, [Precision(4), Precision()])
    assert ask(bert_graph, [Precision(4)], keep={"*": W8A8})[1] == 0
