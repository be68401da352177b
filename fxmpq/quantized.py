"""What the whole way found: the plan, the graph that simulates it, and what they were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import fx

from fxmpq.costs.table import CostTable
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import state_of
from fxmpq.refinement.refine import refine
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.budget import Budget
from fxmpq.solver.plan import Plan
from fxmpq.solver.solve import solve
from fxmpq.steps import apply
from fxmpq.targets.convert import convert
from fxmpq.targets.target import Converted, Target


@dataclass(frozen=True)
class Quantized:
    """Everything that `quantize` found on its way.

    Args:
        graph: Simulates the plan, refined where that was asked for; called like the model.
        calibrated: The same graph with every candidate at hand and all quantizers off.
        plan: What was chosen.
        sensitivity: How much each choice hurts.
        costs: What each choice costs.
        target: What it was planned for.
        seconds: Wall time per step: `trace`, `calibrate`, `measure`, `solve`; `cost` where a budget
            has it measured, `refine` where that is asked for.
        refinement: The recipe or method of refinement that `graph` went through; `None` for none.
        calibration: The batches it was refined on; none without refinement.
    """

    graph: fx.GraphModule
    calibrated: fx.GraphModule
    plan: Plan
    sensitivity: Sensitivity
    costs: CostTable
    target: Target
    seconds: Mapping[str, float]
    refinement: str | None = None
    calibration: Sequence[Batch] = field(default=(), repr=False)

    def convert(self, output: str | Path | None = None) -> Converted:
        """Convert for the plan's target; see `fxmpq.convert`."""
        return convert(self.graph, self.target, output)

    def solve(
        self, budget: str | Mapping[str, object] | Budget, *, program: str | None = None
    ) -> Quantized:
        """Plan again, for another budget or by another program, from the same measurements.

        The new plan's graph is refined if this one's was, by the same method on the same batches,
        which takes its time again; `fxmpq.solve(result.sensitivity, result.costs, budget)` gives
        a plan alone.
        """
        plan = solve(self.sensitivity, self.costs, budget, program=program)
        plan = finish_plan(self.calibrated, plan)
        return replace(self, plan=plan, graph=self.simulate(plan))

    def simulate(self, plan: Plan | Mapping[str, str], *, progress: bool = False) -> fx.GraphModule:
        """The graph of any plan for this model, refined if this one's is, in the same way.

        Args:
            plan: From `solve`, or precision names per group.
            progress: Whether to show progress bars.

        Returns:
            What `graph` would be with this plan.
        """
        if self.refinement is None:
            return apply(self.calibrated, plan)
        return refine(
            self.calibrated, plan, self.calibration, method=self.refinement, progress=progress
        )


def finish_plan(graph: fx.GraphModule, plan: Plan) -> Plan:
    """Write the target and each layer's own precision into a plan, for people to read.

    Args:
        graph: The graph it was made for.
        plan: From `solve`.

    Returns:
        The plan with `target` and `layers` filled in.
    """
    state = state_of(graph)
    layers = {
        member.name: plan.choices[group.name] for group in state.groups for member in group.members
    }
    return replace(plan, target=state.target, layers=layers)
