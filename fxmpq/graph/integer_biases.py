"""Biases that the target stores as integers: their units, and the rounding to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from fxmpq.formats import NumberFormat, Precision
from fxmpq.granularity import PerBlock
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.findings import BiasUnits
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import Group, Layer, state_of
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer

_FINE = 2.0**24
"""Units in a bias of which `float32` does not hold more exactly."""


def with_bias_units(
    graph: fx.GraphModule, groups: Sequence[Group], rules: TargetRules
) -> tuple[Group, ...]:
    """Write down in what units the target stores biases as integers.

    Args:
        graph: With quantizers.
        groups: Its groups; the layers name their quantizers.
        rules: The target's: their operators' `bias_width`.

    Returns:
        The groups, with `bias_units` in layers that have a bias correction and read codes.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    return tuple(
        replace(
            group,
            layers=tuple(
                replace(layer, bias_units=_bias_units(graph, nodes[layer.node], layer, rules))
                for layer in group.layers
            ),
        )
        for group in groups
    )


def _bias_units(
    graph: fx.GraphModule, node: fx.Node, layer: Layer, rules: TargetRules
) -> BiasUnits | None:
    rule, source = rules.operators.get(layer.kind), _source(graph, node, rules)
    if rule is None or rule.bias_width is None or not source or layer.bias_correction is None:
        return None
    return BiasUnits(source, rule.bias_width)


def _source(graph: fx.GraphModule, node: fx.Node, rules: TargetRules) -> str:
    """Module name of the quantizer whose codes a layer reads; empty if there is none."""
    source = argument(node, OPERATORS[node.target].input)
    while isinstance(source, fx.Node) and source.target in rules.through:
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return ""
    name = str(source.target)
    return name if isinstance(graph.get_submodule(name), ActivationQuantizer) else ""


def round_biases(graph: fx.GraphModule) -> None:
    """Round the biases of a planned graph as the target does, in place.

    A layer on integers with calibrated ranges adds `u round(b / u)` for its bias `b`, its shift
    included, with the units `u` of `BiasUnits`. An output channel without weights has no scale of
    its own, and the target one for which its bias is exact; so has one whose bias is of so many
    units that `float32` does not tell them apart.

    Args:
        graph: With chosen precisions, its quantizers switched to them.
    """
    state = state_of(graph)
    calls = {str(node.target): node for node in graph.graph.find_nodes(op="call_module")}
    for group in state.groups:
        chosen = group.candidate(state.choices[group.name])
        for layer in group.layers:
            if layer.bias_correction is None or layer.bias_units is None:
                continue
            correction = graph.get_submodule(layer.bias_correction)
            assert isinstance(correction, BiasCorrection)
            correction.set_rounding(None)
            stored = calls[layer.bias_correction].args[0]
            bias = get_tensor(graph, str(stored.target)) if isinstance(stored, fx.Node) else None
            with torch.inference_mode(False), torch.no_grad():
                shifted = correction(bias)
                units = None if shifted is None else _units(graph, layer, chosen)
                if units is not None:
                    correction.set_rounding(_rounding(shifted.detach().double(), units))


def _units(graph: fx.GraphModule, layer: Layer, chosen: Precision) -> Tensor | None:
    """Units of a layer's bias, `[channels]` or `[1]`, 0 where it is exact; `None` if it is real."""
    assert layer.bias_units is not None and layer.weight_quantizer is not None
    weight = graph.get_submodule(layer.weight_quantizer)
    source = graph.get_submodule(layer.bias_units.source)
    assert isinstance(weight, WeightQuantizer) and isinstance(source, ActivationQuantizer)
    stored, read = weight.active, source.active
    if chosen.activation is None or not (_is_scaled(stored) and _is_scaled(read)):
        return None
    assert stored is not None and read is not None
    codes = weight.codes(get_tensor(graph, layer.weight).detach(), stored)
    has_weights = codes.transpose(0, weight.axis).flatten(1).any(1)
    finer = 1 << max(layer.bias_units.width - stored.bits, 0)
    return weight.scale(stored).double() * source.ranges[read.name].scale / finer * has_weights


def _is_scaled(number_format: NumberFormat | None) -> bool:
    """Whether its codes are integers with a scale a channel at most, known beforehand."""
    return (
        number_format is not None
        and number_format.is_integer
        and number_format.dynamic is None
        and not isinstance(number_format.granularity, PerBlock)
    )


def _rounding(bias: Tensor, units: Tensor) -> Tensor:
    """What takes a bias, `[channels]`, to whole units; 0 where these are 0 or too fine.

    Groups of a transposed convolution share scales, so that there may be fewer units.
    """
    shared = units.repeat(len(bias) // len(units))
    steps = bias / shared
    is_rounded = (shared > 0) & (steps.abs() < _FINE)
    return torch.where(is_rounded, steps.round() * shared - bias, 0.0).float()
