"""What the bytes of an ONNX file are spent on."""

from __future__ import annotations

import onnx
from torch import fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.state import state_of
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel
from fxmpq.targets.target import FileParts

_STORED_WEIGHTS = ("codes_", "packed_", "scale_")
"""How names of quantized weights and their scales begin."""


def onnx_parts(proto: onnx.ModelProto, graph: fx.GraphModule) -> FileParts:
    """Measure the parts of a model that is about to be written.

    Args:
        proto: The model, with all data inside.
        graph: The planned graph that it was made of.

    Returns:
        Bytes; they add up to the file's. Numbers that quantize activations are part of the graph.
    """
    names = {layer.weight for group in state_of(graph).groups for layer in group.layers}
    stored = {entry.name: entry for entry in proto.graph.initializer}
    # The exporter transposes float weights where a product of matrices wants that.
    written = WrittenModel(proto)
    for weight in names - set(stored):
        names.update(written.stored_transposes(get_tensor(graph, weight)))
    weights = parameters = 0
    for name, entry in stored.items():
        if name.startswith(_STORED_WEIGHTS) or name in names:
            weights += len(entry.raw_data)
        elif entry.dims and entry.data_type == onnx.TensorProto.FLOAT:
            parameters += len(entry.raw_data)
    return FileParts(weights, parameters, proto.ByteSize() - weights - parameters)
