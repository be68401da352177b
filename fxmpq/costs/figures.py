"""Cost figures of a piece of hardware, and what they make a group cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fxmpq.costs.weights import weight_bytes
from fxmpq.errors import FxmpqError, closest
from fxmpq.formats import Precision
from fxmpq.graph.state import Group, Layer, Member, Product

_FLOAT = str(Precision())


@dataclass(frozen=True)
class KindFigures:
    """What layers of one kind cost in some unit, as cycles, microseconds or picojoules.

    Args:
        per_mac: Cost of a multiply-accumulate by precision name: `fp32` is what stays float, `a8`
            a product of two activations.
        per_layer: Cost of each call of a layer, at any precision.
        per_weight_byte: Cost of reading a byte of stored weights, scales included.
    """

    per_mac: Mapping[str, float] = field(default_factory=dict)
    per_layer: float = 0.0
    per_weight_byte: float = 0.0

    def __post_init__(self) -> None:
        found = {str(Precision.parse(name)): value for name, value in self.per_mac.items()}
        object.__setattr__(self, "per_mac", found)
        named = {f"per_mac of {name}": value for name, value in found.items()}
        named |= {"per_layer": self.per_layer, "per_weight_byte": self.per_weight_byte}
        for name, value in named.items():
            if not (math.isfinite(value) and value >= 0):
                raise FxmpqError(f"{name} is {value}; a cost is finite and not negative")


@dataclass(frozen=True)
class MetricFigures:
    """What a model costs in one metric of a target's own.

    A group at precision `p` costs

        sum over its layers and products of (per_layer + macs * per_mac[p])
            + weight bytes(p) * per_weight_byte

    for one sample, with the figures of each one's kind; a tied weight is read once, by the layer
    whose kind reads at the highest cost.

    Args:
        metric: Its name, as `cycles`.
        general: Figures of every kind without ones of its own.
        kinds: Figures by kind of operator, as `conv`.
        per_model: What is spent once, whatever the precisions.

    Examples:
        >>> figures = MetricFigures("cycles", KindFigures({"w8a8": 0.25, "fp32": 1}), per_model=100)
        >>> figures.of("conv").per_mac["w8a8"]
        0.25
    """

    metric: str
    general: KindFigures
    kinds: Mapping[str, KindFigures] = field(default_factory=dict)
    per_model: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.per_model) and self.per_model >= 0):
            raise FxmpqError(f"per_model is {self.per_model}; a cost is finite and not negative")

    def of(self, kind: str) -> KindFigures:
        """The figures of a kind of operator."""
        return self.kinds.get(kind, self.general)

    def group_cost(self, group: Group, precision: Precision) -> float:
        """What a group costs at a precision, for one sample.

        Raises:
            FxmpqError: If it multiplies at a precision without a figure, naming those there are.
        """
        bytes_by_kind = self._weight_bytes_by_kind(group, precision)
        return math.fsum(
            [
                *(self._member_cost(member, precision) for member in group.members),
                *(self.of(kind).per_weight_byte * size for kind, size in bytes_by_kind.items()),
            ]
        )

    @property
    def knows_float(self) -> bool:
        """Whether there is a figure for what is computed in float, of any kind."""
        return all(_FLOAT in found.per_mac for found in (self.general, *self.kinds.values()))

    def float_cost(self, multiply_accumulates: int) -> float:
        """What products that are in no group cost, for one sample, with `per_model`.

        Raises:
            FxmpqError: If there are any, and `fp32` has no figure.
        """
        if multiply_accumulates == 0:
            return self.per_model
        if _FLOAT not in self.general.per_mac:
            raise FxmpqError(
                f"{multiply_accumulates} multiply-accumulates of the model stay in float, for "
                f"which {self.metric!r} has no figure; give per_mac.{_FLOAT}"
            )
        return self.per_model + multiply_accumulates * self.general.per_mac[_FLOAT]

    def _member_cost(self, member: Member, precision: Precision) -> float:
        figures = self.of(member.kind)
        if member.macs == 0:
            return figures.per_layer
        is_product = isinstance(member, Product)
        name = str(precision.activation_only if is_product else precision)
        if name not in figures.per_mac:
            raise FxmpqError(
                f"{member.name!r} ({member.kind}) may run at {name}, for which {self.metric!r} has "
                f"no figure; there are {closest(name, figures.per_mac)}"
            )
        return figures.per_layer + member.macs * figures.per_mac[name]

    def _weight_bytes_by_kind(self, group: Group, precision: Precision) -> dict[str, int]:
        """Stored bytes of a group's weights by the kind of the layer that reads them."""
        reader: dict[str, Layer] = {}
        for layer in group.layers:
            first = reader.setdefault(layer.weight, layer)
            if self.of(layer.kind).per_weight_byte > self.of(first.kind).per_weight_byte:
                reader[layer.weight] = layer
        kinds: dict[str, list[Layer]] = {}
        for layer in reader.values():
            kinds.setdefault(layer.kind, []).append(layer)
        return {
            kind: weight_bytes(Group(group.name, tuple(layers), group.candidates), precision)
            for kind, layers in kinds.items()
        }
