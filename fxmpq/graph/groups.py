"""Groups: which layers must share a precision, and which precisions they may take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.asked_products import NO_PRODUCTS, AskedProducts
from fxmpq.graph.findings import Join, Missed
from fxmpq.graph.joins import JOINS, FoundJoins, describe_join, shared_weight
from fxmpq.graph.partition import partition
from fxmpq.graph.patterns import matching, tied
from fxmpq.graph.products import shared_operands
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import Group, Layer, Member, Product

_FLOAT = (Precision(),)
_MOST_JOINS = 4


@dataclass(frozen=True)
class Grouping:
    """Layers in groups, and why.

    Args:
        groups: In graph order.
        joins: What joined their layers.
        missed: Rules that did not fire, and why.
    """

    groups: tuple[Group, ...]
    joins: tuple[Join, ...]
    missed: tuple[Missed, ...]


def form_groups(
    graph: fx.GraphModule,
    layers: Sequence[Layer],
    rules: TargetRules,
    candidates: Sequence[Precision],
    keep: Mapping[str, Precision],
    exclude: Sequence[str],
    ties: Sequence[Sequence[str]] = (),
    further: Sequence[Join] = (),
    *,
    asked: AskedProducts = NO_PRODUCTS,
) -> Grouping:
    """Join layers into groups and give each its candidates.

    Layers are joined by the target's rules (`JOINS`) and by the user's ties; products of two
    activations by the ties, and with what else reads an operand of theirs. Excluded layers, and
    kinds the target does not quantize, form groups of their own, whose only candidate is `fp32`;
    only a shared weight joins them. Where every candidate is weight-only, no activation is stored
    in codes, and layers that read the same one need not share a precision.

    Args:
        graph: A canonical graph.
        layers: In graph order.
        rules: The target's.
        candidates: What the user wants to choose from.
        keep: Pattern on layer names to the one precision its groups must have.
        exclude: Patterns of layers that stay float.
        ties: Patterns of layers that share a precision, from `read_ties`.
        further: Joins that something else asks for.
        asked: The products that are to be quantized; patterns match their names too.

    Returns:
        Groups in graph order, and what joined them.

    Raises:
        PatternError: If a pattern matches no layer, or a tie one layer only.
        PrecisionError: If a group is left without a candidate, or two pins disagree.
    """
    order = {node.name: place for place, node in enumerate(graph.graph.nodes)}
    every: list[Member] = [*layers, *asked.products]
    every.sort(key=lambda member: order[member.node])
    names = [*(member.name for member in every), *asked.fused]
    excluded = {name for pattern in exclude for name in matching(pattern, names)}
    excluded |= {member.name for member in every if member.kind not in rules.operators}
    excluded.update(asked.fused)
    pins: dict[str, Precision] = {}
    for pattern, precision in keep.items():
        for name in matching(pattern, names):
            pins[name] = precision
    kept = [layer for layer in layers if layer.name not in excluded]
    others = [layer for layer in layers if layer.name in excluded]
    quantized = [member for member in every if member.name not in excluded]
    is_weight_only = _is_weight_only(quantized, rules, candidates, pins)
    # An excluded layer shares nothing, so that those around it still find each other.
    found = [_find_joins(name, graph, kept, is_weight_only) for name in rules.joins]
    found += [shared_weight(graph, others), tied(ties, names, excluded)]
    joins = [*(join for one in found for join in one.joins), *further]
    joins += shared_operands(graph, quantized)
    groups = []
    for members in _joined(every, joins):
        allowed: tuple[Precision, ...] = _FLOAT
        if members[0].name not in excluded:
            wanted = _pinned(members, pins, joins) or tuple(candidates)
            allowed = _allowed(members, rules, wanted, joins)
        groups.append(_group(members, allowed))
    missed = tuple(entry for one in found for entry in one.missed)
    return Grouping(tuple(groups), tuple(joins), missed)


def _is_weight_only(
    members: Sequence[Member],
    rules: TargetRules,
    candidates: Sequence[Precision],
    pins: Mapping[str, Precision],
) -> bool:
    """Whether no group of these members can have a precision with quantized activations."""
    wanted = [pins[member.name] for member in members if member.name in pins]
    if any(member.name not in pins for member in members):
        wanted += candidates
    # Of all kinds: a pin of one layer holds for those it is joined to, of whatever kind.
    found = [
        entry for kind in {m.kind for m in members} for entry in rules.candidates_for(kind, wanted)
    ]
    return bool(found) and all(precision.activation is None for precision in found)


def _find_joins(
    name: str, graph: fx.GraphModule, layers: Sequence[Layer], is_weight_only: bool
) -> FoundJoins:
    """The joins of a rule; where it is about stored activations and there are none, why not."""
    found = JOINS[name].find(graph, layers)
    if not (is_weight_only and JOINS[name].of_activations):
        return found
    missed = tuple(
        Missed(name, join.layer, f"it {describe_join(join)}, but every candidate is weight-only")
        for join in found.joins
    )
    return FoundJoins(missed=(*found.missed, *missed))


def _group(members: Sequence[Member], candidates: tuple[Precision, ...]) -> Group:
    layers = tuple(member for member in members if isinstance(member, Layer))
    products = tuple(member for member in members if isinstance(member, Product))
    name = layers[0].name if layers else products[0].name
    return Group(name, layers, candidates, products=products)


def _joined(every: Sequence[Member], joins: Iterable[Join]) -> list[list[Member]]:
    """Union of layers and products over all joins, in graph order."""
    place = {member.name: index for index, member in enumerate(every)}
    pairs = ((place[join.layer], place[join.other]) for join in joins)
    return [[every[index] for index in found] for found in partition(len(every), pairs)]


def _why(members: Sequence[Member], joins: Sequence[Join]) -> str:
    """What joins these layers, as a sentence."""
    names = {layer.name for layer in members}
    found = [f"{join.layer} {describe_join(join)}" for join in joins if join.layer in names]
    more = f"; and {len(found) - _MOST_JOINS} more" if len(found) > _MOST_JOINS else ""
    return "; ".join(found[:_MOST_JOINS]) + more


def _pinned(
    members: Sequence[Member], pins: Mapping[str, Precision], joins: Sequence[Join]
) -> tuple[Precision, ...]:
    wanted = {pins[layer.name] for layer in members if layer.name in pins}
    if len(wanted) > 1:
        pinned = ", ".join(
            f"{layer.name} at {pins[layer.name]}" for layer in members if layer.name in pins
        )
        raise PrecisionError(
            "these layers must share a precision, but are kept at different ones: "
            f"{pinned}. {_why(members, joins)}"
        )
    return tuple(wanted)


def _allowed(
    members: Sequence[Member],
    rules: TargetRules,
    wanted: Sequence[Precision],
    joins: Sequence[Join],
) -> tuple[Precision, ...]:
    """Precisions that every member can run.

    Weight-only members follow the others' weights, products their activations.
    """
    runs = {kind: set(rules.candidates_for(kind, wanted)) for kind in {m.kind for m in members}}
    allowed = [
        precision
        for precision in sorted(set.union(*runs.values()), key=lambda found: found.sort_key)
        if all(rules.operators[kind].half(precision) in found for kind, found in runs.items())
        and all(_fits(member, precision, rules) for member in members)
    ]
    if not allowed:
        asked = ", ".join(str(precision) for precision in wanted)
        kinds = ", ".join(dict.fromkeys(layer.kind for layer in members))
        raise PrecisionError(
            f"no candidate among {asked} runs on layer {members[0].name!r} ({kinds}); target "
            f"{rules.name!r} runs {rules.describe()}{_cut_blocks(members, wanted, rules)}"
            + (f". {_why(members, joins)}" if len(members) > 1 else "")
        )
    return tuple(allowed)


def _fits(member: Member, precision: Precision, rules: TargetRules) -> bool:
    if isinstance(member, Product):
        return True
    return rules.operators[member.kind].fits(precision, _channel_weights(member))


def _channel_weights(layer: Layer) -> int:
    """Weights of an output channel."""
    return math.prod(layer.weight_shape) // layer.weight_shape[layer.channel_axis]


def _cut_blocks(members: Sequence[Member], wanted: Sequence[Precision], rules: TargetRules) -> str:
    """Which layers' channels are no whole number of blocks that are wanted, as a sentence."""
    found = [
        f"{layer.name} has {_channel_weights(layer)} weights a channel, no whole number of blocks "
        f"of {precision}"
        for layer in members
        for precision in wanted
        if isinstance(layer, Layer) and not _fits(layer, precision, rules)
    ]
    return "".join(f". {text}" for text in found[:_MOST_JOINS])
