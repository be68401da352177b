"""Latency: what to measure of a graph, and what it adds up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from fxmpq.costs.cost import count
from fxmpq.costs.latency.assemble import Joint, Times, assemble, has_codes
from fxmpq.costs.latency.cut import Piece, cut
from fxmpq.costs.latency.measure import FLOAT, Measurer, Wanted
from fxmpq.costs.latency.places import Junction, Unit, find_junctions, find_units
from fxmpq.costs.latency.runtime import Runtime
from fxmpq.costs.latency.store import TimeStore, cache_folder
from fxmpq.costs.latency.timing import clock_for
from fxmpq.costs.latency.variants import Choice
from fxmpq.costs.parts import MetricParts
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import Group, require_groups

_FOLDER = "latency"


def latency_cost(
    graph: fx.GraphModule,
    rules: TargetRules,
    runtime: Runtime,
    *,
    progress: bool = False,
    clock: Callable[[], float] | None = None,
) -> MetricParts:
    """Measure what each group costs at each of its candidates, in milliseconds.

    See `fxmpq.costs.latency` for what is modelled.

    Args:
        graph: From `prepare` or later; not changed.
        rules: Of the target it was prepared for.
        runtime: The target's.
        progress: Whether to show a progress bar.
        clock: Tells the time, in seconds; `clock_for` the runtime's threads by default.

    Returns:
        Milliseconds for one sample of the example's shape, or for the example where the trace
        fixed the batch size.
    """
    state = require_groups(graph, stage="prepared")
    groups = {group.name: group for group in state.groups}
    units = find_units(state)
    wanted = Wanted()
    pieces: dict[Unit, Piece] = {}
    for unit in units:
        pieces[unit] = cut(graph, unit.nodes, unit.nodes[-1])
        # What is left in float is told by the whole model where no group may be float.
        names = [str(entry) for entry in groups[unit.group].candidates]
        wanted.add(pieces[unit], [(name,) for name in names])
    joints = []
    for junction in find_junctions(graph, units, rules):
        codes = _standing_for_codes(junction, groups)
        if codes is not None:
            piece = cut(graph, junction.nodes, junction.reader.nodes[-1])
            signature = wanted.add(piece, _pairs(junction, codes, groups))
            joints.append(Joint(junction, signature, codes))
            # Float stands for all precisions that are not on codes, as weights alone in low bits.
            for unit in (junction.producer, junction.reader):
                if _is_mixed(groups[unit.group]):
                    wanted.add(pieces[unit], [(FLOAT,)])
    store = TimeStore(cache_folder() / _FOLDER)
    clock = clock or clock_for(runtime.threads())
    measurer = Measurer(rules, runtime, store, clock, progress=progress)
    found = measurer.pieces(wanted)
    anchors = _anchors(graph)
    in_float: Choice = (FLOAT,) * len(groups)
    whole = measurer.whole(graph, list(dict.fromkeys([*anchors, in_float])))
    times = Times(found, measurer.call(), whole)
    signatures = {unit: piece.signature for unit, piece in pieces.items()}
    return assemble(state.groups, signatures, joints, times, anchors)


def _standing_for_codes(junction: Junction, groups: Mapping[str, Group]) -> Choice | None:
    """The precisions of most bits whose activations are quantized, if both ends have any."""
    found = []
    for unit in (junction.producer, junction.reader):
        names = [str(entry) for entry in groups[unit.group].candidates if has_codes(entry)]
        found += names[-1:]
    return (found[0], found[1]) if len(found) == 2 else None


def _pairs(junction: Junction, codes: Choice, groups: Mapping[str, Group]) -> list[Choice]:
    """The precisions to measure a junction at: codes or not on each side, as groups may have it."""
    sides: list[list[str]] = []
    for unit, name in zip((junction.producer, junction.reader), codes, strict=True):
        sides.append([name, FLOAT] if _is_mixed(groups[unit.group]) else [name])
    return [junction.in_graph_order(made, read) for made in sides[0] for read in sides[1]]


def _is_mixed(group: Group) -> bool:
    """Whether it may be on something else than codes."""
    return not all(map(has_codes, group.candidates))


def _anchors(graph: fx.GraphModule) -> list[Choice]:
    """A plan for each precision that some weights have, with all groups nearest to it."""
    state = require_groups(graph, stage="prepared")
    table = count(graph)
    found = {entry for group in state.groups for entry in group.candidates}
    # What only products of activations have is in the plans of the layers around them.
    of_weights = {entry for entry in found if entry.weight is not None or entry.is_float} or found
    names = sorted(of_weights, key=lambda entry: entry.sort_key, reverse=True)
    plans = [table.uniform(name) for name in names]
    return list(dict.fromkeys(tuple(plan[g.name] for g in state.groups) for plan in plans))
