"""The portable target: packed codes and scales, dequantized and computed in float."""

from __future__ import annotations

from fxmpq.formats import Precision, Scheme
from fxmpq.granularity import Dynamic, PerBlock, PerChannel, PerTensor
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.targets.reference.convert import convert_reference
from fxmpq.targets.target import Target

_WEIGHTS = frozenset({2, 3, 4, 5, 6, 7, 8, 16})
_ACTIVATIONS: frozenset[int | None] = frozenset({None, 2, 3, 4, 5, 6, 7, 8, 16})
_FLOATS = frozenset({Scheme.E4M3, Scheme.E5M2, Scheme.E2M1})
_GRANULARITIES = frozenset({PerTensor, PerChannel, PerBlock})

REFERENCE = Target(
    rules=TargetRules(
        name="reference",
        operators={
            "conv": OperatorRule(_WEIGHTS, _ACTIVATIONS, _FLOATS, _GRANULARITIES),
            "conv_transpose": OperatorRule(_WEIGHTS, _ACTIVATIONS, _FLOATS, _GRANULARITIES),
            "linear": OperatorRule(
                _WEIGHTS, _ACTIVATIONS, _FLOATS, _GRANULARITIES, dynamic=frozenset(Dynamic)
            ),
            "experts": OperatorRule(_WEIGHTS, _ACTIVATIONS, _FLOATS, _GRANULARITIES),
            "embedding": OperatorRule(_WEIGHTS, frozenset({None}), _FLOATS, _GRANULARITIES),
            "matmul": OperatorRule(frozenset(), _ACTIVATIONS - {None}, _FLOATS, frozenset()),
        },
        default_candidates=tuple(Precision(bits, 8) for bits in (2, 3, 4, 6, 8)),
        # It computes operator by operator in float, so it fuses nothing and adds any two tensors.
        joins=("shared_weight", "shared_input"),
    ),
    convert=convert_reference,
    description="packed codes and scales, dequantized and computed in float; any format",
    packages={},
)
