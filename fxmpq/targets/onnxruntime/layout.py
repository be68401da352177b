"""Bringing stored weights into the layouts that kernels read, inside an ONNX file."""

from __future__ import annotations

import onnx_ir as ir

from fxmpq.targets.onnxruntime.blocks import scale_columns
from fxmpq.targets.onnxruntime.integer_constants import integer_constant
from fxmpq.targets.onnxruntime.rewrite_products import is_stored

_WEIGHTS = {"MatMulIntegerToFloat": 1, "MatMulNBits": 1, "GatherBlockQuantized": 0}
_SCALES = 2


def lay_out_weights(model: ir.Model) -> None:
    """Put nodes between stored weights and kernels that want another layout, in place.

    The runtime folds them when it loads the file. So a weight that several kernels read in
    several layouts, as one that an embedding shares with the head, is in the file once, and each
    scale once, whatever block size the kernel has:

    - `MatMulIntegerToFloat` gets codes `[in, out]` from those stored `[out, in]`;
    - `MatMulNBits` gets packed codes `[rows, blocks, bytes]` from `[rows, bytes]`;
    - the kernels on blocks get a scale for each of their blocks.

    Args:
        model: Whose kernels read the stored form.
    """
    for node in list(model.graph):
        if node.domain != "com.microsoft" or node.op_type not in _WEIGHTS:
            continue
        position = _WEIGHTS[node.op_type]
        if node.op_type == "MatMulIntegerToFloat" and not is_stored(node):
            continue
        rows, row_bytes = _shape(node, position)
        if node.op_type == "MatMulIntegerToFloat":
            _insert(model, node, position, "Transpose")
            continue
        bits, block = (int(node.attributes[name].as_int()) for name in ("bits", "block_size"))
        blocks = row_bytes // (block * bits // 8)
        if node.op_type == "MatMulNBits":
            _insert(model, node, position, "Reshape", [rows, blocks, row_bytes // blocks])
        _, scales = _shape(node, _SCALES)
        if scales != blocks:
            columns = scale_columns(blocks * block, block, scales)
            _insert(model, node, _SCALES, "Gather", columns)


def _insert(
    model: ir.Model,
    node: ir.Node,
    position: int,
    operator: str,
    integers: list[int] | None = None,
) -> None:
    """Have a node read a stored tensor through an operator on it, of which there is one."""
    stored = node.inputs[position]
    assert stored is not None
    name = f"{stored.name}_{operator.lower()}"
    found = [user.outputs[0] for user, _ in stored.uses() if user.outputs[0].name == name]
    if not found:
        inputs = [stored]
        if integers is not None:
            inputs.append(integer_constant(model, integers))
        attributes = {"axis": 1} if operator == "Gather" else {}
        new = ir.node(operator, inputs, attributes=attributes, name=name)
        new.outputs[0].name = name
        found = [new.outputs[0]]
        model.graph.insert_before(model.graph[0], new)
    node.replace_input_with(position, found[0])


def _shape(node: ir.Node, position: int) -> tuple[int, ...]:
    """Shape of a stored operand."""
    stored = node.inputs[position]
    assert stored is not None
    assert stored.const_value is not None
    return tuple(stored.const_value.shape.numpy())
