"""One metric's part of a cost table."""

from __future__ import annotations

from dataclasses import dataclass

from fxmpq.costs.terms import Edge, Moment, Rows


@dataclass(frozen=True)
class MetricParts:
    """What a cost table holds of one metric: a sum over groups, or a peak of moments.

    Args:
        rows: Group to precision to cost; `None` of a peak.
        fixed: Cost of what is in no group, of a sum.
        float_total: What the float model costs, where it is known.
        edges: What format changes between groups add to a sum.
        moments: What is alive at once, of a peak.

    Examples:
        >>> MetricParts({"conv1": {"w8a8": 3.0, "fp32": 9.0}}, fixed=1.0, float_total=10.0).fixed
        1.0
    """

    rows: Rows | None = None
    fixed: float = 0.0
    float_total: float | None = None
    edges: tuple[Edge, ...] = ()
    moments: tuple[Moment, ...] = ()
