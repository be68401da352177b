from __future__ import annotations

import pytest

from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.planning import check_tables, plan_of
from fxmpq.solver.program import Solution

SENSITIVITY = Sensitivity({"a": {"w4a8": 0.5, "w8a8": 0.0}}, "entropy", "0123", unit="score")
COSTS = CostTable(
    {"weights": {"a": {"w4a8": 4, "w8a8": 8}}, "macs": {"a": {"w4a8": 3, "w8a8": 3}}},
    float_total={"weights": 32},
    fixed={"macs": 2},
)


def test_a_plan_holds_everything_that_is_known() -> None:
    found = Solution({"a": "w4a8"}, objective=0.5, bound=0.25, status="feasible", seconds=0.1)
    plan = plan_of(found, SENSITIVITY, COSTS, budget="weights=5", program="greedy", loss=0.5)
    assert plan.choices == {"a": "w4a8"}
    assert plan.costs == {"weights": 4, "macs": 5}
    assert plan.relative == {"weights": 0.125}
    assert (plan.method, plan.program, plan.unit) == ("entropy", "greedy", "score")
    assert (plan.loss, plan.bound, plan.gap, plan.status) == (0.5, 0.25, 0.5, "feasible")
    assert (plan.budget, plan.fingerprint, plan.seconds) == ("weights=5", "0123", 0.1)


def test_the_model_may_be_known_from_the_costs_alone() -> None:
    known = CostTable(COSTS.costs, fingerprint="4567")
    found = Solution({"a": "w4a8"}, 0.5, 0.5, "optimal", 0.1)
    bare = Sensitivity(SENSITIVITY.values)
    plan = plan_of(found, bare, known, budget="", program="ilp", loss=0.5)
    assert (plan.fingerprint, plan.relative) == ("4567", {})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"b": {"w4a8": 4, "w8a8": 8}}, "cover different groups; only one of them has .*'a', 'b'"),
        ({"a": {"w4a8": 4}}, "group 'a' has sensitivities for w4a8, w8a8 but costs for w4a8"),
    ],
)
def test_tables_of_other_groups_are_refused(
    table: dict[str, dict[str, float]], message: str
) -> None:
    check_tables(SENSITIVITY, COSTS)
    with pytest.raises(FxmpqError, match=message):
        check_tables(SENSITIVITY, CostTable({"weights": table}))


def test_tables_of_two_models_are_refused() -> None:
    with pytest.raises(FxmpqError, match="different models: fingerprints 0123 and 4567"):
        check_tables(SENSITIVITY, CostTable(COSTS.costs, fingerprint="4567"))
