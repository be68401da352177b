"""How long the bit-width program takes: ResNet-18's own, and large random ones."""

from __future__ import annotations

import statistics
import time

import numpy as np
from _models import random_images, resnet18
from rich.console import Console
from rich.table import Table

import fxmpq
from fxmpq.solver.program import Row, Solution, solve_program

REPEATS = 5
NAMES = ("w2a8", "w3a8", "w4a8", "w5a8", "w6a8", "w8a8")
BITS = (2, 3, 4, 5, 6, 8)


def random_program(groups: int, limits: int) -> tuple[dict[str, dict[str, float]], list[Row]]:
    """A program with sizes and sensitivities spread over orders of magnitude."""
    generator = np.random.default_rng(0)
    sizes = 10 ** generator.uniform(3, 6, groups)
    hurts = 10 ** generator.uniform(-9, -3, groups)
    objective = {
        f"g{g}": {
            name: float(hurts[g] * 4.0**-bits * generator.uniform(0.7, 1.3))
            for name, bits in zip(NAMES, BITS, strict=True)
        }
        for g in range(groups)
    }
    rows = []
    for limit in range(limits):
        spread = (1.0, 1.0) if limit == 0 else (0.2, 3.0)
        table = {
            f"g{g}": {
                name: int(sizes[g] * bits * generator.uniform(*spread))
                for name, bits in zip(NAMES, BITS, strict=True)
            }
            for g in range(groups)
        }
        rows.append(Row(table, int(sum(row["w5a8"] for row in table.values()))))
    return objective, rows


def timed(objective: dict[str, dict[str, float]], rows: list[Row]) -> tuple[float, Solution]:
    """Median seconds and the last solution."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        solution = solve_program(objective, rows, max_gap=0.0, time_limit=20)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), solution


def resnet_row() -> list[str]:
    """ResNet-18's program with five candidates a group, from a real measurement."""
    batches = random_images(16, 1, size=64)
    graph = fxmpq.trace(resnet18(), batches[0])
    candidates = ["w2a8", "w3a8", "w4a8", "w6a8", "w8a8"]
    prepared = fxmpq.prepare(graph, "reference", candidates=candidates)
    calibrated = fxmpq.calibrate(prepared, batches)
    sensitivity = fxmpq.measure(calibrated, batches)
    costs = fxmpq.cost(prepared)
    seconds = []
    for _ in range(REPEATS):
        plan = fxmpq.solve(sensitivity, costs, "weights=15%,bops=10%")
        seconds.append(plan.seconds or 0.0)
    return ["ResNet-18", "18", "2", f"{statistics.median(seconds):.3f}", f"{plan.gap:.1e}"]


def main() -> None:
    """Measure and print the table."""
    table = Table(title=f"Bit-width programs with CBC, median of {REPEATS}")
    for column in ("program", "groups", "limits", "seconds", "proven gap"):
        table.add_column(column, justify="right")
    table.add_row(*resnet_row())
    for groups, limits in ((21, 1), (21, 3), (1_000, 2), (10_000, 1), (10_000, 3)):
        seconds, solution = timed(*random_program(groups, limits))
        table.add_row("random", f"{groups:,}", str(limits), f"{seconds:.3f}", f"{solution.gap:.1e}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
