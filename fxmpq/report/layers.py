"""The layers of a plan, as rows for people."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxmpq.costs.operations import bops, float_bops
from fxmpq.costs.weights import weight_bytes
from fxmpq.formats import Precision
from fxmpq.graph.state import Group, Member, Product, require
from fxmpq.report.report import LayerRow, finite_or_none
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.targets.outcome import layer_precision
from fxmpq.targets.target import Converted


def layer_rows(
    graph: fx.GraphModule, sensitivity: Sensitivity, converted: Converted
) -> tuple[LayerRow, ...]:
    """List every layer and product of a planned graph, and what stays float.

    Sizes and bit operations add up to the cost table's totals: weights that two layers share
    are counted at the first.

    Args:
        graph: With chosen precisions.
        sensitivity: That they were chosen by.
        converted: What became of the graph.

    Returns:
        A row a layer in graph order, then what is in no group.
    """
    state = require(graph, stage="calibrated")
    fates = {row.layer: row for row in converted.layers}
    rows: list[LayerRow] = []
    for group in state.groups:
        chosen = group.candidate(state.choices[group.name])
        is_noise = sensitivity.unit == "noise"
        alone = finite_or_none(sensitivity.sqnr_db(group.name, chosen)) if is_noise else None
        seen: set[str] = set()
        for member in group.members:
            fate = fates.pop(member.name)
            own = _alone(group, member)
            rows.append(
                LayerRow(
                    layer=member.name,
                    group=group.name,
                    precision=str(layer_precision(member, chosen)),
                    alone_db=alone,
                    weight_bytes=_own_bytes(own, chosen, seen),
                    bops=bops(own, chosen),
                    kernel=fate.kernel,
                    reason=fate.reason,
                )
            )
    macs = {entry.name: entry.macs for entry in state.left_float}
    rows += [
        LayerRow(
            layer=name,
            group="",
            precision="fp32",
            alone_db=None,
            weight_bytes=0,
            bops=float_bops(macs[name]),
            kernel=fate.kernel,
            reason=fate.reason,
        )
        for name, fate in fates.items()
    ]
    return tuple(rows)


def _alone(group: Group, member: Member) -> Group:
    """A group of one member."""
    if isinstance(member, Product):
        return replace(group, layers=(), products=(member,))
    return replace(group, layers=(member,), products=())


def _own_bytes(own: Group, chosen: Precision, seen: set[str]) -> int:
    """Bytes of a member's weight, 0 if it has none or it was `seen` before; adds it to them."""
    fresh = [layer for layer in own.layers if layer.weight not in seen]
    seen.update(layer.weight for layer in own.layers)
    return weight_bytes(own, chosen) if fresh else 0
