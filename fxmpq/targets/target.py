"""What a target is, and what conversion returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx

from fxmpq.costs.figures import MetricFigures
from fxmpq.costs.latency.runtime import Conditions, Run
from fxmpq.graph.batches import Batch
from fxmpq.graph.rules import TargetRules
from fxmpq.wording import counted


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Args:
        layer: Its name.
        asked: The precision the plan asks for.
        kernel: What the target runs.
        reason: Why it stays in float or differs from what was asked; empty if it does not.
    """

    layer: str
    asked: str
    kernel: str
    reason: str = ""


@dataclass(frozen=True)
class LayerValue:
    """What a target computed for one layer.

    Args:
        layer: The layer's name; empty for the model's outputs in the same run, which a target
            tells if showing layers changes what is fused.
        node: The node of the planned graph that simulates it: the layer's own, or of what the
            target fuses with it, up to a quantizer.
        value: In real numbers.
    """

    layer: str
    node: str
    value: Tensor


@dataclass(frozen=True)
class FileParts:
    """What the bytes of a main file are spent on.

    Args:
        weights: Layers' weights and their scales, which the cost `weights` predicts.
        parameters: Other stored numbers: biases, norms, what stays in float for good.
        graph: Operators, names, shapes, and the grids of activations.

    Examples:
        >>> print(FileParts(weights=273_784, parameters=3_176, graph=11_216))
        288 kB = 274 kB weights + 3.18 kB other parameters + 11.2 kB graph
    """

    weights: int
    parameters: int
    graph: int

    def __str__(self) -> str:
        """The parts as a sum."""
        sizes = (self.weights, self.parameters, self.graph)
        whole, weights, parameters, graph = (counted(size, "B") for size in (sum(sizes), *sizes))
        return f"{whole} = {weights} weights + {parameters} other parameters + {graph} graph"


@dataclass(frozen=True)
class Converted:
    """A model that runs on its target.

    Args:
        target: The target's name.
        run: Takes a batch as the model does and returns the flat outputs.
        module: What was made: a graph module, or the runtime's own object.
        files: What was written, the main file first; empty without `output`.
        layers: What became of each layer.
        sqnr_db: Agreement with the simulation on the checked batches, `inf` if equal.
        layer_values: Takes a batch and tells what the target computed for its layers, those it
            can tell about, with the kernels that `run` uses; `None` if for none.
        runtime: The name of the target whose converter made it: another one than `target` where
            a file describes that.
        parts: What the bytes of the main file are spent on, written or not, where it is told.
    """

    target: str
    run: Callable[[Batch], Sequence[Tensor]]
    module: object
    files: tuple[Path, ...]
    layers: tuple[LayerReport, ...]
    sqnr_db: float = float("nan")
    layer_values: Callable[[Batch], Sequence[LayerValue]] | None = None
    runtime: str = ""
    parts: FileParts | None = None

    def report(self) -> list[dict[str, str]]:
        """The layers' fates as plain rows with `layer`, `asked`, `kernel` and `reason`."""
        return [vars(row).copy() for row in self.layers]


Converter = Callable[[fx.GraphModule, Path | None], Converted]


@dataclass(frozen=True)
class Target:
    """A runtime: its rules, and its converter.

    Args:
        rules: What it runs and where it quantizes.
        convert: Makes a runnable model of a graph whose precisions are chosen.
        description: One line for people.
        packages: Modules the converter imports, by the extra that installs them.
        metrics: Cost metrics of its own, by name.
        latency: Modules whose versions decide how fast its models run, where they run on
            this machine as they will elsewhere; `None` where their latency cannot be measured.
        load: Makes a planned graph run as what `convert` makes of it does, where that is less
            work for measuring its latency.
        conditions: What decides how fast its models run besides, by name.
        check: Raises where this machine lacks what is no package, before any work is done.
        write: Writes a planned graph's files to a folder as `convert` does, where that is less
            work.
    """

    rules: TargetRules
    convert: Converter
    description: str
    packages: Mapping[str, str]
    metrics: Mapping[str, MetricFigures] = field(default_factory=dict)
    latency: tuple[str, ...] | None = None
    load: Callable[[fx.GraphModule], Run] | None = None
    conditions: Callable[[], Conditions] | None = None
    check: Callable[[], None] | None = None
    write: Callable[[fx.GraphModule, Path], object] | None = None

    @property
    def name(self) -> str:
        """The target's name."""
        return self.rules.name


def agreement_db(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """SQNR of outputs against the simulation's, `10 log10(sum y^2 / sum (y - z)^2)` in dB.

    Args:
        expected: The simulation's outputs.
        actual: The target's, in the same order.

    Returns:
        Decibels; `inf` where there is no difference.
    """
    signal = noise = 0.0
    for one, other in zip(expected, actual, strict=True):
        if one.is_floating_point():
            signal += float(one.detach().double().square().sum())
            difference = one.detach().double() - other.detach().double().to(one.device)
            noise += float(difference.square().sum())
    if noise == 0.0:
        return float("inf")
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))
