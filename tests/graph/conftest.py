from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from fxmpq.formats import Precision
from fxmpq.graph.fusions import find_fusions
from fxmpq.graph.groups import form_groups
from fxmpq.graph.layers import find_layers
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.sites import find_sites
from fxmpq.graph.state import Group
from fxmpq.targets.reference import REFERENCE

W4A8, W8A8 = Precision(4, 8), Precision(8, 8)


def groups_of(
    graph: fx.GraphModule,
    candidates: Sequence[Precision] = (W4A8, W8A8),
    keep: Mapping[str, Precision] | None = None,
    exclude: Sequence[str] = (),
    ties: Sequence[Sequence[str]] = (),
    rules: TargetRules = REFERENCE.rules,
) -> dict[str, Group]:
    layers = find_layers(graph).layers
    groups = form_groups(graph, layers, rules, candidates, keep or {}, exclude, ties).groups
    assert sorted(layer.name for group in groups for layer in group.layers) == sorted(
        layer.name for layer in layers
    )
    return {group.name: group for group in groups}


def members(groups: Mapping[str, Group]) -> dict[str, list[str]]:
    return {name: [layer.name for layer in group.layers] for name, group in groups.items()}


Found = dict[str, tuple[str, set[str] | None]]


def sites_of(
    graph: fx.GraphModule,
    rules: TargetRules,
    exclude: tuple[str, ...] = (),
    candidate: Precision = Precision(8, 8),
) -> Found:
    """Value to (owning group, readers)."""
    layers = find_layers(graph).layers
    groups = form_groups(graph, layers, rules, [candidate], {}, exclude).groups
    sites = find_sites(graph, groups, rules, find_fusions(graph, layers, rules.fusions).fusions)
    order = [node.name for node in graph.graph.nodes]
    assert [site.value.name for site in sites] == sorted(
        (site.value.name for site in sites), key=order.index
    )
    return {
        site.value.name: (
            site.group,
            None if site.readers is None else {reader.name for reader in site.readers},
        )
        for site in sites
    }


def symmetric_of(graph: fx.GraphModule, rules: TargetRules, *kinds: str) -> set[str]:
    rules = replace(rules, symmetric_inputs_of=frozenset(kinds))
    layers = find_layers(graph).layers
    groups = form_groups(graph, layers, rules, [Precision(8, 8)], {}, ()).groups
    fusions = find_fusions(graph, layers, rules.fusions).fusions
    sites = find_sites(graph, groups, rules, fusions)
    return {site.value.name for site in sites if site.is_symmetric}
