"""Finding what can be quantized, and naming what cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.batches import batch_size
from fxmpq.graph.constants import constant_nodes
from fxmpq.graph.operators import FLOAT_MATMULS, RECURRENT, argument, operator_of
from fxmpq.graph.state import Layer, LeftFloat, node_shape, state_of

aten = torch.ops.aten

_OF_TWO_TENSORS = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default})


@dataclass(frozen=True)
class FoundLayers:
    """What a search through the graph found.

    Args:
        layers: Calls of weighted operators with stored weights, in graph order.
        left_float: Matrix products that stay float.
    """

    layers: tuple[Layer, ...]
    left_float: tuple[LeftFloat, ...]


def find_layers(graph: fx.GraphModule) -> FoundLayers:
    """Find every weighted operator, and every matrix product that stays float.

    A layer is named after its weight without the `.weight` ending; further calls of the same
    weight get `#2`, `#3` and so on.

    Args:
        graph: A canonical graph.

    Returns:
        The layers and what stays float, each with its multiply-accumulates per sample.
    """
    samples = batch_size(state_of(graph).example)
    constants = constant_nodes(graph)
    layers: list[Layer] = []
    left: list[LeftFloat] = []
    calls: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.target in FLOAT_MATMULS:
            macs = float_matmul_macs(node) // samples
            left.append(LeftFloat(place_of(node), float_reason(node, constants), macs))
            continue
        operator = operator_of(node)
        if operator is None:
            continue
        weight_node = argument(node, operator.weight)
        source, output = _shape(argument(node, operator.input)), _shape(node)
        if not isinstance(weight_node, fx.Node) or weight_node.op != "get_attr":
            macs = operator.macs(source, output, _shape(weight_node)) // samples
            left.append(LeftFloat(place_of(node), "its weight is computed, not stored", macs))
            continue
        weight = get_tensor(graph, str(weight_node.target))
        macs = operator.macs(source, output, weight.shape) // samples
        name = layer_name(str(weight_node.target))
        calls[name] += 1
        name = name if calls[name] == 1 else f"{name}#{calls[name]}"
        layers.append(
            Layer(
                name=name,
                kind=operator.kind,
                node=node.name,
                weight=str(weight_node.target),
                macs=macs,
                weight_shape=tuple(weight.shape),
                channel_axis=operator.channel_axis,
            )
        )
    return FoundLayers(tuple(layers), tuple(left))


def float_reason(node: fx.Node, constants: Collection[fx.Node]) -> str:
    """Why a matrix product stays float.

    Args:
        node: A call of an operator of `FLOAT_MATMULS`.
        constants: What is the same in every call, from `constant_nodes`.
    """
    if node.target in _OF_TWO_TENSORS and any(factor in constants for factor in node.args[-2:]):
        return "this product with a stored tensor is computed in float"
    return FLOAT_MATMULS[node.target]


def _shape(node: object) -> torch.Size:
    found = node_shape(node) if isinstance(node, fx.Node) else None
    return found or torch.Size()


def layer_name(weight: str) -> str:
    """The layer's name from its weight's: `a.b.weight` gives `a.b`."""
    return weight.removesuffix(".weight")


def place_of(node: fx.Node) -> str:
    """Where in the model a node comes from, as the module path that the export recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple) and entry[0]]
    path = paths[-1] if paths else ""
    return f"{path}.{node.name}" if path else node.name


def float_matmul_macs(node: fx.Node) -> int:
    """Multiply-accumulates of a product of activations on the example batch.

    Fused attention with query `[..., T, d]`, key `[..., S, d]`, value `[..., S, e]` does
    `T S (d + e)` for each leading index; a matrix product `[..., T, d] x [d, S]` does
    `T d S`; a recurrent layer multiplies all its matrices at each position, a bilinear form
    `[..., i] x [o, i, j] x [..., j]` does `o i j`.
    """
    if node.target in _OWN_MACS:
        return _OWN_MACS[node.target](node)
    known = _operand_shapes(node)
    output = node_shape(node) or torch.Size([0])
    products = [shape for shape in known if len(shape) >= 2]
    if node.target in (aten.addmm.default, aten.baddbmm.default) and len(products) >= 2:
        return int(output.numel() * products[-2][-1])
    return int(output.numel() * known[0][-1]) if known and len(known[0]) > 0 else 0


def _operand_shapes(node: fx.Node) -> list[torch.Size]:
    found = [node_shape(arg) for arg in node.args if isinstance(arg, fx.Node)]
    return [shape for shape in found if shape is not None]


def _attention_macs(node: fx.Node) -> int:
    query, key, value = _operand_shapes(node)[:3]
    return int(query[:-1].numel() * key[-2] * (query[-1] + value[-1]))


def _tensordot_macs(node: fx.Node) -> int:
    """Each result sums over all axes that are contracted."""
    shape, axes = _shape(node.args[0]), node.args[2]
    assert isinstance(axes, (tuple, list))
    contracted = {axis % len(shape) for axis in axes if isinstance(axis, int)}
    summed = math.prod(size for axis, size in enumerate(shape) if axis in contracted)
    return _shape(node).numel() * summed


def _bilinear_macs(node: fx.Node) -> int:
    """Each result sums over a matrix of weights."""
    return _shape(node).numel() * _shape(node.args[2])[1:].numel()


def _recurrent_macs(node: fx.Node) -> int:
    source, weights = _shape(node.args[0]), node.args[2]
    assert isinstance(weights, (tuple, list))
    shapes = [_shape(weight) for weight in weights]
    each = sum(shape.numel() for shape in shapes if len(shape) == 2)
    return source[:-1].numel() * each


def _einsum_macs(node: fx.Node) -> int:
    """One multiply-accumulate for every combination of index values, an ellipsis's included."""
    terms = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    sizes: dict[object, int] = {}
    operands = node.args[1]
    assert isinstance(operands, (tuple, list))
    for term, operand in zip(terms, operands, strict=True):
        shape = list(node_shape(operand) or ()) if isinstance(operand, fx.Node) else []
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after) if dots else 0
        # Hidden dimensions are counted from the right, as they broadcast.
        names = [*before, *range(-hidden, 0), *after]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    return math.prod(sizes.values())


_OWN_MACS: Mapping[object, Callable[[fx.Node], int]] = {
    aten.scaled_dot_product_attention.default: _attention_macs,
    aten.einsum.default: _einsum_macs,
    aten.tensordot.default: _tensordot_macs,
    aten.bilinear.default: _bilinear_macs,
    **dict.fromkeys(RECURRENT, _recurrent_macs),
}
"""Operators that are no plain matrix product."""


def is_real_tensor(node: fx.Node) -> bool:
    """Whether a node's recorded value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
