"""Rules: one thing each that a legal graph has, and what they look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.graph.state import GraphState, Group, Layer


class Subject:
    """A graph under examination, with what many rules look up; each table is made once.

    Args:
        graph: It is only read.
        state: Of the graph, from its trace on; `None` between the passes before.
    """

    def __init__(self, graph: fx.GraphModule, state: GraphState | None = None) -> None:
        self.graph = graph
        self._state = state

    @property
    def state(self) -> GraphState:
        """The graph's state.

        Raises:
            FxmpqError: If it has none yet.
        """
        if self._state is None:
            raise FxmpqError("the graph has no state yet, which rules behind the trace read")
        return self._state

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """Nodes by name, in graph order."""
        return {node.name: node for node in self.graph.graph.nodes}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Modules by name, those under several names under each."""
        return dict(self.graph.named_modules(remove_duplicate=False))

    @cached_property
    def calls(self) -> dict[str, fx.Node]:
        """Calls of modules by the module's name."""
        return {str(node.target): node for node in self.nodes.values() if node.op == "call_module"}

    @cached_property
    def layers(self) -> list[tuple[Group, Layer]]:
        """Every layer with its group, in the order of the state."""
        return [(group, layer) for group in self.state.groups for layer in group.layers]

    @cached_property
    def constants(self) -> set[fx.Node]:
        """Nodes that read a stored tensor, or are computed from such alone and without chance."""
        found: set[fx.Node] = set()
        for node in self.nodes.values():
            inputs = node.all_input_nodes
            is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            is_computed = node.op == "call_function" and bool(inputs) and not is_random
            if self.stored(node) is not None or (is_computed and found.issuperset(inputs)):
                found.add(node)
        return found

    def stored(self, node: object) -> Tensor | None:
        """The parameter or buffer that a node reads; `None` if it reads none."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        owner, _, leaf = str(node.target).rpartition(".")
        module = self.modules.get(owner)
        if module is None:
            return None
        return module._parameters.get(leaf, module._buffers.get(leaf))


Breaches = Iterator[str]


@dataclass(frozen=True)
class Rule:
    """One thing that a legal graph has.

    Args:
        name: In a word or two.
        says: What must hold, for people.
        breaches: Yields a line for each place that breaks it; in time linear in the graph's size.
        needed: Whether later steps fail or compute something wrong without it, so that it is
            checked outside the debug mode too.
    """

    name: str
    says: str
    breaches: Callable[[Subject], Breaches]
    needed: bool = False


def called(node: fx.Node) -> str:
    """A node for people: its name, and what it calls."""
    return f"{node.name!r} ({node.target})" if node.op == "call_function" else f"{node.name!r}"
