from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.plan import Plan
from fxmpq.solver.solve import solve

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published.json").read_text())
HAWQ = PUBLISHED["hawq_v3_resnet18"]
GROUPS = HAWQ["layer_names"]
TIES = [[GROUPS[index] for index in tie] for tie in HAWQ["ties"]]
NAMES = ("w2a8", "w4a8", "w8a8")


def hawq_tables() -> tuple[Sensitivity, CostTable]:
    """The published program: perturbations as sensitivities, and three costs."""
    inputs = HAWQ["inputs"]

    def table(at4: list[float], at8: list[float]) -> dict[str, dict[str, float]]:
        return {
            group: {"w4a4": low, "w8a8": high}
            for group, low, high in zip(GROUPS, at4, at8, strict=True)
        }

    gains = [
        trace * (at8 - at4)
        for trace, at4, at8 in zip(
            inputs["Hutchinson_trace"],
            inputs["delta_weights_4bit_square"],
            inputs["delta_weights_8bit_square"],
            strict=True,
        )
    ]
    sizes, macs = inputs["parameters"], inputs["millions_of_macs"]
    costs = CostTable(
        {
            "modelsize": table([size / 2 for size in sizes], sizes),
            "bops": table([count / 64 for count in macs], [count / 16 for count in macs]),
            "latency": table(inputs["latency_int4"], inputs["latency_int8"]),
        }
    )
    return Sensitivity(table([0.0] * len(GROUPS), gains), "published"), costs


@pytest.mark.parametrize("solver", ["cbc", "highs"])
@pytest.mark.parametrize("published", HAWQ["configurations"], ids=lambda entry: entry["name"])
def test_the_published_configurations_bit_for_bit(published: dict[str, Any], solver: str) -> None:
    sensitivity, costs = hawq_tables()
    metric = published["constraint"]
    low, high = costs.smallest(metric), costs.largest(metric)
    limit = low + published["fraction"] * (high - low)
    assert limit == pytest.approx(published["limit"], rel=1e-12)
    plan = solve(sensitivity, costs, {metric: limit}, ties=TIES, solver=solver)
    assert [int(plan.choices[group][1]) for group in GROUPS] == published["bits"]
    assert (plan.gap, plan.status) == (0.0, "optimal")
    assert plan.loss == plan.bound == pytest.approx(published["objective"], rel=1e-12)
    assert plan.costs[metric] == pytest.approx(published["cost"], rel=1e-12)


def test_the_published_data_is_whole() -> None:
    found = {(entry["constraint"], entry["fraction"]) for entry in HAWQ["configurations"]}
    assert found == set(itertools.product(("modelsize", "bops", "latency"), (0.25, 0.5, 0.75)))
    assert all(len(column) == len(GROUPS) == 19 for column in HAWQ["inputs"].values())


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sensitivity, CostTable]:
    groups = [f"g{index}" for index in range(draw(st.integers(1, 4)))]
    loss = draw(st.sampled_from([st.integers(0, 4).map(float), st.floats(1e-12, 1e3)]))
    values = {group: {name: draw(loss) for name in NAMES} for group in groups}
    costs = {
        metric: {group: {name: draw(st.integers(0, 50)) for name in NAMES} for group in groups}
        for metric in ("weights", "bops")
    }
    fixed = {"bops": draw(st.integers(0, 20))}
    totals = {"weights": 200, "bops": draw(st.integers(1, 500))}
    return Sensitivity(values), CostTable(costs, totals, fixed)


def plans(case: tuple[Sensitivity, CostTable]) -> list[tuple[float, float, float]]:
    """Loss, weights and bops of every choice."""
    sensitivity, costs = case
    found = []
    for names in itertools.product(NAMES, repeat=len(costs.groups)):
        choice = dict(zip(costs.groups, names, strict=True))
        loss = math.fsum(sensitivity.value(group, name) for group, name in choice.items())
        found.append((loss, costs.total("weights", choice), costs.total("bops", choice)))
    return found


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 200), st.integers(1, 220))
def test_two_limits_against_enumeration(
    case: tuple[Sensitivity, CostTable], weights: int, bops: int
) -> None:
    fitting = [loss for loss, size, work in plans(case) if size <= weights and work <= bops]
    budget = {"weights": weights, "bops": bops}
    if not fitting:
        with pytest.raises(InfeasibleBudgetError, match=f"weights={weights}: at most {weights}"):
            solve(*case, budget)
        return
    plan = solve(*case, budget)
    assert plan.loss == pytest.approx(min(fitting), rel=1e-9, abs=1e-300)
    assert plan.costs["weights"] <= weights
    assert plan.costs["bops"] <= bops


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(1e-6, 20), st.none() | st.integers(1, 220))
def test_minimising_a_cost_under_a_loss_limit_against_enumeration(
    case: tuple[Sensitivity, CostTable], loss: float, bops: int | None
) -> None:
    allowed = loss * (1 + 2.0**-50)
    fitting = [
        size
        for found, size, work in plans(case)
        if found <= allowed and (bops is None or work <= bops)
    ]
    budget = {"minimize": "weights", "loss": loss} | ({} if bops is None else {"bops": bops})
    if not fitting:
        with pytest.raises(InfeasibleBudgetError, match="no choice of precisions meets"):
            solve(*case, budget)
        return
    plan = solve(*case, budget)
    assert plan.costs["weights"] == min(fitting)
    assert plan.loss is not None
    assert plan.loss <= allowed


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 200), st.integers(0, 100))
def test_a_larger_budget_never_loses_more(
    case: tuple[Sensitivity, CostTable], weights: int, more: int
) -> None:
    weights = max(weights, int(case[1].smallest("weights")), 1)
    tight = solve(*case, {"weights": weights})
    loose = solve(*case, {"weights": weights + more})
    assert loose.loss is not None
    assert tight.loss is not None
    assert loose.loss <= tight.loss * (1 + 1e-9)


def tables() -> tuple[Sensitivity, CostTable]:
    values = {
        "a": {"w2a8": 0.4, "w4a8": 0.02, "w8a8": 0.0005},
        "b": {"w2a8": 0.1, "w4a8": 0.01, "w8a8": 0.0001},
    }
    weights = {
        "a": {"w2a8": 20, "w4a8": 40, "w8a8": 80},
        "b": {"w2a8": 50, "w4a8": 100, "w8a8": 200},
    }
    bits = {group: {name: 8 * cost for name, cost in row.items()} for group, row in weights.items()}
    return (
        Sensitivity(values, "projected", "cafe"),
        CostTable(
            {"weights": weights, "weight_bits": bits},
            float_total={"weights": 1120, "weight_bits": 8960},
            fixed={"weights": 7},
            fingerprint="cafe",
        ),
    )


def test_a_plan_says_what_it_takes_and_where_it_is_from() -> None:
    sensitivity, costs = tables()
    plan = solve(sensitivity, costs, "weights=20%")
    assert plan.choices == {"a": "w8a8", "b": "w4a8"}
    assert plan.loss == 0.0105
    assert plan.costs == {"weights": 187, "weight_bits": 1440}
    assert plan.relative == {"weights": 187 / 1120, "weight_bits": 1440 / 8960}
    assert (plan.budget, plan.method, plan.fingerprint) == ("weights=20%", "projected", "cafe")
    assert (plan.status, plan.gap, plan.bound) == ("optimal", 0.0, plan.loss)
    assert plan.seconds is not None
    assert 0 < plan.seconds < 10
    assert Plan.from_json(plan.to_json()) == plan


def test_the_fixed_part_counts_against_the_budget() -> None:
    sensitivity, costs = tables()
    assert solve(sensitivity, costs, "weights=147").costs["weights"] == 147
    assert solve(sensitivity, costs, "weights=146").costs["weights"] < 147


def test_average_bits() -> None:
    sensitivity, costs = tables()
    plan = solve(sensitivity, costs, "avg_weight_bits=4")
    assert plan.costs["weight_bits"] <= 4 / 32 * 8960
    assert plan.choices == {"a": "w4a8", "b": "w4a8"}


def test_a_budget_that_equals_the_smallest_sum_of_fractions_is_met() -> None:
    latencies = {f"g{index}": {"w4a8": 0.1 * (index + 1), "w8a8": 9.0} for index in range(10)}
    costs = CostTable({"latency": latencies}, fixed={"latency": 0.7})
    losses = {group: {"w4a8": 1.0, "w8a8": 0.0} for group in latencies}
    plan = solve(Sensitivity(losses), costs, {"latency": costs.smallest("latency")})
    assert set(plan.choices.values()) == {"w4a8"}


def test_tied_groups_take_one_precision() -> None:
    sensitivity, costs = tables()
    plan = solve(sensitivity, costs, "weights=220", ties=[("a", "b")])
    assert plan.choices == {"a": "w4a8", "b": "w4a8"}


def test_minimise_by_sqnr() -> None:
    plan = solve(*tables(), "minimize=weights,sqnr=15")
    assert plan.choices == {"a": "w4a8", "b": "w4a8"}
    assert plan.budget is not None
    assert plan.budget.startswith("minimize=weights,loss=0.0316")


def test_no_time_returns_a_plan_that_can_be_written() -> None:
    groups = [f"g{index}" for index in range(40)]
    losses = {
        group: {"w2a8": 1.0 + index % 7, "w4a8": 0.3 + index % 3, "w8a8": 0.0}
        for index, group in enumerate(groups)
    }
    sizes = {
        group: {"w2a8": 20 + index % 5, "w4a8": 41 + index % 11, "w8a8": 83 + index % 13}
        for index, group in enumerate(groups)
    }
    costs = CostTable({"weights": sizes})
    best = solve(Sensitivity(losses), costs, "weights=2000")
    plan = solve(Sensitivity(losses), costs, "weights=2000", time_limit=0.0)
    assert (best.status, plan.status) == ("optimal", "feasible")
    assert plan.costs["weights"] <= 2000
    assert plan.loss is not None
    assert plan.bound is not None
    assert best.loss is not None
    assert plan.bound <= best.loss <= plan.loss
    assert plan.gap == (plan.loss - plan.bound) / plan.loss > 0
    assert Plan.from_json(plan.to_json()) == plan


def test_an_infeasible_budget_states_the_limits() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(*tables(), "weights=5%,weight_bits=10kB")
    message = str(caught.value)
    assert "weights=5%: at most 56; the smallest value reachable is 77 (6.88 % of float)" in message
    assert "weight_bits=10kB: at most 10,000; the smallest value reachable is 560" in message


def test_limits_that_exclude_each_other() -> None:
    costs = CostTable(
        {"weights": {"a": {"w4a8": 1, "w8a8": 2}}, "latency": {"a": {"w4a8": 2, "w8a8": 1}}}
    )
    sensitivity = Sensitivity({"a": {"w4a8": 1.0, "w8a8": 0.0}})
    with pytest.raises(InfeasibleBudgetError, match="each limit can be met alone"):
        solve(sensitivity, costs, "weights=1,latency=1")


def test_ties_that_make_a_budget_infeasible() -> None:
    costs = CostTable({"weights": {"a": {"w2a8": 1, "w8a8": 4}, "b": {"w4a8": 2, "w8a8": 4}}})
    sensitivity = Sensitivity({"a": {"w2a8": 1, "w8a8": 0}, "b": {"w4a8": 1, "w8a8": 0}})
    assert solve(sensitivity, costs, "weights=3").loss == 2
    with pytest.raises(InfeasibleBudgetError, match="reachable is 8  <- not reachable"):
        solve(sensitivity, costs, "weights=3", ties=[("a", "b")])


@pytest.mark.parametrize("budget", ["minimize=weights,loss=0.0005", "minimize=weights,sqnr=60"])
def test_an_unreachable_loss_states_the_smallest(budget: str) -> None:
    with pytest.raises(InfeasibleBudgetError, match="smallest loss reachable is 0.0006") as caught:
        solve(*tables(), budget)
    assert "each limit can be met alone" not in str(caught.value)


def test_a_loss_limit_that_excludes_a_cost_limit_states_both() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(*tables(), "minimize=weight_bits,loss=0.001,weights=100")
    message = str(caught.value)
    assert "weights=100: at most 100; the smallest value reachable is 77" in message
    assert "loss at most 0.001; the smallest loss reachable is 0.0006" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"b": {"w4a8": 0.0}}, r"different groups; only one of them has \['a', 'b'\]"),
        ({"a": {"w8a8": 0.0}}, "group 'a' has sensitivities for w8a8 but costs for w4a8"),
        ({"a": {"w4a8": 0.0}}, "different models: fingerprints cafe and f00d"),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(
    values: dict[str, dict[str, float]], message: str
) -> None:
    costs = CostTable({"weights": {"a": {"w4a8": 1}}}, fingerprint="f00d")
    with pytest.raises(FxmpqError, match=message):
        solve(Sensitivity(values, fingerprint="cafe"), costs, "weights=9")
