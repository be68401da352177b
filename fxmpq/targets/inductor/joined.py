"""Linear layers that read the same codes, computed as one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.targets.inductor.rewrite import DEQUANTIZE_WEIGHT, dequantization_read_by
from fxmpq.targets.lowering import store_tensor

aten = torch.ops.aten

_REARRANGES = frozenset(
    {aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default}
)


def join_linears(graph: fx.GraphModule) -> dict[str, list[str]]:
    """Let linear layers that read the same codes be one product with all their output channels.

    Queries, keys and values of attention are such layers. Each output channel has a scale of its
    own, so the results are the same; each layer's are then a slice. What follows a layer in the
    same kernel, as an activation or a sum, is worth more: only layers whose results are
    rearranged before they are computed with are joined. Slices lie apart in memory, so views
    become `reshape`, which copies where it must; a graph with `as_strided`, which counts on how
    results lie, is left as it is.

    Args:
        graph: From `to_decomposed`, before it is rewritten for the compiler; changed in place.

    Returns:
        The names of scales that are now in one tensor, by the name of that tensor.
    """
    if graph.graph.find_nodes(op="call_function", target=aten.as_strided.default):
        return {}
    alike: dict[tuple[object, ...], list[fx.Node]] = {}
    for linear in graph.graph.find_nodes(op="call_function", target=aten.linear.default):
        read = dequantization_read_by(linear)
        weight = linear.args[1]
        is_on_integers = isinstance(weight, fx.Node) and weight.target is DEQUANTIZE_WEIGHT
        if read is None or not is_on_integers or not _is_rearranged(linear):
            continue
        operands = _operands(linear)
        if _are_stored(graph, operands):
            grid = weight.args[3:]
            alike.setdefault((read.args, grid, len(operands)), []).append(linear)
    joined = dict(_join(graph, found) for found in alike.values() if len(found) > 1)
    views = graph.graph.find_nodes(op="call_function", target=aten.view.default)
    for view in views if joined else ():
        view.target = aten.reshape.default
    return joined


def _is_rearranged(linear: fx.Node) -> bool:
    return all(user.target in _REARRANGES for user in linear.users)


def _are_stored(graph: fx.GraphModule, operands: Sequence[fx.Node]) -> bool:
    """Whether what a layer reads is stored, its bias with a number for each channel as the rest."""
    if any(operand.op != "get_attr" for operand in operands):
        return False
    return len({get_tensor(graph, _name(operand)).shape for operand in operands[1:]}) == 1


def _join(graph: fx.GraphModule, linears: Sequence[fx.Node]) -> tuple[str, list[str]]:
    """Replace layers by slices of one; returns the name of its scales, and of theirs."""
    first = linears[0]
    call = graph.graph.call_function
    names = [[_name(operand) for operand in _operands(linear)] for linear in linears]
    codes, scales, zero_points, *bias = [
        store_tensor(graph, f"joined_{parts[0]}", _stacked(graph, parts), first)
        for parts in zip(*names, strict=True)
    ]
    weight = first.args[1]
    assert isinstance(weight, fx.Node)
    with graph.graph.inserting_before(first):
        real = call(DEQUANTIZE_WEIGHT, (codes, scales, zero_points, *weight.args[3:]))
        result = call(aten.linear.default, (first.args[0], real, *bias))
    ends = [0]
    for codes_name, *_ in names:
        ends.append(ends[-1] + len(get_tensor(graph, codes_name)))
    for linear, (start, end) in zip(linears, pairwise(ends), strict=True):
        with graph.graph.inserting_before(linear):
            own = call(aten.slice.Tensor, (result, -1, start, end))
        linear.replace_all_uses_with(own)
        graph.graph.erase_node(linear)
    return str(scales.target), [scales_name for _, scales_name, *_ in names]


def _operands(linear: fx.Node) -> list[fx.Node]:
    """A layer's codes, scales, zero points and, if it has one, its bias."""
    _, weight, *bias = linear.args
    assert isinstance(weight, fx.Node)
    operands = [*weight.args[:3], *(found for found in bias if found is not None)]
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def _name(operand: fx.Node) -> str:
    return str(operand.target)


def _stacked(graph: fx.GraphModule, names: Sequence[str]) -> Tensor:
    return torch.cat([get_tensor(graph, name).detach() for name in names])
