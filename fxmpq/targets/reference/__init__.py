"""The portable target: packed integers and scales, dequantized and computed in float."""

from __future__ import annotations

from fxmpq.formats import Precision
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.targets.reference.convert import convert_reference
from fxmpq.targets.target import Target

_WEIGHTS = frozenset({2, 3, 4, 5, 6, 7, 8, 16})
_ACTIVATIONS: frozenset[int | None] = frozenset({None, 2, 3, 4, 5, 6, 7, 8, 16})

REFERENCE = Target(
    rules=TargetRules(
        name="reference",
        operators={
            "conv": OperatorRule(_WEIGHTS, _ACTIVATIONS),
            "linear": OperatorRule(_WEIGHTS, _ACTIVATIONS),
            "embedding": OperatorRule(_WEIGHTS, frozenset({None})),
        },
        default_candidates=tuple(Precision(bits, 8) for bits in (2, 3, 4, 6, 8)),
    ),
    convert=convert_reference,
    description="packed integers and scales, dequantized and computed in float; any width",
    packages={},
)
