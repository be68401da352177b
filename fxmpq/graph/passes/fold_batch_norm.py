"""Fold batch normalization into the (transposed) convolution or linear layer before it."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, fx, nn

from fxmpq.graph.attributes import get_tensor, set_tensor
from fxmpq.graph.operators import argument, operator_of

aten = torch.ops.aten


def fold_batch_norm(graph: fx.GraphModule) -> int:
    """Fold every inference batch norm that alone reads a weighted layer, in place on the graph.

    With `f = gamma / sqrt(var + eps)` per channel: `W' = f W`, `b' = f (b - mean) + beta`
    (computed in float64). New tensors take the places of the old ones in the graph; the
    traced model's own parameters are not touched.

    Args:
        graph: A graph of ATen operators; changed in place.

    Returns:
        How many batch norms were folded.
    """
    folded = 0
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is aten.batch_norm.default:
            folded += _fold(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return folded


def _fold(graph: fx.GraphModule, norm: fx.Node) -> bool:
    layer, statistics = norm.args[0], norm.args[1:5]
    is_training, epsilon = norm.args[5], norm.args[7]
    operator = operator_of(layer) if isinstance(layer, fx.Node) else None
    if operator is None or operator.bias is None or is_training:
        return False
    assert isinstance(layer, fx.Node) and isinstance(epsilon, (int, float))
    if len(layer.users) != 1 or not all(arg is None or _is_stored(arg) for arg in statistics):
        return False
    weight_node, bias_node = argument(layer, operator.weight), argument(layer, operator.bias)
    gamma, beta, mean, variance = (_value(graph, arg) for arg in statistics)
    if not _is_own_tensor(weight_node) or mean is None or variance is None:
        return False
    if bias_node is not None and not _is_own_tensor(bias_node):
        return False
    weight = get_tensor(graph, str(weight_node.target))
    # A norm's channels come second, a linear layer's last, and those of one sample of a
    # convolution first: they are the same where the output has the dimensions of the weight.
    if layer.meta["val"].dim() != weight.dim():
        return False
    factor = (variance.double() + epsilon).rsqrt()
    factor = factor if gamma is None else factor * gamma.double()
    bias = _value(graph, bias_node)
    shifted = (-mean.double() if bias is None else bias.double() - mean.double()) * factor
    shifted = shifted if beta is None else shifted + beta.double()
    scaled = _scaled(weight.double(), factor, operator.channel_axis)
    bias_name = _bias_name(graph, str(weight_node.target), bias_node)
    _store(graph, str(weight_node.target), scaled.to(weight.dtype), weight.requires_grad)
    _store(graph, bias_name, shifted.to(weight.dtype), weight.requires_grad)
    _set_bias(graph, layer, operator.bias, bias_name)
    norm.replace_all_uses_with(layer)
    graph.graph.erase_node(norm)
    return True


def _scaled(weight: Tensor, factor: Tensor, axis: int) -> Tensor:
    """Multiply every output channel's weights by its factor.

    Groups of a transposed convolution share an axis of channels, and split that of its inputs.
    """
    if axis == 0:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    factors = factor.reshape(-1, weight.shape[1])
    rows = factors.repeat_interleave(weight.shape[0] // len(factors), dim=0)
    return weight * rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))


def _store(graph: fx.GraphModule, name: str, tensor: Tensor, requires_grad: bool) -> None:
    set_tensor(graph, name, nn.Parameter(tensor, requires_grad=requires_grad))


def _set_bias(graph: fx.GraphModule, layer: fx.Node, position: int, name: str) -> None:
    """Let a layer read its bias from a stored tensor."""
    with graph.graph.inserting_before(layer):
        bias_node = graph.graph.get_attr(name)
    args = [*layer.args, *[None] * (position + 1 - len(layer.args))]
    args[position] = bias_node
    layer.args = tuple(args)


def _bias_name(graph: fx.GraphModule, weight: str, bias_node: object) -> str:
    """The bias's own name, or a free one beside the weight's."""
    if isinstance(bias_node, fx.Node):
        return str(bias_node.target)
    prefix = weight.rpartition(".")[0]
    usual = f"{prefix}.bias".lstrip(".")
    is_taken = hasattr(graph.get_submodule(prefix), "bias")
    return f"{weight}_bias" if is_taken else usual


def _is_own_tensor(node: object) -> TypeGuard[fx.Node]:
    """Whether a node reads a parameter that no other node reads."""
    return _is_stored(node) and len(node.users) == 1


def _is_stored(node: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _value(graph: fx.GraphModule, node: object) -> Tensor | None:
    return get_tensor(graph, str(node.target)) if _is_stored(node) else None
