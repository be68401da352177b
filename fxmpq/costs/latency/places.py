"""What a model's latency is the sum of: units around layers, and junctions between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from fxmpq.costs.latency.cut import behind_quantizers
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import GraphState, Member, state_of
from fxmpq.graph.vocabulary import MEETINGS, operator_name


@dataclass(frozen=True)
class Unit:
    """A layer or product, with what the target runs as one with it.

    Args:
        member: The layer or product.
        group: Name of its group.
        nodes: Names of its nodes, in order; the last one's result is the unit's.
    """

    member: Member
    group: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Junction:
    """Two units of different groups, with a tensor between them that may be codes.

    Args:
        producer: Whose result it is.
        reader: Whose input it is, or which adds it to its layer's result.
        between: Names of the nodes on the way, such as a pooling or a residual sum.
        read_by: The reader's node that reads it: its layer's, or that of its sum.
        is_reader_first: Whether the reader's layer is the first of the two in the graph, and
            adds what is computed after it.
    """

    producer: Unit
    reader: Unit
    between: tuple[str, ...]
    read_by: str
    is_reader_first: bool = False

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of all nodes, from the producer's to the reader's."""
        return (*self.producer.nodes, *self.between, *self.reader.nodes)

    def in_graph_order(self, made: str, read: str) -> tuple[str, str]:
        """The producer's precision and the reader's, in the order of their layers."""
        return (read, made) if self.is_reader_first else (made, read)


def find_units(state: GraphState) -> tuple[Unit, ...]:
    """The units of a prepared graph, group by group."""
    fused = {fusion.nodes[0]: fusion.nodes for fusion in state.fusions}
    return tuple(
        Unit(member, group.name, fused.get(member.node, (member.node,)))
        for group in state.groups
        for member in group.members
    )


def find_junctions(
    graph: fx.GraphModule, units: tuple[Unit, ...], rules: TargetRules
) -> tuple[Junction, ...]:
    """The junctions of a prepared graph: where one unit may hand codes to another.

    A unit reads another one's result as its layer's input, or as what is added to its layer's
    result: directly, past what commutes with quantization, or past one sum or concatenation that
    the target stores in codes. Where it reads it as both, in one way, that is one junction.

    Args:
        graph: Prepared.
        units: Its units.
        rules: Of the target it was prepared for.

    Returns:
        The junctions, by their readers in the order of the units.
    """
    search = _Search(graph, units, rules)
    return tuple(junction for unit in units for junction in search.junctions_into(unit))


class _Search:
    def __init__(self, graph: fx.GraphModule, units: tuple[Unit, ...], rules: TargetRules) -> None:
        self._graph = graph
        self._rules = rules
        self._nodes: Mapping[str, fx.Node] = {node.name: node for node in graph.graph.nodes}
        self._steps = {name: step for step, name in enumerate(self._nodes)}
        self._made = {self._nodes[unit.nodes[-1]]: unit for unit in units}
        self._fused = {
            self._nodes[fusion.nodes[-1]]: fusion.nodes for fusion in state_of(graph).fusions
        }

    def junctions_into(self, reader: Unit) -> Iterator[Junction]:
        cut_out: set[tuple[str, ...]] = set()
        for name, value in self._read(reader):
            seen: set[str] = set()
            for producer, between in self._producers(value, ()):
                if producer.group == reader.group or producer.member.name in seen:
                    continue
                seen.add(producer.member.name)
                steps = [self._steps[unit.member.node] for unit in (reader, producer)]
                found = Junction(producer, reader, between, name, steps[0] < steps[1])
                if found.nodes not in cut_out:
                    cut_out.add(found.nodes)
                    yield found

    def _read(self, reader: Unit) -> Iterator[tuple[str, object]]:
        """What a unit reads in codes, with the name of the node that reads it."""
        layer = self._nodes[reader.member.node]
        operator = OPERATORS.get(layer.target)
        if operator is None or not operator.quantizes_input:
            return
        yield layer.name, argument(layer, operator.input)
        for before, name in zip(reader.nodes, reader.nodes[1:], strict=False):
            node = self._nodes[name]
            for operand in node.all_input_nodes if operator_name(node) == "add" else ():
                found = behind_quantizers(self._graph, operand)
                if found is not self._nodes[before]:
                    yield name, found

    def _producers(
        self, value: object, between: tuple[str, ...], *, meets: bool = True
    ) -> Iterator[tuple[Unit, tuple[str, ...]]]:
        """The units that a value comes from, and what is on the way."""
        found = behind_quantizers(self._graph, value)
        if not isinstance(found, fx.Node):
            return
        if found in self._made:
            yield self._made[found], between
        elif found.target in self._rules.through:
            yield from self._producers(found.args[0], (found.name, *between), meets=meets)
        elif meets:
            names = self._fused.get(found, (found.name,))
            meeting = self._nodes[names[0]]
            name = operator_name(meeting)
            if name in MEETINGS and name in self._rules.quantize_outputs_of:
                for operand in meeting.all_input_nodes:
                    yield from self._producers(operand, (*names, *between), meets=False)
