from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxmpq.errors import BudgetError
from fxmpq.solver import search
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.program import Row, solve_program
from fxmpq.solver.search import find_optimum

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
    cover = search._Search._violated_cover

    def record(self: Any, chosen: Any) -> Any:
        learnt.append(cover(self, chosen))
        return learnt[-1]

    monkeypatch.setattr(search._Search, "_violated_cover", record)
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
