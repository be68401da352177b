"""Sensitivity: how much each choice hurts, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fxmpq.artefact import build, check_fields, dump_json, load_json
from fxmpq.errors import FxmpqError, closest
from fxmpq.formats import Precision

SCHEMA = "fxmpq.sensitivity"
VERSION = 1

OPTIONAL = {"method", "fingerprint", "projections", "unit"}
UNITS = ("noise", "loss", "score")


def noise_to_db(ratio: float) -> float:
    """SQNR in dB of a ratio of noise to signal power, `-10 log10(ratio)`.

    Args:
        ratio: Relative noise power.

    Returns:
        Decibels; `inf` where there is no noise.
    """
    return math.inf if ratio <= 0 else -10 * math.log10(ratio)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The loss increase of every (group, precision): higher is worse, and additive over groups.

    Args:
        values: Group to precision name to value; finite.
        method: The estimator's name.
        fingerprint: Of the model they were measured on.
        projections: `[draws, entries]`, columns in the order of `entries`, whose Gram matrix
            holds the interactions; `None` where the method gives none.
        unit: What a value is: `noise`, the relative output noise power `E||y_q - y||^2 /
            E||y||^2` with that group alone at that precision; `loss`, the increase of a loss;
            or `score`, which ranks and predicts nothing.

    Raises:
        FxmpqError: If there are no values, a value is not finite, the unit is unknown, or
            shapes differ.

    Examples:
        >>> sensitivity = Sensitivity({"conv1": {"w8a8": 1e-4, "w4a8": 1e-2}})
        >>> round(sensitivity.sqnr_db("conv1", "w4a8"), 6)
        20.0
    """

    values: Mapping[str, Mapping[str, float]]
    method: str = "given"
    fingerprint: str | None = None
    projections: NDArray[np.float64] | None = None
    unit: str = "noise"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise FxmpqError(f"no unit {self.unit!r} of sensitivity; there are {', '.join(UNITS)}")
        table = {
            str(group): {str(Precision.parse(name)): float(v) for name, v in row.items()}
            for group, row in self.values.items()
        }
        if not table or not all(table.values()):
            raise FxmpqError("a sensitivity needs at least one group, each with a precision")
        for group, row in table.items():
            for precision, value in row.items():
                if not math.isfinite(value):
                    raise FxmpqError(
                        f"the sensitivity of group {group!r} at {precision} is {value}; "
                        "every value must be finite"
                    )
        object.__setattr__(self, "values", table)
        if self.projections is not None:
            matrix = np.asarray(self.projections, dtype=np.float64)
            if matrix.ndim != 2 or matrix.shape[1] != len(self.entries) or not len(matrix):
                raise FxmpqError(
                    f"projections have shape {matrix.shape}; expected [draws, {len(self.entries)}]"
                )
            if not np.isfinite(matrix).all():
                raise FxmpqError("projections must be finite")
            object.__setattr__(self, "projections", matrix)

    @property
    def entries(self) -> tuple[tuple[str, str], ...]:
        """Every (group, precision), in the order of the values."""
        return tuple((group, name) for group, row in self.values.items() for name in row)

    def value(self, group: str, precision: str | Precision) -> float:
        """The value of one entry.

        Raises:
            FxmpqError: If there is none, with the closest names.
        """
        if group not in self.values:
            raise FxmpqError(f"no group {group!r}; closest: {closest(group, self.values)}")
        row, name = self.values[group], str(Precision.parse(precision))
        if name not in row:
            raise FxmpqError(f"group {group!r} has no {name}; it has {', '.join(row)}")
        return row[name]

    def sqnr_db(self, group: str, precision: str | Precision) -> float:
        """Output SQNR with one group quantized: `-10 log10(value)` in dB, `inf` at 0.

        Raises:
            FxmpqError: If there is no such entry, or values are not noise.
        """
        value = self.value(group, precision)
        if self.unit != "noise":
            raise FxmpqError(
                f"method {self.method!r} measures a {self.unit}, which is no noise power; measure "
                "with 'projected' or 'sqnr' for decibels"
            )
        return noise_to_db(value)

    def pairs(self) -> NDArray[np.float64]:
        """Interactions `M = P^T P / draws` between every two entries, `[entries, entries]`.

        A plan with one-hot choice `x` has predicted loss `x^T M x`; the diagonal holds the
        values. Positive semi-definite by construction.

        Raises:
            FxmpqError: If the method gave no projections.
        """
        if self.projections is None:
            raise FxmpqError(
                f"method {self.method!r} measures no interactions; measure with 'projected' or "
                "'pairwise'"
            )
        gram: NDArray[np.float64] = self.projections.T @ self.projections / len(self.projections)
        return gram

    def to_json(self, path: str | Path | None = None) -> str:
        """Write as JSON; returns the text, and writes it to `path` if given."""
        matrix = self.projections
        fields = {
            "method": self.method,
            "fingerprint": self.fingerprint,
            "unit": self.unit,
            "values": self.values,
            "projections": None if matrix is None else matrix.tolist(),
        }
        return dump_json(SCHEMA, VERSION, fields, path)

    @classmethod
    def from_json(cls, source: str | Path) -> Sensitivity:
        """Read from a file or JSON text.

        Raises:
            FileFormatError: If it holds something else.
        """
        found = load_json(SCHEMA, VERSION, source)
        check_fields(SCHEMA, found, {"values"}, OPTIONAL)
        return build(SCHEMA, cls, found)
