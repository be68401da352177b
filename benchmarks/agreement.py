"""How well the projected estimator agrees with the exact sweep on trained models.

Kendall's tau over all (group, precision), search time of both in float passes, and the
measured output SQNR and accuracy of the plans that the two give at the same budgets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from _models import minilm_reviews
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.recipes.fashion_mnist import embedded_subset
from fxmpq.recipes.models.resnet20 import pretrained

Result = TypeVar("Result")

BUDGETS = ("weights=9%", "weights=12.5%", "weights=15%")
METHODS: dict[str, tuple[str, dict[str, int]]] = {
    "projected": ("projected", {}),
    "projected, probes=4": ("projected", {"probes": 4}),
    "sqnr": ("sqnr", {}),
}
CANDIDATES = ["w2a8", "w3a8", "w4a8", "w6a8", "w8a8"]

Labelled = Sequence[tuple[object, Tensor]]


def call(model: nn.Module, batch: object) -> Tensor:
    """Logits of one batch, however the model takes it."""
    result = model(**batch) if isinstance(batch, dict) else model(batch)
    return result if isinstance(result, Tensor) else result.logits


def logits(model: nn.Module, labelled: Labelled) -> tuple[Tensor, float]:
    """Logits on the test data and the accuracy in percent."""
    with torch.no_grad():
        found = torch.cat([call(model, batch) for batch, _ in labelled])
    truth = torch.cat([labels for _, labels in labelled])
    return found, 100 * float((found.argmax(1) == truth).float().mean())


def sqnr(signal: Tensor, found: Tensor) -> float:
    """Decibels of signal over error power."""
    return float(10 * torch.log10(signal.square().sum() / (found - signal).square().sum()))


def cpu_seconds(work: Callable[[], Result]) -> tuple[float, Result]:
    """CPU seconds of a call, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def tau(found: fxmpq.Sensitivity, exact: fxmpq.Sensitivity) -> float:
    """Kendall's tau over all (group, precision)."""
    ours = [found.value(*entry) for entry in exact.entries]
    return float(kendalltau(ours, [exact.value(*entry) for entry in exact.entries]).statistic)


def compare(
    name: str, model: nn.Module, calibration: Sequence[object], labelled: Labelled, table: Table
) -> None:
    """Add a model's rows to the table."""
    graph = fxmpq.trace(model, calibration[0])
    prepared = fxmpq.prepare(graph, "reference", candidates=CANDIDATES)
    calibrated = fxmpq.calibrate(prepared, calibration)
    costs = fxmpq.cost(prepared)

    def float_pass() -> None:
        with torch.no_grad():
            for batch in calibration:
                call(model, batch)

    float_pass()
    passes, _ = cpu_seconds(float_pass)
    found: dict[str, fxmpq.Sensitivity] = {}
    cost_of: dict[str, float] = {}
    for label, (method, options) in METHODS.items():
        measure = partial(fxmpq.measure, calibrated, calibration, method=method, **options)
        seconds, found[label] = cpu_seconds(measure)
        cost_of[label] = seconds / passes
    exact = found["sqnr"]
    signal, accuracy = logits(model, labelled)
    table.add_row(name, "float", "", "", "", f"{accuracy:.2f}")
    for budget in BUDGETS:
        for label, sensitivity in found.items():
            plan = fxmpq.solve(sensitivity, costs, budget)
            planned, plan_accuracy = logits(fxmpq.apply(calibrated, plan), labelled)
            table.add_row(
                name,
                budget,
                f"{label} ({cost_of[label]:.1f} passes)",
                f"{tau(sensitivity, exact):.3f}",
                f"{sqnr(signal, planned):.2f}",
                f"{plan_accuracy:.2f}",
            )
    _uniform_rows(name, calibrated, costs, signal, labelled, table)


def _uniform_rows(
    name: str,
    calibrated: fx.GraphModule,
    costs: fxmpq.CostTable,
    signal: Tensor,
    labelled: Labelled,
    table: Table,
) -> None:
    for precision in ("w2a8", "w3a8", "w4a8", "w8a8"):
        choices = costs.uniform(precision)
        share = costs.total("weights", choices) / costs.float_total["weights"]
        found, accuracy = logits(fxmpq.apply(calibrated, choices), labelled)
        label = f"uniform {precision} ({100 * share:.1f} %)"
        table.add_row(name, label, "", "", f"{sqnr(signal, found):.2f}", f"{accuracy:.2f}")


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    table = Table(title="Projected against the exact sweep, trained models")
    for column in ("model", "plan", "method", "tau", "SQNR dB", "accuracy %"):
        table.add_column(column)
    data = embedded_subset()
    calibration = list(data.calibration_images[:512].split(64))
    images = list(zip(data.test_images.split(250), data.test_labels.split(250), strict=True))
    compare("ResNet-20", pretrained(), calibration, images, table)
    minilm, sentences, labelled = minilm_reviews()
    compare("MiniLM-L6", minilm, sentences[:8], labelled, table)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
