"""Storing weight codes in fewer than eight bits inside an ONNX file."""

from __future__ import annotations

import re

import ml_dtypes
import onnx_ir as ir

_CODES = re.compile(r"codes_(?P<bits>[24])bit_")
_STORED = {2: (ir.DataType.INT2, ml_dtypes.int2), 4: (ir.DataType.INT4, ml_dtypes.int4)}
OPSET = {2: 25, 4: 21, 8: 21}
"""First ONNX opset whose `Cast` takes codes of a width."""

IR_VERSION = {2: 13, 4: 10, 8: 10}
"""First ONNX file version that can hold codes of a width."""


def narrow_codes(model: ir.Model) -> None:
    """Store 4- and 2-bit codes as such, with a cast to `int8` behind them, in place.

    The runtime folds the cast when it loads the file, so the kernels see `int8` and only the
    file is smaller.

    Args:
        model: Whose code initializers are `int8` and named `codes_<bits>bit_...`.
    """
    widths = {8}
    for name, value in list(model.graph.initializers.items()):
        match = _CODES.search(name)
        if match is None or value.const_value is None:
            continue
        bits = int(match["bits"])
        widths.add(bits)
        dtype, stored = _STORED[bits]
        cast = ir.node("Cast", [], attributes={"to": ir.DataType.INT8}, name=f"widen_{name}")
        wide = cast.outputs[0]
        wide.name, wide.type, wide.shape = f"{name}_int8", value.type, value.shape
        for user, position in list(value.uses()):
            user.replace_input_with(position, wide)
        codes = value.const_value.numpy().astype(stored)
        value.const_value = ir.Tensor(codes, dtype=dtype, name=name)
        value.type = ir.TensorType(dtype)
        cast.resize_inputs(1)
        cast.replace_input_with(0, value)
        model.graph.insert_before(model.graph[0], cast)
    narrowest = min(widths)
    model.graph.opset_imports[""] = max(model.opset_imports[""], OPSET[narrowest])
    model.ir_version = max(model.ir_version, IR_VERSION[narrowest])
