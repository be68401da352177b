"""What became of each layer, for the convert report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from torch import fx

from fxmpq.formats import Precision
from fxmpq.graph.state import Member, Product, state_of
from fxmpq.targets.target import LayerReport

KernelRule = Callable[[Member, Precision], tuple[str, str]]
"""From a quantized layer or product and its precision to (kernel, reason it differs or empty)."""

FloatKernelRule = Callable[[Member], str]
"""From a layer or product that stays float to what the target runs for it."""


def layer_reports(
    graph: fx.GraphModule, kernel: KernelRule, float_kernel: FloatKernelRule | None = None
) -> tuple[LayerReport, ...]:
    """List every layer and product of a planned graph, and what stays float.

    Args:
        graph: With chosen precisions.
        kernel: Tells what the target runs for a quantized layer or product.
        float_kernel: Tells it for one that stays float; `float` if `None`.

    Returns:
        A row a layer, in graph order, then what is in no group.
    """
    state = state_of(graph)
    reasons = {entry.name: entry.reason for entry in state.left_float}
    rows: list[LayerReport] = []
    for group in state.groups:
        for member in group.members:
            candidates = group.candidate(state.choices[group.name])
            precision = layer_precision(member, candidates)
            if precision.is_float:
                reason = reasons.pop(member.name, "the plan keeps it in float")
                found = "float" if float_kernel is None else float_kernel(member)
                rows.append(LayerReport(member.name, "fp32", found, reason))
            else:
                rows.append(LayerReport(member.name, str(precision), *kernel(member, precision)))
    rows += [LayerReport(name, "fp32", "float", reason) for name, reason in reasons.items()]
    return tuple(rows)


def computed_elsewhere(
    rows: Sequence[LayerReport], places: Collection[str], kernel: str
) -> tuple[LayerReport, ...]:
    """Name what runs for float operators at some places, of layers and of what no group has.

    Args:
        rows: From `layer_reports`.
        places: As reports name them. A layer on codes may have such a name too, and stays as it is.
        kernel: What runs there.
    """
    return tuple(
        replace(row, kernel=kernel) if row.asked == "fp32" and row.layer in places else row
        for row in rows
    )


def layer_names(graph: fx.GraphModule) -> dict[str, str]:
    """Names of a planned graph's layers and products, by the node that computes each.

    Args:
        graph: With groups.
    """
    groups = state_of(graph).groups
    return {member.node: member.name for group in groups for member in group.members}


def layer_precision(member: Member, precision: Precision) -> Precision:
    """A layer's or product's own precision in its group.

    An embedding takes the weight half, a product of two activations the activation half.
    """
    if isinstance(member, Product):
        return precision.activation_only
    return precision.weight_only if member.kind == "embedding" else precision
