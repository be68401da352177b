from __future__ import annotations

from typing import Any

import pytest

from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Moment
from fxmpq.errors import BudgetError, FxmpqError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver import pareto as module
from fxmpq.solver.pair_search import find_either
from fxmpq.solver.pareto import pareto

from .conftest import sizes


def test_a_front_too_long_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = sizes(5)
    length = len(pareto(*tables).plans)
    monkeypatch.setattr(module, "MAX_POINTS", length)
    assert len(pareto(*tables).plans) == length
    monkeypatch.setattr(module, "MAX_POINTS", length - 1)
    with pytest.raises(BudgetError, match=rf"more than {length - 1} points.*points=100"):
        pareto(*tables)
    assert len(pareto(*tables, points=length).plans) <= length


def test_time_that_runs_out_is_an_error_and_says_how_far_it_came() -> None:
    with pytest.raises(BudgetError, match=r"0 points .* after 0 s.*time_limit.*points=20"):
        pareto(*sizes(4), time_limit=0.0)


def test_a_point_that_is_not_proven_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def unproven(*args: Any, **kwargs: Any) -> Any:
        found = find_either(*args, **kwargs)
        return None if found is None else module.replace(found, bound=found.bound - 1)

    monkeypatch.setattr(module, "find_either", unproven)
    with pytest.raises(BudgetError, match="0 points of the front are proven"):
        pareto(*sizes(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "wieghts"}, "no cost 'wieghts'; there are 'weights'"),
        ({"solver": "gurobi"}, "no solver 'gurobi'; there are 'cbc', 'highs'"),
        ({"points": 1}, "points=1 is no front; ask for 2 or more"),
        ({"limits": "minimize=bops,loss=1"}, "minimises one"),
        ({"limits": {"joules": 3}}, "no cost 'joules' to put a budget on"),
        ({"limits": {"bops": 1}}, "bops=1: at most 1; the smallest value reachable is"),
        ({"limits": {"weights": "1%"}}, "no choice of precisions meets the budget"),
        ({"ties": [["g0", "g9"]]}, "'g9', which is no group"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FxmpqError, match=message):
        pareto(*sizes(3), **options)


def test_tables_of_different_groups_are_refused() -> None:
    with pytest.raises(FxmpqError, match="cover different groups"):
        pareto(Sensitivity({"x": {"w2a8": 0.0}}), sizes(2)[1])


def test_a_front_over_a_peak_is_refused_with_the_way_out() -> None:
    rows = {"a": {"w4a8": 4, "w8a8": 8}}
    costs = CostTable({"weights": rows}, moments={"peak": [Moment("n", 0, rows)]})
    sensitivity = Sensitivity({"a": {"w4a8": 1.0, "w8a8": 0.0}})
    with pytest.raises(BudgetError, match=r"'peak' is a peak, and a front is of sums; .*solve\("):
        pareto(sensitivity, costs, "peak")
    assert len(pareto(sensitivity, costs).plans) == 2


def test_limits_that_exclude_each_other_leave_no_front() -> None:
    rows = {"a": {"w4a8": 4, "w8a8": 8}}
    turned = {"a": {"w4a8": 8, "w8a8": 4}}
    costs = CostTable({"weights": rows, "bops": turned})
    sensitivity = Sensitivity({"a": {"w4a8": 1.0, "w8a8": 0.0}})
    with pytest.raises(InfeasibleBudgetError, match="each limit can be met alone"):
        pareto(sensitivity, costs, limits="weights=4,bops=4")
