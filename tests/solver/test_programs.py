"""The table of programs."""

from __future__ import annotations

import inspect

import pytest

from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge
from fxmpq.errors import BudgetError, FxmpqError
from fxmpq.sensitivity.measure import METHODS
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.program import Row
from fxmpq.solver.programs import (
    COUNT_EDGES,
    PROGRAMS,
    check_counted,
    check_program,
    program_of,
)
from fxmpq.solver.solve import solve

SENSITIVITY = Sensitivity(
    {"a": {"w2a8": 3.0, "w8a8": 0.0}, "b": {"w2a8": 1.0, "w8a8": 0.0}},
    projections=[[3**0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]],  # type: ignore[arg-type]
)
COSTS = CostTable(
    {"weights": {"a": {"w2a8": 20, "w8a8": 80}, "b": {"w2a8": 20, "w8a8": 80}}},
    float_total={"weights": 320},
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_one_way_in(program: str) -> None:
    """The shared arguments come first, so that `solve` needs to know none of them."""
    shared = inspect.signature(PROGRAMS["ilp"]).parameters
    found = list(inspect.signature(PROGRAMS[program]).parameters)
    assert found[: len(shared)] == list(shared)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_solves_what_has_one_good_answer(program: str) -> None:
    """One of the two groups can stay at 8 bits: the one that loses more."""
    found = PROGRAMS[program](SENSITIVITY, COSTS, [Row(COSTS.costs["weights"], 100)])
    assert found.choices == {"a": "w8a8", "b": "w2a8"}
    assert found.bound <= found.objective + 1e-9
    plan = solve(SENSITIVITY, COSTS, {"weights": 100}, program=program)
    assert (plan.choices, plan.program) == (found.choices, program)
    assert plan.loss == pytest.approx(0.5 if program == "quadratic" else 1.0)


def test_unknown_programs_and_options_are_refused_before_work() -> None:
    """With what there is."""
    with pytest.raises(FxmpqError, match="no program 'ipl'; there are.*'ilp'"):
        solve(SENSITIVITY, COSTS, {"weights": 100}, program="ipl")
    with pytest.raises(FxmpqError, match="no option 'rounding' with the program 'ilp'"):
        solve(SENSITIVITY, COSTS, {"weights": 100}, rounding="search")
    with pytest.raises(FxmpqError, match="no option 'roundin' with.*there are 'rounding'"):
        check_program("lp", ["roundin"])


def test_minimising_a_cost_is_a_program_of_its_own() -> None:
    """Other forms refuse it; the method's own form steps back."""
    budget = "minimize=weights,loss=1"
    with pytest.raises(BudgetError, match="program='ilp' instead of 'greedy'"):
        solve(SENSITIVITY, COSTS, budget, program="greedy")
    pairwise = Sensitivity(SENSITIVITY.values, "pairwise", unit="loss")
    assert solve(pairwise, COSTS, budget).choices == {"a": "w8a8", "b": "w2a8"}


def test_an_sqnr_needs_noise() -> None:
    """A loss in nats has no decibels."""
    nats = Sensitivity(SENSITIVITY.values, "layer_loss", unit="loss")
    with pytest.raises(BudgetError, match="limits the SQNR, and the method 'layer_loss'"):
        solve(nats, COSTS, "minimize=weights,sqnr=20")
    plan = solve(nats, COSTS, {"weights": 100})
    assert (plan.unit, plan.sqnr_db) == ("loss", None)


def test_methods_programs_are_there() -> None:
    """Each method's own form is in the table."""
    assert {program_of(method) for method in METHODS} <= set(PROGRAMS)
    assert program_of("pairwise") == "quadratic"


@pytest.mark.parametrize("method", METHODS)
def test_interactions_must_be_measured_to_be_counted(method: str) -> None:
    """Said before the measurement, for methods that measure none."""
    check_program("ilp", method=method)
    if METHODS[method].interactions:
        return check_program("quadratic", method=method)
    with pytest.raises(FxmpqError, match=f"{method!r} does not measure; measure with 'projected'"):
        check_program("quadratic", method=method)
    return None


def test_interactions_count_by_default_where_they_are_known() -> None:
    """Of a method that measures them, unless they are not kept or a cost is minimised."""
    projected = Sensitivity(SENSITIVITY.values, "projected", None, SENSITIVITY.projections)
    bare = Sensitivity(SENSITIVITY.values, "projected")
    assert solve(projected, COSTS, {"weights": 100}).program == "quadratic"
    assert solve(bare, COSTS, {"weights": 100}).program == "ilp"
    assert solve(projected, COSTS, "minimize=weights,loss=1").program == "ilp"
    assert program_of("projected") == "quadratic"


def test_limits_with_format_changes_need_a_form_that_counts_them() -> None:
    """Whatever the limits on other costs are."""
    change = {"w2a8": {"w2a8": 0, "w8a8": 1}, "w8a8": {"w2a8": 1, "w8a8": 0}}
    edges = (Edge("a", "b", change),)
    table = CostTable({"us": COSTS.costs["weights"], **COSTS.costs}, edges={"us": edges})
    check_counted("ilp", ["us", "weights"], table)
    check_counted("greedy", ["weights"], table)
    with pytest.raises(BudgetError, match="'us' counts format changes .* program 'greedy' cannot"):
        check_counted("greedy", ["weights", "us"], table)
    assert set(PROGRAMS) > COUNT_EDGES
