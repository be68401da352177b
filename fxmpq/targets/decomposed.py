"""PyTorch's reference form of a quantized graph: codes, and real numbers made of them at each use.

Layers stay the ATen operators they were. Before each stands a `dequantize` of its own, so that a
compiler finds a layer, what it reads and nothing else in its way, and runs all of it on integers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

# Defines the operators `quantized_decomposed::*`.
import torch.ao.quantization.fx._decomposed
from torch import fx

from fxmpq.formats import NumberFormat
from fxmpq.granularity import PerBlock
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.state import Layer
from fxmpq.targets.lowering import finish, store_tensor
from fxmpq.targets.qdq import layers_of, to_qdq

quantized_decomposed = torch.ops.quantized_decomposed
_QUANTIZE = quantized_decomposed.quantize_per_tensor.default


def to_decomposed(graph: fx.GraphModule, *, signed: bool) -> fx.GraphModule:
    """Replace a planned graph's quantizers by the operators `quantized_decomposed::*`.

    A quantized activation becomes one `quantize_per_tensor`, and a `dequantize_per_tensor` for
    each node that reads it; one whose rows find their ranges at every run
    `choose_qparams_per_token_asymmetric`, `quantize_per_token` and `dequantize_per_token`, always
    of `int8`. A weight becomes `int8` codes behind `dequantize_per_channel`, with
    the width's own `quant_min` and `quant_max` and zero points of 0; a scale of the whole tensor
    is repeated for each channel. Those of a linear layer in blocks are behind
    `dequantize_per_channel_group`, if the blocks are whole. Other weights in blocks and embeddings
    are as in `to_qdq`: the codes are cast and multiplied by their scales, an embedding's after
    they are looked up. Biases stay float, and float weights that nothing reads are gone. On the
    CPU the graph computes the same bits as the simulation, but for ranges found at every run,
    which torch finds in `float64`.

    Args:
        graph: With chosen precisions, all of integers of at most 8 bits; not changed.
        signed: Whether activations' codes are `int8`, `2^(bits-1)` less than those of the plan,
            and so are their zero points; else they are `uint8`.

    Returns:
        A graph without modules. Nodes that compute layers keep their names; `quantize_per_tensor`
        nodes have in `meta["quantizer"]` whose they are, a place in `active_quantizers(graph)`.

    Raises:
        TargetError: If a range that is found at every run is not of rows, or symmetric.

    Examples:
        >>> import fxmpq
        >>> x = torch.tensor([[0.0, 2.55]])
        >>> graph = fxmpq.prepare(fxmpq.trace(torch.nn.Linear(2, 2), x), "reference")
        >>> graph = fxmpq.calibrate(graph, [x], progress=False)
        >>> planned = fxmpq.apply(graph, fxmpq.cost(graph).uniform("w4a8"))
        >>> for node in to_decomposed(planned, signed=True).graph.nodes:
        ...     if node.op == "call_function":
        ...         print(node.name)
        quantize_per_tensor_default
        dequantize_per_channel_default
        dequantize_per_tensor_default
        linear
    """
    rewritten = to_qdq(graph)
    layers = layers_of(graph)
    for node in list(rewritten.graph.nodes):
        if node.target is torch.ops.fxmpq.fake_quantize.default:
            _hand_out_codes(rewritten, node, signed=signed)
        elif node.target is torch.ops.fxmpq.fake_quantize_rows.default:
            _hand_out_rows(rewritten, node)
        elif node.target is torch.ops.fxmpq.widened_codes.default:
            layer, precision = layers[node.args[2]]
            assert precision.weight is not None
            is_blocked = isinstance(precision.weight.granularity, PerBlock)
            if layer.kind != "embedding" and not is_blocked:
                _dequantize_weight(rewritten, node, precision.weight)
            elif layer.kind == "linear" and is_blocked:
                _dequantize_blocks(rewritten, node, layer, precision.weight)
            node.replace_all_uses_with(node.args[0])
    finish(rewritten)
    return rewritten


def quantize_again(graph: fx.GraphModule, node: fx.Node) -> None:
    """Let readers of a value that lies on a grid read it through the codes of that grid.

    Args:
        graph: From `to_decomposed`; changed in place.
        node: Moves or picks among what a `dequantize_per_tensor` gives, as `max_pool2d` does.
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)
    readers = list(node.users)
    with graph.graph.inserting_after(node):
        codes = graph.graph.call_function(_QUANTIZE, (node, *source.args[1:]))
    _dequantize_for(graph, readers, node, codes)


def _hand_out_codes(graph: fx.GraphModule, node: fx.Node, *, signed: bool) -> None:
    """Replace a rounding by codes, and a dequantization for each node that reads them."""
    value, scale, zero_point, bits, index = node.args
    assert isinstance(bits, int) and isinstance(zero_point, int)
    lowest = -(1 << (bits - 1)) if signed else 0
    grid = (scale, zero_point + lowest, lowest, lowest + (1 << bits) - 1)
    dtype = torch.int8 if signed else torch.uint8
    with graph.graph.inserting_before(node):
        codes = graph.graph.call_function(_QUANTIZE, (value, *grid, dtype))
    codes.meta["quantizer"] = index
    _dequantize_for(graph, list(node.users), node, codes)
    graph.graph.erase_node(node)


def _hand_out_rows(graph: fx.GraphModule, node: fx.Node) -> None:
    """Replace a rounding of rows by codes, and a dequantization for each node that reads them."""
    value, bits, _ = node.args
    assert bits == 8, "these operators find ranges for codes of 8 bits"
    call, form = graph.graph.call_function, (-128, 127, torch.int8)
    with graph.graph.inserting_before(node):
        chosen = call(
            quantized_decomposed.choose_qparams_per_token_asymmetric.default, (value, torch.int8)
        )
        grid = (call(operator.getitem, (chosen, 0)), call(operator.getitem, (chosen, 1)))
        codes = call(quantized_decomposed.quantize_per_token.default, (value, *grid, *form))
    for reader in list(node.users):
        with graph.graph.inserting_before(reader):
            dequantize = quantized_decomposed.dequantize_per_token.default
            real = call(dequantize, (codes, *grid, *form, torch.float32))
        reader.replace_input_with(node, real)
    graph.graph.erase_node(node)


def _dequantize_for(
    graph: fx.GraphModule, readers: Sequence[fx.Node], value: fx.Node, codes: fx.Node
) -> None:
    """Let each reader of a value dequantize codes instead, for itself."""
    dequantize = quantized_decomposed.dequantize_per_tensor.default
    for reader in readers:
        with graph.graph.inserting_before(reader):
            real = graph.graph.call_function(dequantize, (codes, *codes.args[1:]))
        reader.replace_input_with(value, real)


def _dequantize_blocks(
    graph: fx.GraphModule, node: fx.Node, layer: Layer, stored: NumberFormat
) -> None:
    """Let a linear layer read whole blocks of codes behind `dequantize_per_channel_group`."""
    source = node.args[0]
    assert isinstance(source, fx.Node) and isinstance(stored.granularity, PerBlock)
    codes = get_tensor(graph, str(source.target)).flatten(1)
    if codes.shape != layer.weight_shape:
        return
    (cast,) = node.users
    (product,) = cast.users
    (shaped,) = product.users
    spread = product.args[1]
    assert isinstance(spread, fx.Node)
    scale = get_tensor(graph, str(spread.target)).squeeze(-1)
    name = str(source.target)
    kept = store_tensor(graph, name, codes, shaped)
    scales = store_tensor(graph, name.replace("codes", "scales", 1), scale, shaped)
    zeros = torch.zeros(scale.shape, dtype=torch.int64, device=scale.device)
    zero_points = store_tensor(
        graph, f"zero_points_{scale.shape[0]}x{scale.shape[1]}", zeros, shaped
    )
    grid = (stored.qmin, stored.qmax, torch.int8, stored.granularity.size, torch.float32)
    with graph.graph.inserting_before(shaped):
        dequantize = quantized_decomposed.dequantize_per_channel_group.default
        real = graph.graph.call_function(dequantize, (kept, scales, zero_points, *grid))
    shaped.replace_all_uses_with(real)
    for left in (shaped, product, cast):
        graph.graph.erase_node(left)


def _dequantize_weight(graph: fx.GraphModule, node: fx.Node, stored: NumberFormat) -> None:
    """Let a layer read its codes behind `dequantize_per_channel`."""
    codes = node.args[0]
    (cast,) = node.users
    (product,) = cast.users
    spread = product.args[1]
    assert isinstance(codes, fx.Node) and isinstance(spread, fx.Node)
    scale = get_tensor(graph, str(spread.target))
    axis = next((axis for axis, size in enumerate(scale.shape) if size > 1), 0)
    channels = get_tensor(graph, str(codes.target)).shape[axis]
    name = str(codes.target).removeprefix("codes_")
    scales = store_tensor(graph, f"scales_{name}", scale.flatten().expand(channels), product)
    zeros = torch.zeros(channels, dtype=torch.int64, device=scale.device)
    zero_points = store_tensor(graph, f"zero_points_{channels}", zeros, product)
    grid = (axis, stored.qmin, stored.qmax, torch.int8)
    with graph.graph.inserting_before(product):
        dequantize = quantized_decomposed.dequantize_per_channel.default
        real = graph.graph.call_function(dequantize, (codes, scales, zero_points, *grid))
    product.replace_all_uses_with(real)
    graph.graph.erase_node(product)
