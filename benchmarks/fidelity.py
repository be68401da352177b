"""Does every target compute what the plan promised? Agreement, accuracy and size on real data.

A trained ResNet-20 on Fashion-MNIST and MiniLM-L6 on movie reviews are converted for every target
at a few plans. The table has the agreement with the simulation, in dB SQNR, of the outputs and of
the layer that agrees least on the inputs it got; accuracy on 1,000 test samples in the
simulation and on the target; and the main file against what the cost model predicts for weights.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _models import minilm_reviews
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch
from fxmpq.recipes.fashion_mnist import embedded_subset
from fxmpq.recipes.models.resnet20 import pretrained
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.registry import TARGETS
from fxmpq.targets.target import Converted

UNIFORM = ("w8a8", "w4a8", "we4m3ae4m3")
MIXED = "mixed in turn"


@dataclass(frozen=True)
class Subject:
    """A trained model, unlabelled calibration data, and labelled test data."""

    model: nn.Module
    calibration: Sequence[Batch]
    test: Sequence[tuple[Batch, Tensor]]


def resnet20() -> Subject:
    """The recipes' ResNet-20, on 1,000 test images."""
    data = embedded_subset()
    images, labels = data.test_images[:1000].split(50), data.test_labels[:1000].split(50)
    calibration = data.calibration_images[:256].split(32)
    return Subject(pretrained(), calibration, list(zip(images, labels, strict=True)))


def minilm() -> Subject:
    """MiniLM-L6 on 1,000 test sentences."""
    model, unlabelled, test = minilm_reviews(64)
    return Subject(model, unlabelled, test)


SUBJECTS: dict[str, Callable[[], Subject]] = {"ResNet-20": resnet20, "MiniLM-L6": minilm}


def plans_of(prepared: fx.GraphModule, wanted: Sequence[str]) -> dict[str, dict[str, str]]:
    """Choices by the plan's name: uniform ones that the target has, and candidates in turn."""
    costs = fxmpq.cost(prepared)
    found: dict[str, dict[str, str]] = {}
    for name in wanted:
        choices = costs.uniform(name)
        if any(choice == name for choice in choices.values()):
            found[name] = choices
    found[MIXED] = {
        group: costs.precisions(group)[index % len(costs.precisions(group))]
        for index, group in enumerate(costs.groups)
    }
    return found


def accuracy(outputs: Callable[[Batch], Tensor], test: Sequence[tuple[Batch, Tensor]]) -> float:
    """Percent of the test samples whose largest logit is the label's."""
    with torch.no_grad():
        right = sum(int((outputs(batch).argmax(1) == truth).sum()) for batch, truth in test)
    return 100 * right / sum(len(truth) for _, truth in test)


def simulated(planned: fx.GraphModule) -> Callable[[Batch], Tensor]:
    """The simulation's logits."""

    def run(batch: Batch) -> Tensor:
        found = planned(**batch) if isinstance(batch, dict) else planned(batch)
        return found if isinstance(found, Tensor) else found.logits

    return run


def rows_of(target: str, subject: Subject, wanted: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The cells of each plan on one target."""
    graph = fxmpq.trace(subject.model, subject.calibration[0])
    candidates = _candidates(target, graph, wanted)
    prepared = fxmpq.prepare(graph, target, candidates=candidates)
    calibrated = fxmpq.calibrate(prepared, subject.calibration, progress=False)
    for name, choices in plans_of(calibrated, wanted).items():
        planned = fxmpq.apply(calibrated, choices)
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = fxmpq.convert(
                    planned, output=Path(folder), verify=list(subject.calibration[:2])
                )
            except FxmpqError as error:
                yield (name, f"refused: {error}", "", "", "", "")
                continue
            yield (name, *_cells(planned, made, subject, choices))


def _candidates(target: str, graph: fx.GraphModule, wanted: Sequence[str]) -> list[str]:
    """The target's own candidates, and those asked for that it has."""
    rules = TARGETS[target].rules
    found = [str(candidate) for candidate in rules.default_candidates]
    for name in wanted:
        try:
            fxmpq.prepare(graph, target, candidates=[name])
        except FxmpqError:
            continue
        found.append(name)
    return sorted(set(found))


def _cells(
    planned: fx.GraphModule, made: Converted, subject: Subject, choices: dict[str, str]
) -> tuple[str, ...]:
    layers = layer_agreements(planned, made, subject.calibration[0])
    worst = min((entry.sqnr_db for entry in layers), default=math.nan)
    in_simulation = accuracy(simulated(planned), subject.test)
    on_target = accuracy(lambda batch: made.run(batch)[0].cpu(), subject.test)
    size = max((file.stat().st_size for file in made.files), default=0)
    predicted = fxmpq.cost(planned).total("weights", choices)
    return (
        f"{made.sqnr_db:.1f}",
        f"{worst:.1f}",
        f"{in_simulation:.1f}, {on_target:.1f}",
        f"{size / 1e6:.3f}" if size else "",
        f"{100 * (size / predicted - 1):+.1f} %" if size else "",
    )


def main() -> None:
    """Convert, run and print the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--plans", nargs="*", default=list(UNIFORM))
    wanted = parser.parse_args()
    table = Table(title="converted models against their simulation")
    for heading in ("model", "target", "plan"):
        table.add_column(heading)
    for heading in ("dB", "worst layer", "accuracy: simulated, run", "MB", "over plan"):
        table.add_column(heading, justify="right")
    for model in wanted.models:
        subject = SUBJECTS[model]()
        for target in wanted.targets:
            for cells in rows_of(target, subject, wanted.plans):
                table.add_row(model, target, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
