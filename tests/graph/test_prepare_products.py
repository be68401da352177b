from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require, state_of
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.target import Target, agreement_db

TARGETS = pytest.mark.parametrize("target", [REFERENCE, ONNXRUNTIME], ids=lambda t: t.name)


@TARGETS
def test_products_of_attention_agree_to_rounding_with_every_quantizer_off(
    target: Target, bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    prepared = insert_quantizers(bert_graph, target.rules, products=True)
    groups = [group for group in require(prepared, stage="prepared").groups if group.products]
    assert len(groups) == 4
    for group in groups:
        assert [str(candidate) for candidate in group.candidates] == ["a8"]
        assert len(group.activation_quantizers) == 2
    for batch in token_batches:
        expected, found = run_batch(bert_graph, batch), run_batch(prepared, batch)
        assert agreement_db(expected, found) >= 100
    assert state_of(prepared).left_float == ()


def test_without_products_fused_attention_stays(bert_graph: fx.GraphModule) -> None:
    names = [
        [(node.name, node.target) for node in graph.graph.nodes]
        for graph in (
            insert_quantizers(bert_graph, REFERENCE.rules),
            insert_quantizers(bert_graph, REFERENCE.rules, products=False),
        )
    ]
    assert names[0] == names[1]
    fused = torch.ops.aten.scaled_dot_product_attention.default
    assert [target for _, target in names[0]].count(fused) == 2
    with pytest.raises(PrecisionError, match="a8 is of products"):
        insert_quantizers(bert_graph, REFERENCE.rules, candidates=[Precision(None, 8)])


def test_products_that_the_user_leaves_out_say_so(bert_graph: fx.GraphModule) -> None:
    prepared = insert_quantizers(
        bert_graph, REFERENCE.rules, exclude=["*.layer.1.*.scores"], products=True
    )
    state = state_of(prepared)
    name = "bert.encoder.layer.1.attention.self.scores"
    assert [(entry.name, entry.reason) for entry in state.left_float] == [
        (name, "kept in float by the user")
    ]
    assert state.group(name).candidates == (Precision(),)
