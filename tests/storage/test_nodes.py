from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, fx

from fxmpq.errors import FileFormatError
from fxmpq.graph.layers import place_of
from fxmpq.storage.nodes import decode_nodes, encode_nodes
from fxmpq.storage.sizes import SizeReader, SizeWriter

CPU = torch.device("cpu")
Entries = list[dict]


def stored(graph: fx.Graph) -> tuple[Entries, SizeReader]:
    writer = SizeWriter()
    text = json.dumps(encode_nodes(graph, writer), allow_nan=False)
    return json.loads(text), SizeReader(writer.ranges)


def test_nodes_come_back_with_what_later_steps_read(
    planned: fx.GraphModule, bert_graph: fx.GraphModule
) -> None:
    for graph in (planned.graph, bert_graph.graph):
        entries, sizes = stored(graph)
        found = decode_nodes(entries, sizes, CPU)
        for old, new in zip(graph.nodes, found.nodes, strict=True):
            assert (new.op, new.name, new.target) == (old.op, old.name, old.target)
            assert repr((new.args, new.kwargs)) == repr((old.args, old.kwargs))
            assert new.meta.get("example_shape") == old.meta.get("example_shape")
            assert place_of(new) == place_of(old)
            value, before = new.meta.get("val"), old.meta.get("val")
            if isinstance(before, Tensor):
                assert list(map(str, value.shape)) == list(map(str, before.shape))
                assert value.dtype is before.dtype


def test_nothing_of_the_machine_is_stored(bert_graph: fx.GraphModule) -> None:
    text = json.dumps(stored(bert_graph.graph)[0])
    assert "stack_trace" not in text
    assert ".py" not in text


def test_graphs_with_other_operations_are_not_stored() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_method("relu", (x,)))
    with pytest.raises(FileFormatError, match="node 'relu' is a call_method"):
        encode_nodes(graph, SizeWriter())
    other = fx.Graph()
    y = other.placeholder("y")
    other.output(other.call_function(torch.relu, (y,)))
    with pytest.raises(FileFormatError, match="node 'relu': a stored graph cannot call"):
        encode_nodes(other, SizeWriter())


X = {"name": "x", "op": "placeholder", "target": "x"}
RELU = {
    "name": "relu",
    "op": "call_function",
    "target": "aten::relu.default",
    "args": [{"node": "x"}],
}
OUTPUT = {"name": "output", "op": "output", "target": "output", "args": [{"node": "relu"}]}


def test_the_least_graph_is_taken() -> None:
    graph = decode_nodes([X, RELU, OUTPUT], SizeReader({}), CPU)
    assert [node.name for node in graph.nodes] == ["x", "relu", "output"]


@pytest.mark.parametrize(
    "entries",
    [
        {},
        ["x"],
        [X, RELU],
        [X, OUTPUT, RELU],
        [RELU, X, OUTPUT],
        [X, RELU, {**RELU}, OUTPUT],
        [X, RELU, OUTPUT, {**OUTPUT, "name": "second"}],
        [X, RELU, {**OUTPUT, "args": []}],
        [X, RELU, {**OUTPUT, "target": "other"}],
        [X, {**RELU, "target": "os.system", "args": ["true"]}, OUTPUT],
        [X, {**RELU, "target": "builtins::eval", "args": ["1"]}, OUTPUT],
        [X, {**RELU, "op": "call_method", "target": "__class__"}, OUTPUT],
        [X, {**RELU, "op": "call_module", "target": "a.__dict__"}, OUTPUT],
        [X, {**RELU, "op": "get_attr", "target": 'a"); import os; ("', "args": []}, OUTPUT],
        [X, {**RELU, "op": "get_attr", "target": "a"}, OUTPUT],
        [{**X, "target": "x, y=__import__('os').system('true')"}, RELU, OUTPUT],
        [{**X, "target": "*args"}, RELU, OUTPUT],
        [{**X, "args": [1]}, RELU, OUTPUT],
        [X, {**RELU, "name": "a-b"}, OUTPUT],
        [X, {**RELU, "name": "print"}, OUTPUT],
        [X, {**RELU, "kwargs": {"a=__import__('os')": 1}}, OUTPUT],
        [X, {**RELU, "kwargs": []}, OUTPUT],
        [X, {**RELU, "args": []}, OUTPUT],
        [X, {**RELU, "args": [{"node": "x"}, 1]}, OUTPUT],
        [X, {**RELU, "kwargs": {"out": {"node": "x"}}}, OUTPUT],
        [X, {**RELU, "args": {}}, OUTPUT],
        [X, {**RELU, "args": [{"node": "output"}]}, OUTPUT],
        [X, {**RELU, "more": 1}, OUTPUT],
        [X, {**RELU, "value": {"dtype": "nothing", "shape": []}}, OUTPUT],
        [X, {**RELU, "shape": ["1"]}, OUTPUT],
        [X, {**RELU, "modules": [["a", "b"]]}, OUTPUT],
        [X, {**RELU, "modules": {"a": 1}}, OUTPUT],
        [X, {"name": "relu"}, OUTPUT],
    ],
)
def test_nodes_that_are_not_legal_are_refused(entries: object) -> None:
    with pytest.raises(FileFormatError):
        decode_nodes(entries, SizeReader({}), CPU)


def test_devices_of_operators_follow_the_graph() -> None:
    graph = fx.Graph()
    device = torch.device("cuda", 3)
    made = graph.call_function(torch.ops.aten.arange.default, (4,), {"device": device})
    graph.output(made)
    entries, sizes = stored(graph)
    found = decode_nodes(entries, sizes, CPU)
    assert next(iter(found.nodes)).kwargs["device"] == CPU
