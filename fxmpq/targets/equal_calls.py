"""Which nodes of a planned graph compute the same, so that an exporter may make one of them."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.targets.lowering import quantizer_of


def value_numbers(graph: fx.GraphModule) -> dict[str, int]:
    """Number a planned graph's nodes; those that compute the same have the same number.

    Two calls are the same if they call the same with the same operands, in numbers. Quantizers
    are if they round the same to the same grid; idle ones have the number of what they read.
    Operators that draw random numbers are never the same.

    Args:
        graph: With chosen precisions.

    Returns:
        The number by node name.

    Examples:
        >>> from fxmpq.graph.trace import trace
        >>> class Twice(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.relu() + x.relu(), x.sin()
        >>> numbers = value_numbers(trace(Twice(), torch.randn(2)))
        >>> numbers["relu"] == numbers["relu_1"], numbers["relu"] == numbers["sin"]
        (True, False)
    """
    numbers: dict[fx.Node, int] = {}
    known: dict[str, int] = {}
    for node in graph.graph.nodes:
        module = quantizer_of(graph, node)
        if _is_idle(module) and node.all_input_nodes:
            numbers[node] = numbers[node.all_input_nodes[0]]
            continue
        numbers[node] = known.setdefault(_key(node, module, numbers), len(known))
    return {node.name: number for node, number in numbers.items()}


def _is_idle(module: object) -> bool:
    """Whether a module returns what it reads."""
    if isinstance(module, BiasCorrection):
        return module.added is None
    return isinstance(module, ActivationQuantizer) and module.active is None


def _key(node: fx.Node, module: object, numbers: dict[fx.Node, int]) -> str:
    """The same text for the same computation."""
    is_random = (
        isinstance(node.target, OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )
    if node.op in ("placeholder", "output") or is_random:
        return f"{node.op} {node.name}"
    operands = fx.node.map_arg((node.args, node.kwargs), lambda read: ("node", numbers[read]))
    called: object = node.target
    if isinstance(module, ActivationQuantizer) and module.active is not None:
        grid = module.ranges.get(module.active.name)
        called = (module.active, grid, module.is_symmetric)
    elif isinstance(module, WeightQuantizer):
        called = (module.name, module.active)
    elif isinstance(module, BiasCorrection):
        called = None if module.added is None else module.added.tolist()
    return f"{node.op} {called!r} {operands!r}"
