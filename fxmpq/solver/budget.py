"""Budgets: what a plan may cost, as people write it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxmpq.artefact import build, check_fields, dump_json, load_json
from fxmpq.costs.table import CostTable
from fxmpq.errors import BudgetError, FileFormatError, InfeasibleBudgetError
from fxmpq.solver.exact import within
from fxmpq.solver.limits import check_limited, is_reachable, least_total

SCHEMA = "fxmpq.budget"
VERSION = 1

_UNITS: Mapping[str, float] = {
    "": 1,
    "b": 1,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "t": 1e12,
}
_AMOUNT = re.compile(r"(?P<number>[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(?P<unit>%|[a-z]*)")
_AVERAGE = "avg_weight_bits"
WORDS = ("minimize", "loss", "sqnr", _AVERAGE)
"""What a budget may say besides the names of costs."""

_FLOAT_BITS = 32


@dataclass(frozen=True)
class Limit:
    """One limit as asked.

    Args:
        metric: The cost it bounds.
        amount: The greatest value allowed; a share of the float model's if `relative`.
        relative: Whether it is a share.
        text: As the user wrote it.
    """

    metric: str
    amount: float
    relative: bool
    text: str


@dataclass(frozen=True)
class ResolvedLimit:
    """One limit in absolute units.

    Args:
        metric: The cost it bounds.
        amount: The greatest value allowed.
        text: As the user wrote it.
    """

    metric: str
    amount: float
    text: str


@dataclass(frozen=True)
class Budget:
    """What a plan may cost; or what to minimise, under a limit on the loss.

    Args:
        limits: Bounds on costs.
        minimize: A cost to minimise instead of the loss.
        loss: The greatest loss allowed when a cost is minimised.
        in_decibels: Whether that was asked for as an SQNR, so the loss must be a noise power.

    Examples:
        >>> budget = Budget.parse("weights=15%,bops=35G")
        >>> [(limit.metric, limit.amount, limit.relative) for limit in budget.limits]
        [('weights', 0.15, True), ('bops', 35000000000.0, False)]
    """

    limits: tuple[Limit, ...] = ()
    minimize: str | None = None
    loss: float | None = None
    in_decibels: bool = False

    def __post_init__(self) -> None:
        if self.minimize is None and self.loss is not None:
            raise BudgetError(
                "a loss limit needs a cost to minimise, as in 'minimize=weights,sqnr=30'"
            )
        if self.minimize is not None and self.loss is None:
            raise BudgetError(
                f"minimising {self.minimize!r} needs a limit on the loss, as in "
                f"'minimize={self.minimize},sqnr=30' (dB) or 'minimize={self.minimize},loss=0.01'"
            )
        if self.minimize is None and not self.limits:
            raise BudgetError("the budget is empty; write for example 'weights=15%'")

    @classmethod
    def parse(cls, budget: str | Mapping[str, object] | Budget) -> Budget:
        """Read a budget.

        Text is a comma-separated list of `metric=amount`: `weights=15%` (of the float
        model), `weights=1.5MB` (also kB, GB, KiB, MiB, GiB), `bops=35G` (k, M, G, T),
        `avg_weight_bits=4.5`; or `minimize=weights,sqnr=30` (dB) or
        `minimize=bops,loss=0.01`. A mapping has the same keys and values.

        Raises:
            BudgetError: If it cannot be read.
        """
        if isinstance(budget, Budget):
            return budget
        if not isinstance(budget, (str, Mapping)):
            raise BudgetError(
                f"cannot read a budget from {budget!r}; write for example 'weights=15%' or "
                "{'weights': '15%'}"
            )
        entries = _split(budget) if isinstance(budget, str) else list(budget.items())
        if len({name for name, _ in entries}) != len(entries):
            raise BudgetError(f"the budget {budget!r} names a cost twice")
        limits: list[Limit] = []
        minimize: str | None = None
        loss: float | None = None
        in_decibels = False
        for name, value in entries:
            if name == "minimize":
                minimize = str(value)
            elif name in ("loss", "sqnr"):
                if loss is not None:
                    raise BudgetError("give the loss limit once, as 'loss' or as 'sqnr'")
                number, _ = _amount(name, value, units=False)
                in_decibels = name == "sqnr"
                loss = 10 ** (-number / 10) if in_decibels else number
            else:
                limits.append(_limit(name, value))
        return cls(tuple(limits), minimize, loss, in_decibels)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The costs that it names, each once."""
        minimized = [] if self.minimize is None else [self.minimize]
        return tuple(dict.fromkeys([*(limit.metric for limit in self.limits), *minimized]))

    def __str__(self) -> str:
        parts = [limit.text for limit in self.limits]
        if self.minimize is not None:
            parts = [f"minimize={self.minimize}", f"loss={self.loss}", *parts]
        return ",".join(parts)

    def to_json(self, path: str | Path | None = None) -> str:
        """Write as JSON; returns the text, and writes it to `path` if given."""
        limits = [vars(limit) for limit in self.limits]
        fields = {
            "limits": limits,
            "minimize": self.minimize,
            "loss": self.loss,
            "in_decibels": self.in_decibels,
        }
        return dump_json(SCHEMA, VERSION, fields, path)

    @classmethod
    def from_json(cls, source: str | Path) -> Budget:
        """Read from a file or JSON text.

        Raises:
            FileFormatError: If it holds something else.
        """
        found = load_json(SCHEMA, VERSION, source)
        check_fields(SCHEMA, found, {"limits"}, {"minimize", "loss", "in_decibels"})
        entries = found["limits"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise FileFormatError(f"{SCHEMA}: 'limits' must be a list of objects")
        found["limits"] = tuple(build(SCHEMA, Limit, entry) for entry in entries)
        return build(SCHEMA, cls, found)

    def resolve(self, costs: CostTable) -> tuple[ResolvedLimit, ...]:
        """Turn the limits into absolute ones.

        Raises:
            BudgetError: If a metric is not in the table, or a relative limit has no float
                total.
        """
        if self.minimize is not None:
            check_limited(self.minimize, costs, _AVERAGE)
        return tuple(_resolve(limit, costs) for limit in self.limits)

    def check_feasible(self, costs: CostTable) -> None:
        """Refuse a budget that no choice meets, one limit at a time.

        Raises:
            InfeasibleBudgetError: With each unreachable limit and the smallest value there is.
            BudgetError: If a metric is not in the table.
        """
        resolved = self.resolve(costs)
        if not all(is_reachable(costs, limit.metric, limit.amount) for limit in resolved):
            raise InfeasibleBudgetError(infeasible_message(resolved, costs))


def infeasible_message(
    limits: tuple[ResolvedLimit, ...], costs: CostTable, ties: Sequence[Sequence[str]] = ()
) -> str:
    """Say of each limit what was asked and the smallest value reachable."""
    lines = []
    alone = True
    for limit in limits:
        least, is_reached = least_total(costs, limit.metric, ties)
        total = costs.float_total.get(limit.metric)
        share = "" if not total else f" ({100 * least / total:.2f} % of float)"
        met = within(least, limit.amount)
        alone = alone and met
        lines.append(
            f"  {limit.text}: at most {_number(limit.amount)}; the smallest value reachable is "
            f"{'' if is_reached else 'no less than '}{_number(least)}{share}"
            f"{'' if met else '  <- not reachable'}"
        )
    head = "no choice of precisions meets the budget"
    if alone:
        head += ": each limit can be met alone, but not all of them together"
    return "\n".join([head, *lines, "Raise the budget, or allow candidates with fewer bits."])


def _resolve(limit: Limit, costs: CostTable) -> ResolvedLimit:
    metric = "weight_bits" if limit.metric == _AVERAGE else limit.metric
    check_limited(metric, costs, _AVERAGE)
    if not limit.relative and limit.metric != _AVERAGE:
        return ResolvedLimit(metric, limit.amount, limit.text)
    total = costs.float_total.get(metric)
    if not total:
        raise BudgetError(
            f"the limit {limit.text!r} is relative, but the cost table has no float total for "
            f"{metric!r}; give an absolute limit, or float_total={{{metric!r}: ...}}"
        )
    share = limit.amount / _FLOAT_BITS if limit.metric == _AVERAGE else limit.amount
    return ResolvedLimit(metric, share * total, limit.text)


def _split(text: str) -> list[tuple[str, object]]:
    entries: list[tuple[str, object]] = []
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise BudgetError(
                f"cannot read {part.strip()!r} in the budget {text!r}; write 'metric=amount', as "
                "in 'weights=15%' or 'weights=1.5MB,bops=10%'"
            )
        entries.append((name.strip(), value.strip()))
    return entries


def _limit(name: str, value: object) -> Limit:
    number, relative = _amount(name, value, units=name != _AVERAGE)
    if number <= 0:
        raise BudgetError(f"the limit {name}={value} must be greater than zero")
    return Limit(name, number, relative, f"{name}={value}")


def _amount(name: str, value: object, *, units: bool) -> tuple[float, bool]:
    """Read a number with its unit; returns it and whether it is a share."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(name, value, float(value)), False
    match = _AMOUNT.fullmatch(str(value).strip().lower())
    unit = match["unit"] if match else ""
    if match is None or (unit != "%" and unit not in _UNITS) or (unit and not units):
        raise BudgetError(
            f"cannot read the amount {value!r} of {name!r}; write a number, a share such as "
            "'15%', or a size such as '1.5MB', '200KiB' or '35G'"
        )
    number = _finite(name, value, float(match["number"]))
    return (number / 100, True) if unit == "%" else (number * _UNITS[unit], False)


def _finite(name: str, value: object, number: float) -> float:
    if not math.isfinite(number):
        raise BudgetError(f"the limit {name}={value} must be finite")
    return number


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:,.4g}"
