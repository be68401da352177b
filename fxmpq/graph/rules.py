"""Target rules as data: what a target can run, and where it wants quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision


@dataclass(frozen=True)
class OperatorRule:
    """The precisions a target can run for one kind of operator.

    Args:
        weight_bits: Weight widths.
        activation_bits: Activation widths; `None` among them allows weight-only.
    """

    weight_bits: frozenset[int]
    activation_bits: frozenset[int | None]

    def runs(self, precision: Precision) -> bool:
        """Whether the target has this precision; float always runs."""
        if precision.is_float:
            return True
        return (
            precision.weight_bits in self.weight_bits
            and precision.activation_bits in self.activation_bits
        )


@dataclass(frozen=True)
class TargetRules:
    """What `prepare` must know of a target.

    Args:
        name: The target's name.
        operators: Rule per operator kind; a kind that is missing stays float.
        default_candidates: Precisions tried when the user names none.
        quantize_outputs_of: Operator kinds whose (fused) output the target stores quantized.
        quantize_adds: Whether the sum of quantized tensors is itself quantized.
        fused_activations: Activation operators that are absorbed by the layer before them.
        through: Operators that commute with quantization; a quantizer moves up past them.
    """

    name: str
    operators: Mapping[str, OperatorRule]
    default_candidates: tuple[Precision, ...]
    quantize_outputs_of: frozenset[str] = frozenset()
    quantize_adds: bool = False
    fused_activations: frozenset[object] = frozenset()
    through: frozenset[object] = frozenset()

    def check(self, candidates: Sequence[Precision]) -> None:
        """Refuse candidates that no operator of the target runs.

        Raises:
            PrecisionError: Naming the candidate, and what the target runs.
        """
        for candidate in candidates:
            if not any(rule.runs(candidate) for rule in self.operators.values()):
                raise PrecisionError(
                    f"target {self.name!r} cannot run {candidate}; it runs {self.describe()}"
                )

    def candidates_for(self, kind: str, wanted: Sequence[Precision]) -> list[Precision]:
        """The wanted precisions that a kind of operator can run, fewest bits first.

        A kind that only stores weights in low bits (an embedding) takes the weight half.
        """
        rule = self.operators[kind]
        weight_only_kind = rule.activation_bits == frozenset({None})
        kept = [entry.weight_only if weight_only_kind else entry for entry in wanted]
        return sorted({entry for entry in kept if rule.runs(entry)}, key=lambda p: p.sort_key)

    def describe(self) -> str:
        """What each kind runs, for people."""
        return "; ".join(
            f"{kind}: weights {sorted(rule.weight_bits)}, activations "
            f"{sorted(rule.activation_bits, key=str)}"
            for kind, rule in self.operators.items()
        )
