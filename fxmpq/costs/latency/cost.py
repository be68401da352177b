"""Latency: what to measure of a graph, and what it adds up to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from torch import fx

from fxmpq.costs.cost import count
from fxmpq.costs.latency.assemble import Joint, Times, assemble, has_codes
from fxmpq.costs.latency.cut import cut
from fxmpq.costs.latency.measure import FLOAT, Measurer, Wanted
from fxmpq.costs.latency.places import Junction, Unit, find_junctions, find_units
from fxmpq.costs.latency.runtime import Runtime
from fxmpq.costs.latency.store import TimeStore, cache_folder
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
    clock: Callable[[], float] = time.process_time,
) -> MetricParts:
    """Measure what each group costs at each of its candidates, in milliseconds of CPU time.

    See `fxmpq.costs.latency` for what is modelled.

    Args:
        graph: From `prepare` or later; not changed.
        rules: Of the target it was prepared for.
        runtime: The target's.
        progress: Whether to show a progress bar.
        clock: CPU time of this process, in seconds.

    Returns:
        Milliseconds for one sample of the example's shape, or for the example where the trace
        fixed the batch size.
    """
    state = require_groups(graph, stage="prepared")
    groups = {group.name: group for group in state.groups}
    units = find_units(state)
    wanted = Wanted()
    pieces: dict[Unit, str] = {}
    for unit in units:
        piece = cut(graph, unit.nodes, unit.nodes[-1])
        # What is left in float is told by the whole model where no group may be float.
        names = [str(entry) for entry in groups[unit.group].candidates]
        pieces[unit] = wanted.add(piece, [(name,) for name in names])
    joints = []
    for junction in find_junctions(graph, units, rules):
        codes = _standing_for_codes(junction, groups)
        if codes is not None:
            piece = cut(graph, junction.nodes, junction.reader.nodes[-1])
            signature = wanted.add(piece, _pairs(junction, codes, groups))
            joints.append(Joint(junction, signature, codes))
    measurer = Measurer(rules, runtime, TimeStore(cache_folder() / _FOLDER), clock, progress)
    found = measurer.pieces(wanted)
    anchors = _anchors(graph)
    in_float: Choice = (FLOAT,) * len(groups)
    whole = measurer.whole(graph, list(dict.fromkeys([*anchors, in_float])))
    times = Times(found, measurer.call(), whole)
    return assemble(state.groups, pieces, joints, times, anchors)


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
        is_mixed = any(not has_codes(entry) for entry in groups[unit.group].candidates)
        sides.append([name, FLOAT] if is_mixed else [name])
    return [(made, read) for made in sides[0] for read in sides[1]]


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
