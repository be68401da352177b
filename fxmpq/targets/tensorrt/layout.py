"""What an exported model needs before it is written: narrow codes, dequantized for each reader."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from fxmpq.targets.tensorrt.rewrite import FOUR_BITS

_IR_VERSION = 10
"""The first ONNX file version that holds codes of 4 bits."""


def store_four_bits(model: ir.Model) -> None:
    """Store codes of 4 bits as `INT4`: two a byte, the first in the lower half. In place.

    Args:
        model: Whose initializers of such codes are `int8`, with names that begin as `FOUR_BITS`.
    """
    for name, value in model.graph.initializers.items():
        if not name.startswith(FOUR_BITS) or value.const_value is None:
            continue
        codes = value.const_value.numpy().astype(np.int8).astype(ml_dtypes.int4)
        value.const_value = ir.Tensor(codes, dtype=ir.DataType.INT4, name=name)
        value.type = ir.TensorType(ir.DataType.INT4)
        model.ir_version = max(model.ir_version, _IR_VERSION)


def dequantize_at_each_reader(model: ir.Model) -> None:
    """Give each node that reads dequantized codes a `DequantizeLinear` of its own, in place.

    The exporter makes one of equal nodes; a layer is recognised by those that only it reads.

    Args:
        model: Any.
    """
    made = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    for count, node in enumerate(made):
        (real,) = node.outputs
        for further, (reader, position) in enumerate(list(real.uses())[1:], start=1):
            other = ir.node("DequantizeLinear", node.inputs, attributes=node.attributes)
            (own,) = other.outputs
            own.type, own.shape = real.type, real.shape
            own.name = other.name = f"dequantized_{count}_again_{further}"
            model.graph.insert_before(reader, other)
            reader.replace_input_with(position, own)
