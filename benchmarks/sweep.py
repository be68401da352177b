"""What re-running only downstream nodes saves the exact sweep, on ResNet-18 and MiniLM-L6.

One run, one thread, CPU time: the naive sweep runs the whole graph for every (group,
precision). Both are repeated in turn, ratios are formed within a repeat, and the median is
shown with the smallest and largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from _models import minilm_reviews, random_images, resnet18
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import switch_group
from fxmpq.sensitivity.sqnr import sqnr

Result = TypeVar("Result")

CANDIDATES = ["w2a8", "w4a8", "w8a8"]
REPEATS = 3


def cpu_seconds(work: Callable[[], Result]) -> tuple[float, Result]:
    """CPU seconds of a call, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def naive(graph: fx.GraphModule, batches: list[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """The sweep by definition: a whole forward pass per (group, precision) and batch."""
    graph = copy_graph(graph)
    noise: dict[str, dict[str, float]] = {}
    signal = 0.0
    with torch.no_grad():
        for batch in batches:
            exact = graph(**batch).logits.double()
            signal += float(exact.square().sum())
            for group in require(graph, stage="calibrated").groups:
                row = noise.setdefault(group.name, {str(c): 0.0 for c in group.candidates})
                for candidate in group.candidates:
                    switch_group(graph, group, candidate)
                    error = graph(**batch).logits.double() - exact
                    row[str(candidate)] += float(error.square().sum())
                switch_group(graph, group, fxmpq.Precision())
    return {name: {c: v / signal for c, v in row.items()} for name, row in noise.items()}


def compare(name: str, model: nn.Module, batches: list[dict[str, Tensor]]) -> list[str]:
    """One row: both sweeps' times, their ratio, and how far their values differ."""
    prepared = fxmpq.prepare(fxmpq.trace(model, batches[0]), "reference", candidates=CANDIDATES)
    graph = fxmpq.calibrate(prepared, batches, progress=False)
    times: list[tuple[float, float]] = []
    for _ in range(REPEATS):
        whole, expected = cpu_seconds(lambda: naive(graph, batches))
        downstream, found = cpu_seconds(lambda: sqnr(graph, batches).values)
        times.append((whole, downstream))
    differences = [
        abs(found[group][precision] - value) / value if value else abs(found[group][precision])
        for group, row in expected.items()
        for precision, value in row.items()
    ]
    ratios = [downstream / whole for whole, downstream in times]
    return [
        name,
        str(len(differences)),
        f"{statistics.median(whole for whole, _ in times):.1f}",
        f"{statistics.median(downstream for _, downstream in times):.1f}",
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        f"{max(differences):.1e}",
    ]


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    table = Table(title="The exact sweep: whole passes against downstream re-execution")
    for column in ("model", "entries", "whole s", "downstream s", "ratio", "largest difference"):
        table.add_column(column)
    table.add_row(*compare("ResNet-18", resnet18(), random_images(4, 1, batch=4)))
    minilm, sentences, _ = minilm_reviews()
    table.add_row(*compare("MiniLM-L6", minilm, [dict(batch) for batch in sentences[:1]]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
