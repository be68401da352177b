"""The quantize-dequantize form that TensorRT takes: symmetric, with layers between stored codes."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.errors import TargetError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.granularity import PerBlock, PerTensor
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.state import Layer
from fxmpq.quantizers.grids import middle_code
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.targets.lowering import store_tensor
from fxmpq.targets.qdq import put_instead, rewrite_quantizers, stored_codes
from fxmpq.targets.tensorrt import operators  # noqa: F401  (registers torch.ops.fxmpq)

aten = torch.ops.aten
own = torch.ops.fxmpq

FOUR_BITS = "codes_4bit_"
"""How names of codes begin that are to be stored in 4 bits."""


def to_symmetric_qdq(graph: fx.GraphModule) -> fx.GraphModule:
    """Replace a planned graph's quantizers by `symmetric_codes` and `symmetric_numbers`.

    A layer reads its weight dequantized from codes, with nothing in between: those of a linear
    layer are stored `[in, out]`, and it becomes a product of matrices and a sum with its bias.
    Biases stay float.

    Args:
        graph: With chosen precisions of `int8`, E4M3 and, for weights in blocks, `int4`; not
            changed.

    Returns:
        A graph without modules.

    Raises:
        TargetError: If a tensor is stored with a zero point, naming it.
    """
    return rewrite_quantizers(graph, _round, _store)


def _round(
    graph: fx.GraphModule, node: fx.Node, quantizer: ActivationQuantizer, index: int
) -> None:
    """Replace a quantizer by codes and the numbers that they stand for."""
    found = quantizer.active
    assert found is not None
    grid = quantizer.ranges[found.name]
    if grid.zero_point != middle_code(found):
        raise TargetError(
            f"{quantizer.name} is stored with the zero point {grid.zero_point}, where TensorRT has "
            "none; the target's symmetric_inputs_of must name what reads it"
        )
    dtype = torch.int8 if found.is_integer else torch.float8_e4m3fn
    scale, zero = torch.tensor(grid.scale), torch.zeros((), dtype=dtype)
    scales = store_tensor(graph, f"activation_scale_{index}", scale, node)
    zeros = store_tensor(graph, f"zero_{str(dtype).removeprefix('torch.')}", zero, node)
    call = graph.graph.call_function
    with graph.graph.inserting_before(node):
        codes = call(own.symmetric_codes.default, (node.args[0], scales, zeros))
        real = call(own.symmetric_numbers.default, (codes, scales, 1, 0))
    put_instead(graph, node, real)


def _store(
    graph: fx.GraphModule,
    node: fx.Node,
    place: tuple[Layer, Precision],
    quantizer: WeightQuantizer,
    index: int,
) -> None:
    """Let a layer read its weight dequantized from codes."""
    operator = OPERATORS[node.target]
    codes, scale, found = stored_codes(graph, quantizer)
    if place[0].kind != "linear":
        real = _numbers(graph, node, quantizer.name, codes, scale, found, quantizer.axis)
        node.update_arg(operator.weight, real)
        return
    scale = scale.T if scale.dim() == 2 else scale
    real = _numbers(graph, node, quantizer.name, codes.T, scale, found, 1 - quantizer.axis)
    bias = argument(node, operator.bias)
    assert bias is None or isinstance(bias, fx.Node)
    with graph.graph.inserting_before(node):
        result = graph.graph.call_function(aten.matmul.default, (node.args[0], real))
        if bias is not None:
            result = graph.graph.call_function(aten.add.Tensor, (result, bias))
    put_instead(graph, node, result)


def _numbers(
    graph: fx.GraphModule,
    node: fx.Node,
    name: str,
    codes: Tensor,
    scale: Tensor,
    found: NumberFormat,
    channel_axis: int,
) -> fx.Node:
    """Store codes and scales, and read them as real numbers in front of a node.

    Args:
        graph: Changed in place.
        node: Where to read them.
        name: The weight's name.
        codes: In the layout to store; integers, or bit patterns of E4M3.
        scale: `[1]`, `[channels]`, or that of the codes with one axis in blocks.
        found: Their format.
        channel_axis: Of the codes.
    """
    axis, block, kind = channel_axis, 0, "codes_"
    if isinstance(found.granularity, PerBlock):
        axis, block = 1 - channel_axis, found.granularity.size
    elif isinstance(found.granularity, PerTensor):
        scale = scale.reshape(())
    if found.bits == 4:
        kind = FOUR_BITS
    if not found.is_integer:
        codes = codes.contiguous().view(torch.float8_e4m3fn)
    stored = [
        store_tensor(graph, f"{prefix}{name}", tensor, node)
        for prefix, tensor in ((kind, codes), ("scale_", scale))
    ]
    numbers = own.symmetric_numbers.default
    with graph.graph.inserting_before(node):
        return graph.graph.call_function(numbers, (*stored, axis, block))
