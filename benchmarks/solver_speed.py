"""How long the bit-width program takes: ResNet-18's own, random ones, and ones with edges."""

from __future__ import annotations

import math
import statistics
import time

import numpy as np
from _models import random_images, resnet18
from rich.console import Console
from rich.table import Table

import fxmpq
from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge, Moment
from fxmpq.sensitivity.sensitivity import Sensitivity
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


def linked_tables(groups: int, edges: int) -> tuple[Sensitivity, CostTable]:
    """Groups in a chain with branches, as of a residual network: time, format changes, memory.

    Integer formats are three times as fast as float but for one group in five, which they slow
    down; two groups are alive at once.
    """
    generator = np.random.default_rng(0)
    names = [f"g{index}" for index in range(groups)]
    speed = {"w2a8": 0.3, "w3a8": 0.3, "w4a8": 0.3, "w8a8": 0.33, "fp32": 1.0}
    bits = {"w2a8": 2, "w3a8": 3, "w4a8": 4, "w8a8": 8, "fp32": 32}
    hurts = 10 ** generator.uniform(-5, -2, groups)
    floats = 10 ** generator.uniform(1, 3, groups)
    slowed = np.where(generator.random(groups) < 0.2, 3.6, 1.0)
    outputs = [int(count) for count in generator.integers(10**5, 10**6, groups)]
    losses, times, alive = {}, {}, {}
    for index, group in enumerate(names):
        losses[group] = {
            name: 0.0 if width == 32 else float(hurts[index] * 4.0**-width)
            for name, width in bits.items()
        }
        times[group] = {
            name: round(float(floats[index] * part * (slowed[index] if part < 1 else 1)), 1)
            for name, part in speed.items()
        }
        alive[group] = {name: outputs[index] * (4 if name == "fp32" else 1) for name in bits}
    ends = [(one, one + 1) for one in range(groups - 1)]
    while len(ends) < edges:
        start = int(generator.integers(0, groups - 5))
        ends.append((start, start + int(generator.integers(2, 5))))
    changes = []
    for one, other in ends:
        cost = round(float(generator.uniform(2, 30)), 1)
        table = {
            name: {to: 0 if (name == "fp32") == (to == "fp32") else cost for to in bits}
            for name in bits
        }
        changes.append(Edge(names[one], names[other], table))
    moments = [
        Moment(names[index], 0, {group: alive[group] for group in names[index : index + 2]})
        for index in range(groups)
    ]
    float_total = {"latency": math.fsum(row["fp32"] for row in times.values())}
    in_float = dict.fromkeys(names, "fp32")
    float_total["memory"] = max(moment.total(in_float) for moment in moments)
    costs = CostTable(
        {"latency": times},
        float_total=float_total,
        edges={"latency": changes},
        moments={"memory": moments},
    )
    return Sensitivity(losses, "sqnr"), costs


def linked_table() -> Table:
    """Programs with format changes and peaks."""
    groups, edges = 54, 70
    sensitivity, costs = linked_tables(groups, edges)
    table = Table(title=f"{groups} groups of 5 candidates, {edges} edges, {groups} moments, CBC")
    for column in ("budget", "seconds", "proven gap", "latency", "memory"):
        table.add_column(column, justify="left" if column == "budget" else "right")
    for budget in (
        "latency=50%",
        "latency=60%",
        "latency=80%",
        "memory=40%",
        "latency=60%,memory=40%",
        "minimize=latency,loss=1e-6",
        "minimize=memory,loss=1e-6",
        "minimize=memory,loss=1e-6,latency=70%",
    ):
        plans = [fxmpq.solve(sensitivity, costs, budget) for _ in range(REPEATS)]
        seconds = statistics.median(plan.seconds or 0.0 for plan in plans)
        shares = [f"{plans[0].relative[metric]:.1%}" for metric in ("latency", "memory")]
        table.add_row(budget, f"{seconds:.2f}", f"{plans[0].gap:.1e}", *shares)
    return table


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
    console = Console(width=100)
    console.print(table)
    console.print(linked_table())


if __name__ == "__main__":
    main()
