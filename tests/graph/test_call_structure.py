from __future__ import annotations

import copy
import warnings

import torch
from torch import fx

from fxmpq.graph.call_structure import CallStructure, return_flat
from fxmpq.graph.state import copy_graph


def test_copies_share_the_structure_and_warn_of_nothing(bert_graph: fx.GraphModule) -> None:
    structure = bert_graph.graph._codegen
    assert isinstance(structure, CallStructure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.deepcopy(structure) is structure
    assert structure.pytree_info.orig_args == ["input_ids", "attention_mask"]


def test_a_graph_is_called_as_before_and_returns_a_flat_tuple(bert_graph: fx.GraphModule) -> None:
    flat = copy_graph(bert_graph)
    (logits,) = (node for node in flat.graph.output_node().all_input_nodes)
    return_flat(flat, [logits, logits])
    ids = torch.ones(2, 8, dtype=torch.long)
    one, other = flat(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(one, other)
    assert torch.equal(one, bert_graph(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
