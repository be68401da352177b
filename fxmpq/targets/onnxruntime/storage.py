"""Storing weight codes in fewer than eight bits inside an ONNX file."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import onnx_ir as ir

_CODES = re.compile(r"codes_(?P<bits>[24])bit(?P<factor>\d*)_")
_STORED = {2: (ir.DataType.INT2, ml_dtypes.int2), 4: (ir.DataType.INT4, ml_dtypes.int4)}
OPSET = {2: 25, 4: 21, 8: 21}
"""First ONNX opset whose `Cast` takes codes of a width."""

IR_VERSION = {2: 13, 4: 10, 8: 10}
"""First ONNX file version that can hold codes of a width."""


def narrow_codes(model: ir.Model) -> None:
    """Store 4- and 2-bit codes as such, with a cast to `int8` behind them, in place.

    The runtime folds the cast when it loads the file, so the kernels see `int8` and only the
    file is smaller. Codes that are multiples of a factor are stored divided by it, and multiplied
    again behind the cast.

    Args:
        model: Whose code initializers are `int8` and named `codes_<bits>bit_...` or
            `codes_<bits>bit<factor>_...`.
    """
    widths = {8}
    for name, value in list(model.graph.initializers.items()):
        match = _CODES.match(name)
        if match is None or value.const_value is None:
            continue
        bits, factor = int(match["bits"]), int(match["factor"] or 1)
        widths.add(bits)
        dtype, stored = _STORED[bits]
        codes = (value.const_value.numpy() // factor).astype(stored)
        users = list(value.uses())
        nodes = _widening(model, value, factor)
        for user, position in users:
            user.replace_input_with(position, nodes[-1].outputs[0])
        value.const_value = ir.Tensor(codes, dtype=dtype, name=name)
        value.type = ir.TensorType(dtype)
        model.graph.insert_before(model.graph[0], nodes)
    narrowest = min(widths)
    model.graph.opset_imports[""] = max(model.opset_imports[""], OPSET[narrowest])
    model.ir_version = max(model.ir_version, IR_VERSION[narrowest])


def _widening(model: ir.Model, codes: ir.Value, factor: int) -> list[ir.Node]:
    """Nodes from narrow codes to `int8`, which the runtime folds; only `int32` has a product."""
    if factor == 1:
        return [_node("Cast", [codes], f"{codes.name}_wide", ir.DataType.INT8)]
    first = _node("Cast", [codes], f"{codes.name}_narrow", ir.DataType.INT32)
    operands = [first.outputs[0], _factor(model, factor)]
    product = _node("Mul", operands, f"{codes.name}_times", None)
    last = _node("Cast", [product.outputs[0]], f"{codes.name}_wide", ir.DataType.INT8)
    return [first, product, last]


def _node(operator: str, inputs: list[ir.Value], result: str, dtype: ir.DataType | None) -> ir.Node:
    node = ir.node(operator, inputs, attributes=None if dtype is None else {"to": dtype})
    node.outputs[0].name = result
    return node


def _factor(model: ir.Model, factor: int) -> ir.Value:
    """An initializer with a factor, of which there is one."""
    name = f"factor_{factor}"
    found = model.graph.initializers.get(name)
    if found is None:
        tensor = ir.tensor(np.array(factor, np.int32), name=name)
        found = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.INT32),
            shape=ir.Shape([]),
            const_value=tensor,
        )
        model.graph.initializers[name] = found
    return found
