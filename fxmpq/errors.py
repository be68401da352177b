"""The errors fxmpq raises: each says what was asked, what was found and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxmpqError(ValueError):
    """Base of every error that fxmpq raises on a request it cannot serve.

    It derives from `ValueError`, so callers that catch that keep working.
    """


class TraceError(FxmpqError):
    """The model cannot be exported, or the graph is not in canonical form."""


class LegalityError(FxmpqError):
    """A graph is not what it has to be at its stage: a fault of fxmpq's, or of who changed it."""


class BatchError(FxmpqError):
    """A batch does not fit the model's inputs."""


class CalibrationError(FxmpqError):
    """The calibration data is empty or makes activations NaN or infinite."""


class PrecisionError(FxmpqError):
    """A number format or precision is unknown, or the target cannot run it."""


class PatternError(FxmpqError):
    """A layer pattern matches no layer."""


class BudgetError(FxmpqError):
    """A budget cannot be read, or names a cost that is not there."""


class InfeasibleBudgetError(BudgetError):
    """No choice of precisions meets the budget."""


class PlanError(FxmpqError):
    """A plan does not belong to this graph."""


class TargetError(FxmpqError):
    """The target is unknown, its packages are missing, or conversion disagrees."""


class FileFormatError(FxmpqError):
    """A saved artefact has another schema, version or content than expected."""


def closest(name: str, known: Iterable[str], limit: int = 5) -> str:
    """Return the legal values nearest to `name` as a readable list.

    Args:
        name: What was asked.
        known: The legal values.
        limit: How many to list at most.

    Returns:
        The closest matches first; when nothing is close, the first `limit` legal values.

    Examples:
        >>> closest("stem.cnv", ["stem.conv", "head.linear"])
        "'stem.conv'"
    """
    legal = list(known)
    near = difflib.get_close_matches(name, legal, n=limit, cutoff=0.5) or legal[:limit]
    return ", ".join(repr(entry) for entry in near) or "nothing"
