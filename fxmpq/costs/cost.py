"""Cost: what every (group, precision) takes, by exact rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

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


def cost(graph: fx.GraphModule) -> CostTable:
    """Count what each group costs at each of its candidates.

    Metrics: `weights` (bytes, scales included), `weight_bits` (bits of the codes alone),
    `bops` (bit operations for one sample), `macs` (for one sample). All are exact integers.
    Matrix products that stay float, such as fused attention, enter `bops` and `macs` as a
    fixed part. Sample sizes are those of the batch the model was traced with.

    Args:
        graph: From `prepare` or later.

    Returns:
        The table, with the float model's totals as denominators for relative budgets.

    Raises:
        FxmpqError: If the graph has no groups.
    """
    state = require_groups(graph, stage="prepared")
    fixed_macs = sum(entry.macs for entry in state.left_float)
    fixed = {"weights": 0, "weight_bits": 0, "bops": float_bops(fixed_macs), "macs": fixed_macs}
    tables = {
        metric: {
            group.name: {str(candidate): rule(group, candidate) for candidate in group.candidates}
            for group in state.groups
        }
        for metric, rule in COSTS.items()
    }
    in_float = {
        metric: fixed[metric] + sum(rule(group, Precision()) for group in state.groups)
        for metric, rule in COSTS.items()
    }
    return CostTable(tables, float_total=in_float, fixed=fixed, fingerprint=state.fingerprint)
