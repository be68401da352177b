from __future__ import annotations

import itertools
from typing import Any

import mip
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import FxmpqError
from fxmpq.solver import branch as module
from fxmpq.solver.branch import SOLVERS, Cover, branch, sharp_prices, violated_cover
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.relaxation import Relaxation

# Each group is worth its loss at two units of five: the two greatest losses are avoided.
INSTANCE = Instance(
    tuple(
        (Option(2 * index, 0, (2,)), Option(2 * index + 1, loss, (0,)))
        for index, loss in enumerate((1, 2, 3, 4))
    ),
    (5,),
)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_optimum_and_its_bound(solver: str) -> None:
    answer = branch(INSTANCE, [], solver=solver, seconds=10, unit=10)
    assert answer.chosen is not None
    assert [option.key for option in answer.chosen] == [1, 3, 4, 6]
    assert answer.complete
    assert answer.bound == pytest.approx(0.3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_covers_are_kept(solver: str) -> None:
    answer = branch(INSTANCE, [Cover(frozenset({4, 6}), 1)], solver=solver, seconds=10, unit=10)
    assert answer.chosen is not None
    assert [option.key for option in answer.chosen] == [1, 2, 5, 6]


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_is_left_under_covers_that_exclude_everything(solver: str) -> None:
    covers = [Cover(frozenset({0, 1}), 0)]
    answer = branch(INSTANCE, covers, solver=solver, seconds=10, unit=10)
    assert (answer.chosen, answer.complete) == (None, True)


def test_a_cover_counts_settled_options() -> None:
    settled = Instance(INSTANCE.groups, INSTANCE.limits, settled=(100, 101))
    cover = Cover(frozenset({100, 101}), 1)
    answer = branch(settled, [cover], solver="cbc", seconds=10, unit=10)
    assert (answer.chosen, answer.complete) == (None, True)


def test_without_time_nothing_is_claimed() -> None:
    answer = branch(INSTANCE, [], solver="cbc", seconds=0, unit=10)
    assert (answer.chosen, answer.complete, answer.bound) == (None, False, 0.0)
    relaxation = Relaxation.of(INSTANCE, 10)
    prices = sharp_prices(relaxation, solver="cbc", seconds=0)
    assert prices.tolist() == relaxation.single_price().tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_sharp_prices_give_the_best_bound(solver: str) -> None:
    relaxation = Relaxation.of(INSTANCE, 10)
    prices = sharp_prices(relaxation, solver=solver, seconds=10)
    best = max(relaxation.bound(np.array([price]))[0] for price in np.linspace(0, 2, 401))
    assert relaxation.bound(prices)[0] == pytest.approx(best, rel=1e-5)


def test_each_limit_gets_a_price_of_its_own() -> None:
    """What is short is dear: no price for all limits bounds as well."""
    generator = np.random.default_rng(0)
    groups = tuple(
        (
            Option(2 * index, 0, tuple(generator.integers(1, 100, 2).tolist())),
            Option(2 * index + 1, int(generator.integers(1, 100)), (0, 0)),
        )
        for index in range(50)
    )
    relaxation = Relaxation.of(Instance(groups, (200, 2000)), 1000)
    sharp = relaxation.bound(sharp_prices(relaxation, solver="cbc", seconds=10))[0]
    grid = np.linspace(0, 10, 101)
    best = max(relaxation.bound(np.array([one, two]))[0] for one in grid for two in grid)
    assert sharp >= best
    assert sharp > relaxation.bound(relaxation.single_price())[0]


# Mixed in halves, the free options keep the limits: the best bound is 0.
FREE = (
    "0:011 1:200, 0:012 0:020 0:201, 0:021 2:220 2:300, 0:121 2:002 2:130, 0:110 1:003 2:000, "
    "0:103 0:120 1:032"
)
# Where prices are steep, the solver's tolerance hides what the planes allow.
STEEP = "0:012 3:100, 0:001 0:110, 0:010 1:000, 0:011 0:100, 0:100 1:020"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("options", "limits"), [(FREE, (9, 7, 9)), (STEEP, (1, 5, 2))])
def test_sharp_prices_come_to_an_end(
    options: str, limits: tuple[int, ...], solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = itertools.count()
    groups = tuple(
        tuple(Option(next(keys), int(text[0]), tuple(map(int, text[2:]))) for text in group.split())
        for group in options.split(", ")
    )
    optimize, solved = mip.Model.optimize, itertools.count()

    def count(self: mip.Model, **options: Any) -> mip.OptimizationStatus:
        assert next(solved) < 50
        return optimize(self, **options)

    monkeypatch.setattr(mip.Model, "optimize", count)
    relaxation = Relaxation.of(Instance(groups, limits), 4)
    prices = sharp_prices(relaxation, solver=solver, seconds=5)
    assert relaxation.bound(prices)[0] >= relaxation.bound(relaxation.single_price())[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_say_nothing(solver: str, capfd: pytest.CaptureFixture[str]) -> None:
    branch(INSTANCE, [], solver=solver, seconds=10, unit=10)
    sharp_prices(Relaxation.of(INSTANCE, 10), solver=solver, seconds=10)
    assert capfd.readouterr() == ("", "")


def test_a_solver_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **options: Any) -> None:
        raise FileNotFoundError("HiGHS not found")

    monkeypatch.setattr(module.mip, "Model", missing)
    with pytest.raises(FxmpqError, match=r"pip install 'mip\[highs\]'.*solver='cbc'"):
        branch(INSTANCE, [], solver="highs", seconds=10, unit=10)


@given(data=st.data())
def test_a_cover_cuts_off_what_exceeds_a_limit_and_nothing_else(data: st.DataObject) -> None:
    """Whatever the least cost of a group is, also below zero."""
    cost = st.integers(-5, 9)
    rows = data.draw(st.integers(1, 2))
    groups = tuple(
        tuple(
            Option(4 * group + index, 0, tuple(data.draw(cost) for _ in range(rows)))
            for index in range(data.draw(st.integers(1, 3)))
        )
        for group in range(data.draw(st.integers(1, 4)))
    )
    limits = tuple(data.draw(st.integers(-6, 20)) for _ in range(rows))
    instance = Instance(groups, limits)
    for chosen in itertools.product(*groups):
        if instance.is_met_by(chosen):
            continue
        cover = violated_cover(instance, chosen)
        assert sum(option.key in cover.keys for option in chosen) > cover.most
        for other in itertools.product(*groups):
            if instance.is_met_by(other):
                assert sum(option.key in cover.keys for option in other) <= cover.most


def test_a_solver_that_stops_without_a_solution_proves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CBC then names its largest number as the bound."""

    class Stopped(mip.Model):
        num_solutions = 0
        objective_bound = 1.7976931348623157e308

        def optimize(self, **_: object) -> mip.OptimizationStatus:
            return mip.OptimizationStatus.NO_SOLUTION_FOUND

    monkeypatch.setattr(module, "new_model", lambda solver: Stopped(solver_name=mip.CBC))
    answer = branch(INSTANCE, [], solver="cbc", seconds=10, unit=10)
    assert (answer.chosen, answer.complete, answer.bound) == (None, False, 0.0)
