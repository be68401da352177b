"""Keeping float layers float between integer ones, inside an ONNX file."""

from __future__ import annotations

import onnx_ir as ir

_QUANTIZED_BY_THE_RUNTIME = frozenset({"Conv", "ConvTranspose", "Gemm"})


def keep_float_layers(model: ir.Model) -> None:
    """Put a node that does nothing between codes and each layer with a float weight, in place.

    ONNX Runtime takes a float layer that reads dequantized codes, and whose result is quantized,
    for one that somebody forgot to quantize: it rounds the weight to 8 bits when it loads the
    file and runs an integer kernel. It does not where the layer reads something else: here the
    maximum of a single tensor, which no optimization removes and which costs a copy.

    Args:
        model: Whose float weights are initializers.
    """
    for node in list(model.graph):
        if node.domain or node.op_type not in _QUANTIZED_BY_THE_RUNTIME:
            continue
        source, weight = node.inputs[0], node.inputs[1]
        is_float = weight is not None and weight.is_initializer()
        if source is None or not is_float or not _is_dequantized(source):
            continue
        copy = ir.node("Max", [source])
        copy.outputs[0].name = f"{source.name}_for_{node.name}"
        copy.outputs[0].type, copy.outputs[0].shape = source.type, source.shape
        model.graph.insert_before(node, copy)
        node.replace_input_with(0, copy.outputs[0])


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
