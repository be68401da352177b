"""Build a report: measure what there is to measure and put it together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from fxmpq.costs.further import units_of
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import state_of
from fxmpq.quantized import Quantized
from fxmpq.report.compare import compare
from fxmpq.report.environment import environment
from fxmpq.report.layers import layer_rows
from fxmpq.report.refinements import refinement_rows
from fxmpq.report.report import Report, finite_or_none
from fxmpq.report.tradeoff import trade_off


def build_report(
    quantized: Quantized,
    batches: Sequence[Batch],
    labels: Tensor,
    *,
    title: str,
    metric: str = "accuracy",
    model: str = "",
    data: str = "",
    calibration_samples: int = 0,
    uniform: Sequence[str] | None = None,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure float, mixed and uniform models on test data and report on them.

    Args:
        quantized: From `quantize`.
        batches: Test data, what the model takes.
        labels: What the metric takes, for the samples of all batches: classes, int64 `[samples]`,
            or token ids, int64 `[samples, length]`.
        title: One line.
        metric: A key of `METRICS`, `accuracy` or `perplexity`.
        model: Which model, for people.
        data: Which data, for people.
        calibration_samples: Number of samples the search saw.
        uniform: Precisions for the uniform plans; all candidates if `None`.
        output: Folder to write the converted mixed model to.
        say: Told what is being done.

    Returns:
        The report.

    Raises:
        BatchError: If batches or labels do not fit the model.
        TargetError: If a conversion disagrees with its simulation.
    """
    comparison = compare(
        quantized, batches, labels, metric=metric, uniform=uniform, output=output, say=say
    )
    say("solving along the trade-off curve")
    plan, converted = quantized.plan, comparison.converted
    return Report(
        title=title,
        entries=comparison.entries,
        model=model,
        data=data,
        metric=metric,
        target=converted.target,
        runtime=converted.runtime,
        budget=plan.budget or "",
        method=plan.method or "",
        calibration_samples=calibration_samples,
        test_samples=len(labels),
        latency_samples=comparison.latency_samples,
        layers=layer_rows(quantized.graph, quantized.sensitivity, converted),
        curve=trade_off(quantized.sensitivity, quantized.costs),
        refinements=refinement_rows(quantized.graph),
        unit=plan.unit,
        predicted_sqnr_db=finite_or_none(plan.sqnr_db),
        agreement_db=finite_or_none(converted.sqnr_db),
        gap=finite_or_none(plan.gap),
        search_seconds=dict(quantized.seconds),
        environment=environment(),
        files={path.name: path.stat().st_size for path in converted.files},
        fixed_sizes=state_of(quantized.graph).fixed_sizes,
        cost_units=units_of(quantized.costs.metrics, quantized.target.metrics),
        parts=converted.parts,
    )
