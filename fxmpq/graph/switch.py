"""Switching groups: which precision each group's quantizers simulate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from fxmpq.errors import PlanError, closest
from fxmpq.formats import Precision
from fxmpq.graph.debug import checked
from fxmpq.graph.integer_biases import round_biases
from fxmpq.graph.state import Group, copy_graph, require, with_state
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer


def switch_group(graph: fx.GraphModule, group: Group, precision: Precision) -> None:
    """Set every quantizer of a group to a precision, in place; `fp32` switches them off.

    Args:
        graph: A calibrated graph.
        group: One of its groups.
        precision: A candidate of the group, or float.
    """
    for name in group.activation_quantizers:
        quantizer = graph.get_submodule(name)
        assert isinstance(quantizer, ActivationQuantizer)
        quantizer.activate(precision.activation)
    for layer in group.layers:
        if layer.weight_quantizer is not None:
            weight = graph.get_submodule(layer.weight_quantizer)
            assert isinstance(weight, WeightQuantizer)
            weight.activate(precision.weight)
        if layer.bias_correction is not None:
            bias = graph.get_submodule(layer.bias_correction)
            assert isinstance(bias, BiasCorrection)
            bias.activate(precision.weight)


def with_choices(graph: fx.GraphModule, choices: Mapping[str, str]) -> fx.GraphModule:
    """Copy a calibrated graph and set each group to its chosen precision.

    Args:
        graph: A calibrated graph; not changed.
        choices: Precision name per group, one for every group.

    Returns:
        A graph that simulates the choices.

    Raises:
        PlanError: If the choices name other groups than the graph has.
        FxmpqError: If a precision is not among a group's candidates.
    """
    state = require(graph, stage="calibrated")
    names = dict.fromkeys(group.name for group in state.groups)
    unknown = [name for name in choices if name not in names]
    missing = [name for name in names if name not in choices]
    if unknown:
        raise PlanError(
            f"the plan chooses a precision for {unknown[0]!r}, which is no group of this graph; "
            f"closest: {closest(unknown[0], names)}"
        )
    if missing:
        raise PlanError(
            f"the plan has no precision for {len(missing)} groups: {closest(missing[0], missing)}"
        )
    chosen = {group.name: group.candidate(choices[group.name]) for group in state.groups}
    switched = copy_graph(graph)
    for group in state.groups:
        switch_group(switched, group, chosen[group.name])
    named = {name: str(precision) for name, precision in chosen.items()}
    with_state(switched, replace(state, choices=named))
    round_biases(switched)
    return checked(switched, "apply")


def without_choices(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph with every quantizer off.

    Args:
        graph: A calibrated graph, with chosen precisions or without; not changed.

    Returns:
        The graph as it was before precisions were chosen; what was refined stays.
    """
    state = require(graph, stage="calibrated")
    switched = copy_graph(graph)
    for group in state.groups:
        switch_group(switched, group, Precision())
    return with_state(switched, replace(state, choices={}))
