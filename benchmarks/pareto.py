"""How long Pareto fronts take, with each point begun from its neighbour and without."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import numpy as np
from _models import random_images, resnet18
from rich.console import Console
from rich.table import Table

import fxmpq
from fxmpq.costs.table import CostTable
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver import pareto as module
from fxmpq.solver.front import ParetoFront
from fxmpq.solver.pair_search import find_either
from fxmpq.solver.pareto import pareto
from fxmpq.solver.search import Found

BITS = {"w2a8": 2, "w3a8": 3, "w4a8": 4, "w6a8": 6, "w8a8": 8}
TIME_LIMIT = 600.0


def resnet_tables() -> tuple[Sensitivity, CostTable]:
    """ResNet-18 with five candidates a group, from a real measurement."""
    batches = random_images(16, 1, size=64)
    graph = fxmpq.trace(resnet18(), batches[0])
    prepared = fxmpq.prepare(graph, "reference", candidates=list(BITS))
    calibrated = fxmpq.calibrate(prepared, batches)
    return fxmpq.measure(calibrated, batches), fxmpq.cost(prepared)


def random_tables(groups: int) -> tuple[Sensitivity, CostTable]:
    """Sizes and sensitivities spread over orders of magnitude."""
    generator = np.random.default_rng(0)
    sizes = 10 ** generator.uniform(3, 6, groups)
    works = sizes * generator.uniform(0.2, 3.0, groups)
    hurts = 10 ** generator.uniform(-9, -3, groups)

    def table(scales: np.ndarray[Any, Any], *, falling: bool) -> dict[str, dict[str, float]]:
        return {
            f"g{group}": {
                name: float(scales[group] * 4.0**-bits * generator.uniform(0.7, 1.3))
                if falling
                else int(scales[group]) * bits
                for name, bits in BITS.items()
            }
            for group in range(groups)
        }

    costs = {"weights": table(sizes, falling=False), "bops": table(works, falling=False)}
    totals = {
        metric: sum(row["w8a8"] * 4 for row in rows.values()) for metric, rows in costs.items()
    }
    return Sensitivity(table(hurts, falling=True)), CostTable(costs, totals)


def timed(tables: tuple[Sensitivity, CostTable], **options: Any) -> tuple[float, ParetoFront]:
    """Seconds, and the front."""
    start = time.perf_counter()
    front = pareto(*tables, time_limit=TIME_LIMIT, **options)
    return time.perf_counter() - start, front


def cold(tables: tuple[Sensitivity, CostTable], **options: Any) -> tuple[float, ParetoFront]:
    """The same, every program by itself."""

    def alone(*args: Any, start: object, **found: Any) -> Found | None:
        return find_either(*args, **found)

    with mock.patch.object(module, "find_either", alone):
        return timed(tables, **options)


def main() -> None:
    """Measure and print the table."""
    resnet, random = resnet_tables(), random_tables(75)
    table = Table(title="Pareto fronts of loss and weights, every point proven")
    for column in ("program", "groups", "held", "points", "warm, s", "cold, s", "warm, ms a point"):
        table.add_column(column, justify="left" if column == "program" else "right")
    cases: list[tuple[str, tuple[Sensitivity, CostTable], dict[str, Any]]] = [
        ("ResNet-18, whole", resnet, {}),
        ("ResNet-18, 100 limits", resnet, {"points": 100}),
        ("ResNet-18, 100 limits", resnet, {"points": 100, "limits": "bops=3%"}),
        ("random, 400 limits", random, {"points": 400}),
        ("random, 50 limits", random, {"points": 50, "limits": "bops=14%"}),
    ]
    for name, tables, options in cases:
        warm, front = timed(tables, **options)
        alone, same = cold(tables, **options)
        assert (front.costs, front.losses) == (same.costs, same.losses)
        points = len(front.plans)
        table.add_row(
            name,
            str(len(tables[0].values)),
            str(options.get("limits", "")),
            f"{points:,}",
            f"{warm:.2f}",
            f"{alone:.2f}",
            f"{1000 * warm / points:.1f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
