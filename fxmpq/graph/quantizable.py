"""The class of fxmpq's graphs: a graph module that can be moved from device to device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxmpq.graph.batches import graph_device

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantizableGraph(fx.GraphModule):
    """A graph module whose operators follow it when it is moved.

    `torch.export` writes the device of the example into every call that makes a tensor
    (`arange`, `zeros`, a mask); `.to`, `.cuda` and `.cpu` move those too.

    Examples:
        >>> import fxmpq
        >>> class Positions(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) + torch.arange(2.0, device=x.device)
        >>> graph = fxmpq.trace(Positions(3, 2), torch.ones(4, 3))
        >>> graph.to("meta")(torch.ones(4, 3, device="meta")).device
        device(type='meta')
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = graph_device(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = graph_device(self)
        if after != before:
            for module in self.modules():
                if isinstance(module, fx.GraphModule) and _move_nodes(module.graph, before, after):
                    module.recompile()
        return self


def _move_nodes(nodes: fx.Graph, before: torch.device, after: torch.device) -> int:
    """Replace one device by another among all arguments; returns how many there were."""
    moved = 0

    def follow(argument: fx.node.Argument) -> fx.node.Argument:
        nonlocal moved
        # A device without an index is the current one of its type.
        is_left = isinstance(argument, torch.device) and (
            argument == before or (argument.type == before.type and argument.index is None)
        )
        moved += is_left
        return after if is_left else argument

    for node in nodes.nodes:
        if node.op == "call_function":
            args = fx.node.map_aggregate(node.args, follow)
            kwargs = fx.node.map_aggregate(node.kwargs, follow)
            assert isinstance(args, tuple) and isinstance(kwargs, dict)
            node.args, node.kwargs = args, kwargs
    return moved
