from __future__ import annotations

import json

import pytest
import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from fxmpq.errors import FileFormatError
from fxmpq.graph.trace import trace
from fxmpq.storage.calls import decode_call, encode_call


class Nested(nn.Module):
    def forward(self, pair: dict, *rest: torch.Tensor, scale: float = 1.0) -> tuple:
        return pair["a"] * scale, [pair["b"][0], rest[0] + 1], None


def test_a_call_comes_back(bert_graph: fx.GraphModule) -> None:
    stored = json.loads(json.dumps(encode_call(bert_graph.graph)))
    found, wanted = decode_call(stored, 2).pytree_info, bert_graph.graph._codegen.pytree_info
    assert found.orig_args == wanted.orig_args
    assert found.in_spec == wanted.in_spec
    assert found.out_spec == wanted.out_spec


def test_nested_and_variable_arguments_come_back() -> None:
    x = torch.ones(2)
    batch = ({"a": x, "b": [x]}, x)
    graph = trace(Nested(), batch)
    stored = json.loads(json.dumps(encode_call(graph.graph)))
    structure = decode_call(stored, 3)
    assert structure.pytree_info.in_spec == graph.graph._codegen.pytree_info.in_spec
    wanted = graph(*batch)
    graph.graph.set_codegen(structure)
    graph.recompile()
    found = graph(*batch)
    assert type(found) is tuple
    assert found[0].equal(wanted[0])
    assert found[1][1].equal(wanted[1][1])
    assert found[2] is None


def test_a_graph_without_a_call_is_not_stored(conv_graph: fx.GraphModule) -> None:
    graph = fx.symbolic_trace(nn.ReLU()).graph
    graph.set_codegen(CodeGen())
    with pytest.raises(FileFormatError, match="does not say how it is called"):
        encode_call(graph)


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": ["input_ids"]},
        {"arguments": ["input_ids", "input_ids"]},
        {"arguments": ["input_ids", "x=__import__('os').system('true')"]},
        {"arguments": ["input_ids", "__class__"]},
        {"arguments": ["input_ids", "self"]},
        {"arguments": ["input_ids", 3]},
        {"arguments": "ab"},
        {"inputs": "*"},
        {"inputs": {"type": "tuple", "context": None, "children": ["*", "*"]}},
        {"outputs": {"type": "nothing", "context": None, "children": ["*"]}},
        {"more": 1},
    ],
)
def test_calls_that_do_not_fit_are_refused(
    bert_graph: fx.GraphModule, change: dict[str, object]
) -> None:
    stored = {**encode_call(bert_graph.graph), **change}
    with pytest.raises(FileFormatError):
        decode_call(stored, 2)


def test_keywords_become_code_and_must_be_identifiers(bert_graph: fx.GraphModule) -> None:
    stored = json.loads(json.dumps(encode_call(bert_graph.graph)))
    stored["inputs"]["children"][1]["context"][1] = "x': __import__('os').system('true'), 'y"
    with pytest.raises(FileFormatError, match="must be named by an identifier"):
        decode_call(stored, 2)


def test_the_number_of_placeholders_must_fit(bert_graph: fx.GraphModule) -> None:
    with pytest.raises(FileFormatError, match="2 arguments and 3 placeholders do not fit"):
        decode_call(encode_call(bert_graph.graph), 3)
    with pytest.raises(FileFormatError, match="a stored call is an object"):
        decode_call([], 2)
