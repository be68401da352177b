"""Dropping from an ONNX model what its readers find by themselves, so that files are small."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

import onnx
import onnx.defs
import onnx.helper

_AUTOMATIC = re.compile(r"val_\d+")
"""How the exporter names constants of its own."""

_EXPORTED = "node_"
"""How it begins the names of nodes."""

_GRIDS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_NEUTRAL = {"dilations": 1, "strides": 1, "pads": 0, "output_padding": 0}
"""What windows do along every axis unless told; operators' schemas do not say it."""


def compact(proto: onnx.ModelProto, layers: Mapping[str, onnx.NodeProto]) -> None:
    """Drop notes, inner shapes, defaults and names that tell nothing, in place.

    Runtimes find inner shapes by themselves. ONNX Runtime (1.30 and 1.31) is even faster without:
    told them, it fuses sums into normalisations, which then take longer than the two apart.

    A layer's node gets the layer's name, which profiles then show. Nodes that quantize or
    dequantize, or compute with constants, have none; others keep the exporter's. Values are
    numbered, except inputs, outputs and stored tensors that the exporter did not name itself.

    Args:
        proto: A model about to be written.
        layers: Its node of each layer, by the layer's name.
    """
    del proto.graph.value_info[:]
    _drop_notes(proto)
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    for node in proto.graph.node:
        if not node.domain:
            _drop_defaults(node, opset)
    _name_nodes(proto.graph, layers)
    _number_values(proto.graph)


def _drop_notes(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    values = (*graph.input, *graph.output)
    for entry in (proto, graph, *values, *graph.initializer, *graph.node):
        del entry.metadata_props[:]
        entry.ClearField("doc_string")


def _drop_defaults(node: onnx.NodeProto, opset: int) -> None:
    """Drop attributes that are as they are if left out."""
    known = onnx.defs.get_schema(node.op_type, opset, "").attributes
    kept: list[onnx.AttributeProto] = []
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        default = known[attribute.name].default_value
        is_told = default.type != onnx.AttributeProto.UNDEFINED
        if is_told and onnx.helper.get_attribute_value(default) == value:
            continue
        if attribute.name in _NEUTRAL and set(value) == {_NEUTRAL[attribute.name]}:
            continue
        kept.append(attribute)
    del node.attribute[:]
    node.attribute.extend(kept)


def _name_nodes(graph: onnx.GraphProto, layers: Mapping[str, onnx.NodeProto]) -> None:
    """Name layers' nodes after them, and shorten or drop the exporter's names."""
    constant = {entry.name for entry in graph.initializer} | {""}
    named = {node.output[0]: layer for layer, node in reversed(list(layers.items()))}
    taken = set(layers)
    for node in graph.node:
        is_constant = bool(node.input) and all(name in constant for name in node.input)
        if is_constant:
            constant.update(node.output)
        layer = named.get(node.output[0])
        if layer is not None:
            node.name = layer
        elif is_constant or node.op_type in _GRIDS:
            node.name = ""
        else:
            short = node.name.removeprefix(_EXPORTED)
            node.name = node.name if short in taken else short


def _number_values(graph: onnx.GraphProto) -> None:
    """Give computed values, and constants that the exporter named, short names."""
    kept = {entry.name for entry in (*graph.input, *graph.output)} | {""}
    kept |= {entry.name for entry in graph.initializer if not _AUTOMATIC.fullmatch(entry.name)}
    for node in graph.node:
        # Graphs inside a node read values of this one by their names.
        kept |= {name for inner in inner_graphs(node) for name in _names_in(inner)}
    free = (name for name in map(str, itertools.count()) if name not in kept)
    found = {name: name for name in kept}

    def numbered(name: str) -> str:
        if name not in found:
            found[name] = next(free)
        return found[name]

    for node in graph.node:
        node.input[:] = [numbered(name) for name in node.input]
        node.output[:] = [numbered(name) for name in node.output]
    for entry in graph.initializer:
        entry.name = numbered(entry.name)


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node, as the branches of an `If`.

    Args:
        node: It is only read.
    """
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _names_in(graph: onnx.GraphProto) -> Iterator[str]:
    """All names of values in a graph and those inside its nodes."""
    yield from (entry.name for entry in (*graph.input, *graph.output, *graph.initializer))
    for node in graph.node:
        yield from (*node.input, *node.output)
        for inner in inner_graphs(node):
            yield from _names_in(inner)
