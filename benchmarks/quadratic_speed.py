"""How long the quadratic program takes: ResNet-20's own, and larger ones made like it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import fxmpq
from fxmpq import Sensitivity
from fxmpq.costs.table import CostTable
from fxmpq.recipes.fashion_mnist import embedded_subset
from fxmpq.recipes.models.resnet20 import pretrained
from fxmpq.sensitivity.interactions import shrinkage
from fxmpq.solver.program import Row, Solution, solve_program
from fxmpq.solver.quadratic import quadratic as program
from fxmpq.solver.quadratic.outer_approximation import Optimum
from fxmpq.solver.quadratic.quadratic import quadratic

SHARES = (0.09, 0.125, 0.16)
BITS = {4: (2, 4, 6, 8), 5: (2, 3, 4, 6, 8)}
TIME_LIMIT = 60.0
DRAWS = 128


@dataclass(frozen=True)
class Case:
    """A program and what to call it."""

    name: str
    sensitivity: Sensitivity
    sizes: dict[str, int]
    shrinkage: float


def like_a_network(groups: int, candidates: int, draws: int, seed: int = 0) -> Case:
    """Errors that share a few directions, sizes and sensitivities over orders of magnitude."""
    generator = np.random.default_rng(seed)
    bits = BITS[candidates]
    shared = generator.normal(size=(draws, 4))
    columns, table = [], {}
    sizes = {f"g{group}": int(10 ** generator.uniform(4, 6)) for group in range(groups)}
    for group in sizes:
        hurt = 10 ** generator.uniform(-1, 0)
        own = shared @ generator.normal(size=4) / 4 + generator.normal(size=draws)
        found = [
            hurt * 2.0**-count * (0.7 * own + 0.7 * generator.normal(size=draws)) for count in bits
        ]
        columns += found
        table[group] = {
            f"w{count}a8": float(np.square(column).mean())
            for count, column in zip(bits, found, strict=True)
        }
    sensitivity = Sensitivity(table, "projected", None, np.array(columns).T)
    return Case(f"random, {draws} draws", sensitivity, sizes, shrinkage(sensitivity))


def resnet20() -> Case:
    """The trained ResNet-20 on 128 images of clothes, one probe an image."""
    images = embedded_subset().calibration_images[:DRAWS]
    batches = list(images.split(32))
    graph = fxmpq.trace(pretrained(), batches[0])
    candidates = [f"w{count}a8" for count in BITS[5]]
    prepared = fxmpq.prepare(graph, "reference", candidates=candidates)
    calibrated = fxmpq.calibrate(prepared, batches, progress=False)
    sensitivity = fxmpq.measure(calibrated, batches)
    weights = fxmpq.cost(prepared).costs["weights"]
    sizes = {group: int(row["w8a8"]) for group, row in weights.items()}
    return Case("ResNet-20", sensitivity, sizes, shrinkage(sensitivity))


def as_measured(case: Case) -> Case:
    """The same with interactions as measured, which are harder."""
    return Case(case.name, case.sensitivity, case.sizes, 0.0)


def solved(case: Case, share: float) -> tuple[Solution, float, int]:
    """The solution, what the additive plan loses by interactions more, and planes."""
    values = case.sensitivity.values
    costs = {
        group: {name: case.sizes[group] * int(name[1]) for name in row}
        for group, row in values.items()
    }
    row = Row(costs, int(share * 32 * sum(case.sizes.values())))
    planes = 0
    minimise = program.minimise

    def counted(*args: Any, **options: Any) -> Optimum:
        nonlocal planes
        found = minimise(*args, **options)
        planes = found.planes
        return found

    program.minimise = counted
    try:
        found = quadratic(
            case.sensitivity,
            CostTable({"weights": costs}),
            [row],
            shrinkage=case.shrinkage,
            time_limit=TIME_LIMIT,
        )
    finally:
        program.minimise = minimise
    additive = solve_program(values, [row])
    matrix = program.shrunk_pairs(case.sensitivity, case.shrinkage)
    entries = {entry: index for index, entry in enumerate(case.sensitivity.entries)}
    place = [entries[entry] for entry in additive.choices.items()]
    return found, float(matrix[np.ix_(place, place)].sum()) / found.objective, planes


def main() -> None:
    """Measure and print the table."""
    table = Table(title=f"Quadratic programs, one thread, time limit {TIME_LIMIT:.0f} s")
    heads = ("program", "groups", "shrunk", "weights", "seconds", "planes", "gap", "additive loss")
    for head in heads:
        table.add_column(head, justify="right")
    resnet, small = resnet20(), like_a_network(40, 5, DRAWS)
    for case in (
        resnet,
        as_measured(resnet),
        like_a_network(20, 5, DRAWS),
        small,
        as_measured(small),
        like_a_network(74, 4, DRAWS),
        like_a_network(60, 5, DRAWS),
    ):
        groups = len(case.sizes)
        candidates = len(next(iter(case.sensitivity.values.values())))
        for share in SHARES:
            began = time.perf_counter()
            found, additive, planes = solved(case, share)
            table.add_row(
                case.name,
                f"{groups} x {candidates}",
                f"{case.shrinkage:.2f}",
                f"{share:.1%}",
                f"{time.perf_counter() - began:.2f}",
                f"{planes:,}",
                f"{found.gap:.1e}",
                f"x {additive:.2f}",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
