"""The whole way in one call."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import fx, nn

from fxmpq.calibration.calibrate import calibrate
from fxmpq.calibration.options import read_ranges, read_weight_scales
from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.batches import Batch, graph_device, materialize
from fxmpq.graph.patterns import Ties, read_ties
from fxmpq.graph.trace import trace
from fxmpq.quantized import Quantized, finish_plan
from fxmpq.quantizers.rule import RuleText
from fxmpq.refinement.refine import check_refinement
from fxmpq.refinement.refine import refine as refine_graph
from fxmpq.sensitivity.measure import check_method, measure, reads_labels
from fxmpq.sensitivity.scores import find_score, is_metric
from fxmpq.sensitivity.signal import check_base
from fxmpq.solver.budget import Budget
from fxmpq.solver.programs import check_counted, check_program, program_of
from fxmpq.solver.solve import solve
from fxmpq.steps import apply, cost, further_of, prepare
from fxmpq.targets.registry import get_target
from fxmpq.targets.target import Target
from fxmpq.training.loss import LossFunction, check_loss, loss_value, on_device


def quantize(
    model: nn.Module,
    calibration: Iterable[Batch],
    *,
    target: str | Path | Target,
    budget: str | Mapping[str, object] | Budget,
    candidates: Sequence[str | Precision] | None = None,
    method: str = "projected",
    program: str | None = None,
    labelled: Iterable[object] | None = None,
    keep: Mapping[str, str | Precision] | None = None,
    exclude: Sequence[str] = (),
    ties: Ties = (),
    products: bool = False,
    ranges: RuleText = "mse",
    weight_scales: RuleText = "mse",
    bias_correction: bool = True,
    refine: str | None = None,
    progress: bool = True,
    resume: str | Path | None = None,
    **options: object,
) -> Quantized:
    """Choose a precision for every layer and return the graph that simulates the choice.

    Traces the model, groups its layers by the target's fusion rules, calibrates every
    candidate's ranges, measures sensitivities and solves the bit-width program. The model is
    not changed.

    Args:
        model: Any module that `torch.export` takes.
        calibration: Batches of what the model takes: tensors, tuples of arguments, or
            mappings of keyword arguments; a few dozen samples, no labels.
        target: A target's name, as `reference` or `onnxruntime`, or a TOML file that describes
            one, as `npu.toml`.
        budget: As `"weights=15%"`, `"weights=1.5MB,bops=10%"`, `"avg_weight_bits=4.5"` or
            `"minimize=weights,sqnr=30"`; what takes more than counting, as `"latency=60%"`, is
            measured because it is named.
        candidates: Precisions to choose from, as `["w2a8", "w4a8", "w8a8"]`; the target's own if
            `None`.
        method: Sensitivity method, a key of `METHODS`; the guide says which to choose.
        program: Form of the bit-width program, a key of `PROGRAMS`; the method's own if `None`.
        labelled: What a `loss` or metric takes, labels included, for methods with one; the
            calibration batches if `None`.
        keep: Layers that must have a precision, as `{"classifier": "w8a8"}`.
        exclude: Layers that stay float, even where `keep` matches too.
        ties: Layers that share a precision: each entry a pattern on their names, or several.
        products: Whether products of two activations, as in attention, are quantized too.
        ranges: Rule of the activation ranges, a key of `RANGES` or a mapping with its options,
            as `{"rule": "percentile", "percentile": 99.9}`; see `calibrate`.
        weight_scales: Rule of the weight scales, a key of `WEIGHT_SCALES`, in the same form.
        bias_correction: Whether quantized layers get corrected biases.
        refine: How to refine the plan's graph on the calibration batches: a recipe of `RECIPES`,
            as `light`, or one method of `REFINEMENTS`; `None` leaves it as it was calibrated.
        progress: Whether to show progress bars.
        resume: A journal file of the measurement, which an interrupted run goes on from;
            finished layers of a refinement are kept in a folder beside it, `<name>.refine`.
        **options: Of the method, as `probes=4, seed=1`.

    Returns:
        The simulated graph, the plan, and what it was made from.

    Raises:
        FxmpqError: A subclass for each unusable request: before long work starts, but for
            what a method alone can tell of its options' values.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
        >>> batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
        >>> result = quantize(model, batches, target="reference", budget="weights=25%")
        >>> result.plan.relative["weights"] <= 0.25
        True
    """
    asked = _Asked(
        get_target(target), Budget.parse(budget), method, options, program, refine, progress, resume
    )
    ties, ranges = read_ties(ties), read_ranges(ranges)
    weight_scales = read_weight_scales(weight_scales)
    batches = materialize(calibration)
    measured = _measured(batches, labelled, method, options)
    laps = _Laps()
    graph = trace(model, batches[0])
    if reads_labels(method, options):
        _try_loss(graph, measured[0], options, is_labelled=labelled is not None)
    prepared = prepare(
        graph,
        asked.target,
        candidates=candidates,
        keep=keep,
        exclude=exclude,
        ties=ties,
        products=products,
    )
    laps.end("trace")
    costs = asked.costs(prepared)
    if asked.further:
        laps.end("cost")
    calibrated = calibrate(
        prepared,
        batches,
        ranges=ranges,
        weight_scales=weight_scales,
        bias_correction=bias_correction,
        progress=progress,
    )
    laps.end("calibrate")
    return asked.planned(calibrated, costs, batches, measured, laps)


@dataclass(frozen=True)
class _Asked:
    """What is asked of the steps that know the target and the budget; refuses what cannot be done.

    Attributes:
        further: The metrics of the budget that take more than counting.
    """

    target: Target
    budget: Budget
    method: str
    options: Mapping[str, object]
    program: str | None
    refine: str | None
    progress: bool
    resume: str | Path | None
    further: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        further = further_of(self.target, self.budget.metrics)
        object.__setattr__(self, "further", further)
        check_method(self.method, self.options)
        check_program(self.program or program_of(self.method), method=self.method)
        if self.refine is not None:
            check_refinement(self.refine, has_labels=False)

    def costs(self, prepared: fx.GraphModule) -> CostTable:
        """What each choice costs; refuses a budget that none of them meets."""
        costs = cost(prepared, self.target, metric=self.further, progress=self.progress)
        if self.program is not None:
            check_counted(self.program, [limit.metric for limit in self.budget.limits], costs)
        self.budget.check_feasible(costs)
        return costs

    def planned(
        self,
        calibrated: fx.GraphModule,
        costs: CostTable,
        batches: list[Batch],
        measured: Sequence[object],
        laps: _Laps,
    ) -> Quantized:
        """Measure, solve, and simulate the plan, refined if that is asked for."""
        progress, resume = self.progress, self.resume
        sensitivity = measure(
            calibrated,
            measured,
            method=self.method,
            progress=progress,
            resume=resume,
            **self.options,
        )
        laps.end("measure")
        plan = solve(sensitivity, costs, self.budget, program=self.program)
        plan = finish_plan(calibrated, plan)
        laps.end("solve")
        found = calibrated, plan, sensitivity, costs, self.target, laps.seconds
        if self.refine is None:
            return Quantized(apply(calibrated, plan), *found)
        folder, method = refine_folder(resume), self.refine
        graph = refine_graph(
            calibrated, plan, batches, method=method, progress=progress, resume=folder
        )
        laps.end("refine")
        return Quantized(graph, *found, self.refine, tuple(batches))


class _Laps:
    """Wall time per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, step: str) -> None:
        """Write down the time since the step before."""
        now = time.perf_counter()
        self.seconds[step] = now - self._since
        self._since = now


def refine_folder(journal: str | Path | None) -> Path | None:
    """The folder of a refinement's finished layers, beside the journal of a measurement.

    Examples:
        >>> refine_folder("runs/search.journal").name
        'search.journal.refine'
    """
    return None if journal is None else Path(f"{journal}.refine")


def _measured(
    batches: list[Batch],
    labelled: Iterable[object] | None,
    method: str,
    options: Mapping[str, object],
) -> Sequence[object]:
    """What the method measures with; refuses labels that nothing reads, and a missing target."""
    score = options.get("score", "noise")
    find_score(score)  # type: ignore[arg-type]  # it refuses what is none
    if labelled is None:
        if is_metric(score):
            raise FxmpqError(
                f"a metric as score needs targets: give labelled=, batches (what the model takes, "
                f"target) for {type(score).__name__}"
            )
        return batches
    if not reads_labels(method, options):
        raise FxmpqError(
            f"labelled= is what a loss or a metric takes, and the method {method!r} has none here; "
            "leave labelled out, or give loss= or score= to a method that takes one"
        )
    return materialize(labelled, "labelled")


def _try_loss(
    graph: fx.GraphModule, batch: object, options: Mapping[str, object], *, is_labelled: bool
) -> None:
    """Run a loss once, so that labels it cannot read are found before long work."""
    loss = options.get("loss", options.get("score"))
    if is_metric(loss):
        return
    check_loss(loss)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            placed = on_device(batch, graph_device(graph))
            found = float(loss_value(cast(LossFunction, loss), graph, placed).detach())
    except Exception as error:
        if isinstance(error, FxmpqError) and is_labelled:
            raise
        where = "the labelled batches"
        if not is_labelled:
            where = "the calibration batches, as labelled= is not given"
        raise FxmpqError(
            f"the loss failed on the first of {where}: {type(error).__name__}: {error}. Give "
            "labelled=, batches as the loss takes them"
        ) from error
    check_base(found)
