"""What a legal graph is at each stage, checked after the passes ran."""

from __future__ import annotations

import torch
from torch import fx

from fxmpq.errors import TraceError
from fxmpq.graph.operators import operator_of

_OPS = frozenset({"placeholder", "get_attr", "call_function", "call_module", "output"})


def check_canonical(graph: fx.GraphModule) -> None:
    """Check that a graph is in canonical form.

    Canonical: the graph is topologically sound; functions only (no module calls left from
    export); no operator that writes to its arguments; weighted operators are called with
    positional arguments, as the operator table reads them.

    Raises:
        TraceError: Naming the node and what it breaks.
    """
    graph.graph.lint()
    for node in graph.graph.nodes:
        if node.op not in _OPS or node.op == "call_module":
            raise TraceError(f"node {node.name!r} is a {node.op}; a canonical graph has none")
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            raise TraceError(f"node {node.name!r} ({target}) writes to its arguments")
        operator = operator_of(node)
        if operator is not None and len(node.args) <= max(operator.input, operator.weight):
            raise TraceError(f"node {node.name!r} ({target}) has no positional input and weight")


def check_prepared(graph: fx.GraphModule, quantizers: frozenset[str]) -> None:
    """Check that the module calls of a prepared graph are quantizers, each used once.

    Args:
        graph: A prepared graph.
        quantizers: Module names the groups know.

    Raises:
        TraceError: If a call is unknown, repeated or missing.
    """
    graph.graph.lint()
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    if len(called) != len(set(called)):
        raise TraceError("a quantizer is called twice")
    if set(called) != quantizers:
        difference = sorted(set(called) ^ quantizers)
        raise TraceError(f"quantizers of graph and groups differ: {difference}")
