from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.findings import Missed
from fxmpq.graph.groups import form_groups
from fxmpq.graph.layers import find_layers
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE

from .conftest import W4A8, W8A8, groups_of

BLOCKS = [Precision.parse(name) for name in ("w2b32", "w4b32", "w8b32")]
ATTENTION = [f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")]


@pytest.mark.parametrize("rules", [REFERENCE.rules, ONNXRUNTIME.rules], ids=lambda r: r.name)
def test_weight_only_candidates_leave_layers_of_one_input_apart(
    bert_graph: fx.GraphModule, rules: TargetRules
) -> None:
    layers = find_layers(bert_graph).layers
    found = form_groups(bert_graph, layers, rules, [*BLOCKS, Precision()], {}, ())
    assert all(len(group.layers) == 1 for group in found.groups)
    assert found.joins == ()
    query, key, value = ATTENTION
    reason = f"it reads the input of {query}, but every candidate is weight-only"
    assert [entry for entry in found.missed if entry.place in ATTENTION] == [
        Missed("shared_input", key, reason),
        Missed("shared_input", value, reason),
    ]


def test_weight_only_pins_of_layers_of_one_input_may_differ(bert_graph: fx.GraphModule) -> None:
    # No layer is left to the candidates, which have 8-bit activations.
    groups = groups_of(bert_graph, [W8A8], {"*": BLOCKS[0], "*key": BLOCKS[2]})
    query, key, value = ATTENTION
    assert groups[key].candidates == (BLOCKS[2],)
    assert groups[query].candidates == groups[value].candidates == (BLOCKS[0],)


def test_weight_only_pins_among_activation_candidates_still_join(
    bert_graph: fx.GraphModule,
) -> None:
    groups = groups_of(bert_graph, [W4A8, W8A8], {"*key": BLOCKS[1]})
    assert [layer.name for layer in groups[ATTENTION[0]].layers] == ATTENTION
    assert groups[ATTENTION[0]].candidates == (BLOCKS[1],)
    with pytest.raises(PrecisionError, match="key reads the input of .*query"):
        groups_of(bert_graph, [W8A8], {"*query": BLOCKS[0], "*key": BLOCKS[1]})


def test_one_layer_with_quantized_activations_keeps_all_joins(bert_graph: fx.GraphModule) -> None:
    groups = groups_of(bert_graph, BLOCKS, {"classifier": W8A8})
    assert [layer.name for layer in groups[ATTENTION[0]].layers] == ATTENTION


def test_a_pin_of_a_table_may_bring_activations_to_the_layer_of_its_weight() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.other = nn.Embedding(6, 4), nn.Linear(4, 2)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.table(x).tanh()
            return self.head(hidden), self.other(hidden)

    graph = trace(Heads(), torch.zeros(2, 3, dtype=torch.long))
    groups = groups_of(graph, [Precision(4)], {"table": W8A8})
    (group,) = groups.values()
    assert len(group.layers) == 3
    assert group.candidates == (W8A8,)
