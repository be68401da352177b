"""Groups: which layers must share a precision, and which precisions they may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import fx

from fxmpq.errors import PatternError, PrecisionError, closest
from fxmpq.formats import Precision
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import Group, Layer

_FLOAT = (Precision(),)


def form_groups(
    graph: fx.GraphModule,
    layers: Sequence[Layer],
    rules: TargetRules,
    candidates: Sequence[Precision],
    keep: Mapping[str, Precision],
    exclude: Sequence[str],
) -> tuple[Group, ...]:
    """Join layers into groups and give each its candidates.

    Two layers are joined when they share a weight (tied weights, a module called twice), or
    when they read the same activation, which is stored once and so has one format (query,
    key and value; a downsample convolution and the block's first). Excluded layers, and kinds
    the target does not quantize, form groups of their own, whose only candidate is `fp32`.

    Args:
        graph: A canonical graph.
        layers: In graph order.
        rules: The target's.
        candidates: What the user wants to choose from.
        keep: Pattern on layer names to the one precision its groups must have.
        exclude: Patterns of layers that stay float.

    Returns:
        Groups in graph order.

    Raises:
        PatternError: If a pattern matches no layer.
        PrecisionError: If a group is left without a candidate, or two pins disagree.
    """
    names = [layer.name for layer in layers]
    excluded = {name for pattern in exclude for name in matching(pattern, names)}
    excluded |= {layer.name for layer in layers if layer.kind not in rules.operators}
    pins: dict[str, Precision] = {}
    for pattern, precision in keep.items():
        for name in matching(pattern, names):
            pins[name] = precision
    groups = []
    for members in _joined(graph, layers, excluded):
        if members[0].name in excluded:
            groups.append(Group(members[0].name, tuple(members), _FLOAT))
            continue
        wanted = _pinned(members, pins) or tuple(candidates)
        groups.append(Group(members[0].name, tuple(members), _allowed(members, rules, wanted)))
    return tuple(groups)


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Names that an fnmatch pattern matches.

    Raises:
        PatternError: If there are none, with the closest names.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise PatternError(
            f"no layer matches {pattern!r}; the closest of {len(names)} layers: "
            f"{closest(pattern, names)}"
        )
    return found


def _joined(
    graph: fx.GraphModule, layers: Sequence[Layer], excluded: set[str]
) -> list[list[Layer]]:
    """Union of layers over shared weights and shared inputs, in graph order."""
    nodes = {node.name: node for node in graph.graph.nodes}
    parent = list(range(len(layers)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[object, int] = {}
    for index, layer in enumerate(layers):
        is_excluded = layer.name in excluded
        # An excluded layer shares nothing, so that those around it still find each other.
        keys: list[object] = [("weight", layer.weight, is_excluded)]
        operator = OPERATORS[nodes[layer.node].target]
        if operator.quantizes_input and not is_excluded:
            keys.append(("input", argument(nodes[layer.node], operator.input)))
        for key in keys:
            other = first.setdefault(key, index)
            parent[max(root(other), root(index))] = min(root(other), root(index))
    members: dict[int, list[Layer]] = {}
    for index, layer in enumerate(layers):
        members.setdefault(root(index), []).append(layer)
    return list(members.values())


def _pinned(members: Sequence[Layer], pins: Mapping[str, Precision]) -> tuple[Precision, ...]:
    wanted = {pins[layer.name] for layer in members if layer.name in pins}
    if len(wanted) > 1:
        pinned = ", ".join(
            f"{layer.name} at {pins[layer.name]}" for layer in members if layer.name in pins
        )
        raise PrecisionError(
            f"these layers share one activation or weight and must share a precision, but are "
            f"kept at different ones: {pinned}"
        )
    return tuple(wanted)


def _allowed(
    members: Sequence[Layer], rules: TargetRules, wanted: Sequence[Precision]
) -> tuple[Precision, ...]:
    """Precisions that every member can run; weight-only members follow the others' weights."""
    per_layer = {layer.name: rules.candidates_for(layer.kind, wanted) for layer in members}
    widest = max(per_layer.values(), key=lambda found: [p.activation_bits or 0 for p in found])
    allowed = [
        precision
        for precision in widest
        if all(precision in found or precision.weight_only in found for found in per_layer.values())
    ]
    if not allowed:
        asked = ", ".join(str(precision) for precision in wanted)
        kinds = ", ".join(dict.fromkeys(layer.kind for layer in members))
        raise PrecisionError(
            f"no candidate among {asked} runs on layer {members[0].name!r} ({kinds}); target "
            f"{rules.name!r} runs {rules.describe()}"
        )
    return tuple(allowed)
