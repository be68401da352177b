"""Cost: what every (group, precision) takes, by exact rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import fx

from fxmpq.costs.figures import MetricFigures
from fxmpq.costs.operations import bops, float_bops, macs
from fxmpq.costs.table import CostTable
from fxmpq.costs.weights import weight_bits, weight_bytes
from fxmpq.formats import Precision
from fxmpq.graph.state import Group, require_groups

CostRule = Callable[[Group, Precision], int]

COSTS: Mapping[str, CostRule] = {
    "weights": weight_bytes,
    "weight_bits": weight_bits,
    "bops": bops,
    "macs": macs,
}


def count(graph: fx.GraphModule, figures: Mapping[str, MetricFigures] | None = None) -> CostTable:
    """Count what each group costs at each of its candidates.

    Args:
        graph: From `prepare` or later.
        figures: Of a target's own metrics, by name; none by default.

    Returns:
        The table, with the float model's totals as denominators for relative budgets; a metric
        without figures for float has none.

    Raises:
        FxmpqError: If the graph has no groups, or a metric no figure for a candidate.
    """
    state = require_groups(graph, stage="prepared")
    fixed_macs = sum(entry.macs for entry in state.left_float)
    fixed: dict[str, float] = {
        "weights": 0,
        "weight_bits": 0,
        "bops": float_bops(fixed_macs),
        "macs": fixed_macs,
    }
    tables: dict[str, dict[str, dict[str, float]]] = {
        metric: {
            group.name: {str(candidate): rule(group, candidate) for candidate in group.candidates}
            for group in state.groups
        }
        for metric, rule in COSTS.items()
    }
    in_float: dict[str, float] = {
        metric: fixed[metric] + sum(rule(group, Precision()) for group in state.groups)
        for metric, rule in COSTS.items()
    }
    for metric, found in (figures or {}).items():
        tables[metric] = {
            group.name: {
                str(candidate): found.group_cost(group, candidate) for candidate in group.candidates
            }
            for group in state.groups
        }
        fixed[metric] = found.float_cost(fixed_macs)
        if found.knows_float:
            floats = [found.group_cost(group, Precision()) for group in state.groups]
            in_float[metric] = math.fsum([fixed[metric], *floats])
    return CostTable(tables, float_total=in_float, fixed=fixed, fingerprint=state.fingerprint)
