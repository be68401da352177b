"""What became of each layer, for the convert report."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer, state_of
from fxmpq.targets.target import LayerReport

KernelRule = Callable[[Layer, Precision], tuple[str, str]]
"""From a quantized layer and its precision to (kernel, reason it differs or empty)."""


def layer_reports(graph: fx.GraphModule, kernel: KernelRule) -> tuple[LayerReport, ...]:
    """List every layer of a planned graph, and every matrix product that stays float.

    Args:
        graph: With chosen precisions.
        kernel: Tells what the target runs for a quantized layer.

    Returns:
        A row a layer, in graph order, then what is in no group.
    """
    state = state_of(graph)
    reasons = {entry.name: entry.reason for entry in state.left_float}
    rows: list[LayerReport] = []
    for group in state.groups:
        for layer in group.layers:
            candidates = group.candidate(state.choices[group.name])
            precision = layer_precision(layer, candidates)
            if precision.is_float:
                reason = reasons.pop(layer.name, "the plan keeps it in float")
                rows.append(LayerReport(layer.name, "fp32", "float", reason))
            else:
                rows.append(LayerReport(layer.name, str(precision), *kernel(layer, precision)))
    rows += [LayerReport(name, "fp32", "float", reason) for name, reason in reasons.items()]
    return tuple(rows)


def layer_precision(layer: Layer, precision: Precision) -> Precision:
    """A layer's own precision in its group: an embedding takes the weight half."""
    return precision.weight_only if layer.kind == "embedding" else precision
