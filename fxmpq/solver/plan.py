"""Plans: what was chosen, and what is known about the choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from fxmpq.artefact import build, check_fields, dump_json, load_json
from fxmpq.errors import PlanError
from fxmpq.formats import Precision
from fxmpq.sensitivity.sensitivity import UNITS, noise_to_db

SCHEMA = "fxmpq.plan"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """A precision for every group.

    A plan is plain data: write it, read it, edit `choices` by hand, apply it.

    Args:
        choices: Precision name per group.
        layers: Precision name per layer, for reading; `apply` follows `choices`.
        target: The target it was made for.
        budget: As asked.
        method: Sensitivity method.
        fingerprint: Of the model; a plan is refused by another model's graph.
        program: Form of the bit-width program, a key of `PROGRAMS`.
        loss: Predicted loss: the sum of the choices' sensitivities, with their interactions
            where the program counts them.
        unit: What the loss is; see `Sensitivity`.
        costs: Total per metric.
        relative: Share of the float model's total per metric.
        gap: Proven relative gap of the objective, `(objective - bound) / |objective|`.
        bound: Proven lower bound of the objective.
        status: `optimal`, or `feasible` when the optimum was not proven in the time given.
        seconds: Wall time of the solver.

    Raises:
        PlanError: If there are no choices, the unit is unknown, or a number is none or not finite.
        PrecisionError: If a precision cannot be read.

    Examples:
        >>> Plan({"conv1": "w8a8", "conv2": "W4A8"}).choices["conv2"]
        'w4a8'
    """

    choices: Mapping[str, str]
    layers: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None
    budget: str | None = None
    method: str | None = None
    program: str | None = None
    fingerprint: str | None = None
    loss: float | None = None
    unit: str = "noise"
    costs: Mapping[str, float] = field(default_factory=dict)
    relative: Mapping[str, float] = field(default_factory=dict)
    gap: float | None = None
    bound: float | None = None
    status: str | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.choices:
            raise PlanError("a plan needs a precision for at least one group")
        chosen = {str(group): str(Precision.parse(name)) for group, name in self.choices.items()}
        object.__setattr__(self, "choices", chosen)
        if self.unit not in UNITS:
            raise PlanError(f"no unit {self.unit!r} of a loss; there are {', '.join(UNITS)}")
        for name in ("layers", "costs", "relative"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        self._check_numbers()

    def _check_numbers(self) -> None:
        named: dict[str, object] = {
            "loss": self.loss,
            "gap": self.gap,
            "bound": self.bound,
            "seconds": self.seconds,
            **{f"costs[{metric!r}]": value for metric, value in self.costs.items()},
            **{f"relative[{metric!r}]": value for metric, value in self.relative.items()},
        }
        for name, value in named.items():
            if value is None:
                continue
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise PlanError(f"{name} of a plan is {value!r}; give a finite number")

    @property
    def sqnr_db(self) -> float | None:
        """Predicted output SQNR, `-10 log10(loss)` in dB; `None` if the loss is no noise power."""
        if self.loss is None or self.unit != "noise":
            return None
        return noise_to_db(self.loss)

    def check(self, fingerprint: str) -> None:
        """Refuse another model's graph.

        Raises:
            PlanError: If the fingerprints differ.
        """
        if self.fingerprint is not None and self.fingerprint != fingerprint:
            raise PlanError(
                f"the plan was made for a model with fingerprint {self.fingerprint}, and this "
                f"graph's is {fingerprint}: other operators or other weights. Make a plan for "
                "this model, or apply the bare choices: apply(graph, plan.choices)"
            )

    def to_json(self, path: str | Path | None = None) -> str:
        """Write as JSON; returns the text, and writes it to `path` if given."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return dump_json(SCHEMA, VERSION, found, path)

    @classmethod
    def from_json(cls, source: str | Path) -> Plan:
        """Read from a file or JSON text.

        Raises:
            FileFormatError: If it holds something else.
        """
        found = load_json(SCHEMA, VERSION, source)
        names = {entry.name for entry in fields(cls)}
        check_fields(SCHEMA, found, {"choices"}, names - {"choices"})
        return build(SCHEMA, cls, found)


def choices_of(plan: Plan | Mapping[str, str], fingerprint: str) -> Mapping[str, str]:
    """A plan's choices, or bare ones as they are.

    Args:
        plan: A plan, or precision names per group.
        fingerprint: Of the model they are for.

    Raises:
        PlanError: If the plan was made for another model, or is none.
    """
    if isinstance(plan, Plan):
        plan.check(fingerprint)
        return plan.choices
    if not isinstance(plan, Mapping):
        raise PlanError(
            "a plan is what fxmpq.solve returns, or a precision by group, as {'conv1': 'w8a8'}; "
            f"found a {type(plan).__name__}. It goes behind the graph, in front of any batches"
        )
    return plan
