"""Sites: which tensors get an activation quantizer, and which readers see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fxmpq.graph.layers import is_real_tensor
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import Group

aten = torch.ops.aten

_ADDS = frozenset({aten.add.Tensor})


@dataclass
class Site:
    """One tensor to quantize.

    Args:
        value: The node that produces it.
        group: Name of the group whose precision decides its format.
        readers: The nodes that read the quantized tensor; `None` means all of them.
    """

    value: fx.Node
    group: str
    readers: set[fx.Node] | None = field(default_factory=set)


def find_sites(graph: fx.GraphModule, groups: Sequence[Group], rules: TargetRules) -> list[Site]:
    """Find the tensors that the target stores quantized, in graph order.

    Every input of a quantized layer is a site, owned by the layer's group and read by its
    layers only. Where the rules say so, so are the fused output of a layer and the sum of
    quantized tensors; these are stored quantized, so every reader sees them so, and they are
    owned by the group that reads them, or else by the one that computes them.

    Args:
        graph: A canonical graph.
        groups: Its groups.
        rules: The target's.

    Returns:
        One site a tensor.
    """
    sites: dict[fx.Node, Site] = {}
    layer_groups = {layer.node: group for group in groups for layer in group.layers}
    quantizing = {
        name: group
        for name, group in layer_groups.items()
        if any(candidate.activation_bits is not None for candidate in group.candidates)
    }
    for node in graph.graph.nodes:
        operator = OPERATORS.get(node.target)
        if node.name not in quantizing or operator is None or not operator.quantizes_input:
            continue
        source = argument(node, operator.input)
        assert isinstance(source, fx.Node)
        value, reader = _before(source, node, rules)
        site = sites.setdefault(value, Site(value, quantizing[node.name].name))
        assert site.readers is not None
        site.readers.add(reader)
    computed_by: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        owner = _stored_output_owner(node, quantizing, computed_by, sites, rules)
        if owner is None:
            continue
        output = _fused_output(node, rules)
        computed_by[output] = owner
        site = sites.setdefault(output, Site(output, owner))
        site.readers = None
        _store_operands(node, sites, rules)
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    return sorted(sites.values(), key=lambda site: order[site.value])


def _before(source: fx.Node, reader: fx.Node, rules: TargetRules) -> tuple[fx.Node, fx.Node]:
    """Walk up past operators that commute with quantization."""
    while source.target in rules.through and isinstance(source.args[0], fx.Node):
        source, reader = source.args[0], source
    return source, reader


def _fused_output(node: fx.Node, rules: TargetRules) -> fx.Node:
    """The activation behind a layer or add if the target fuses it, else the node itself."""
    readers = list(node.users)
    if len(readers) == 1 and readers[0].target in rules.fused_activations:
        return readers[0]
    return node


def _stored_output_owner(
    node: fx.Node,
    quantizing: dict[str, Group],
    computed_by: dict[fx.Node, str],
    sites: dict[fx.Node, Site],
    rules: TargetRules,
) -> str | None:
    """Group that owns a node's stored output, or `None` if the target keeps it in float."""
    operator = OPERATORS.get(node.target)
    if operator is not None and operator.kind in rules.quantize_outputs_of:
        return quantizing[node.name].name if node.name in quantizing else None
    if not rules.quantize_adds or node.target not in _ADDS:
        return None
    operands = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and is_real_tensor(arg)]
    if len(operands) != 2 or not all(operand in sites for operand in operands):
        return None
    return next((computed_by[operand] for operand in operands if operand in computed_by), None)


def _store_operands(node: fx.Node, sites: dict[fx.Node, Site], rules: TargetRules) -> None:
    """An add that the target runs on codes reads the codes of its operands."""
    if node.target not in _ADDS:
        return
    for operand in node.args[:2]:
        if isinstance(operand, fx.Node) and operand in sites:
            site = sites[operand]
            if site.readers is not None:
                site.readers.add(node)
