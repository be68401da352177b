"""One metric's part of a cost table."""

from __future__ import annotations

from fxmpq.costs.parts import MetricParts
from fxmpq.costs.terms import Moment


def test_a_part_is_a_sum_or_a_peak() -> None:
    peak = MetricParts(moments=(Moment("conv", 4, {}),))
    assert peak.rows is None
    assert MetricParts({"a": {"w8a8": 1}}).moments == ()
    assert MetricParts({"a": {"w8a8": 1}}).float_total is None
