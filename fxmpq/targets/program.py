"""Exporting a rewritten graph, for converters that start from an exported program."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from fxmpq.graph.batches import fixed_size
from fxmpq.graph.export import quiet_torch
from fxmpq.graph.state import state_of


def rewritten_program(graph: fx.GraphModule) -> ExportedProgram:
    """Export a rewritten graph with the sizes free that were free in its trace, on the CPU.

    Args:
        graph: A lowered copy of a planned graph; its tensors are moved to the CPU.

    Returns:
        A program that takes and returns what the model does.
    """
    state = state_of(graph)
    args, kwargs = pytree.tree_unflatten(list(state.example), state.call_spec)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    free = [_free_dimensions(node) for node in placeholders]
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


def _free_dimensions(placeholder: fx.Node) -> Mapping[int, object] | None:
    value = placeholder.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return {axis: Dim.AUTO for axis, size in enumerate(value.shape) if fixed_size(size) is None}
