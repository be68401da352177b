"""Shared ranges: stored tensors that a target can only combine if they have one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.findings import Fusion, Join, Missed
from fxmpq.graph.layers import place_of
from fxmpq.graph.partition import partition
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.sites import Site, stored_source
from fxmpq.graph.state import Group
from fxmpq.graph.vocabulary import met_tensors, operator_name


@dataclass(frozen=True)
class SharedRanges:
    """Which sites have one range.

    Args:
        classes: Positions in the list of sites; those of a tuple have one range.
        missed: Operators that the target runs on codes of one scale, but not here, and why.
    """

    classes: tuple[tuple[int, ...], ...]
    missed: tuple[Missed, ...]


def find_shared_ranges(
    graph: fx.GraphModule, sites: Sequence[Site], rules: TargetRules, fusions: Sequence[Fusion]
) -> SharedRanges:
    """Find the stored tensors that must have one range, by `TargetRules.shared_ranges`.

    An add needs one scale for what it adds, so that codes add up, but not for the sum; `cat`,
    pooling and the like pass codes on, so that the result has the scale too. Where one of the
    tensors is not stored quantized, the operator runs in float and asks for nothing; nor does one
    that is fused with what comes before it, which works on results that have no scale yet.

    Args:
        graph: A canonical graph.
        sites: From `find_sites`.
        rules: The target's.
        fusions: What it runs as one.

    Returns:
        Classes of two sites or more, in order.
    """
    place: dict[fx.Node, int] = {}
    for index, site in enumerate(sites):
        # Of two sites of a tensor the first one is what is stored.
        place.setdefault(site.value, index)
    fused = {name for fusion in fusions for name in fusion.nodes[1:]}
    pairs: list[tuple[int, int]] = []
    missed: list[Missed] = []
    for node in graph.graph.nodes:
        is_asked = operator_name(node) in rules.shared_ranges and node.name not in fused
        if not is_asked or node.target in rules.through:
            continue
        tensors = _tensors(node, rules)
        in_float = dict.fromkeys(
            place_of(value)
            for value, reader in tensors
            if not _is_stored(value, reader, place, sites)
        )
        if not in_float:
            pairs += [(place[tensors[0][0]], place[value]) for value, _ in tensors[1:]]
        elif len(in_float) < len(tensors):
            rule = f"one range at {operator_name(node)}"
            reason = f"{' and '.join(in_float)} stays in float"
            missed.append(Missed(rule, place_of(node), reason))
    classes = (tuple(found) for found in partition(len(sites), pairs) if len(found) > 1)
    return SharedRanges(tuple(classes), tuple(missed))


def _is_stored(
    value: fx.Node, reader: fx.Node | None, place: Mapping[fx.Node, int], sites: Sequence[Site]
) -> bool:
    """Whether a tensor is in codes, for this reader of it."""
    if value not in place:
        return False
    readers = sites[place[value]].readers
    return reader is None or readers is None or reader in readers


def joins_for_ranges(
    shared: SharedRanges, sites: Sequence[Site], groups: Sequence[Group]
) -> tuple[Join, ...]:
    """The groups that must become one, since tensors of one range have one format too.

    Groups whose candidates hold a single activation format need not be joined.

    Args:
        shared: From `find_shared_ranges`.
        sites: The same sites.
        groups: That own them.

    Returns:
        Joins of the groups' first layers, by the rule `shared_range`.
    """
    by_name: Mapping[str, Group] = {group.name: group for group in groups}
    order = {group.name: position for position, group in enumerate(groups)}
    joins = []
    for members in shared.classes:
        owners = {sites[index].group for index in members}
        formats = {_activation(c) for owner in owners for c in by_name[owner].candidates}
        if len(formats) > 1:
            first, *others = sorted(owners, key=order.__getitem__)
            joins += [Join("shared_range", other, first) for other in others]
    return tuple(joins)


def share_symmetry(shared: SharedRanges, sites: Sequence[Site]) -> None:
    """Make all sites of one range symmetric where one of them is, in place.

    Args:
        shared: From `find_shared_ranges`.
        sites: The same sites.
    """
    for members in shared.classes:
        is_symmetric = any(sites[index].is_symmetric for index in members)
        for index in members:
            sites[index].is_symmetric = is_symmetric


def check_ranges_are_fixed(
    shared: SharedRanges, sites: Sequence[Site], groups: Sequence[Group]
) -> None:
    """Refuse dynamic formats where tensors have one range: each would find one of its own.

    Args:
        shared: From `find_shared_ranges`.
        sites: The same sites.
        groups: That own them.

    Raises:
        PrecisionError: If a candidate of such a group has one, with the tensors' places.
    """
    by_name: Mapping[str, Group] = {group.name: group for group in groups}
    for members in shared.classes:
        for candidate in [c for index in members for c in by_name[sites[index].group].candidates]:
            if candidate.activation is not None and candidate.activation.dynamic is not None:
                places = " and ".join(dict.fromkeys(place_of(sites[i].value) for i in members))
                raise PrecisionError(
                    f"candidate {candidate} finds a range on each tensor, but those of {places} "
                    "have one range on this target; give candidates whose ranges are calibrated, "
                    "as 'w8a8', or keep these layers at one"
                )


def _activation(precision: Precision) -> object:
    return precision.activation


def _tensors(node: fx.Node, rules: TargetRules) -> list[tuple[fx.Node, fx.Node | None]]:
    """The tensors that must have one range, each with the node that reads it in codes."""
    if operator_name(node) == "add":
        return [stored_source(operand, node, rules) for operand in met_tensors(node)]
    operands = met_tensors(node) if operator_name(node) == "cat" else node.all_input_nodes[:1]
    return [*(stored_source(operand, node, rules) for operand in operands), (node, None)]
