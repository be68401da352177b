"""How well measured layers predict whole models: predicted latency against measured.

`fxmpq.cost(graph, metric="latency")` measures layers, neighbours and uniform plans; random plans,
whose precisions it has never seen together, are then converted and run side by side, twice, loaded
anew. Each plan's lesser time counts; how alike the two measurements rank the random plans is the
most that can be expected of a prediction. CPU time of one thread; on a shared machine single
numbers are off by several percent.

MiniLM-L6 needs packages (`_models.minilm_reviews`); ResNets have random weights.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from _models import minilm_reviews, random_images, random_tokens, resnet18, resnet50
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import fx, nn

import fxmpq
from fxmpq.costs.latency.timing import ROUNDS, cpu_seconds
from fxmpq.costs.latency.variants import load_graph
from fxmpq.graph.batches import Batch
from fxmpq.steps import runtime_of

MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "MiniLM-L6": lambda: minilm_reviews()[0],
}
TARGETS = ("onnxruntime", "openvino", "inductor", "executorch")
MEASUREMENTS = 2


@dataclass(frozen=True)
class Row:
    """A plan's latency, in milliseconds.

    Args:
        plan: What it is called.
        predicted: By the cost table.
        times: Of the whole model, one a measurement.
    """

    plan: str
    predicted: float
    times: tuple[float, ...]

    @property
    def measured(self) -> float:
        """The least time."""
        return min(self.times)

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1


def inputs(name: str, image: int, tokens: int) -> Batch:
    """Two samples of what a model takes."""
    if name == "MiniLM-L6":
        (batch,) = random_tokens(2, seed=1, length=tokens)
        return batch
    (batch,) = random_images(2, seed=1, size=image)
    return batch


def candidates_of(name: str, target: str) -> list[str]:
    """A few precisions that a target runs, float among them."""
    wanted = ["w4a8", "w8a8", *(["w8"] if name == "MiniLM-L6" else []), "fp32"]
    left_out = {"inductor": {"w4a8", "w8"}, "executorch": {"w8"}}
    return [entry for entry in wanted if entry not in left_out.get(target, set())]


def random_plans(costs: fxmpq.CostTable, count: int, seed: int) -> dict[str, Mapping[str, str]]:
    """Different plans whose groups draw precisions, in shares that each plan draws for itself."""
    generator = torch.Generator().manual_seed(seed)
    count = min(count, math.prod(len(costs.precisions(group)) for group in costs.groups))
    found: dict[str, Mapping[str, str]] = {}
    while len(found) < count:
        names = sorted({name for group in costs.groups for name in costs.precisions(group)})
        weights = -torch.rand(len(names), generator=generator).log()
        share = dict(zip(names, weights.tolist(), strict=True))
        plan = {}
        for group in costs.groups:
            legal = costs.precisions(group)
            drawn = torch.tensor([share[name] for name in legal])
            index = int(torch.multinomial(drawn, 1, generator=generator))
            plan[group] = legal[index]
        if plan not in found.values():
            found[f"random {len(found)}"] = plan
    return found


def rows_of(
    graph: fx.GraphModule, batch: Batch, target: str, plans: int, rounds: int
) -> tuple[list[Row], float]:
    """Predicted and measured latency of each plan; and the seconds that costs took."""
    start = time.perf_counter()
    costs = fxmpq.cost(graph, metric="latency")
    spent = time.perf_counter() - start
    names = dict.fromkeys(n for group in costs.groups for n in costs.precisions(group))
    asked: dict[str, Mapping[str, str]] = {name: costs.uniform(name) for name in names}
    asked |= random_plans(costs, plans, seed=0)
    calibrated = fxmpq.calibrate(graph, [batch], progress=False)
    runtime = runtime_of(fxmpq.TARGETS[target])
    assert runtime is not None
    choices = [tuple(plan[group] for group in costs.groups) for plan in asked.values()]
    times = [
        cpu_seconds(load_graph(calibrated, choices, runtime), rounds=rounds)
        for _ in range(MEASUREMENTS)
    ]
    rows = [
        Row(name, costs.total("latency", plan), tuple(1000 * seconds for seconds in found))
        for (name, plan), *found in zip(asked.items(), *times, strict=True)
    ]
    return rows, spent


def show(console: Console, title: str, rows: list[Row], spent: float) -> None:
    """Print a table."""
    table = Table(title=title)
    for name in ("plan", "predicted, ms", "measured, ms", "error"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for row in rows:
        cells = (f"{row.predicted:.2f}", f"{row.measured:.2f}", f"{100 * row.error:+.1f} %")
        table.add_row(row.plan, *cells)
    console.print(table)
    drawn = [row for row in rows if row.plan.startswith("random")]
    rank = spearman([row.predicted for row in drawn], [row.measured for row in drawn])
    ceiling = spearman(*zip(*(row.times for row in drawn), strict=True))
    worst = max(abs(row.error) for row in rows)
    console.print(
        f"largest error {100 * worst:.1f} %; Spearman over {len(drawn)} random plans {rank:.3f}, "
        f"of the two measurements {ceiling:.3f}; costs took {spent:.0f} s\n"
    )


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of ranks."""
    return float(spearmanr(one, other).statistic)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--candidates", nargs="+", help="precisions; by default a few per model")
    parser.add_argument("--image", type=int, default=224, help="pixels a side")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--plans", type=int, default=10, help="random plans")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each whole model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    for name in options.models:
        batch = inputs(name, options.image, options.tokens)
        model: nn.Module = MODELS[name]()
        for target in options.targets:
            candidates = options.candidates or candidates_of(name, target)
            graph = fxmpq.prepare(fxmpq.trace(model, batch), target, candidates=candidates)
            rows, spent = rows_of(graph, batch, target, options.plans, options.rounds)
            show(console, f"{name}, {target}", rows, spent)


if __name__ == "__main__":
    main()
