"""The arithmetic: from the times of pieces and of whole models to a cost table's part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from fxmpq.costs.latency.measure import FLOAT, PieceTimes
from fxmpq.costs.latency.places import Junction, Unit
from fxmpq.costs.latency.variants import Choice
from fxmpq.costs.parts import MetricParts
from fxmpq.costs.terms import Edge
from fxmpq.formats import Precision
from fxmpq.graph.state import Group

_MILLISECONDS = 1000
_LEAST_SHARE = 0.05
"""Of a unit's own time: what is left of it at least when format changes are taken off."""


@dataclass(frozen=True)
class Joint:
    """A junction that was measured.

    Args:
        junction: Where.
        signature: Of its piece.
        codes: The precisions at which its producer and its reader stand for all that have
            quantized activations.
    """

    junction: Junction
    signature: str
    codes: Choice


@dataclass(frozen=True)
class Times:
    """Everything that was measured, in seconds.

    Args:
        pieces: By signature and precisions.
        call: What a call takes whatever it computes.
        whole: Of the whole model, by a precision for every group.
    """

    pieces: PieceTimes
    call: float
    whole: Mapping[Choice, float]


def assemble(
    groups: Sequence[Group],
    units: Mapping[Unit, str],
    joints: Sequence[Joint],
    times: Times,
    anchors: Sequence[Choice],
) -> MetricParts:
    """Sum up what was measured.

    Args:
        groups: Of the graph.
        units: Their units, with the signatures of their pieces.
        joints: The junctions between them.
        times: That of every unit at each candidate of its group; of every joint at the pairs of
            precisions that its groups may have, and of its ends in float where one of these is
            not on codes; of the whole model at each anchor, and in float.
        anchors: Plans at which the prediction is made to agree, most of the groups at one
            precision.

    Returns:
        Costs in milliseconds; `float_total` as it was measured.
    """
    model = _Model(groups, units, joints, times)
    rows = {
        group.name: {str(entry): model.group_cost(group, str(entry)) for entry in group.candidates}
        for group in groups
    }
    edges = model.edges()
    names = [group.name for group in groups]
    plans = [(dict(zip(names, anchor, strict=True)), times.whole[anchor]) for anchor in anchors]
    rows, fixed = anchored(rows, edges, plans)
    in_float = times.whole[(FLOAT,) * len(groups)]
    return MetricParts(
        {
            group: {name: _MILLISECONDS * value for name, value in row.items()}
            for group, row in rows.items()
        },
        fixed=_MILLISECONDS * fixed,
        float_total=_MILLISECONDS * in_float,
        edges=tuple(_in_milliseconds(edge) for edge in edges),
    )


def anchored(
    rows: Mapping[str, Mapping[str, float]],
    edges: Sequence[Edge],
    plans: Sequence[tuple[Mapping[str, str], float]],
) -> tuple[dict[str, dict[str, float]], float]:
    """Find the fixed part, and scale costs so that plans cost what was measured.

    With `S(P)` the sum of groups and edges under a plan and `T(P)` its measured time, the fixed
    part is `max(0, min_P T(P) - S(P))`. What then still differs is put on the entries of the plan
    that are in no plan before it, all by one factor.

    Args:
        rows: Group to precision to cost.
        edges: Between groups.
        plans: Precision per group, and the measured time.

    Returns:
        The scaled rows, and the fixed part.
    """
    found = {group: dict(row) for group, row in rows.items()}

    def total(plan: Mapping[str, str]) -> float:
        own = [found[group][name] for group, name in plan.items()]
        return math.fsum([*own, *(edge.cost(plan) for edge in edges)])

    fixed = max(0.0, min((time - total(plan) for plan, time in plans), default=0.0))
    scaled: set[tuple[str, str]] = set()
    for plan, time in plans:
        open_entries = [entry for entry in plan.items() if entry not in scaled]
        now = math.fsum(found[group][name] for group, name in open_entries)
        if now <= 0:
            continue
        wanted = max(now + (time - fixed - total(plan)), _LEAST_SHARE * now)
        for group, name in open_entries:
            found[group][name] *= wanted / now
        scaled.update(open_entries)
    return found, fixed


class _Model:
    """What units and junctions take, in seconds."""

    def __init__(
        self,
        groups: Sequence[Group],
        units: Mapping[Unit, str],
        joints: Sequence[Joint],
        times: Times,
    ) -> None:
        self._groups = {group.name: group for group in groups}
        self._units = units
        self._joints = joints
        self._times = times
        # Halves of what a junction takes beyond its two units where both are alike. A reader has
        # several tensors to read; each of them comes from one of several producers.
        self._as_producer: dict[tuple[Unit, bool], list[float]] = {}
        self._as_reader: dict[tuple[Unit, bool], dict[str, list[float]]] = {}
        for joint in joints:
            for in_codes in (True, False):
                half = self._beyond(joint, in_codes, in_codes)
                if half is not None:
                    ends = joint.junction
                    self._as_producer.setdefault((ends.producer, in_codes), []).append(half / 2)
                    read = self._as_reader.setdefault((ends.reader, in_codes), {})
                    read.setdefault(ends.read_by, []).append(half / 2)

    def group_cost(self, group: Group, name: str) -> float:
        """What a group takes within a model whose neighbours are alike."""
        units = [unit for unit in self._units if unit.group == group.name]
        return math.fsum(self._unit_cost(unit, name) for unit in units)

    def edges(self) -> tuple[Edge, ...]:
        """What format changes add, between groups that may differ."""
        found: dict[tuple[str, str], dict[Unit, list[tuple[float, float]]]] = {}
        for joint in self._joints:
            ends = joint.junction
            narrowing = self._beyond(joint, False, True)
            widening = self._beyond(joint, True, False)
            halves = [self._produced(ends.producer, side) for side in (True, False)]
            others = [
                self._read(ends.reader, side).get(ends.read_by, 0.0) for side in (True, False)
            ]
            # What was not measured is no choice that the groups have.
            pair = (
                0.0 if widening is None else max(0.0, widening - halves[0] - others[1]),
                0.0 if narrowing is None else max(0.0, narrowing - halves[1] - others[0]),
            )
            between = found.setdefault((ends.producer.group, ends.reader.group), {})
            # A tensor that several units of the group read is changed once.
            between.setdefault(ends.producer, []).append(pair)
        edges = []
        for (producer, reader), by_unit in found.items():
            widening, narrowing = (
                math.fsum(fmean(pair[side] for pair in pairs) for pairs in by_unit.values())
                for side in (0, 1)
            )
            if widening or narrowing:
                edges.append(self._edge(producer, reader, widening, narrowing))
        return tuple(edges)

    def _edge(self, producer: str, reader: str, widening: float, narrowing: float) -> Edge:
        def cost(made: Precision, read: Precision) -> float:
            if has_codes(made) == has_codes(read):
                return 0.0
            return widening if has_codes(made) else narrowing

        firsts, seconds = (self._groups[name].candidates for name in (producer, reader))
        rows = {str(a): {str(b): cost(a, b) for b in seconds} for a in firsts}
        return Edge(producer, reader, rows)

    def _unit_cost(self, unit: Unit, name: str) -> float:
        own = self._piece(self._units[unit], (name,))
        assert own is not None
        in_codes = has_codes(Precision.parse(name))
        shared = math.fsum([self._produced(unit, in_codes), *self._read(unit, in_codes).values()])
        return max(own + shared, _LEAST_SHARE * own)

    def _produced(self, unit: Unit, in_codes: bool) -> float:
        found = self._as_producer.get((unit, in_codes))
        return fmean(found) if found else 0.0

    def _read(self, unit: Unit, in_codes: bool) -> Mapping[str, float]:
        """By the node that reads."""
        found = self._as_reader.get((unit, in_codes), {})
        return {name: fmean(halves) for name, halves in found.items()}

    def _beyond(self, joint: Joint, made: bool, read: bool) -> float | None:
        """What a junction takes beyond its units alone: less than nothing where both are alike."""
        names = [
            name if in_codes else FLOAT
            for name, in_codes in zip(joint.codes, (made, read), strict=True)
        ]
        both = self._piece(joint.signature, joint.junction.in_graph_order(*names))
        ends = (joint.junction.producer, joint.junction.reader)
        alone = [
            self._piece(self._units[unit], (name,)) for unit, name in zip(ends, names, strict=True)
        ]
        if both is None or alone[0] is None or alone[1] is None:
            return None
        return both - alone[0] - alone[1]

    def _piece(self, signature: str, choice: Choice) -> float | None:
        """A piece's time without the call; `None` if it was not measured."""
        found = self._times.pieces.get((signature, choice))
        return None if found is None else max(0.0, found - self._times.call)


def has_codes(precision: Precision) -> bool:
    """Whether layers at this precision read and write codes whose ranges are known beforehand."""
    return precision.activation is not None and precision.activation.dynamic is None


def _in_milliseconds(edge: Edge) -> Edge:
    rows = {
        name: {other: _MILLISECONDS * value for other, value in row.items()}
        for name, row in edge.costs.items()
    }
    return replace(edge, costs=rows)
