"""Fronts: plans of which none beats another in both loss and cost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from pathlib import Path

from fxmpq.artefact import build, check_fields, dump_json, load_json
from fxmpq.errors import BudgetError, FileFormatError, InfeasibleBudgetError, PlanError
from fxmpq.solver.budget import Budget
from fxmpq.solver.exact import within
from fxmpq.solver.plan import Plan

SCHEMA = "fxmpq.front"
VERSION = 1


@dataclass(frozen=True)
class ParetoFront:
    """Plans of which none beats another: more cost, less loss.

    Args:
        metric: The cost that is traded for loss.
        plans: From the smallest cost to the largest.
        whole: Whether these are all; else some of them, at spaced limits.

    Raises:
        PlanError: If there are no plans, one lacks its loss or the cost, or one with a larger
            cost has no smaller loss.

    Examples:
        >>> small = Plan({"a": "w4a8"}, loss=0.1, costs={"weights": 50})
        >>> large = Plan({"a": "w8a8"}, loss=0.0, costs={"weights": 100})
        >>> ParetoFront("weights", (small, large), whole=True).at(70).choices
        {'a': 'w4a8'}
    """

    metric: str
    plans: tuple[Plan, ...]
    whole: bool = True

    def __post_init__(self) -> None:
        if not self.plans:
            raise PlanError("a front needs at least one plan")
        for plan in self.plans:
            if plan.loss is None or self.metric not in plan.costs:
                raise PlanError(
                    f"a plan of a front needs its loss and its cost {self.metric!r}; one has the "
                    f"loss {plan.loss} and the costs {dict(plan.costs)}"
                )
        # Neighbours may agree after rounding, as when sums of fractions differ by less.
        for (less, more), (loses, gains) in zip(
            itertools.pairwise(self.costs), itertools.pairwise(self.losses), strict=True
        ):
            if not within(less, more) or not within(gains, loses):
                raise PlanError(
                    f"the plans of a front must grow in {self.metric!r} and fall in loss; one of "
                    f"cost {less} and loss {loses} is followed by one of {more} and {gains}"
                )

    @property
    def costs(self) -> tuple[float, ...]:
        """Cost of every plan."""
        return tuple(plan.costs[self.metric] for plan in self.plans)

    @property
    def losses(self) -> tuple[float, ...]:
        """Predicted loss of every plan."""
        return tuple(plan.loss for plan in self.plans if plan.loss is not None)

    def at(self, budget: str | float) -> Plan:
        """Choose the plan of least loss within a budget, as HAWQ-V2 does (arXiv:1911.03852).

        On a whole front this is the plan that `solve` finds for the budget, and the smallest of
        those that lose as little. On a part of it, it is the best of the points there are.

        Args:
            budget: Limit on the front's cost, as `Budget.parse` reads an amount: `1.5e6`,
                `"1.5MB"`, `"15%"`.

        Raises:
            InfeasibleBudgetError: If all plans cost more.
            BudgetError: If the budget cannot be read, or is a share and the plans have no shares.

        Returns:
            The plan.
        """
        (limit,) = Budget.parse({self.metric: budget}).limits
        found = self.costs
        if limit.relative:
            found = tuple(plan.relative.get(self.metric, -1) for plan in self.plans)
            if min(found) < 0:
                raise BudgetError(
                    f"the limit {limit.text!r} is relative, but the plans do not say what share "
                    f"of the float model's {self.metric!r} they take; give an absolute limit"
                )
        fitting = [
            plan for plan, cost in zip(self.plans, found, strict=True) if within(cost, limit.amount)
        ]
        if not fitting:
            share = f" ({100 * found[0]:.2f} % of float)" if limit.relative else ""
            raise InfeasibleBudgetError(
                f"no plan of the front is within {limit.text}; the smallest takes "
                f"{self.costs[0]:,.10g}{share}"
            )
        return fitting[-1]

    def to_json(self, path: str | Path | None = None) -> str:
        """Write as JSON; returns the text, and writes it to `path` if given."""
        plans = [
            {entry.name: getattr(plan, entry.name) for entry in fields(plan)} for plan in self.plans
        ]
        found = {"metric": self.metric, "whole": self.whole, "plans": plans}
        return dump_json(SCHEMA, VERSION, found, path)

    @classmethod
    def from_json(cls, source: str | Path) -> ParetoFront:
        """Read from a file or JSON text.

        Raises:
            FileFormatError: If it holds something else.
        """
        found = load_json(SCHEMA, VERSION, source)
        check_fields(SCHEMA, found, {"metric", "plans"}, {"whole"})
        plans = found["plans"]
        if not isinstance(plans, list) or not all(isinstance(plan, dict) for plan in plans):
            raise FileFormatError(f"{SCHEMA}: 'plans' must be a list of objects")
        found["plans"] = tuple(build(SCHEMA, Plan, plan) for plan in plans)
        return build(SCHEMA, cls, found)
