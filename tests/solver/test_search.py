from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxmpq.errors import BudgetError
from fxmpq.solver import lists, search
from fxmpq.solver.branch import Branched
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.program import Row, solve_program
from fxmpq.solver.search import Start, find_optimum

PUBLISHED = json.loads(
    (Path(__file__).parents[1] / "data" / "published.json").read_text(encoding="utf-8")
)["hawq_v3_resnet18"]
CONFIGURATIONS = {found["name"]: found for found in PUBLISHED["configurations"]}


def hawq_costs(kind: str) -> dict[int, list[float]]:
    """Cost of every layer at 4 and at 8 bits."""
    inputs = PUBLISHED["inputs"]
    if kind == "latency":
        return {4: inputs["latency_int4"], 8: inputs["latency_int8"]}
    if kind == "modelsize":
        return {bits: [bits / 8 * size for size in inputs["parameters"]] for bits in (4, 8)}
    return {bits: [bits**2 / 1024 * macs for macs in inputs["millions_of_macs"]] for bits in (4, 8)}


def test_there_are_nine_published_plans() -> None:
    assert len(CONFIGURATIONS) == 9


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_published_hawq_plans_are_the_proven_optimum(name: str) -> None:
    found = CONFIGURATIONS[name]
    inputs, layers = PUBLISHED["inputs"], PUBLISHED["layer_names"]
    gains = [
        trace * (eight - four)
        for trace, eight, four in zip(
            inputs["Hutchinson_trace"],
            inputs["delta_weights_8bit_square"],
            inputs["delta_weights_4bit_square"],
            strict=True,
        )
    ]
    objective = {
        layer: {"w4a4": 0.0, "w8a8": gain} for layer, gain in zip(layers, gains, strict=True)
    }
    costs = hawq_costs(found["constraint"])
    table = {
        layer: {"w4a4": costs[4][index], "w8a8": costs[8][index]}
        for index, layer in enumerate(layers)
    }
    limit = sum(costs[4]) + found["fraction"] * (sum(costs[8]) - sum(costs[4]))
    ties = [[layers[index] for index in tie] for tie in PUBLISHED["ties"]]
    plan = solve_program(objective, [Row(table, limit)], ties=ties)
    assert [{"w4a4": 4, "w8a8": 8}[plan.choices[layer]] for layer in layers] == (found["bits"])
    assert (plan.status, plan.gap) == ("optimal", 0.0)
    assert plan.objective == pytest.approx(found["objective"], rel=1e-11)


def random_instance(seed: int, spread: int) -> Instance:
    generator = np.random.default_rng(seed)
    rows = int(generator.integers(1, 4))
    keys = itertools.count()
    groups = tuple(
        tuple(
            Option(
                next(keys),
                int(generator.integers(0, spread)),
                tuple(generator.integers(0, spread, rows).tolist()),
            )
            for _ in range(3)
        )
        for _ in range(7)
    )
    limits = tuple(
        sum(generator.choice([option.costs[row] for option in group]).item() for group in groups)
        for row in range(rows)
    )
    return Instance(groups, limits)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("spread", [4, 10**6, 10**15])
def test_a_small_core_widens_to_the_optimum(
    seed: int, spread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_CORE", 1)
    monkeypatch.setattr(lists, "_MOST", 0)
    instance = random_instance(seed, spread)
    feasible = [
        sum(option.value for option in chosen)
        for chosen in itertools.product(*instance.groups)
        if instance.is_met_by(chosen)
    ]
    found = find_optimum(instance, solver="cbc", time_limit=30, max_gap=0.0)
    if not feasible:
        assert found is None
        return
    assert found is not None
    assert found.objective == found.bound == min(feasible)
    options = {option.key: option for option in instance.options}
    chosen = [options[key] for key in sorted(found.keys)]
    assert instance.is_met_by(chosen)
    assert sum(option.value for option in chosen) == found.objective


@pytest.mark.parametrize("solver", ["cbc", "highs"])
def test_what_only_a_tolerance_allows_is_cut_off_by_a_cover(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = 5 * 10**14
    groups = tuple(
        (Option(2 * index, 0, (half + 1 + index,)), Option(2 * index + 1, 3 + index, (0,)))
        for index in range(4)
    )
    learnt: list[Any] = []
    cover = search.violated_cover

    def record(instance: Any, chosen: Any) -> Any:
        learnt.append(cover(instance, chosen))
        return learnt[-1]

    monkeypatch.setattr(search, "violated_cover", record)
    monkeypatch.setattr(lists, "_MOST", 0)
    found = find_optimum(Instance(groups, (2 * half,)), solver=solver, time_limit=30, max_gap=0.0)
    assert found is not None
    # One group fits, the one of the greatest loss; the solver was sure of two.
    assert found.keys == {1, 3, 5, 6}
    assert found.objective == found.bound == 3 + 4 + 5
    assert learnt
    assert all(entry.most < len(entry.keys) for entry in learnt)


def test_time_that_is_out_before_any_choice_is_an_error() -> None:
    rows = [(9, 4, 1), (1, 7, 6), (7, 3, 5)], [(4, 6, 1), (0, 8, 5), (0, 8, 6)]
    rows += [(2, 1, 4), (9, 3, 7), (7, 9, 1)], [(5, 8, 3), (5, 4, 4), (0, 9, 1)]
    keys = itertools.count()
    groups = tuple(tuple(Option(next(keys), 0, costs) for costs in group) for group in rows)
    instance = Instance(groups, (11, 22, 12))
    with pytest.raises(BudgetError, match="in 0 s"):
        find_optimum(instance, solver="cbc", time_limit=0.0, max_gap=0.0)
    assert find_optimum(instance, solver="cbc", time_limit=30.0, max_gap=0.0) is not None


@pytest.mark.parametrize(("max_gap", "repaired"), [(0.0, False), (0.1, False), (0.5, True)])
def test_what_a_tolerance_lets_through_is_repaired_where_the_gap_allows_it(
    max_gap: float, repaired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = (
        (Option(0, 0, (11,)), Option(1, 2, (9,)), Option(2, 9, (0,))),
        (Option(3, 0, (10,)), Option(4, 1, (2,))),
    )
    instance = Instance(groups, (20,))
    answers = [Branched((groups[0][0], groups[1][0]), complete=True, bound=0.0)]
    answers += [Branched(None, complete=True, bound=0.0)]
    monkeypatch.setattr(search, "branch", lambda *args, **kwargs: answers.pop(0))
    found = search._Search(instance, "cbc", 30.0, max_gap)
    found.keys, found.objective = frozenset({1, 4}), 3
    answer = found._branch(instance, unit=3)
    # The nearest choice that fits adds 1; it is within half of the objective of the bound.
    assert answer.chosen == ((groups[0][0], groups[1][1]) if repaired else None)
    assert bool(answers) == repaired
    assert [cover.most for cover in found._covers] == ([] if repaired else [1])


def best(instance: Instance) -> int | None:
    values = [
        sum(option.value for option in chosen)
        for chosen in itertools.product(*instance.groups)
        if instance.is_met_by(chosen)
    ]
    return min(values, default=None)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [4, 10**6, 10**25])
@pytest.mark.parametrize("listed", [True, False])
def test_any_start_leads_to_the_same_optimum(
    seed: int, spread: int, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever choice and prices it begins with, also with values and costs below zero."""
    if not listed:
        monkeypatch.setattr(lists, "_MOST", 0)
        spread = min(spread, 10**6)
    generator = np.random.default_rng(seed)
    shift = int(generator.integers(0, 2)) * spread
    instance = random_instance(seed, min(spread, 10**15))
    factor = max(spread // 10**15, 1)
    groups = tuple(
        tuple(
            Option(o.key, o.value * factor - shift, tuple(c * factor - shift for c in o.costs))
            for o in group
        )
        for group in instance.groups
    )
    limits = tuple(limit * factor - shift * len(groups) for limit in instance.limits)
    instance = Instance(groups, limits)
    expected = best(instance)
    options = {option.key: option for option in instance.options}
    for _ in range(3):
        start = Start(
            frozenset(int(generator.choice([option.key for option in group])) for group in groups),
            tuple(Fraction(float(price)) for price in generator.lognormal(0, 3, len(limits))),
            None if expected is None else expected - int(generator.integers(0, 2)),
        )
        found = find_optimum(instance, solver="cbc", time_limit=30, max_gap=0.0, start=start)
        if expected is None:
            assert found is None
            continue
        assert found is not None
        assert found.objective == found.bound == expected
        chosen = [options[key] for key in found.keys]
        assert len(chosen) == len(groups)
        assert instance.is_met_by(chosen)
        assert sum(option.value for option in chosen) == expected


def test_a_start_at_the_known_bound_is_proven_without_a_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instance = random_instance(3, 10**6)
    found = find_optimum(instance, solver="cbc", time_limit=30, max_gap=0.0)
    assert found is not None
    monkeypatch.setattr(search, "Relaxation", None)
    start = Start(found.keys, floor=found.objective)
    again = find_optimum(instance, solver="cbc", time_limit=30, max_gap=0.0, start=start)
    assert again is not None
    assert (again.keys, again.objective, again.bound) == (found.keys, found.objective, found.bound)


def test_known_prices_of_several_limits_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = (random_instance(seed, 10**6) for seed in range(50))
    solved = (
        (instance, find_optimum(instance, solver="cbc", time_limit=30, max_gap=0.0))
        for instance in programs
    )
    instance, found = next(
        (instance, found)
        for instance, found in solved
        if found is not None and sum(map(bool, found.prices)) > 1
    )
    assert len(found.prices) == len(instance.limits)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("prices are known")

    monkeypatch.setattr(search, "sharp_prices", refuse)
    worst = frozenset(max(group, key=lambda option: option.value).key for group in instance.groups)
    moved = Instance(instance.groups, tuple(limit * 99 // 100 for limit in instance.limits))
    again = find_optimum(
        moved, solver="cbc", time_limit=30, max_gap=0.0, start=Start(found.keys, found.prices)
    )
    assert again is not None
    assert again.objective == again.bound == best(moved)
    with pytest.raises(AssertionError, match="prices are known"):
        find_optimum(moved, solver="cbc", time_limit=30, max_gap=0.0, start=Start(worst))
