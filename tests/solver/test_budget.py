from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.errors import BudgetError, FileFormatError, InfeasibleBudgetError
from fxmpq.solver.budget import Budget, Limit, infeasible_message

ROW = {"w4a8": 1_000, "w8a8": 2_000}
TABLE = CostTable(
    {
        "weights": {"a": ROW, "b": ROW},
        "weight_bits": {"a": {"w4a8": 8_000, "w8a8": 16_000}, "b": {"w4a8": 8_000, "w8a8": 16_000}},
        "latency": {"a": {"w4a8": 0.25, "w8a8": 0.5}, "b": {"w4a8": 0.25, "w8a8": 0.5}},
    },
    float_total={"weights": 16_000, "weight_bits": 128_000},
    fixed={"weights": 10},
)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("1500", 1500.0),
        ("1500B", 1500.0),
        ("1.5kB", 1500.0),
        ("1.5 MB", 1.5e6),
        ("2gb", 2e9),
        ("1KiB", 1024.0),
        ("0.5MiB", 524288.0),
        ("1GiB", 2.0**30),
        ("35G", 35e9),
        ("3k", 3e3),
        ("3M", 3e6),
        ("3T", 3e12),
        (".5", 0.5),
        ("1e3", 1e3),
        ("2.5E+2", 250.0),
    ],
)
def test_amounts_with_their_units(text: str, amount: float) -> None:
    (limit,) = Budget.parse(f"weights={text}").limits
    assert limit == Limit("weights", amount, relative=False, text=f"weights={text}")
    assert Budget.parse({"weights": text}).limits == (limit,)


def test_several_limits_and_spaces() -> None:
    budget = Budget.parse(" weights = 15% , bops=35G,avg_weight_bits=4.5 ")
    assert [(limit.metric, limit.amount, limit.relative) for limit in budget.limits] == [
        ("weights", 0.15, True),
        ("bops", 35e9, False),
        ("avg_weight_bits", 4.5, False),
    ]
    assert (budget.minimize, budget.loss) == (None, None)


def test_minimise_a_cost_under_a_loss_limit() -> None:
    budget = Budget.parse("minimize=weights,sqnr=30")
    assert budget.minimize == "weights"
    assert budget.loss == pytest.approx(1e-3)
    assert Budget.parse("minimize=bops,loss=0.01").loss == 0.01
    assert Budget.parse({"minimize": "bops", "sqnr": -10}).loss == pytest.approx(10.0)
    with_limit = Budget.parse("minimize=bops,loss=0.01,weights=50%")
    assert [limit.metric for limit in with_limit.limits] == ["weights"]


@given(
    limits=st.dictionaries(
        st.sampled_from(["weights", "bops", "latency"]),
        st.floats(1e-6, 1e18) | st.integers(1, 10**12) | st.sampled_from(["15%", "2MiB", "3 k"]),
        min_size=1,
    ),
    loss=st.none() | st.floats(1e-12, 1e3),
)
def test_the_text_of_a_budget_reads_as_that_budget(
    limits: dict[str, object], loss: float | None
) -> None:
    asked = limits if loss is None else {**limits, "minimize": "weights", "loss": loss}
    budget = Budget.parse(asked)
    assert Budget.parse(str(budget)) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("budget", "metric", "amount"),
    [
        ("weights=25%", "weights", 4_000),
        ("weights=3kB", "weights", 3_000),
        ("avg_weight_bits=4.5", "weight_bits", 18_000),
        ("avg_weight_bits=32", "weight_bits", 128_000),
        ("latency=0.6", "latency", 0.6),
    ],
)
def test_resolve_gives_absolute_limits(budget: str, metric: str, amount: float) -> None:
    (limit,) = Budget.parse(budget).resolve(TABLE)
    assert (limit.metric, limit.text) == (metric, budget)
    assert limit.amount == pytest.approx(amount, rel=1e-15)


@given(share=st.floats(0.01, 1000))
def test_a_percentage_is_that_share_of_the_float_model(share: float) -> None:
    (limit,) = Budget.parse(f"weights={share:.6f}%").resolve(TABLE)
    assert limit.amount == pytest.approx(160 * float(f"{share:.6f}"))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("", r"cannot read '' in the budget ''; write 'metric=amount', as in 'weights=15%'"),
        ("weights", r"cannot read 'weights' in the budget 'weights'"),
        ("weights=", "cannot read 'weights=' in"),
        ("=15%", "cannot read '=15%' in"),
        ("weights=15%,", "cannot read '' in"),
        ("weights=fifteen", r"cannot read the amount 'fifteen' of 'weights'; .*'1\.5MB'"),
        ("weights=3 miles", "cannot read the amount '3 miles'"),
        ("weights=-5", "cannot read the amount '-5'"),
        ("weights=1,5MB", "cannot read '5MB' in"),
        ("weights=1e999", "limit weights=1e999 must be finite"),
        ({"weights": float("nan")}, "limit weights=nan must be finite"),
        ({"weights": -1}, "limit weights=-1 must be greater than zero"),
        ({"weights": True}, "cannot read the amount True"),
        ("weights=0", "limit weights=0 must be greater than zero"),
        ("weights=0%", "limit weights=0% must be greater than zero"),
        ("avg_weight_bits=4MB", "cannot read the amount '4MB' of 'avg_weight_bits'"),
        ("minimize=weights,loss=50%", "cannot read the amount '50%' of 'loss'"),
        ("weights=1,weights=2", "names a cost twice"),
        ("minimize=weights,sqnr=30,loss=0.1", "give the loss limit once"),
        ("minimize=weights", r"minimising 'weights' needs a limit on the loss.*sqnr=30"),
        ("weights=15%,sqnr=30", r"a loss limit needs a cost to minimise.*minimize=weights,sqnr=30"),
        ({}, "the budget is empty; write for example 'weights=15%'"),
        (15, r"cannot read a budget from 15; .*'weights=15%'"),
        (None, "cannot read a budget from None"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_can(budget: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget.parse(budget)


@pytest.mark.parametrize("budget", ["wieghts=15%", "minimize=wieghts,sqnr=30"])
def test_an_unknown_cost_shows_the_legal_ones(budget: str) -> None:
    with pytest.raises(BudgetError, match="no cost 'wieghts' to put a budget on") as caught:
        Budget.parse(budget).resolve(TABLE)
    assert "'weights'" in str(caught.value)
    with pytest.raises(BudgetError) as caught:
        Budget.parse("joules=3").resolve(TABLE)
    for legal in ("weights", "weight_bits", "latency", "avg_weight_bits"):
        assert repr(legal) in str(caught.value)


def test_a_cost_that_is_counted_where_it_is_asked_for_says_how() -> None:
    with pytest.raises(BudgetError, match=r"add.* by fxmpq.cost\(graph, metric='energy'\)"):
        Budget.parse("energy=3").resolve(TABLE)
    with pytest.raises(BudgetError, match="no cost 'enrgy' .*; there are 'energy'"):
        Budget.parse("enrgy=3").resolve(TABLE)


@pytest.mark.parametrize("total", [{}, {"latency": 0}])
def test_a_share_of_an_unknown_total_is_refused(total: dict[str, float]) -> None:
    costs = CostTable({"latency": {"a": {"w4a8": 1}}}, float_total=total)
    with pytest.raises(BudgetError, match=r"'latency=10%' is relative, but .* absolute limit"):
        Budget.parse("latency=10%").resolve(costs)


@given(amount=st.integers(1, 5_000))
def test_feasible_alone_means_at_least_the_smallest_total(amount: int) -> None:
    budget = Budget.parse({"weights": amount})
    if amount >= TABLE.smallest("weights"):
        budget.check_feasible(TABLE)
    else:
        with pytest.raises(InfeasibleBudgetError, match=f"at most {amount:,}; .* is 2,010 "):
            budget.check_feasible(TABLE)


def test_an_infeasible_budget_states_every_limit_and_the_smallest_value() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        Budget.parse("weights=10%,latency=0.75").check_feasible(TABLE)
    assert str(caught.value).splitlines() == [
        "no choice of precisions meets the budget",
        (
            "  weights=10%: at most 1,600; the smallest value reachable is 2,010 "
            "(12.56 % of float)  <- not reachable"
        ),
        "  latency=0.75: at most 0.75; the smallest value reachable is 0.5",
        "Raise the budget, or allow candidates with fewer bits.",
    ]


def test_limits_that_exclude_each_other_are_told_apart() -> None:
    limits = Budget.parse("weights=2010,latency=0.5").resolve(TABLE)
    assert "each limit can be met alone, but not all of them together" in infeasible_message(
        limits, TABLE
    )


def test_ties_raise_the_smallest_value_reachable() -> None:
    costs = CostTable({"weights": {"a": {"w4a8": 1, "w8a8": 9}, "b": {"w2a8": 1, "w8a8": 4}}})
    limits = Budget.parse("weights=5").resolve(costs)
    assert "reachable is 2" in infeasible_message(limits, costs)
    assert "reachable is 13  <- not reachable" in infeasible_message(limits, costs, [("a", "b")])


@pytest.mark.parametrize(
    "make",
    [
        Budget,
        lambda: Budget(minimize="weights"),
        lambda: Budget((Limit("weights", 1.0, relative=False, text="weights=1"),), loss=0.1),
    ],
)
def test_a_budget_without_sense_cannot_be_built(make: Callable[[], Budget]) -> None:
    with pytest.raises(BudgetError, match=r"write for example|needs a"):
        make()


@pytest.mark.parametrize(
    "text", ["weights=15%,bops=35G", "avg_weight_bits=4.5", "minimize=weights,sqnr=30,bops=10%"]
)
def test_json_round_trip(text: str, tmp_path: Path) -> None:
    budget = Budget.parse(text)
    assert Budget.from_json(budget.to_json(tmp_path / "budget.json")) == budget
    assert Budget.from_json(tmp_path / "budget.json") == budget


@pytest.mark.parametrize("limits", ["3", "[3]", '[{"metric": "weights"}]', "[]"])
def test_other_content_is_refused(limits: str) -> None:
    text = f'{{"schema": "fxmpq.budget", "version": 1, "limits": {limits}}}'
    with pytest.raises(FileFormatError, match=r"fxmpq\.budget"):
        Budget.from_json(text)


def test_a_budget_remembers_that_it_was_asked_for_in_decibels() -> None:
    asked = Budget.parse("minimize=weights,sqnr=20")
    assert (asked.loss, asked.in_decibels) == (pytest.approx(0.01), True)
    assert not Budget.parse("minimize=weights,loss=0.01").in_decibels
    assert Budget.from_json(asked.to_json()) == asked


def test_a_budget_tells_which_costs_it_names() -> None:
    budget = Budget.parse("minimize=latency,sqnr=30,weights=1MB,latency=5")
    assert budget.metrics == ("weights", "latency")
    assert Budget.parse("weights=15%").metrics == ("weights",)
