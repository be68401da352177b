"""Inserting calls into a graph."""

from __future__ import annotations

import torch
from torch import fx


class Inserter:
    """Inserts calls before a node, as if the export had recorded them at its place.

    Args:
        graph: Changed in place.
        node: Where to insert; what is inserted has its metadata, but for the value.
    """

    def __init__(self, graph: fx.GraphModule, node: fx.Node) -> None:
        self._graph = graph
        self._node = node

    def __call__(self, target: torch._ops.OpOverload, *args: fx.node.Argument) -> fx.Node:
        """Insert a call of an operator and find the value it has on what the export recorded.

        Args:
            target: The operator.
            *args: Its arguments.

        Returns:
            The inserted node.
        """
        found = self._insert(target, args)
        found.meta["val"] = target(*fx.node.map_arg(args, lambda node: node.meta.get("val")))
        return found

    def replace(self, target: torch._ops.OpOverload, *args: fx.node.Argument) -> fx.Node:
        """Insert a call that computes what the node does, and put it in the node's place.

        Args:
            target: The operator.
            *args: Its arguments.

        Returns:
            The inserted node; the other one is gone.
        """
        found = self._insert(target, args)
        self._node.replace_all_uses_with(found)
        self._graph.graph.erase_node(self._node)
        return found

    def _insert(self, target: torch._ops.OpOverload, args: tuple[fx.node.Argument, ...]) -> fx.Node:
        with self._graph.graph.inserting_before(self._node):
            found = self._graph.graph.call_function(target, args)
        found.meta = dict(self._node.meta)
        return found
