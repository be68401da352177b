"""From when to when stored values are alive, and what of them a group's precision decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import fx

from fxmpq.costs.stored_values import StoredValue, StoredValues
from fxmpq.formats import Precision
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import Group, state_of
from fxmpq.graph.vocabulary import ACTIVATIONS, MOVEMENTS, operator_name


def stored_bits(precision: Precision) -> int | None:
    """Bits in which an activation is stored at a precision; `None` for float.

    Codes whose range is found at run time are a layer's own: what is stored is float.

    Examples:
        >>> stored_bits(Precision.parse("w4a8")), stored_bits(Precision.parse("w4"))
        (8, None)
    """
    activation = precision.activation
    return None if activation is None or activation.dynamic is not None else activation.bits


class Piece(NamedTuple):
    """Some bytes that are alive for a time, which may depend on a group's precision.

    Node number `t` computes at the instant `2 t`; at `2 t + 1` what it reads is still there, and
    what it overwrote that with.

    Args:
        begin: The first instant.
        end: The last one.
        group: Whose precision decides; `None` if none does.
        values: How many values it holds where the group's activations are codes.
        bytes: What it takes where they are float.

    Examples:
        >>> group = Group("conv1", (), (Precision(8, 4), Precision(8)))
        >>> piece = Piece(0, 9, group, values=5, bytes=20)
        >>> [piece.size(candidate) for candidate in group.candidates]
        [3, 20]
    """

    begin: int
    end: int
    group: Group | None
    values: int
    bytes: int

    def size(self, precision: Precision) -> int:
        """What it takes where its group has a precision."""
        bits = stored_bits(precision)
        return self.bytes if bits is None else -(-self.values * bits // 8)


class Lifetimes:
    """From when to when each stored value is alive, and in what.

    The rules are those that `activation_memory` tells.

    Args:
        graph: With groups.
        stored: Its values.
        owners: Group by the module name of each activation quantizer; a quantizer without one
            does nothing.
        rules: The target's.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        stored: StoredValues,
        owners: Mapping[str, Group],
        rules: TargetRules,
    ) -> None:
        self._stored, self._owners = stored, owners
        self._steps = {node: place for place, node in enumerate(graph.graph.nodes)}
        self._inner = self._fuse(graph)
        self._readers = {value: list(value.readers) for value in stored.made}
        self._same: dict[StoredValue, StoredValue] = {}
        self._owner: dict[StoredValue, Group] = {}
        self._copies: dict[StoredValue, list[StoredValue]] = {}
        for value in stored.made:
            if value.node.op == "call_module":
                self._place_codes(value, owners.get(str(value.node.target)))
            elif operator_name(value.node) in MOVEMENTS or value.node.target in rules.through:
                self._pass_codes_on(value)

    def pieces(self) -> list[Piece]:
        """Everything that is ever alive."""
        begins = {value: 2 * self._steps[value.node] for value in self._lasting()}
        ends = {value: self._own_end(value) for value in begins}
        start = min(begins.values())
        for value in begins:
            if value.node.op == "placeholder":
                begins[value] = start
            overwritten = self._overwritten(value)
            if overwritten in ends:
                begins[value] += 1
                ends[overwritten] -= 1
        return [
            piece
            for value, begin in begins.items()
            for piece in self._pieces_of(value, begin, ends[value])
        ]

    def _fuse(self, graph: fx.GraphModule) -> set[fx.Node]:
        """Let all of a fusion run with its last node; returns those in front of it."""
        by_name = {node.name: node for node in self._steps}
        inner: set[fx.Node] = set()
        for fusion in state_of(graph).fusions:
            *before, last = (by_name[name] for name in fusion.nodes)
            self._steps.update(dict.fromkeys(before, self._steps[last]))
            kept = {value.node for value in self._stored.of.get(last, ())}
            inner.update(node for node in before if node not in kept)
        return inner

    def _root(self, value: StoredValue) -> StoredValue:
        while value in self._same:
            value = self._same[value]
        return value

    def _place_codes(self, codes: StoredValue, group: Group | None) -> None:
        """Decide where a quantizer's codes lie: in place of what it reads, or beside it."""
        source = None if codes.copied is None else self._root(codes.copied)
        if group is None or source is None or self._is_once_more(codes, group):
            if source is not None:
                self._merge(codes, source)
            return
        if self._readers[source] == [codes.node] and source not in self._owner:
            self._merge(codes, source)
            self._owner[source] = group
        else:
            self._owner[codes] = group
            self._copies.setdefault(source, []).append(codes)

    def _is_once_more(self, codes: StoredValue, group: Group) -> bool:
        """Whether codes are those of the quantizer before, since both have one width to choose."""
        copied = codes.copied
        before = None if copied is None else self._owners.get(str(copied.node.target))
        if before is None:
            return False
        found = {entry.activation for owner in (before, group) for entry in owner.candidates}
        return len({entry.bits for entry in found if entry and entry.dynamic is None}) == 1

    def _merge(self, codes: StoredValue, source: StoredValue) -> None:
        self._same[codes] = source
        self._readers[source].remove(codes.node)
        self._readers[source] += self._readers[codes]

    def _pass_codes_on(self, value: StoredValue) -> None:
        sources = self._sources(value.node)
        if len(sources) == 1 and sources[0] in self._owner:
            self._owner[value] = self._owner[sources[0]]

    def _sources(self, node: fx.Node) -> list[StoredValue]:
        """What a node reads, each once."""
        found = (value for source in node.all_input_nodes for value in self._of(source))
        return list(dict.fromkeys(self._root(value) for value in found))

    def _of(self, node: fx.Node) -> Sequence[StoredValue]:
        return self._stored.of.get(node, ())

    def _lasting(self) -> list[StoredValue]:
        """The values that are stored at all."""
        return [
            value
            for value in self._stored.made
            if value not in self._same and value.node not in self._inner
        ]

    def _own_end(self, value: StoredValue) -> int:
        steps = [self._steps[reader] for reader in self._readers[value]]
        return 2 * max([self._steps[value.node], *steps]) + 1

    def _reach(self, value: StoredValue) -> int:
        """When a value is last read if what may stay in float of its copies does."""
        copies = self._copies.get(value, ())
        reaches = [self._reach(copy) for copy in copies if _may_be_float(self._owner[copy])]
        return max([self._own_end(value), *reaches])

    def _overwritten(self, value: StoredValue) -> StoredValue | None:
        """The float values that an activation function reads and writes over."""
        if operator_name(value.node) not in ACTIVATIONS:
            return None
        sources = self._sources(value.node)
        if len(sources) != 1 or self._readers[sources[0]] != [value.node]:
            return None
        source = sources[0]
        is_free = source.node.op == "call_function" and source not in self._owner
        return source if is_free and source.values == value.values else None

    def _pieces_of(self, value: StoredValue, begin: int, end: int) -> list[Piece]:
        group, reach = self._owner.get(value), self._reach(value)
        is_copy = value.node.op == "call_module"
        in_float = 0 if is_copy else value.bytes
        waiting = {
            self._owner[copy].name: self._owner[copy]
            for copy in self._copies.get(value, ())
            if _may_be_float(self._owner[copy]) and self._reach(copy) > end
        }
        extension: list[Piece] = []
        if len(waiting) == 1 and (group is None or group.name in waiting):
            (other,) = waiting.values()
            if not is_copy:
                extension = [Piece(end + 1, reach, other, 0, value.bytes)]
        elif waiting:
            end = reach
        return [Piece(begin, end, group, value.values, in_float), *extension]


def _may_be_float(group: Group) -> bool:
    return any(stored_bits(candidate) is None for candidate in group.candidates)
