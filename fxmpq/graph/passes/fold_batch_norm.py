"""Fold batch normalization into the convolution or linear layer before it."""

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
    layer = norm.args[0]
    operator = operator_of(layer) if isinstance(layer, fx.Node) else None
    if operator is None or not operator.quantizes_input or len(layer.users) != 1 or norm.args[5]:
        return False
    # A linear layer's channels come last, a norm's second: they are the same only for [N, C].
    if operator.kind == "linear" and len(layer.meta["val"].shape) != 2:
        return False
    weight_node, bias_node = layer.args[operator.weight], argument(layer, operator.bias)
    if not all(arg is None or _is_stored(arg) for arg in norm.args[1:5]):
        return False
    gamma, beta, mean, variance = (_value(graph, norm.args[index]) for index in range(1, 5))
    if not _is_own_tensor(weight_node) or mean is None or variance is None:
        return False
    if bias_node is not None and not _is_own_tensor(bias_node):
        return False
    weight = get_tensor(graph, weight_node.target)
    factor = (variance.double() + norm.args[7]).rsqrt()
    factor = factor if gamma is None else factor * gamma.double()
    bias = _value(graph, bias_node)
    shifted = (-mean.double() if bias is None else bias.double() - mean.double()) * factor
    shifted = shifted if beta is None else shifted + beta.double()
    scaled = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    _rewrite(graph, layer, operator.bias or 2, scaled.to(weight.dtype), shifted.to(weight.dtype))
    norm.replace_all_uses_with(layer)
    graph.graph.erase_node(norm)
    return True


def _rewrite(
    graph: fx.GraphModule, layer: fx.Node, bias_position: int, weight: Tensor, bias: Tensor
) -> None:
    """Give the layer its folded tensors, under the names of its own module."""
    weight_node = next(arg for arg in layer.args[:2] if getattr(arg, "op", "") == "get_attr")
    bias_name = _bias_name(graph, weight_node.target, argument(layer, bias_position))
    set_tensor(graph, weight_node.target, nn.Parameter(weight, requires_grad=weight.requires_grad))
    set_tensor(graph, bias_name, nn.Parameter(bias, requires_grad=weight.requires_grad))
    with graph.graph.inserting_before(layer):
        bias_node = graph.graph.get_attr(bias_name)
    args = list(layer.args) + [None] * (bias_position + 1 - len(layer.args))
    args[bias_position] = bias_node
    layer.args = tuple(args)


def _bias_name(graph: fx.GraphModule, weight: str, bias_node: object) -> str:
    """The bias's own name, or a free one beside the weight's."""
    if isinstance(bias_node, fx.Node):
        return str(bias_node.target)
    prefix = weight.rpartition(".")[0]
    usual = f"{prefix}.bias".lstrip(".")
    is_taken = hasattr(graph.get_submodule(prefix), "bias")
    return f"{weight}_bias" if is_taken else usual


def _is_own_tensor(node: object) -> bool:
    """Whether a node reads a parameter that no other node reads."""
    return _is_stored(node) and len(node.users) == 1


def _is_stored(node: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _value(graph: fx.GraphModule, node: object) -> Tensor | None:
    return get_tensor(graph, str(node.target)) if _is_stored(node) else None
