"""Exporting a rewritten graph, for converters that start from an exported program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import Argument
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from fxmpq.graph.batches import fixed_size
from fxmpq.graph.export import quiet_torch
from fxmpq.graph.state import state_of


def rewritten_program(
    graph: fx.GraphModule, limits: Sequence[Mapping[int, int]] | None = None
) -> ExportedProgram:
    """Export a rewritten graph with the sizes free that were free in its trace, on the CPU.

    Args:
        graph: A lowered copy of a planned graph; its tensors are moved to the CPU.
        limits: The largest of these sizes, as `free_limits` gives them; as in the trace if `None`.

    Returns:
        A program that takes and returns what the model does.
    """
    state = state_of(graph)
    args, kwargs = pytree.tree_unflatten(list(state.example), state.call_spec)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    free = [_free_dimensions(node, None) for node in placeholders]
    if limits is not None:
        pairs = zip(placeholders, limits, strict=True)
        free = [_free_dimensions(node, limit) for node, limit in pairs]
    shapes = pytree.tree_unflatten(free, state.call_spec)
    dynamic_shapes = (*shapes[0], *shapes[1].values())
    move_to_cpu(graph)
    with quiet_torch(), torch.no_grad():
        return torch.export.export(graph, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def move_to_cpu(graph: fx.GraphModule) -> None:
    """Move a rewritten graph's tensors and constants to the CPU, in place.

    `Module.to` would also move the tensors it shares with the planned graph.

    Args:
        graph: Changed in place.
    """
    for module in graph.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.detach().cpu(), False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.cpu())

    def on_cpu(argument: Argument) -> Argument:
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, on_cpu)
        node.kwargs = fx.node.map_aggregate(node.kwargs, on_cpu)
    graph.recompile()


def free_limits(graph: fx.GraphModule, largest: Mapping[int, int]) -> list[dict[int, int]]:
    """How large the sizes may be that were free in a graph's trace.

    Args:
        graph: A copy of a planned graph.
        largest: What is wanted, by dimension.

    Returns:
        For each input the limits of its free dimensions: what is wanted, or less where the model
        takes less, or more where the example has more.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    found: list[dict[int, int]] = []
    for node, example in zip(placeholders, state_of(graph).example, strict=True):
        limits: dict[int, int] = {}
        for axis, size in _free_sizes(node).items():
            assert isinstance(example, Tensor)
            bound = size.node.shape_env.bound_sympy(size.node.expr).upper
            wanted = max(largest[axis], example.shape[axis])
            limits[axis] = wanted if bound is int_oo else min(wanted, int(bound))
        found.append(limits)
    return found


def _free_dimensions(
    placeholder: fx.Node, limits: Mapping[int, int] | None
) -> Mapping[int, object] | None:
    if not isinstance(placeholder.meta.get("val"), Tensor):
        return None
    axes = _free_sizes(placeholder)
    if limits is None:
        return dict.fromkeys(axes, Dim.AUTO)
    return {axis: Dim.AUTO(max=limits[axis]) for axis in axes}


def _free_sizes(placeholder: fx.Node) -> dict[int, torch.SymInt]:
    """The free sizes of an input, by dimension."""
    value = placeholder.meta.get("val")
    sizes: tuple[object, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
    return {
        axis: size
        for axis, size in enumerate(sizes)
        if isinstance(size, torch.SymInt) and fixed_size(size) is None
    }
