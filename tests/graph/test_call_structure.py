from __future__ import annotations

import copy
import warnings

from torch import fx

from fxmpq.graph.call_structure import CallStructure


def test_copies_share_the_structure_and_warn_of_nothing(bert_graph: fx.GraphModule) -> None:
    structure = bert_graph.graph._codegen
    assert isinstance(structure, CallStructure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.deepcopy(structure) is structure
    assert structure.pytree_info.orig_args == ["input_ids", "attention_mask"]
