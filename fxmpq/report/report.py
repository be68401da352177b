"""The report: everything that was chosen and measured, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

from fxmpq.artefact import check_fields, dump_json, load_json
from fxmpq.errors import FileFormatError
from fxmpq.graph.state import FixedSize
from fxmpq.targets.target import FileParts

SCHEMA = "fxmpq.report"
VERSION = 2

Item = TypeVar("Item")


@dataclass(frozen=True)
class Entry:
    """One model, converted for the target and measured there.

    Args:
        score: What `Report.metric` says: the share of test samples classified right, in [0, 1], or
            the perplexity, infinite where it is beyond a float (`null` in a file).
        sqnr_db: Output SQNR against the float model in PyTorch, in dB; `None` if there is no
            difference at all.
        weight_bytes: Stored weights with their scales; biases are not counted.
        bops: Bit operations for one sample.
        latency_ms: Wall time of one batch of `Report.latency_samples` on one thread.
        costs: What it costs in metrics that not every cost table has, as cycles or energy; the
            float model's only where they are known.
    """

    score: float
    sqnr_db: float | None
    weight_bytes: int
    bops: int
    latency_ms: float
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRow:
    """One layer of the mixed plan.

    Args:
        layer: Its name.
        group: Name of the group that shares its precision; empty if it is in none.
        precision: As chosen, `fp32` for what stays in float.
        alone_db: Output SQNR predicted with only its group quantized so, in dB; `None` where
            nothing is lost.
        weight_bytes: Its weights and scales; 0 if another layer's weights are used again.
        bops: Bit operations for one sample.
        kernel: What the target runs.
        reason: Why it stays in float or differs from what was asked; empty if it does not.
    """

    layer: str
    group: str
    precision: str
    alone_db: float | None
    weight_bytes: int
    bops: int
    kernel: str
    reason: str = ""

    @property
    def is_shared(self) -> bool:
        """Whether the precision and its sensitivity are told at the group's first layer."""
        return self.group not in ("", self.layer)


@dataclass(frozen=True)
class CurvePoint:
    """The best plan for one weight budget.

    Args:
        weight_bytes: What its weights take.
        sqnr_db: Predicted output SQNR in dB.
    """

    weight_bytes: int
    sqnr_db: float


@dataclass(frozen=True)
class RefinementRow:
    """What one refinement method did to one layer or block.

    Args:
        method: The method's name.
        layer: Name of the layer, or of the block's first; empty for the whole model.
        before_db: SQNR of its output against float before, in dB; `None` if there was no error.
        after_db: The same afterwards.
    """

    method: str
    layer: str
    before_db: float | None
    after_db: float | None


@dataclass(frozen=True)
class Report:
    """What a person wants to know of a quantized model.

    Args:
        title: One line.
        model: Which model, for people.
        data: Which data, for people.
        target: The target's name.
        runtime: The name of the target that ran the models, which a target of one's own is based
            on; the target itself if empty.
        budget: As asked.
        method: Sensitivity method.
        calibration_samples: Number of samples the search saw.
        test_samples: Number of samples `entries` were measured on.
        latency_samples: Batch size of `Entry.latency_ms`.
        entries: `float`, `mixed`, and one per uniform precision such as `w8a8`.
        metric: A key of `METRICS`, `accuracy` or `perplexity`.
        layers: In graph order, then what is in no group.
        curve: Best plans from the smallest to the largest weight size.
        refinements: What each refinement method did to each layer, in order.
        unit: What the method measures; without `noise` there is no predicted SQNR.
        predicted_sqnr_db: The plan's, in dB.
        agreement_db: Of the converted mixed model with the simulation; `None` if equal.
        gap: The solver's proven relative gap.
        search_seconds: Wall time per step of the search.
        environment: Machine and versions.
        files: Bytes of the written files by name.
        fixed_sizes: Sizes of samples and sequences that the export fixed, and why.
        cost_units: Units of `Entry.costs`, where they are known.
        parts: What the bytes of the main file are spent on, where the target tells.

    Examples:
        >>> entry = Entry(0.9, 30.0, weight_bytes=1000, bops=64, latency_ms=1.0)
        >>> report = Report("demo", entries={"float": entry})
        >>> Report.from_json(report.to_json()) == report
        True
    """

    title: str
    entries: Mapping[str, Entry]
    model: str = ""
    data: str = ""
    metric: str = "accuracy"
    target: str = ""
    runtime: str = ""
    budget: str = ""
    method: str = ""
    calibration_samples: int = 0
    test_samples: int = 0
    latency_samples: int = 1
    layers: tuple[LayerRow, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    refinements: tuple[RefinementRow, ...] = ()
    unit: str = "noise"
    predicted_sqnr_db: float | None = None
    agreement_db: float | None = None
    gap: float | None = None
    search_seconds: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    fixed_sizes: tuple[FixedSize, ...] = ()
    cost_units: Mapping[str, str] = field(default_factory=dict)
    parts: FileParts | None = None

    @property
    def is_predicting(self) -> bool:
        """Whether the sensitivities are noise powers, which predict an output SQNR."""
        return self.unit == "noise"

    @property
    def measured_on(self) -> str:
        """The name of the target that ran the models."""
        return self.runtime or self.target

    @property
    def prediction(self) -> str:
        """What a predicted SQNR is of: sensitivities are measured before anything is refined."""
        return "predicted before refinement" if self.refinements else "predicted"

    def to_json(self, path: str | Path | None = None) -> str:
        """Write as JSON; returns the text, and writes it to `path` if given."""
        found = asdict(self)
        for entry in found["entries"].values():
            entry["score"] = finite_or_none(entry["score"])
        return dump_json(SCHEMA, VERSION, found, path)

    @classmethod
    def from_json(cls, source: str | Path) -> Report:
        """Read from a file or JSON text.

        Raises:
            FileFormatError: If it holds something else.
        """
        found = load_json(SCHEMA, VERSION, source)
        optional = {entry.name for entry in fields(cls)} - {"title", "entries"}
        check_fields(SCHEMA, found, {"title", "entries"}, optional)
        entries = found["entries"]
        if not isinstance(entries, dict):
            raise FileFormatError(f"{SCHEMA}: 'entries' maps names to measurements")
        found["entries"] = {name: _entry(value) for name, value in entries.items()}
        found["layers"] = _items(LayerRow, found.get("layers", []))
        found["curve"] = _items(CurvePoint, found.get("curve", []))
        found["refinements"] = _items(RefinementRow, found.get("refinements", []))
        found["fixed_sizes"] = _items(FixedSize, found.get("fixed_sizes", []))
        if found.get("parts") is not None:
            found["parts"] = _item(FileParts, found["parts"])
        return cls(**found)  # type: ignore[arg-type]


def finite_or_none(value: float | None) -> float | None:
    """A number that JSON can hold: `None` in place of infinity.

    Raises:
        FileFormatError: If it is NaN.
    """
    if value is not None and math.isnan(value):
        raise FileFormatError("a report cannot hold NaN; the measurement it comes from failed")
    return None if value is None or math.isinf(value) else value


def _entry(found: object) -> Entry:
    entry = _item(Entry, found)
    return entry if entry.score is not None else replace(entry, score=math.inf)


def _items(kind: type[Item], found: object) -> tuple[Item, ...]:
    if not isinstance(found, list):
        raise FileFormatError(f"{SCHEMA}: expected a list of {kind.__name__}; found {found!r}")
    return tuple(_item(kind, value) for value in found)


def _item(kind: type[Item], found: object) -> Item:
    if not isinstance(found, dict):
        raise FileFormatError(f"{SCHEMA}: expected a {kind.__name__} as an object; found {found!r}")
    try:
        return kind(**found)
    except TypeError as error:
        raise FileFormatError(f"{SCHEMA}: {error}") from error
