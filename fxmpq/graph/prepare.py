"""Prepare: group the layers and insert quantizers, all switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import fx

from fxmpq.errors import PrecisionError, TargetError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.asked_products import NO_PRODUCTS, ask_products
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.debug import checked
from fxmpq.graph.findings import Fusion, Join
from fxmpq.graph.fusions import find_fusions
from fxmpq.graph.groups import Grouping, form_groups
from fxmpq.graph.integer_biases import with_bias_units
from fxmpq.graph.layers import find_layers
from fxmpq.graph.legality.stages import check_stage
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.patterns import Ties, read_ties
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.shared_ranges import (
    SharedRanges,
    check_ranges_are_fixed,
    find_shared_ranges,
    joins_for_ranges,
    share_symmetry,
)
from fxmpq.graph.sites import Site, find_sites, joins_for_sites
from fxmpq.graph.state import Group, Layer, LeftFloat, Member, copy_graph, require, with_state
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer

_HOME = "quantizers"


def insert_quantizers(
    graph: fx.GraphModule,
    rules: TargetRules,
    *,
    candidates: Sequence[Precision] | None = None,
    keep: Mapping[str, Precision] | None = None,
    exclude: Sequence[str] = (),
    ties: Ties = (),
    products: bool = False,
) -> fx.GraphModule:
    """Group a graph's layers by a target's rules and insert quantizers, all off.

    Every distinct weight gets a weight quantizer, every weighted call a bias correction (unless
    its bias is computed), and every tensor the target stores in low bits an activation
    quantizer. With all of them off the graph computes what it did before, bit for bit; but where
    `products` takes fused attention apart, it agrees to rounding.

    Args:
        graph: From `trace`; it is copied, not changed.
        rules: What the target runs and where it quantizes.
        candidates: Precisions to choose from; the target's defaults if `None`.
        keep: fnmatch pattern on layer names to a precision these layers must have.
        exclude: fnmatch patterns of layers that stay float, even where `keep` matches too.
        ties: Each entry an fnmatch pattern, or several, whose layers share a precision.
        products: Whether products of two activations are quantized, those of attention included.

    Returns:
        The prepared graph; `fxmpq.graph.state.state_of` tells its groups.

    Raises:
        PrecisionError: If the target cannot run a candidate, a weight is not `float32`, there is
            nothing for products to take, or tensors of one range would each find their own.
        PatternError: If a pattern matches no layer, or a tie one layer only.
        TargetError: If the target cannot run a layer whatever its precision.
    """
    state = require(graph, stage="traced")
    wanted = tuple(candidates) if candidates is not None else rules.default_candidates
    pins = dict(keep or {})
    rules.check([*wanted, *pins.values()], products=products)
    prepared = copy_graph(graph)
    asked = NO_PRODUCTS
    if products:
        asked = ask_products(prepared, rules, wanted, pins, exclude)
    found = find_layers(prepared)
    _check_convolutions(found.layers, rules)
    fused = find_fusions(prepared, found.layers, rules.fusions)
    form = partial(
        form_groups, prepared, found.layers, rules, wanted, pins, exclude, read_ties(ties)
    )
    form = partial(form, asked=asked)
    grouping, sites, shared = _arrange(prepared, form, rules, fused.fusions)
    groups = grouping.groups
    _check_dtypes(prepared, groups)
    owned = _insert_activation_quantizers(prepared, groups, sites)
    nodes = {node.name: node for node in prepared.graph.nodes}
    weights: dict[str, fx.Node] = {}
    finished = tuple(_finish_group(prepared, nodes, group, owned, weights) for group in groups)
    finished = with_bias_units(prepared, finished, rules)
    floats = [*exclude, *(pattern for pattern, found in pins.items() if found.is_float)]
    excluded = tuple(
        LeftFloat(member.name, _why_float(member, group, rules, wanted, floats))
        for group in finished
        if group.candidates == (Precision(),)
        for member in group.members
    )
    prepared.recompile()
    with_state(
        prepared,
        replace(
            state,
            target=rules.name,
            groups=finished,
            left_float=(*asked.without(found.left_float, prepared), *excluded),
            fusions=fused.fusions,
            joins=grouping.joins,
            missed=(*fused.missed, *grouping.missed, *shared.missed),
            shared_ranges=tuple(
                tuple(_activation_name(index) for index in members) for members in shared.classes
            ),
        ),
    )
    check_stage(prepared, "prepared", needed_only=True)
    return checked(prepared, "prepare")


def _arrange(
    graph: fx.GraphModule,
    form: Callable[..., Grouping],
    rules: TargetRules,
    fusions: Sequence[Fusion],
) -> tuple[Grouping, list[Site], SharedRanges]:
    """Form groups and find their sites; again where a site or a range asks for more joins."""
    further: tuple[Join, ...] = ()
    while True:
        grouping = form(further)
        sites = find_sites(graph, grouping.groups, rules, fusions)
        shared = find_shared_ranges(graph, sites, rules, fusions)
        found = joins_for_sites(graph, grouping.groups, rules)
        found += joins_for_ranges(shared, sites, grouping.groups)
        if not found:
            check_ranges_are_fixed(shared, sites, grouping.groups)
            share_symmetry(shared, sites)
            return grouping, sites, shared
        further += found


def _check_convolutions(layers: Sequence[Layer], rules: TargetRules) -> None:
    most = rules.convolved_dimensions
    if most is None:
        return
    for layer in layers:
        dimensions = len(layer.weight_shape) - 2
        if layer.kind in ("conv", "conv_transpose") and dimensions > most:
            raise TargetError(
                f"layer {layer.name!r} is a convolution over {dimensions} dimensions; target "
                f"{rules.name!r} runs those over {most} at most, in float too. Target "
                "'onnxruntime' may run this model, and 'reference' does"
            )


def _check_dtypes(graph: fx.GraphModule, groups: Sequence[Group]) -> None:
    for group in groups:
        for layer in group.layers:
            dtype = get_tensor(graph, layer.weight).dtype
            if dtype is not torch.float32 and group.candidates != (Precision(),):
                raise PrecisionError(
                    f"layer {layer.name!r} has {str(dtype).removeprefix('torch.')} weights; codes "
                    "and scales are found from float32, so convert the model first: model.float()"
                )


def _why_float(
    member: Member,
    group: Group,
    rules: TargetRules,
    wanted: Sequence[Precision],
    floats: Sequence[str],
) -> str:
    """Why a group's only candidate is float: the target, the user's patterns, or what is left."""
    if member.kind not in rules.operators:
        return f"target {rules.name!r} has no quantized {member.kind}"
    names = [other.name for other in group.members]
    is_named = any(fnmatchcase(name, pattern) for name in names for pattern in floats)
    if is_named or all(precision.is_float for precision in wanted):
        return "kept in float by the user"
    return "of the candidates only fp32 runs on it"


def _activation_name(site: int) -> str:
    """Module name of a site's quantizer."""
    return f"{_HOME}.activation_{site}"


def _insert_activation_quantizers(
    graph: fx.GraphModule, groups: Sequence[Group], sites: Sequence[Site]
) -> dict[str, list[str]]:
    """Insert a quantizer behind each site; returns the module names of each group's."""
    by_name = {group.name: group for group in groups}
    inserted: dict[str, list[str]] = {}
    stored: dict[fx.Node, fx.Node] = {}
    for index, site in enumerate(sites):
        module_name = _activation_name(index)
        formats = _distinct(candidate.activation for candidate in by_name[site.group].candidates)
        name = f"{site.value.name} ({site.group})"
        quantizer = ActivationQuantizer(name, formats, site.is_symmetric, site.is_output)
        graph.add_submodule(module_name, quantizer)
        readers = list(site.value.users) if site.readers is None else list(site.readers)
        source = stored.get(site.value, site.value)
        with graph.graph.inserting_after(source):
            node = graph.graph.call_module(module_name, (source,))
        stored[site.value] = node
        node.meta["val"] = site.value.meta.get("val")
        node.meta["example_shape"] = site.value.meta.get("example_shape")
        for reader in readers:
            reader.replace_input_with(source, node)
        inserted.setdefault(site.group, []).append(module_name)
    return inserted


def _finish_group(
    graph: fx.GraphModule,
    nodes: Mapping[str, fx.Node],
    group: Group,
    owned: Mapping[str, list[str]],
    weights: dict[str, fx.Node],
) -> Group:
    """Insert a group's weight quantizers and bias corrections and write down their names.

    `weights` holds the calls of weight quantizers so far, by module name.
    """
    if group.candidates == (Precision(),):
        return group
    layers = tuple(
        _insert_weight_quantizer(graph, nodes[layer.node], group, layer, weights)
        for layer in group.layers
    )
    return replace(group, layers=layers, activation_quantizers=tuple(owned.get(group.name, ())))


def _insert_weight_quantizer(
    graph: fx.GraphModule,
    node: fx.Node,
    group: Group,
    layer: Layer,
    weights: dict[str, fx.Node],
) -> Layer:
    operator = OPERATORS[node.target]
    weight = argument(node, operator.weight)
    assert isinstance(weight, fx.Node)
    quantizer_name = f"{_HOME}.weight_{weight.name}"
    # Another call of the same weight may have brought its quantizer.
    quantized = weights.get(quantizer_name)
    if quantized is None:
        formats = _distinct(candidate.weight for candidate in group.candidates)
        quantizer = WeightQuantizer(layer.weight, formats, layer.channel_axis)
        graph.add_submodule(quantizer_name, quantizer)
        with graph.graph.inserting_after(weight):
            quantized = graph.graph.call_module(quantizer_name, (weight,))
        quantized.meta["val"] = weight.meta.get("val")
        weights[quantizer_name] = quantized
    node.update_arg(operator.weight, quantized)
    source = argument(node, operator.input)
    input_name = str(source.target) if isinstance(source, fx.Node) else ""
    is_quantizer = input_name.startswith(f"{_HOME}.activation_")
    layer = replace(
        layer,
        weight_quantizer=quantizer_name,
        input_quantizer=input_name if is_quantizer else None,
    )
    bias = argument(node, operator.bias)
    assert bias is None or isinstance(bias, fx.Node)
    is_computed = bias is not None and bias.op != "get_attr"
    if operator.bias is None or is_computed:
        return layer
    correction_name = f"{_HOME}.bias_{node.name}"
    graph.add_submodule(correction_name, BiasCorrection(layer.name))
    with graph.graph.inserting_before(node):
        corrected = graph.graph.call_module(correction_name, (bias,))
    args = list(node.args) + [None] * (operator.bias + 1 - len(node.args))
    args[operator.bias] = corrected
    node.args = tuple(args)
    return replace(layer, bias_correction=correction_name)


def _distinct(formats: Iterable[NumberFormat | None]) -> list[NumberFormat]:
    """Formats without repeats and without float, in order."""
    return list(dict.fromkeys(found for found in formats if found is not None))
