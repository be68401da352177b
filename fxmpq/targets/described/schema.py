"""What a target file says: its keys and what they may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fxmpq.costs.figures import KindFigures, MetricFigures
from fxmpq.errors import FxmpqError, closest
from fxmpq.formats import Precision, Scheme
from fxmpq.granularity import Dynamic, Granularity, PerBlock, PerChannel, PerTensor
from fxmpq.graph.operators import KINDS
from fxmpq.graph.products import PRODUCT
from fxmpq.graph.rules import OperatorRule

GRANULARITIES: Mapping[str, type[Granularity]] = {
    "tensor": PerTensor,
    "channel": PerChannel,
    "block": PerBlock,
}


def _check_kind(kind: str) -> str:
    known = (*KINDS, PRODUCT)
    if kind not in known:
        raise FxmpqError(f"no kind of operator {kind!r}; there are {closest(kind, known)}")
    return kind


def _read_precision(text: str) -> str:
    return str(Precision.parse(text))


Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$")]
Kind = Annotated[str, AfterValidator(_check_kind)]
PrecisionName = Annotated[str, AfterValidator(_read_precision)]
Width = Annotated[int, Field(ge=2, le=16, strict=True)]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_SCALARS = frozenset({"per_layer", "per_weight_byte"})
FloatName = Literal["e4m3", "e5m2", "e2m1"]


class _Section(BaseModel):
    """A part of a file: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Operator(_Section):
    """What the hardware runs of one kind of operator.

    Attributes:
        weights: Widths of integer weights.
        activations: Widths of integer activations; `"float"` is weights of few bits on float
            activations, alone for a kind that is only stored in few bits.
        floats: Small floats of weights and activations.
        scales: How many weights may share a scale: `tensor`, `channel`, `block`.
        block_sizes: Sizes of blocks; any if empty.
        dynamic: What ranges of integer activations that are found at every run cover: `tensor`,
            `row` of its last dimension.
        integer_biases: Whether layers on integers with calibrated ranges add their biases as
            integers, in units of input scale times weight scale.
    """

    weights: tuple[Width, ...] = ()
    activations: tuple[Width | Literal["float"], ...] = ("float",)
    floats: tuple[FloatName, ...] = ()
    scales: tuple[Literal["tensor", "channel", "block"], ...] = ("channel",)
    block_sizes: tuple[Annotated[int, Field(ge=2, strict=True)], ...] = ()
    dynamic: tuple[Literal["tensor", "row"], ...] = ()
    integer_biases: Annotated[bool, Field(strict=True)] = False

    def rule(self, kind: str) -> OperatorRule:
        """As a rule; a product of two activations (`matmul`) has no weights."""
        shared = () if kind == PRODUCT else self.scales
        return OperatorRule(
            frozenset(self.weights),
            frozenset(None if width == "float" else width for width in self.activations),
            frozenset(Scheme(name) for name in self.floats),
            frozenset(GRANULARITIES[name] for name in shared),
            frozenset(self.block_sizes),
            dynamic=frozenset(Dynamic[name.upper()] for name in self.dynamic),
            bias_width=0 if self.integer_biases else None,
        )


class Figures(_Section):
    """What layers cost in a metric; of one kind, or of all.

    Attributes:
        per_mac: Cost of a multiply-accumulate by precision, as `{w8a8 = 0.25}`.
        macs_per_unit: The same the other way round: multiply-accumulates a unit, as a cycle.
        per_layer: Cost of each call of a layer.
        per_weight_byte: Cost of reading a byte of weights.
    """

    per_mac: dict[PrecisionName, Cost] = Field(default_factory=dict)
    macs_per_unit: dict[PrecisionName, Rate] = Field(default_factory=dict)
    per_layer: Cost = 0.0
    per_weight_byte: Cost = 0.0

    @model_validator(mode="after")
    def _says_it_once(self) -> Figures:
        twice = [name for name in self.per_mac if name in self.macs_per_unit]
        if twice:
            raise FxmpqError(f"{twice[0]} has a figure in per_mac and one in macs_per_unit")
        return self

    def figures(self) -> KindFigures:
        """With all figures per multiply-accumulate."""
        inverted = {name: 1 / rate for name, rate in self.macs_per_unit.items()}
        return KindFigures({**self.per_mac, **inverted}, self.per_layer, self.per_weight_byte)


class Metric(Figures):
    """A metric of the target's own, as cycles or energy.

    Attributes:
        per_model: What is spent once.
        operators: Figures of kinds that differ; what a kind leaves out is as above.
    """

    per_model: Cost = 0.0
    operators: dict[Kind, Figures] = Field(default_factory=dict)

    def named(self, metric: str) -> MetricFigures:
        """As figures under the metric's name."""
        general = self.figures()
        kinds = {}
        for kind, section in self.operators.items():
            found = section.figures()
            given = {name: getattr(found, name) for name in section.model_fields_set & _SCALARS}
            per_mac = {**general.per_mac, **found.per_mac}
            kinds[kind] = replace(general, per_mac=per_mac, **given)
        return MetricFigures(metric, general, kinds, self.per_model)


class TargetFile(_Section):
    """A target of one's own.

    Attributes:
        name: What it is called, and what graphs remember.
        description: One line for people.
        based_on: The target whose converter writes the model, and whose rules hold where the
            file has none.
        default_candidates: Precisions tried where the user names none; if empty, those of the
            target below that the operators run.
        operators: Rule by kind of operator; a kind that is missing stays float.
        fusions: Chains of operators that run as one, as `["conv", "add", "relu"]`.
        joins: What makes layers share a precision.
        quantize_outputs_of: Operators whose output is stored quantized.
        shared_ranges: Operators whose stored tensors have one range.
        through: Operators that a quantizer moves up past.
        symmetric_inputs_of: Operators that read signed codes without zero points.
        quantize_residuals_of: Layers whose fused `add` reads its other operand quantized.
        metrics: Figures by the name of the metric.
    """

    name: Name
    description: str = Field(min_length=1)
    based_on: str = "reference"
    default_candidates: tuple[PrecisionName, ...] = ()
    operators: dict[Kind, Operator] = Field(min_length=1)
    fusions: tuple[tuple[str, ...], ...] | None = None
    joins: tuple[str, ...] | None = None
    quantize_outputs_of: tuple[str, ...] | None = None
    shared_ranges: tuple[str, ...] | None = None
    through: tuple[str, ...] | None = None
    symmetric_inputs_of: tuple[str, ...] | None = None
    quantize_residuals_of: tuple[str, ...] | None = None
    metrics: dict[Name, Metric] = Field(default_factory=dict)
