"""An ONNX model as the rules look at it: who reads a value, of what type, and what is constant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx
import onnx.checker
import onnx.inliner
import onnx.numpy_helper

from fxmpq.targets.onnx_compact import inner_graphs

_EXTERNAL = onnx.TensorProto.EXTERNAL
_STANDARD = ("", "ai.onnx")


class LintedModel:
    """A model with what rules look up; each table is made once.

    Calls of the model's own functions are replaced by what these compute.

    Args:
        proto: It is only read.
        file: It was read from, with data that lies beside it; empty if it was not.
    """

    def __init__(self, proto: onnx.ModelProto, file: str = "") -> None:
        self.proto = proto
        self.file = file
        graphs = list(_graphs(_inlined(proto).graph))
        self.nodes = [node for graph in graphs for node in graph.node]
        self.names = [_name(node, place) for place, node in enumerate(self.nodes)]
        self.readers: dict[str, list[int]] = defaultdict(list)
        self.stored = {entry.name: entry for graph in graphs for entry in graph.initializer}
        self.types = {name: found for graph in graphs for name, found in _value_types(graph)}
        self._constants = {*self.stored}
        for place, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.input):
                self.readers[name].append(place)
            if node.op_type == "Constant" and is_standard(node):
                self._read_constant(node)
            elif self._is_of_constants(node):
                self._constants.update(node.output)
            if node.op_type == "QuantizeLinear" and operand(node, 2):
                # Files need not tell the types of inner values.
                found = self.type_of(operand(node, 2))
                self.types |= {name: self.types.get(name, found) for name in node.output}

    def pairs(self, operator: str) -> Iterator[tuple[str, onnx.NodeProto]]:
        """The standard nodes of an operator, each with its name for people."""
        for name, node in zip(self.names, self.nodes, strict=True):
            if node.op_type == operator and is_standard(node):
                yield name, node

    def is_constant(self, value: str) -> bool:
        """Whether a value is stored, or computed of stored ones alone."""
        return value in self._constants

    def array(self, value: str) -> npt.NDArray[np.generic] | None:
        """The numbers of a stored value, or `None` where they are not in the file."""
        found = self.stored.get(value)
        if found is None or found.data_location == _EXTERNAL:
            return None
        return np.asarray(onnx.numpy_helper.to_array(found))

    def type_of(self, value: str) -> int:
        """Element type of a value, `onnx.TensorProto.UNDEFINED` where the file does not say."""
        return self.types.get(value, onnx.TensorProto.UNDEFINED)

    def _is_of_constants(self, node: onnx.NodeProto) -> bool:
        """Whether a node reads stored values alone; what graphs inside it read is not known."""
        is_known = all(name in self._constants or not name for name in node.input)
        return bool(node.input) and is_known and not any(_inner_graphs(node))

    def _read_constant(self, node: onnx.NodeProto) -> None:
        """Count a node that holds a constant as stored."""
        self._constants.update(node.output)
        for attribute in node.attribute:
            tensor = _attribute_tensor(attribute)
            if tensor is not None:
                self.stored[node.output[0]] = tensor
                self.types[node.output[0]] = tensor.data_type


def is_standard(node: onnx.NodeProto) -> bool:
    """Whether a node is of ONNX's own operators, whose domain has two names."""
    return node.domain in _STANDARD


def operand(node: onnx.NodeProto, position: int) -> str:
    """Name of an operand; empty where it was left out."""
    return str(node.input[position]) if position < len(node.input) else ""


def integer(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)


def _name(node: onnx.NodeProto, place: int) -> str:
    return node.name or (node.output[0] if node.output else "") or f"{node.op_type} {place}"


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes, as the branches of an `If`."""
    yield graph
    for node in graph.node:
        for inner in _inner_graphs(node):
            yield from _graphs(inner)


def _inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    return (inner for inner in inner_graphs(node) if inner.node)


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model without functions of its own; itself where it has none, or breaks their rules."""
    if not proto.functions:
        return proto
    try:
        return onnx.inliner.inline_local_functions(proto)
    except onnx.checker.ValidationError:
        return proto


def _value_types(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    for entry in (*graph.input, *graph.value_info, *graph.output):
        yield entry.name, entry.type.tensor_type.elem_type
    for stored in graph.initializer:
        yield stored.name, stored.data_type


def _attribute_tensor(attribute: onnx.AttributeProto) -> onnx.TensorProto | None:
    """The tensor of a `Constant` node's attribute, `None` for text and sparse values."""
    if attribute.name == "value":
        return attribute.t
    found: dict[str, object] = {
        "value_float": np.float32(attribute.f),
        "value_int": np.int64(attribute.i),
        "value_floats": np.array(attribute.floats, np.float32),
        "value_ints": np.array(attribute.ints, np.int64),
    }
    value = found.get(attribute.name)
    return None if value is None else onnx.numpy_helper.from_array(np.asarray(value))
