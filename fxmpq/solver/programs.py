"""The forms of the bit-width program by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from fxmpq.costs.table import CostTable
from fxmpq.errors import BudgetError, FxmpqError, closest
from fxmpq.sensitivity.measure import METHODS
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.edges import solve_rows
from fxmpq.solver.greedy import greedy
from fxmpq.solver.knapsack import knapsack
from fxmpq.solver.lp import lp
from fxmpq.solver.program import Row, Solution
from fxmpq.solver.quadratic.quadratic import quadratic

# (sensitivity, costs, limits, *, ties, solver, time_limit, max_gap, and options of its own)
Program = Callable[..., Solution]

_SHARED = 7


def ilp(
    sensitivity: Sensitivity,
    costs: CostTable,
    limits: Sequence[Row],
    *,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
) -> Solution:
    """The integer program: least summed sensitivity within all limits, proven.

    Limits may have edges: costs of format changes between groups.

    Args:
        sensitivity: Of every group and precision.
        costs: Of the same groups and precisions; the limits already hold them.
        limits: What the choice must keep.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: Seconds, after which the best choice found is returned.
        max_gap: Relative gap at which it may stop.

    Returns:
        The optimum of `solve_program`, or of `solve_with_edges` where limits have edges.

    Examples:
        >>> sensitivity = Sensitivity({"a": {"w4a8": 0.1, "w8a8": 0.0}})
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100}}})
        >>> ilp(sensitivity, costs, [Row(costs.costs["weights"], 60)]).choices
        {'a': 'w4a8'}
    """
    return solve_rows(
        sensitivity.values,
        limits,
        ties=ties,
        solver=solver,
        time_limit=time_limit,
        max_gap=max_gap,
    )


PROGRAMS: Mapping[str, Program] = {
    "ilp": ilp,
    "quadratic": quadratic,
    "greedy": greedy,
    "knapsack": knapsack,
    "lp": lp,
}

NEED_INTERACTIONS = frozenset({"quadratic"})

COUNT_EDGES = frozenset({"ilp"})
"""Forms whose limits may count what format changes between groups cost."""

# Methods whose point is another form than the integer program.
OF_METHOD: Mapping[str, str] = {"projected": "quadratic", "pairwise": "quadratic"}


def program_of(method: str) -> str:
    """The form that a sensitivity method's plans are solved with unless one is asked for.

    Examples:
        >>> program_of("projected"), program_of("sqnr")
        ('quadratic', 'ilp')
    """
    return OF_METHOD.get(method, "ilp")


def check_program(
    program: str, options: Collection[str] = (), *, method: str | None = None
) -> None:
    """Refuse an unknown form, options that it does not take, and a method that it cannot use.

    Args:
        program: As asked.
        options: Names of the options as asked.
        method: The sensitivity method that it is to be used with, where that is known.

    Raises:
        FxmpqError: With the forms, options or methods there are.
    """
    if program not in PROGRAMS:
        raise FxmpqError(f"no program {program!r}; there are {closest(program, PROGRAMS)}")
    known = METHODS.get(method) if method is not None else None
    if program in NEED_INTERACTIONS and known is not None and not known.interactions:
        able = " or ".join(repr(name) for name, entry in METHODS.items() if entry.interactions)
        raise FxmpqError(
            f"the program {program!r} counts interactions between groups, which the method "
            f"{method!r} does not measure; measure with {able}, or take another program"
        )
    legal = tuple(inspect.signature(PROGRAMS[program]).parameters)[_SHARED:]
    for name in options:
        if name not in legal:
            raise FxmpqError(
                f"no option {name!r} with the program {program!r}; there are {closest(name, legal)}"
            )


def check_counted(program: str, metrics: Iterable[str], costs: CostTable) -> None:
    """Refuse limits on costs that a form cannot count.

    Args:
        program: A key of `PROGRAMS`.
        metrics: That have a limit.
        costs: That may have edges.

    Raises:
        BudgetError: If a metric has costs of format changes, and the form counts none.
    """
    between = [metric for metric in metrics if metric in costs.edges]
    if between and program not in COUNT_EDGES:
        raise BudgetError(
            f"the cost {between[0]!r} counts format changes between groups, which the program "
            f"{program!r} cannot; ask for program='ilp'"
        )
