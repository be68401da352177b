"""What the bytes of an ONNX file are spent on."""

from __future__ import annotations

import re

import onnx
from torch import fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.state import state_of
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel
from fxmpq.targets.target import FileParts

_STORED_WEIGHT = re.compile(r"(?:codes_\d+bit\d*|codes|packed_\d+bit|scale)_(?P<weight>.+)")
"""How a quantized weight and its scales are named; underscores behind it tell several apart."""


def onnx_parts(proto: onnx.ModelProto, graph: fx.GraphModule) -> FileParts:
    """Measure the parts of a model that is about to be written.

    Args:
        proto: The model, with all data inside.
        graph: The planned graph that it was made of.

    Returns:
        Bytes; they add up to the file's. Numbers that quantize activations are part of the graph.
    """
    names = {layer.weight for group in state_of(graph).groups for layer in group.layers}
    flat_names = {_flat(name) for name in names}
    own = {name for name, _ in (*graph.named_parameters(), *graph.named_buffers())}
    stored = {entry.name: entry for entry in proto.graph.initializer}
    # The exporter transposes float weights where a product of matrices wants that.
    written = WrittenModel(proto)
    for weight in names - set(stored):
        names.update(written.stored_transposes(get_tensor(graph, weight)))
    weights = parameters = 0
    for name, entry in stored.items():
        match = _STORED_WEIGHT.fullmatch(name)
        if name in names or (match is not None and _flat(match["weight"]) in flat_names):
            weights += len(entry.raw_data)
        elif entry.dims and (name in own or _is_table(entry)):
            parameters += len(entry.raw_data)
    return FileParts(weights, parameters, proto.ByteSize() - weights - parameters)


def _is_table(entry: onnx.TensorProto) -> bool:
    """Whether a tensor that the exporter named is the model's: shapes are lists of integers."""
    return entry.data_type == onnx.TensorProto.FLOAT or len(entry.dims) > 1


def _flat(weight: str) -> str:
    """A weight's name as it is part of a stored tensor's."""
    return weight.replace(".", "_").rstrip("_")
