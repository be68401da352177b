"""Sites: which tensors get an activation quantizer, and which readers see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from fxmpq.formats import NumberFormat
from fxmpq.granularity import Dynamic
from fxmpq.graph.findings import Fusion, Join
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.products import PRODUCT, product_operands
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import Group
from fxmpq.graph.vocabulary import MEETINGS, met_tensors, operator_name


@dataclass
class Site:
    """One tensor to quantize.

    Args:
        value: The node that produces it.
        group: Name of the group whose precision decides its format.
        readers: The nodes that read the quantized tensor; `None` means all of them.
        is_symmetric: Whether its integers are signed codes without a zero point for one of them.
        is_output: Whether it is what a layer returns, stored as the layer's own precision says:
            in float where that finds ranges at every run.
    """

    value: fx.Node
    group: str
    readers: set[fx.Node] | None = field(default_factory=set)
    is_symmetric: bool = False
    is_output: bool = False


def find_sites(
    graph: fx.GraphModule, groups: Sequence[Group], rules: TargetRules, fusions: Sequence[Fusion]
) -> list[Site]:
    """Find the tensors that the target stores quantized, in graph order.

    Every input of a quantized layer is a site, owned by the layer's group and read by its
    layers only; so are both operands of a quantized product. Where the rules say so, so are the
    fused output of a layer and the sum of quantized tensors; these are stored quantized, so
    every reader sees them so, and they are owned by the group that reads them, or else by the
    one that computes them. If a layer's own precision decides (`TargetRules.own_outputs`), and the
    group that reads its result may be without a calibrated range, there are two: what the layer
    stores, read by all, and behind it what the group reads. What a layer's fused `add` adds to its
    result is a site that this `add` reads, owned by the layer's group if by no other.

    Args:
        graph: A canonical graph.
        groups: Its groups.
        rules: The target's.
        fusions: What it runs as one; only the last result of each is stored.

    Returns:
        One site a tensor, or two, in the order in which they follow each other.
    """
    sites: dict[fx.Node, Site] = {}
    quantizing = _quantizing(groups)
    for node in graph.graph.nodes:
        for source in _read_in_codes(node) if node.name in quantizing else ():
            value, reader = _stored_operand(source, node, quantizing[node.name], rules)
            site = sites.setdefault(value, Site(value, quantizing[node.name].name))
            assert site.readers is not None
            site.readers.add(reader)
    outputs = _store_outputs(graph, groups, rules, fusions, sites)
    _store_residuals(graph, quantizing, rules, fusions, sites)
    found = [*outputs, *sites.values()]
    for site in found:
        site.is_symmetric = _is_symmetric(site, rules)
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    return sorted(found, key=lambda site: order[site.value])


def joins_for_sites(
    graph: fx.GraphModule, groups: Sequence[Group], rules: TargetRules
) -> tuple[Join, ...]:
    """The groups that must become one, since they read one site, past operators on codes.

    Groups whose candidates hold a single activation format need not be joined.

    Args:
        graph: A canonical graph.
        groups: Its groups so far.
        rules: The target's.

    Returns:
        Joins of the layers or products that read the site, by the rule `shared_input`.
    """
    quantizing = _quantizing(groups)
    names = {member.node: member.name for group in groups for member in group.members}
    first: dict[fx.Node, str] = {}
    joins: dict[Join, None] = {}
    for node in graph.graph.nodes:
        for source in _read_in_codes(node) if node.name in quantizing else ():
            value, _ = _stored_operand(source, node, quantizing[node.name], rules)
            other = first.setdefault(value, node.name)
            found = [quantizing[other], quantizing[node.name]]
            formats = {candidate.activation for group in found for candidate in group.candidates}
            if found[0] is not found[1] and len(formats) > 1:
                joins[Join("shared_input", names[node.name], names[other])] = None
    return tuple(joins)


def _quantizing(groups: Sequence[Group]) -> dict[str, Group]:
    """Groups with quantized activations, by the nodes of their layers and products."""
    return {
        member.node: group
        for group in groups
        for member in group.members
        if any(candidate.activation is not None for candidate in group.candidates)
    }


def _read_in_codes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The activations that a layer or product reads in codes: its input, or both operands."""
    operator = OPERATORS.get(node.target)
    if operator is None:
        return product_operands(node)
    source = argument(node, operator.input)
    assert isinstance(source, fx.Node)
    return (source,) if operator.quantizes_input else ()


def _stored_operand(
    source: fx.Node, reader: fx.Node, group: Group, rules: TargetRules
) -> tuple[fx.Node, fx.Node]:
    """What is stored of an operand of a group's layer, and who reads that.

    The rows in which ranges are found at every run are the operand's own.
    """
    if any(found is not None and found.dynamic is Dynamic.ROW for found in _activations(group)):
        return source, reader
    return stored_source(source, reader, rules)


def stored_source(source: fx.Node, reader: fx.Node, rules: TargetRules) -> tuple[fx.Node, fx.Node]:
    """Walk up past operators that commute with quantization, and more of them for a product.

    Args:
        source: A tensor.
        reader: A node that reads it.
        rules: The target's.

    Returns:
        The tensor that is stored in its place, and the node that reads that.
    """
    further = rules.product_through if product_operands(reader) else frozenset()
    while source.target in rules.through or (source.target in further and len(source.users) == 1):
        assert isinstance(source.args[0], fx.Node)
        source, reader = source.args[0], source
    return source, reader


def _is_symmetric(site: Site, rules: TargetRules) -> bool:
    """Whether a reader that computes on codes, maybe behind others, asks for signed ones."""
    is_unsigned = operator_name(site.value) in rules.unsigned_outputs_of
    pending = [(site.value, reader) for reader in site.readers or site.value.users]
    while pending:
        value, reader = pending.pop()
        if reader.target in rules.through | rules.product_through:
            pending += [(reader, further) for further in reader.users]
        elif is_unsigned and product_operands(reader)[1:] != (value,):
            continue
        elif _asks_for_symmetric(value, reader, rules):
            return True
    return False


def _asks_for_symmetric(value: fx.Node, reader: fx.Node, rules: TargetRules) -> bool:
    name = operator_name(reader)
    if name in MEETINGS:
        return name in rules.symmetric_inputs_of
    kind = PRODUCT if product_operands(reader) else name
    return kind in rules.symmetric_inputs_of and value in _read_in_codes(reader)


def _store_outputs(
    graph: fx.GraphModule,
    groups: Sequence[Group],
    rules: TargetRules,
    fusions: Sequence[Fusion],
    sites: dict[fx.Node, Site],
) -> list[Site]:
    """Add the outputs that the target stores quantized; what meets in them is read in codes.

    Returns:
        Those that lie before the site of who reads them.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    fused = {fusion.nodes[0]: [nodes[name] for name in fusion.nodes] for fusion in fusions}
    inner = {name for fusion in fusions for name in fusion.nodes[1:]}
    by_name, quantizing = {group.name: group for group in groups}, _quantizing(groups)
    computed_by: dict[fx.Node, str] = {}
    on_codes: list[fx.Node] = []
    own: dict[fx.Node, Site] = {}
    for node in nodes.values():
        owner = _stored_output_owner(node, quantizing, computed_by, sites, rules)
        if owner is None or node.name in inner:
            continue
        members = fused.get(node.name, [node])
        output = members[-1]
        read = sites.get(output)
        if read is None and operator_name(node) in rules.stored_if_read:
            continue
        computed_by[output] = owner
        if read is not None and rules.own_outputs and _differs(by_name[owner], by_name[read.group]):
            own[output] = Site(output, owner, None, is_output=True)
        else:
            site = sites.setdefault(output, Site(output, owner, is_output=rules.own_outputs))
            site.readers = None
        on_codes += members
    for node in on_codes:
        for operand in met_tensors(node) if operator_name(node) in MEETINGS else ():
            met = sites.get(operand)
            if met is None or met.readers is None or operand in own:
                continue
            if not (rules.own_outputs and _finds_ranges(by_name[met.group])):
                met.readers.add(node)
    return list(own.values())


def _differs(computing: Group, reading: Group) -> bool:
    """Whether what a group computes may be stored in codes where what the other reads is not so."""
    if computing is reading:
        return _finds_ranges(reading)
    return not all(found is not None and found.dynamic is None for found in _activations(reading))


def _finds_ranges(group: Group) -> bool:
    """Whether its layers may find ranges at every run, of which sums know nothing."""
    return any(found is not None and found.dynamic is not None for found in _activations(group))


def _activations(group: Group) -> list[NumberFormat | None]:
    return [candidate.activation for candidate in group.candidates]


def _has_calibrated_range(group: Group) -> bool:
    return any(found is not None and found.dynamic is None for found in _activations(group))


def _store_residuals(
    graph: fx.GraphModule,
    quantizing: dict[str, Group],
    rules: TargetRules,
    fusions: Sequence[Fusion],
    sites: dict[fx.Node, Site],
) -> None:
    """Add what layers' fused `add`s add to their results, unless that is a stored tensor."""
    nodes = {node.name: node for node in graph.graph.nodes}
    for fusion in fusions:
        layer = nodes[fusion.nodes[0]]
        kind = operator_name(layer)
        if layer.name not in quantizing or kind not in rules.quantize_residuals_of:
            continue
        for before, name in zip(fusion.nodes, fusion.nodes[1:], strict=False):
            node = nodes[name]
            if operator_name(node) != "add":
                continue
            (residual,) = (found for found in met_tensors(node) if found is not nodes[before])
            value, reader = stored_source(residual, node, rules)
            if value.op == "get_attr":
                continue
            site = sites.setdefault(value, Site(value, quantizing[layer.name].name))
            if site.readers is not None:
                site.readers.add(reader)


def _stored_output_owner(
    node: fx.Node,
    quantizing: dict[str, Group],
    computed_by: dict[fx.Node, str],
    sites: dict[fx.Node, Site],
    rules: TargetRules,
) -> str | None:
    """Group that owns a node's stored output, or `None` if the target keeps it in float."""
    name = operator_name(node)
    if name not in rules.quantize_outputs_of:
        return None
    if name not in MEETINGS:
        group = quantizing.get(node.name)
        if group is None or (rules.own_outputs and not _has_calibrated_range(group)):
            return None
        return group.name
    operands = met_tensors(node)
    if len(operands) < 2 or not all(operand in sites for operand in operands):
        return None
    return next((computed_by[operand] for operand in operands if operand in computed_by), None)
