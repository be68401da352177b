"""Pairs of layers with nothing between them but operators that commute with scaling channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmpq.graph.operators import argument, operator_of
from fxmpq.graph.state import Layer, node_shape, require
from fxmpq.quantizers.modules import ActivationQuantizer

aten = torch.ops.aten

# Layers whose weights are [out, in, ...]: each output value is a dot product with one row.
_KINDS = frozenset({"conv", "linear"})
# f(s x) = s f(x) for s > 0, value by value.
_POINTWISE = frozenset(
    {
        aten.relu.default,
        aten.leaky_relu.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
    }
)
# The same within each channel, over this many last dimensions.
_POOLS = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}
_PADDINGS = frozenset({aten.constant_pad_nd.default, aten.pad.default})
# These keep the flat order of values.
_RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)


@dataclass(frozen=True)
class Pair:
    """Two layers whose channels can be scaled against each other.

    `f(s x) = s f(x)` holds per channel for all that lies between them, and nothing else reads
    what lies there, so dividing the first one's output channels by `s` and multiplying what the
    second has for them by `s` leaves the model as it is.

    Args:
        first: A convolution or linear layer.
        bias: Name of its bias, or `None`.
        second: The layer that reads it.
    """

    first: Layer
    bias: str | None
    second: Layer


def find_pairs(graph: fx.GraphModule) -> list[Pair]:
    """Find all scalable pairs of a prepared graph, in graph order.

    Between them may lie ReLU, leaky ReLU, max and average pooling, means over positions, zero
    padding, reshapes that keep channels together, and quantizers, whose ranges have to be found
    again. A depthwise convolution is the second of one pair and the first of the next.

    Args:
        graph: A prepared graph.

    Returns:
        The pairs; none of their weights and biases is read anywhere else.
    """
    state = require(graph, stage="prepared")
    layers = {layer.node: layer for group in state.groups for layer in group.layers}
    modules = dict(graph.named_modules())
    found = []
    for node in graph.graph.nodes:
        first = layers.get(node.name)
        if first is None or not _is_dot_product(node) or _sole_tensor(node, weight=True) is None:
            continue
        bias = _sole_tensor(node, weight=False)
        if bias is None and _has_bias(node):
            continue
        reader = _reader(node, layers, modules)
        if reader is not None and _sole_tensor(reader, weight=True) is not None:
            found.append(Pair(first, bias, layers[reader.name]))
    return found


def _is_dot_product(node: fx.Node) -> bool:
    operator = operator_of(node)
    return operator is not None and operator.kind in _KINDS


def _has_bias(node: fx.Node) -> bool:
    """Whether a layer has a bias at all: a correction may stand in the place of none."""
    operator = operator_of(node)
    assert operator is not None
    bias = argument(node, operator.bias)
    if isinstance(bias, fx.Node) and bias.op == "call_module":
        return bias.args[0] is not None
    return bias is not None


def _sole_tensor(node: fx.Node, *, weight: bool) -> str | None:
    """Name of a layer's stored weight or bias, if nothing else reads it."""
    operator = operator_of(node)
    assert operator is not None
    source = argument(node, operator.weight if weight else operator.bias)
    while isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1:
        source = source.args[0]
    if isinstance(source, fx.Node) and source.op == "get_attr" and len(source.users) == 1:
        return str(source.target)
    return None


def channel_dimension(layer: Layer, rank: int) -> int:
    """The channels' dimension in a layer's input or output.

    Args:
        layer: A convolution or linear layer.
        rank: Of the input or output; a sample alone has one dimension less than a batch.

    Returns:
        The last one for a linear layer, and the one before the positions for a convolution.
    """
    return rank - len(layer.weight_shape) + 1


def _reader(
    node: fx.Node, layers: dict[str, Layer], modules: dict[str, torch.nn.Module]
) -> fx.Node | None:
    """The layer that alone reads a layer's output, channel by channel; `None` if there is none."""
    shape = node_shape(node)
    if shape is None:
        return None
    axis: int | None = channel_dimension(layers[node.name], len(shape))
    while axis is not None and len(node.users) == 1:
        [reader] = node.users
        operator = operator_of(reader)
        if operator is not None:
            is_input = argument(reader, operator.input) is node and reader.name in layers
            if not is_input or not _is_dot_product(reader):
                return None
            rank = len(node_shape(node) or ())
            return reader if channel_dimension(layers[reader.name], rank) == axis else None
        is_quantizer = isinstance(modules.get(str(reader.target)), ActivationQuantizer)
        axis = axis if is_quantizer else _axis_behind(reader, node, axis)
        node = reader
    return None


def _axis_behind(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Where an operator leaves the channels; `None` if it does not commute with scaling them."""
    before, after = _sizes(source), _sizes(node)
    if before is None or after is None or node.args[0] is not source:
        return None
    if node.target is aten.mean.dim:
        return _behind_mean(node, axis, len(before))
    if node.target in _RESHAPES:
        return _behind_reshape(before, after, axis)
    behind = len(before) - axis
    keeps = (
        node.target in _POINTWISE
        or (node.target in _POOLS and _POOLS[node.target] < behind)
        or (node.target in _PADDINGS and _is_zero_padding(node, behind))
    )
    return axis if keeps else None


def _sizes(node: fx.Node) -> list[tuple[int, str]] | None:
    """Each dimension's size on the example, and as the export knows it."""
    shape, value = node_shape(node), node.meta.get("val")
    if shape is None or not isinstance(value, Tensor):
        return None
    return [(size, str(free)) for size, free in zip(shape, value.shape, strict=True)]


def _behind_mean(node: fx.Node, axis: int, rank: int) -> int | None:
    given = argument(node, 1)
    if not isinstance(given, (list, tuple)) or not given:
        return None
    dims = [int(dim) % rank for dim in given]
    if axis in dims:
        return None
    keeps = bool(argument(node, 2) or node.kwargs.get("keepdim", False))
    return axis if keeps else axis - sum(dim < axis for dim in dims)


def _is_zero_padding(node: fx.Node, behind: int) -> bool:
    """Whether a padding adds zeros, and only to dimensions behind the channels."""
    amounts, *rest = node.args[1:]
    is_constant = all(entry == "constant" for entry in rest if isinstance(entry, str))
    is_zero = all(entry == 0 for entry in rest if isinstance(entry, (int, float)))
    assert isinstance(amounts, (list, tuple))
    return is_constant and is_zero and not node.kwargs and len(amounts) // 2 < behind


def _behind_reshape(
    before: list[tuple[int, str]], after: list[tuple[int, str]], axis: int
) -> int | None:
    """The same dimension, if a channel's values lie side by side in it afterwards."""
    if axis >= len(after) or before[:axis] != after[:axis]:
        return None
    channel = math.prod(size for size, _ in before[axis + 1 :])
    step = math.prod(size for size, _ in after[axis + 1 :])
    return axis if step > 0 and channel % step == 0 else None
