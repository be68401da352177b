"""Rewriting a planned graph to integer operators."""

from __future__ import annotations

from operator import getitem

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxmpq.granularity import PerBlock
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import state_of
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.lowering import finish, lower, quantizer_of, store_tensor
from fxmpq.targets.onnxruntime import (
    FINE_BITS,
    operators,  # noqa: F401  (registers torch.ops.fxmpq)
)
from fxmpq.targets.onnxruntime.layer_operands import bias_of, stored_weight, weight_codes
from fxmpq.targets.onnxruntime.rewrite_blocks import rewrite_in_blocks
from fxmpq.targets.onnxruntime.rewrite_products import products_of, rewrite_products

_OPS = torch.ops.fxmpq

_LARGEST_BIAS = 2**30
"""Half of what an `int32` accumulator holds; the products take the rest."""

_SMALLEST_SCALE = 2 * float(torch.finfo(torch.float32).tiny)


def to_integer_operators(graph: fx.GraphModule, rules: TargetRules) -> fx.GraphModule:
    """Replace quantizers and quantized layers by operators on integer codes.

    A linear layer becomes `integer_linear`, or `dynamic_linear` where its input's range is found
    at every run (once for all layers that read it), or `block_linear` where only its weights are
    quantized; an embedding becomes `integer_embedding`, or `block_embedding` where its scales are
    per block or its weight is also one of a `block_linear`; a product of two activations becomes
    `integer_product`. A convolution stays and reads dequantized codes on every side, which the
    runtime fuses; on float input only its weights are dequantized. Behind an operator that commutes
    with quantization (max pooling) the same quantization is written again, so that the runtime
    sees codes on both sides of it.

    Args:
        graph: With chosen precisions; not changed.
        rules: The target's.

    Returns:
        A graph without modules; weight codes are `int8` buffers named
        `codes_<bits>bit_<weight>`, or `codes_<bits>bit<factor>_<weight>` if they are multiples
        of a factor, or packed `uint8` buffers named `packed_<bits>bit_<weight>`.
    """
    rewritten = lower(graph)
    # Readers of quantized tensors, by the node whose value is back in real numbers.
    codes_of: dict[fx.Node, tuple[fx.Node, ActivationRange]] = {}
    dynamic: dict[object, tuple[fx.Node, ...]] = {}
    for node in list(rewritten.graph.nodes):
        quantizer = quantizer_of(rewritten, node)
        if isinstance(quantizer, ActivationQuantizer) and quantizer.active is not None:
            if quantizer.active.dynamic is not None:
                operands = _found_at_run_time(rewritten, node)
                dynamic[_dequantize_instead(rewritten, node, operands)] = operands
                continue
            found = quantizer.ranges[quantizer.active.name]
            _insert_round_trip(rewritten, node, node.args[0], found, codes_of)
            rewritten.graph.erase_node(node)
        elif node.target in rules.through and node.args[0] in codes_of:
            _insert_round_trip(rewritten, node, node, codes_of[node.args[0]][1], codes_of)
        elif node.target in rules.through and node.args[0] in dynamic:
            operands = _moved_codes(rewritten, node, dynamic[node.args[0]])
            dynamic[_dequantize_instead(rewritten, node, operands)] = operands
    packed = _packed_weights(graph)
    for node in list(rewritten.graph.nodes):
        operator = OPERATORS.get(node.target)
        quantizer = quantizer_of(rewritten, argument(node, operator.weight)) if operator else None
        if operator is None or not isinstance(quantizer, WeightQuantizer):
            continue
        if quantizer.name in packed:
            rewrite_in_blocks(rewritten, node, quantizer)
        elif operator.kind == "linear" and node.args[0] in dynamic:
            linear = _OPS.dynamic_linear.default
            _put_linear(rewritten, node, quantizer, linear, dynamic[node.args[0]])
        else:
            _REWRITES[operator.kind](rewritten, node, quantizer, codes_of)
    rewrite_products(rewritten, products_of(graph), codes_of)
    finish(rewritten)
    return rewritten


def _packed_weights(graph: fx.GraphModule) -> frozenset[str]:
    """Names of the weights that are packed: those in blocks, and of weight-only linear layers.

    An embedding may share its weight with a linear layer, and the file then holds it once.
    """
    state = state_of(graph)
    found: set[str] = set()
    for group in state.groups:
        precision = group.candidate(state.choices[group.name])
        if precision.weight is None:
            continue
        is_blocked = isinstance(precision.weight.granularity, PerBlock)
        for layer in group.layers:
            if is_blocked or (layer.kind == "linear" and precision.activation is None):
                found.add(layer.weight)
    return frozenset(found)


def _insert_round_trip(
    graph: fx.GraphModule,
    node: fx.Node,
    source: fx.node.Argument,
    found: ActivationRange,
    codes_of: dict[fx.Node, tuple[fx.Node, ActivationRange]],
) -> None:
    """Quantize and dequantize `source` behind `node`, whose readers then read the result."""
    readers = list(node.users)
    grid = (found.scale, found.zero_point)
    with graph.graph.inserting_after(node):
        codes = graph.graph.call_function(torch.ops.fxmpq.quantize.default, (source, *grid))
    with graph.graph.inserting_after(codes):
        real = graph.graph.call_function(torch.ops.fxmpq.dequantize.default, (codes, *grid))
    for reader in readers:
        reader.replace_input_with(node, real)
    codes_of[real] = (codes, found)


def _found_at_run_time(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, ...]:
    """Codes, scale and zero point of what a quantizer reads, on the grid of each run."""
    call = graph.graph.call_function
    with graph.graph.inserting_before(node):
        found = call(_OPS.dynamic_quantize.default, (node.args[0],))
        return tuple(call(getitem, (found, index)) for index in range(3))


def _moved_codes(
    graph: fx.GraphModule, node: fx.Node, operands: tuple[fx.Node, ...]
) -> tuple[fx.Node, ...]:
    """The same behind an operator that commutes with quantization."""
    assert callable(node.target)
    with graph.graph.inserting_before(node):
        args = (operands[0], *node.args[1:])
        return graph.graph.call_function(node.target, args, node.kwargs), *operands[1:]


def _dequantize_instead(
    graph: fx.GraphModule, node: fx.Node, operands: tuple[fx.Node, ...]
) -> fx.Node:
    """Put real numbers in a node's place, made of codes on the grid of each run."""
    with graph.graph.inserting_before(node):
        real = graph.graph.call_function(_OPS.dynamic_dequantize.default, operands)
    node.replace_all_uses_with(real)
    graph.graph.erase_node(node)
    return real


def _rewrite_conv(
    graph: fx.GraphModule,
    node: fx.Node,
    quantizer: WeightQuantizer,
    codes_of: dict[fx.Node, tuple[fx.Node, ActivationRange]],
) -> None:
    bias, source = bias_of(graph, node), node.args[0]
    input_codes = codes_of.get(source) if isinstance(source, fx.Node) else None
    if input_codes is None:
        _rewrite_stored(graph, node, quantizer, codes_of)
        return
    codes, scale = weight_codes(graph, quantizer)
    factor = 1
    if bias is not None:
        assert quantizer.active is not None
        finest = 1 << max(FINE_BITS - quantizer.active.bits, 0)
        factor, coarse = _units_that_hold(bias, codes, scale, input_codes[1].scale, finest)
        codes, scale = weight_codes(graph, quantizer, coarse)
        scale = scale / factor
    dequantize = torch.ops.fxmpq.dequantize_channels.default
    stored = stored_weight(graph, node, quantizer, codes, scale, factor)
    with graph.graph.inserting_before(node):
        node.update_arg(1, graph.graph.call_function(dequantize, stored))


def _units_that_hold(
    bias: Tensor, codes: Tensor, scale: Tensor, input_scale: float, finest: int
) -> tuple[int, Tensor]:
    """A factor for the codes and scales for them, so that the bias is fine and fits an `int32`.

    The runtime rounds a bias to units of weight scale times input scale when it loads the file,
    which for 2-bit weights are as coarse as the weights themselves. Codes multiplied by `f`
    beside scales divided by `f` mean the same, and have units `f` times finer. A channel of
    nearly dead weights has a scale so small that its bias would overflow; a larger one loses
    nothing that shows beside that bias. A channel of zeros may have any scale, and takes the one
    that gives its bias the most digits.

    Args:
        bias: `[channels]`.
        codes: Of the weights, channels first.
        scale: `[channels]`.
        input_scale: Of the layer's input.
        finest: The largest factor that the codes' width leaves room for, a power of two.

    Returns:
        The factor `f`, and the scales of the codes before they are multiplied by it.
    """
    # The units are divided by, so they must not be lost in `float32` either.
    smallest = _SMALLEST_SCALE / min(input_scale, 1.0)
    needed = (bias.double().abs() / (input_scale * _LARGEST_BIAS)).clamp(min=smallest)
    is_dead = (codes == 0).flatten(1).all(dim=1)
    factor = finest
    while factor > 1 and bool(((needed * factor > scale) & ~is_dead).any()):
        factor //= 2
    held = torch.maximum(scale.double(), needed * factor)
    return factor, torch.where(is_dead, needed * factor, held).float()


def _rewrite_linear(
    graph: fx.GraphModule,
    node: fx.Node,
    quantizer: WeightQuantizer,
    codes_of: dict[fx.Node, tuple[fx.Node, ActivationRange]],
) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    codes, found = codes_of[source]
    operands = (codes, found.scale, found.zero_point)
    _put_linear(graph, node, quantizer, _OPS.integer_linear.default, operands)


def _put_linear(
    graph: fx.GraphModule,
    node: fx.Node,
    quantizer: WeightQuantizer,
    linear: OpOverload,
    operands: tuple[fx.node.Argument, ...],
) -> None:
    """Replace a layer by an operator on its input's codes, with their scale and zero point."""
    stored = stored_weight(graph, node, quantizer, *weight_codes(graph, quantizer))
    bias = argument(node, OPERATORS[node.target].bias)
    if not isinstance(bias, fx.Node) or bias.op == "get_attr":
        found_bias = bias_of(graph, node)
        zeros = torch.zeros(len(get_tensor(graph, quantizer.name)))
        values = zeros if found_bias is None else found_bias
        bias = store_tensor(graph, f"bias_{quantizer.name}", values, node)
    with graph.graph.inserting_before(node):
        result = graph.graph.call_function(linear, (*operands, *stored, bias))
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)


def _rewrite_embedding(
    graph: fx.GraphModule,
    node: fx.Node,
    quantizer: WeightQuantizer,
    codes_of: dict[fx.Node, tuple[fx.Node, ActivationRange]],
) -> None:
    stored = stored_weight(graph, node, quantizer, *weight_codes(graph, quantizer))
    with graph.graph.inserting_before(node):
        rows = graph.graph.call_function(
            torch.ops.fxmpq.integer_embedding.default, (node.args[1], *stored)
        )
    node.replace_all_uses_with(rows)
    graph.graph.erase_node(node)


def _rewrite_stored(
    graph: fx.GraphModule,
    node: fx.Node,
    quantizer: WeightQuantizer,
    codes_of: dict[fx.Node, tuple[fx.Node, ActivationRange]],
) -> None:
    """Let an operator without an integer kernel read a weight that is stored as codes."""
    stored = stored_weight(graph, node, quantizer, *weight_codes(graph, quantizer))
    dequantize = torch.ops.fxmpq.dequantize_channels.default
    with graph.graph.inserting_before(node):
        real = graph.graph.call_function(dequantize, (*stored, quantizer.axis))
    node.update_arg(OPERATORS[node.target].weight, real)


_REWRITES = {
    "conv": _rewrite_conv,
    "linear": _rewrite_linear,
    "embedding": _rewrite_embedding,
    "conv_transpose": _rewrite_stored,
    "experts": _rewrite_stored,
}
