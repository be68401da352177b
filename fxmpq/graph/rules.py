"""Target rules as data: what a target can run, and where it wants quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxmpq.errors import PrecisionError
from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.granularity import PerBlock, PerChannel, PerTensor


@dataclass(frozen=True)
class OperatorRule:
    """The precisions a target can run for one kind of operator.

    Args:
        weight_bits: Widths of integer weights.
        activation_bits: Widths of integer activations; `None` among them allows weight-only, and
            `None` alone is weight-only.
        floats: Float schemes of weights, and of activations unless it is weight-only.
        granularities: How many weights may share a scale.
    """

    weight_bits: frozenset[int]
    activation_bits: frozenset[int | None]
    floats: frozenset[Scheme] = frozenset()
    granularities: frozenset[type[PerTensor | PerChannel | PerBlock]] = frozenset({PerChannel})

    @property
    def is_weight_only(self) -> bool:
        """Whether activations stay float whatever the weights."""
        return self.activation_bits == frozenset({None})

    def runs(self, precision: Precision) -> bool:
        """Whether the target has this precision; float always runs."""
        weight, activation = precision.weight, precision.activation
        if weight is None:
            return True
        return (
            type(weight.granularity) in self.granularities
            and self._has(weight, self.weight_bits)
            and self._runs_on(activation)
        )

    def _runs_on(self, activation: NumberFormat | None) -> bool:
        if activation is None or self.is_weight_only:
            return (None if activation is None else activation.bits) in self.activation_bits
        return self._has(activation, self.activation_bits)

    def _has(
        self, number_format: NumberFormat, widths: frozenset[int] | frozenset[int | None]
    ) -> bool:
        if number_format.is_integer:
            return number_format.bits in widths
        return number_format.scheme in self.floats

    def describe(self) -> str:
        """What it runs, for people."""
        text = f"weights {sorted(self.weight_bits)}, activations "
        text += f"{sorted(self.activation_bits, key=str)}"
        if self.floats:
            text += f", floats {sorted(scheme.value for scheme in self.floats)}"
        named = ((PerTensor, "per tensor"), (PerChannel, "per channel"), (PerBlock, "per block"))
        shared = ", ".join(name for kind, name in named if kind in self.granularities)
        return f"{text}, scales {shared}"


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
        kept = [entry.weight_only if rule.is_weight_only else entry for entry in wanted]
        return sorted({entry for entry in kept if rule.runs(entry)}, key=lambda p: p.sort_key)

    def describe(self) -> str:
        """What each kind runs, for people."""
        return "; ".join(f"{kind}: {rule.describe()}" for kind, rule in self.operators.items())
