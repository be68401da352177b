"""Prepare: group the layers and insert quantizers, all switched off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from fxmpq.errors import PrecisionError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.groups import form_groups
from fxmpq.graph.layers import find_layers
from fxmpq.graph.legality import check_prepared
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.sites import Site, find_sites
from fxmpq.graph.state import Group, Layer, LeftFloat, copy_graph, require, with_state
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer

_HOME = "quantizers"


def insert_quantizers(
    graph: fx.GraphModule,
    rules: TargetRules,
    *,
    candidates: Sequence[Precision] | None = None,
    keep: Mapping[str, Precision] | None = None,
    exclude: Sequence[str] = (),
) -> fx.GraphModule:
    """Group a graph's layers by a target's rules and insert quantizers, all off.

    Every distinct weight gets a weight quantizer, every weighted call a bias correction (unless
    its bias is computed), and every tensor the target stores in low bits an activation
    quantizer. With all of them off the graph computes what it did before, bit for bit.

    Args:
        graph: From `trace`; it is copied, not changed.
        rules: What the target runs and where it quantizes.
        candidates: Precisions to choose from; the target's defaults if `None`.
        keep: fnmatch pattern on layer names to a precision these layers must have.
        exclude: fnmatch patterns of layers that stay float, even where `keep` matches too.

    Returns:
        The prepared graph; `fxmpq.graph.state.state_of` tells its groups.

    Raises:
        PrecisionError: If the target cannot run a candidate, or a weight is not `float32`.
        PatternError: If a pattern matches no layer.
    """
    state = require(graph, stage="traced")
    wanted = tuple(candidates) if candidates is not None else rules.default_candidates
    pins = dict(keep or {})
    rules.check([*wanted, *pins.values()])
    prepared = copy_graph(graph)
    found = find_layers(prepared)
    groups = form_groups(prepared, found.layers, rules, wanted, pins, exclude)
    _check_dtypes(prepared, groups)
    sites = find_sites(prepared, groups, rules)
    owned = _insert_activation_quantizers(prepared, groups, sites)
    nodes = {node.name: node for node in prepared.graph.nodes}
    finished = tuple(_finish_group(prepared, nodes, group, owned) for group in groups)
    excluded = tuple(
        LeftFloat(layer.name, _why_float(layer, rules))
        for group in finished
        if group.candidates == (Precision(),)
        for layer in group.layers
    )
    prepared.recompile()
    check_prepared(prepared, frozenset(_module_names(finished)))
    return with_state(
        prepared,
        replace(
            state, target=rules.name, groups=finished, left_float=(*found.left_float, *excluded)
        ),
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


def _why_float(layer: Layer, rules: TargetRules) -> str:
    if layer.kind not in rules.operators:
        return f"target {rules.name!r} has no quantized {layer.kind}"
    return "kept in float by the user"


def _module_names(groups: Sequence[Group]) -> list[str]:
    names: list[str] = []
    for group in groups:
        names += group.activation_quantizers
        names += {layer.weight_quantizer for layer in group.layers if layer.weight_quantizer}
        names += [layer.bias_correction for layer in group.layers if layer.bias_correction]
    return names


def _insert_activation_quantizers(
    graph: fx.GraphModule, groups: Sequence[Group], sites: Sequence[Site]
) -> dict[fx.Node, tuple[str, str]]:
    """Insert a quantizer behind each site; returns quantizer node -> (group, module name)."""
    by_name = {group.name: group for group in groups}
    inserted: dict[fx.Node, tuple[str, str]] = {}
    for index, site in enumerate(sites):
        module_name = f"{_HOME}.activation_{index}"
        formats = _distinct(candidate.activation for candidate in by_name[site.group].candidates)
        quantizer = ActivationQuantizer(f"{site.value.name} ({site.group})", formats)
        graph.add_submodule(module_name, quantizer)
        readers = list(site.value.users) if site.readers is None else list(site.readers)
        with graph.graph.inserting_after(site.value):
            node = graph.graph.call_module(module_name, (site.value,))
        node.meta["val"] = site.value.meta.get("val")
        node.meta["example_shape"] = site.value.meta.get("example_shape")
        for reader in readers:
            reader.replace_input_with(site.value, node)
        inserted[node] = (site.group, module_name)
    return inserted


def _finish_group(
    graph: fx.GraphModule,
    nodes: Mapping[str, fx.Node],
    group: Group,
    owned: Mapping[fx.Node, tuple[str, str]],
) -> Group:
    """Insert a group's weight quantizers and bias corrections and write down their names."""
    if group.candidates == (Precision(),):
        return group
    layers = tuple(_insert_weight_quantizer(graph, nodes, group, layer) for layer in group.layers)
    modules = tuple(name for owner, name in owned.values() if owner == group.name)
    return replace(group, layers=layers, activation_quantizers=modules)


def _insert_weight_quantizer(
    graph: fx.GraphModule, nodes: Mapping[str, fx.Node], group: Group, layer: Layer
) -> Layer:
    node = nodes[layer.node]
    operator = OPERATORS[node.target]
    weight = argument(node, operator.weight)
    assert isinstance(weight, fx.Node)
    quantizer_name = f"{_HOME}.weight_{weight.name}"
    quantized = _existing(weight, quantizer_name)
    if quantized is None:
        formats = _distinct(candidate.weight for candidate in group.candidates)
        quantizer = WeightQuantizer(layer.weight, formats, layer.channel_axis)
        graph.add_submodule(quantizer_name, quantizer)
        with graph.graph.inserting_after(weight):
            quantized = graph.graph.call_module(quantizer_name, (weight,))
        quantized.meta["val"] = weight.meta.get("val")
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


def _existing(weight: fx.Node, quantizer_name: str) -> fx.Node | None:
    """The quantizer that another call of the same weight already brought."""
    return next((user for user in weight.users if user.target == quantizer_name), None)


def _distinct(formats: Iterable[NumberFormat | None]) -> list[NumberFormat]:
    """Formats without repeats and without float, in order."""
    return list(dict.fromkeys(found for found in formats if found is not None))
