"""Fusions: operators that a target runs as one, found from its rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxmpq.graph.findings import Fusion, Missed
from fxmpq.graph.layers import place_of
from fxmpq.graph.state import Layer, node_shape
from fxmpq.graph.vocabulary import met_tensors, operator_name

_BETWEEN_TWO = frozenset({"add", "mul"})


@dataclass(frozen=True)
class FoundFusions:
    """What a search for fusions found.

    Args:
        fusions: In graph order of their first nodes; no node is in two.
        missed: For each layer that begins no fusion, each rule that begins with its kind.
    """

    fusions: tuple[Fusion, ...]
    missed: tuple[Missed, ...]


def find_fusions(
    graph: fx.GraphModule, layers: Sequence[Layer], chains: Sequence[tuple[str, ...]]
) -> FoundFusions:
    """Find the fusions of a graph by a target's rules.

    A rule is a chain of operators by name, as `("conv", "add", "relu")`. It fires where each
    operator's result is read by the next one alone. An `add` or `mul` within a chain takes
    another tensor of the same shape. Longer chains go first; where two layers could fuse with
    one add, the later does, since the earlier one's output has to be kept for it.

    Args:
        graph: A canonical graph.
        layers: Its layers.
        chains: The target's rules, as `TargetRules.fusions`.

    Returns:
        The fusions, and for the layers in none why.

    Examples:
        >>> import torch, fxmpq
        >>> from fxmpq.graph.layers import find_layers
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
        >>> graph = fxmpq.trace(model, torch.ones(2, 1, 4, 4))
        >>> found = find_fusions(graph, find_layers(graph).layers, [("conv", "relu")])
        >>> found.fusions
        (Fusion(name='conv-relu', nodes=('conv2d', 'relu'), layer='0'),)
    """
    search = _Search({layer.node: layer.name for layer in layers})
    starts: dict[str, list[fx.Node]] = {}
    for node in reversed(graph.graph.nodes):
        starts.setdefault(operator_name(node) or "", []).append(node)
    for chain in sorted(chains, key=len, reverse=True):
        for node in starts.get(chain[0], ()):
            search.attempt(node, chain)
    return search.found(graph)


class _Search:
    """The fusions so far.

    Args:
        layers: Name per node of a layer.
    """

    def __init__(self, layers: Mapping[str, str]) -> None:
        self._layers = layers
        self._fused: dict[fx.Node, Fusion] = {}
        self._missed: dict[fx.Node, list[Missed]] = {}

    def attempt(self, node: fx.Node, chain: tuple[str, ...]) -> None:
        """Fuse a chain that begins at a node, or note why that cannot be."""
        if node in self._fused:
            return
        name, layer = "-".join(chain), self._layers.get(node.name, "")
        nodes = [node]
        for step in chain[1:]:
            found = self._next(nodes, step)
            if isinstance(found, str):
                if layer:
                    self._missed.setdefault(node, []).append(Missed(name, layer, found))
                return
            nodes.append(found)
        fusion = Fusion(name, tuple(member.name for member in nodes), layer)
        self._fused.update(dict.fromkeys(nodes, fusion))

    def found(self, graph: fx.GraphModule) -> FoundFusions:
        """Everything, in graph order."""
        order = list(graph.graph.nodes)
        fusions = dict.fromkeys(self._fused[node] for node in order if node in self._fused)
        missed = [
            entry
            for node in order
            if node not in self._fused
            for entry in self._missed.get(node, ())
        ]
        return FoundFusions(tuple(fusions), tuple(missed))

    def _next(self, nodes: Sequence[fx.Node], step: str) -> fx.Node | str:
        """The node that takes the next step of a chain, or why there is none."""
        last = nodes[-1]
        output = "its output" if len(nodes) == 1 else f"its {operator_name(last)}'s result"
        readers = list(last.users)
        if len(readers) != 1:
            names = ", ".join(self._name(reader) for reader in readers)
            return f"{output} has {len(readers)} readers: {names}"
        reader = readers[0]
        if reader.op == "output":
            return f"{output} is the model's"
        if operator_name(reader) != step:
            return f"{output} is read by {self._name(reader)}"
        if reader in self._fused:
            with_whom = self._fused[reader].layer or self._fused[reader].nodes[0]
            return f"its {step} is fused with {with_whom}"
        return self._why_not(last, reader, step) or reader

    def _why_not(self, last: fx.Node, reader: fx.Node, step: str) -> str:
        if step not in _BETWEEN_TWO:
            first = reader.args[0] if reader.args else None
            return "" if first is last else f"its output is not what its {step} works on"
        tensors = met_tensors(reader)
        others = [operand for operand in tensors if operand is not last]
        if len(tensors) != 2 or not others:
            return f"the other operand of its {step} is no other tensor"
        if node_shape(others[0]) != node_shape(last):
            return f"the operands of its {step} have different shapes"
        return ""

    def _name(self, node: fx.Node) -> str:
        if node.op == "output":
            return "the model's output"
        return self._layers.get(node.name) or place_of(node)
