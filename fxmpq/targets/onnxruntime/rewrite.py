"""Rewriting a planned graph to integer operators."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.granularity import PerBlock
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import state_of
from fxmpq.quantizers.codes import nearest_codes
from fxmpq.quantizers.integer import per_channel
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.lowering import finish, lower, quantizer_of, store_tensor
from fxmpq.targets.onnxruntime import operators  # noqa: F401  (registers torch.ops.fxmpq)
from fxmpq.targets.onnxruntime.rewrite_blocks import rewrite_in_blocks
from fxmpq.targets.onnxruntime.rewrite_products import products_of, rewrite_products

_LARGEST_BIAS = 2**30
"""Half of what an `int32` accumulator holds; the products take the rest."""

_SMALLEST_SCALE = float(torch.finfo(torch.float32).tiny)

_FINE_BITS = 7
"""Width that codes of fewer bits are widened to. Two products of such codes with a byte add up
within an `int16`, in which CPUs without VNNI instructions add them."""


def to_integer_operators(graph: fx.GraphModule, rules: TargetRules) -> fx.GraphModule:
    """Replace quantizers and quantized layers by operators on integer codes.

    A linear layer becomes `integer_linear`, or `block_linear` where only its weights are
    quantized; an embedding becomes `integer_embedding`, or `block_embedding` where its scales are
    per block or its weight is also one of a `block_linear`; a product of two activations becomes
    `integer_product`. A convolution
    stays and reads dequantized codes on every side, which the runtime fuses. Behind an
    operator that commutes with quantization (max pooling) the same quantization is written
    again, so that the runtime sees codes on both sides of it.

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
    for node in list(rewritten.graph.nodes):
        quantizer = quantizer_of(rewritten, node)
        if isinstance(quantizer, ActivationQuantizer) and quantizer.active is not None:
            found = quantizer.ranges[quantizer.active.name]
            _insert_round_trip(rewritten, node, node.args[0], found, codes_of)
            rewritten.graph.erase_node(node)
        elif node.target in rules.through and node.args[0] in codes_of:
            _insert_round_trip(rewritten, node, node, codes_of[node.args[0]][1], codes_of)
    packed = _packed_weights(graph)
    for node in list(rewritten.graph.nodes):
        operator = OPERATORS.get(node.target)
        quantizer = quantizer_of(rewritten, argument(node, operator.weight)) if operator else None
        if operator is None or not isinstance(quantizer, WeightQuantizer):
            continue
        if quantizer.name in packed:
            rewrite_in_blocks(rewritten, node, quantizer)
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


def _stored_weight(
    graph: fx.GraphModule,
    node: fx.Node,
    quantizer: WeightQuantizer,
    codes: Tensor,
    scale: Tensor,
    factor: int = 1,
) -> tuple[fx.Node, fx.Node]:
    """Nodes that read a weight's codes, multiplied by `factor`, and the scales that go with it."""
    assert quantizer.active is not None
    width = f"{quantizer.active.bits}bit" + ("" if factor == 1 else str(factor))
    stored = store_tensor(graph, f"codes_{width}_{quantizer.name}", codes * factor, node)
    return stored, store_tensor(graph, f"scale_{quantizer.name}", scale, node)


def _codes(
    graph: fx.GraphModule, quantizer: WeightQuantizer, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A weight's codes and scales: its own, or the codes for another scale."""
    assert quantizer.active is not None
    weight = get_tensor(graph, quantizer.name).detach()
    if scale is None:
        return quantizer.codes(weight, quantizer.active), quantizer.scale(quantizer.active)
    # Rounding the quantized weight finds its own codes again wherever the scale is unchanged.
    rounded = quantizer.quantize(weight, quantizer.active)
    spread = per_channel(scale, weight.dim(), quantizer.axis)
    return nearest_codes(rounded, spread, quantizer.active), scale


def _bias_of(graph: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """A call's stored bias; `None` if it has none or computes it."""
    source = argument(node, OPERATORS[node.target].bias)
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    return get_tensor(graph, str(source.target))


def _rewrite_conv(
    graph: fx.GraphModule,
    node: fx.Node,
    quantizer: WeightQuantizer,
    codes_of: dict[fx.Node, tuple[fx.Node, ActivationRange]],
) -> None:
    bias, source = _bias_of(graph, node), node.args[0]
    input_codes = codes_of.get(source) if isinstance(source, fx.Node) else None
    codes, scale = _codes(graph, quantizer)
    factor = 1
    if bias is not None and input_codes is not None:
        assert quantizer.active is not None
        finest = 1 << max(_FINE_BITS - quantizer.active.bits, 0)
        factor, coarse = _units_that_hold(bias, codes, scale, input_codes[1].scale, finest)
        codes, scale = _codes(graph, quantizer, coarse)
        scale = scale / factor
    dequantize = torch.ops.fxmpq.dequantize_channels.default
    stored = _stored_weight(graph, node, quantizer, codes, scale, factor)
    with graph.graph.inserting_before(node):
        node.update_arg(1, graph.graph.call_function(dequantize, stored))
    if bias is None or input_codes is None:
        return
    # The integer kernel adds the bias to its accumulator, so it is stored in its units.
    step = scale.double() * input_codes[1].scale
    units = torch.round(bias.double() / step).to(torch.int32)
    name = f"{quantizer.name}.{node.name}"
    stored_units = store_tensor(graph, f"bias_codes_{name}", units, node)
    steps = store_tensor(graph, f"bias_scale_{name}", step.float(), node)
    with graph.graph.inserting_before(node):
        node.update_arg(2, graph.graph.call_function(dequantize, (stored_units, steps)))


def _units_that_hold(
    bias: Tensor, codes: Tensor, scale: Tensor, input_scale: float, finest: int
) -> tuple[int, Tensor]:
    """A factor for the codes and scales for them, so that the bias is fine and fits an `int32`.

    A bias is rounded to units of weight scale times input scale, which for 2-bit weights are as
    coarse as the weights themselves. Codes multiplied by `f` beside scales divided by `f` mean
    the same, and have units `f` times finer. A channel of nearly dead weights has a scale so
    small that its bias would overflow; a larger one loses nothing that shows beside that bias.
    A channel of zeros may have any scale, and takes the one that gives its bias the most digits.

    Args:
        bias: `[channels]`.
        codes: Of the weights, channels first.
        scale: `[channels]`.
        input_scale: Of the layer's input.
        finest: The largest factor that the codes' width leaves room for, a power of two.

    Returns:
        The factor `f`, and the scales of the codes before they are multiplied by it.
    """
    needed = (bias.double().abs() / (input_scale * _LARGEST_BIAS)).clamp(min=_SMALLEST_SCALE)
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
    input_codes, found = codes_of[source]
    codes, scale = _codes(graph, quantizer)
    stored = _stored_weight(graph, node, quantizer, codes, scale)
    bias = argument(node, OPERATORS[node.target].bias)
    if not isinstance(bias, fx.Node) or bias.op == "get_attr":
        found_bias = _bias_of(graph, node)
        zeros = torch.zeros(len(get_tensor(graph, quantizer.name)))
        values = zeros if found_bias is None else found_bias
        bias = store_tensor(graph, f"bias_{quantizer.name}.{node.name}", values, node)
    with graph.graph.inserting_before(node):
        linear = graph.graph.call_function(
            torch.ops.fxmpq.integer_linear.default,
            (input_codes, found.scale, found.zero_point, *stored, bias),
        )
    node.replace_all_uses_with(linear)
    graph.graph.erase_node(node)


def _rewrite_embedding(
    graph: fx.GraphModule,
    node: fx.Node,
    quantizer: WeightQuantizer,
    codes_of: dict[fx.Node, tuple[fx.Node, ActivationRange]],
) -> None:
    stored = _stored_weight(graph, node, quantizer, *_codes(graph, quantizer))
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
    stored = _stored_weight(graph, node, quantizer, *_codes(graph, quantizer))
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
