"""Target rules as data: what a target can run, and where it wants quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxmpq.errors import PrecisionError, TargetError, closest
from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.granularity import Dynamic, Granularity, PerBlock, PerChannel, PerTensor
from fxmpq.graph.joins import JOINS
from fxmpq.graph.vocabulary import MEETINGS, is_operator_name


@dataclass(frozen=True)
class OperatorRule:
    """The precisions a target can run for one kind of operator.

    Args:
        weight_bits: Widths of integer weights.
        activation_bits: Widths of integer activations; `None` among them allows weight-only, and
            `None` alone is weight-only.
        floats: Float schemes of weights, and of activations unless it is weight-only.
        granularities: How many weights may share a scale; empty where there are no weights, as in
            a product of two activations.
        block_sizes: Weights that share a scale in blocks; any number if empty.
        blocks_are_weight_only: Whether weights in blocks go with float activations alone.
        dynamic: What the ranges of integer activations may cover that are found at every run.
        blocks_are_whole: Whether the weights of an output channel must be whole blocks.
        only: The precisions that run, where not all do that the above allows; `None` for all.
        bias_width: Of layers on integers with calibrated ranges, whose biases the target stores as
            integers in units of both scales: bits that weights' codes of fewer bits are multiplied
            up to, which makes the units finer, 0 if none are. `None` if biases are real numbers.
    """

    weight_bits: frozenset[int]
    activation_bits: frozenset[int | None]
    floats: frozenset[Scheme] = frozenset()
    granularities: frozenset[type[PerTensor | PerChannel | PerBlock]] = frozenset({PerChannel})
    block_sizes: frozenset[int] = frozenset()
    blocks_are_weight_only: bool = False
    dynamic: frozenset[Dynamic] = frozenset()
    blocks_are_whole: bool = False
    only: frozenset[Precision] | None = None
    bias_width: int | None = None

    @property
    def is_weight_only(self) -> bool:
        """Whether activations stay float whatever the weights."""
        return self.activation_bits == frozenset({None})

    @property
    def is_activation_only(self) -> bool:
        """Whether there is no weight, as in a product of two activations."""
        return not self.granularities

    def half(self, precision: Precision) -> Precision | None:
        """What a kind of operator takes of a precision: all of it, or one half.

        `None` where its half is missing, as an embedding's is of `a8`, or a product's of `w4`.
        """
        if precision.is_float:
            return precision
        if self.is_activation_only:
            return None if precision.activation is None else precision.activation_only
        if precision.weight is None:
            return None
        return precision.weight_only if self.is_weight_only else precision

    def runs(self, precision: Precision) -> bool:
        """Whether the target has this precision; float always runs."""
        weight, activation = precision.weight, precision.activation
        if precision.is_float:
            return True
        if self.only is not None and precision not in self.only:
            return False
        if weight is None or self.is_activation_only:
            has_half = weight is None and self.is_activation_only and activation is not None
            return has_half and self._runs_on(activation)
        return (
            self._shares(weight.granularity, activation)
            and self._has(weight, self.weight_bits)
            and self._runs_on(activation)
        )

    def fits(self, precision: Precision, weights: int) -> bool:
        """Whether output channels of so many weights can be stored in a precision."""
        found = None if precision.weight is None else precision.weight.granularity
        return not (self.blocks_are_whole and isinstance(found, PerBlock) and weights % found.size)

    def _shares(self, granularity: Granularity, activation: NumberFormat | None) -> bool:
        if isinstance(granularity, PerBlock):
            if self.block_sizes and granularity.size not in self.block_sizes:
                return False
            if self.blocks_are_weight_only and activation is not None:
                return False
        return type(granularity) in self.granularities

    def _runs_on(self, activation: NumberFormat | None) -> bool:
        if activation is None or self.is_weight_only:
            return (None if activation is None else activation.bits) in self.activation_bits
        is_found = activation.dynamic is None or activation.dynamic in self.dynamic
        return is_found and self._has(activation, self.activation_bits)

    def _has(
        self, number_format: NumberFormat, widths: frozenset[int] | frozenset[int | None]
    ) -> bool:
        if number_format.is_integer:
            return number_format.bits in widths
        return number_format.scheme in self.floats

    def describe(self) -> str:
        """What it runs, for people."""
        text = "" if self.is_activation_only else f"weights {sorted(self.weight_bits)}, "
        widths = sorted(width for width in self.activation_bits if width is not None)
        named = [*map(str, widths), *(["float"] if None in self.activation_bits else [])]
        text += f"activations [{', '.join(named)}]"
        if self.dynamic:
            text += f", dynamic {sorted(found.value for found in self.dynamic)}"
        if self.floats:
            text += f", floats {sorted(scheme.value for scheme in self.floats)}"
        if self.is_activation_only:
            return text
        scales = ((PerTensor, "per tensor"), (PerChannel, "per channel"), (PerBlock, "per block"))
        shared = ", ".join(name for kind, name in scales if kind in self.granularities)
        if PerBlock in self.granularities:
            shared += f" of {sorted(self.block_sizes)}" if self.block_sizes else ""
            shared += " (weight-only)" if self.blocks_are_weight_only else ""
        text += f", scales {shared}"
        return text if self.only is None else f"{text}: {', '.join(sorted(map(str, self.only)))}"


@dataclass(frozen=True)
class TargetRules:
    """What `prepare` must know of a target.

    Args:
        name: The target's name.
        operators: Rule per operator kind; a kind that is missing stays float.
        default_candidates: Precisions tried when the user names none.
        quantize_outputs_of: Operators whose (fused) output the target stores quantized: kinds of
            layers, and `add` or `cat` where all that meets there is stored quantized itself.
        stored_if_read: Of these, operators whose results are stored quantized only where a layer
            reads them in codes.
        own_outputs: Whether a layer's own precision decides whether its result is stored
            quantized, whoever reads it, and ranges that are found at every run leave it float;
            else that of the layer that reads it does, if one does.
        quantize_residuals_of: Kinds of layers that run fused with an `add` if what they add is
            stored quantized: there the `add`, and nobody else, reads its other operand so.
        fusions: Chains of operators that run as one, by name, as `("conv", "add", "relu")`: the
            kind of a layer or an operator's name in ATen, of which only the last one's result
            is stored.
        joins: The rules by which layers must share a precision, keys of `JOINS`. A weight is
            stored once, and so is an activation: `shared_weight` is always among them, and
            `shared_input` wherever activations are quantized.
        shared_ranges: Operators, by name, whose stored tensors have one range: what meets in an
            `add`; of any other, as `cat` or `max_pool2d`, what it reads and what it returns.
        through: Operators that commute with quantization; a quantizer moves up past them, but for
            one that finds ranges row by row.
        symmetric_inputs_of: Kinds of layers, and `add` or `cat`, that read integers as signed codes
            without zero points: what they read in codes is stored with the zero point
            `2^(bits - 1)`, whoever else reads it.
        unsigned_outputs_of: Operators, by name, whose results are never negative and are stored as
            unsigned codes even so; but for second operands of products.
        product_through: Operators that a quantizer of a product's operand moves up past as well,
            where nothing else reads what they return.
        convolved_dimensions: Over how many dimensions convolutions run at most, in float too; any
            number if `None`.

    Raises:
        TargetError: If a rule names what there is not, or a join is missing.
    """

    name: str
    operators: Mapping[str, OperatorRule]
    default_candidates: tuple[Precision, ...]
    quantize_outputs_of: frozenset[str] = frozenset()
    fusions: tuple[tuple[str, ...], ...] = ()
    joins: tuple[str, ...] = ("shared_weight", "shared_input")
    shared_ranges: frozenset[str] = frozenset()
    through: frozenset[object] = frozenset()
    symmetric_inputs_of: frozenset[str] = frozenset()
    unsigned_outputs_of: frozenset[str] = frozenset()
    product_through: frozenset[object] = frozenset()
    quantize_residuals_of: frozenset[str] = frozenset()
    stored_if_read: frozenset[str] = frozenset()
    own_outputs: bool = False
    convolved_dimensions: int | None = None

    def __post_init__(self) -> None:
        """Check the names."""
        for join in self.joins:
            if join not in JOINS:
                raise TargetError(
                    f"target {self.name!r} joins by {join!r}; there are {closest(join, JOINS)}"
                )
        stores = not all(rule.is_weight_only for rule in self.operators.values())
        needed = ("shared_weight", "shared_input") if stores else ("shared_weight",)
        for join in needed:
            if join not in self.joins:
                raise TargetError(
                    f"target {self.name!r} must join by {join!r}: what layers share is stored once"
                )
        for chain in self.fusions:
            if len(chain) < 2:
                raise TargetError(f"target {self.name!r} fuses {chain}; a fusion is of two or more")
            self._check_operators("fuses", chain)
        self._check_operators("shares ranges at", sorted(self.shared_ranges))
        self._check_kinds("quantizes outputs of", self.quantize_outputs_of, MEETINGS)
        self._check_operators("has unsigned outputs of", sorted(self.unsigned_outputs_of))
        self._check_kinds("has symmetric inputs of", self.symmetric_inputs_of, MEETINGS)
        self._check_kinds("quantizes residuals of", self.quantize_residuals_of)
        for name in sorted(self.stored_if_read - self.quantize_outputs_of):
            raise TargetError(
                f"target {self.name!r} stores what {name!r} returns if it is read so, but does not "
                "quantize its outputs"
            )

    def _check_operators(self, does: str, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.operators and not is_operator_name(name):
                raise TargetError(
                    f"target {self.name!r} {does} {name!r}, which is neither a kind of layer nor "
                    "an ATen operator, as 'relu' or 'add'"
                )

    def _check_kinds(self, does: str, names: frozenset[str], others: Sequence[str] = ()) -> None:
        allowed = f"a kind of layer that it runs ({', '.join(self.operators)})"
        words = f"neither {allowed} nor {' or '.join(others)}" if others else f"not {allowed}"
        for name in sorted(names):
            if name not in (*self.operators, *others):
                raise TargetError(f"target {self.name!r} {does} {name!r}, which is {words}")

    def check(self, candidates: Sequence[Precision], *, products: bool = False) -> None:
        """Refuse candidates that no operator of the target runs.

        Args:
            candidates: That the user asks for.
            products: Whether products of two activations are to be quantized too.

        Raises:
            PrecisionError: Naming the candidate, and what the target runs.
        """
        for candidate in candidates:
            if candidate.weight is None and not candidate.is_float and not products:
                raise PrecisionError(
                    f"{candidate} is of products of two activations, which stay float; quantize "
                    "them too with products=True"
                )
            if not any(rule.runs(candidate) for rule in self.operators.values()):
                raise PrecisionError(
                    f"target {self.name!r} cannot run {candidate}; it runs {self.describe()}"
                )

    def candidates_for(self, kind: str, wanted: Sequence[Precision]) -> list[Precision]:
        """The wanted precisions that a kind of operator can run, fewest bits first.

        A kind that only stores weights in low bits (an embedding) takes the weight half, one
        without weights (a product of two activations) the activation half.
        """
        rule = self.operators[kind]
        kept = [half for entry in wanted if (half := rule.half(entry)) is not None]
        return sorted({entry for entry in kept if rule.runs(entry)}, key=lambda p: p.sort_key)

    def describe(self) -> str:
        """What each kind runs, for people."""
        return "; ".join(f"{kind}: {rule.describe()}" for kind, rule in self.operators.items())
