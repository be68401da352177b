"""Weights that are only stored in codes: dequantized once, when the runtime loads the file."""

from __future__ import annotations

import onnx_ir as ir

from fxmpq.targets.onnxruntime.integer_constants import integer_constant


def dequantize_when_loaded(model: ir.Model) -> None:
    """Write a stored weight's dequantization as a cast and a product, in place.

    The runtime never folds `DequantizeLinear`, which would take its time in every run. A cast and
    a product of constants are folded when it loads the file, so that an operator without an
    integer kernel runs as fast as with float weights, from a file as small as its codes.

    Args:
        model: Whose weights are dequantized by `DequantizeLinear` on `int8` initializers.
    """
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or node.domain or not _is_weight(node):
            continue
        result = node.outputs[0]
        if any(_is_integer(user) for user, _ in result.uses()):
            continue
        codes, scale = node.inputs[0], node.inputs[1]
        assert codes is not None
        assert scale is not None
        spread = _spread(model, scale, codes, node.attributes.get_int("axis", 1))
        cast = ir.node("Cast", [codes], attributes={"to": ir.DataType.FLOAT})
        product = ir.node("Mul", [cast.outputs[0], spread.outputs[0]])
        spread.outputs[0].name = f"{result.name}_scale"
        cast.outputs[0].name = f"{result.name}_float"
        name, real = result.name, product.outputs[0]
        for user, position in list(result.uses()):
            user.replace_input_with(position, real)
        model.graph.insert_before(node, [spread, cast, product])
        model.graph.remove(node, safe=True)
        real.name = name


def _is_integer(node: ir.Node) -> bool:
    """Whether the runtime runs an operator on integers, if its weight is in codes as well."""
    source = node.inputs[0]
    producer = None if source is None else source.producer()
    return (
        node.op_type == "Conv" and producer is not None and producer.op_type == "DequantizeLinear"
    )


def _is_weight(node: ir.Node) -> bool:
    codes, scale = node.inputs[0], node.inputs[1]
    if codes is None or scale is None or codes.const_value is None:
        return False
    return codes.dtype is ir.DataType.INT8 and scale.is_initializer()


def _spread(model: ir.Model, scale: ir.Value, codes: ir.Value, axis: int) -> ir.Node:
    """A node that gives the scales, one a channel, a shape that broadcasts against the codes."""
    assert codes.const_value is not None
    others = [other for other in range(len(codes.const_value.shape)) if other != axis]
    return ir.node("Unsqueeze", [scale, integer_constant(model, others)])
