"""Does every target compute what the plan promised? Agreement, accuracy and size on real data.

A trained ResNet-20 on the test set of Fashion-MNIST, and MiniLM-L6 (BERT architecture) on the half
of the movie-review sentences that it was not fine-tuned on, are converted for every target at a few
plans. A table a target has, for each plan:

- the agreement of target and simulation on the test set, in dB SQNR of the outputs; that of the
  simulation with itself in float64 on the first samples: what rounding alone leaves, however a
  runtime rounds; and that of the layer that agrees least on the inputs it got;
- accuracy in the simulation and on the target; how many samples they put into different classes,
  of these how many only the simulation got right, and how many only the target; and the chance of
  so uneven a split, or one more uneven, if neither were better (McNemar's exact test);
- the main file against what the cost model predicts for weights.

The whole test set is read from Debian's package `dataset-fashion-mnist` (`--fashion-mnist`, or the
variable FASHION_MNIST, names its folder); without it, 4,000 images come with the recipes. It takes
hours on one core; `--targets`, `--models`, `--plans` and `--samples` take a part.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _models import minilm_half
from _rounding import in_float64
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch
from fxmpq.graph.products import PRODUCT
from fxmpq.recipes.fashion_mnist import DEFAULT_FOLDER, embedded_subset, normalise, read_split
from fxmpq.recipes.models.resnet20 import pretrained
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.registry import TARGETS
from fxmpq.targets.target import Converted, agreement_db

MIXED, PRODUCTS = "mixed", "products"
PLANS = ("w8a8", "w4a8", "we4m3ae4m3", "we4m3tae4m3", "w4", "w4b128", MIXED, PRODUCTS)
HEADINGS = ("dB", "rounding alone", "worst layer", "simulated", "run", "differ", "MB", "over plan")
_LOOKED_AT = 200
"""Samples that also run in float64."""

Test = Sequence[tuple[Batch, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A trained model, unlabelled calibration data, and labelled test data."""

    model: nn.Module
    calibration: Sequence[Batch]
    test: Test
    is_transformer: bool


@dataclass(frozen=True)
class Simulated:
    """What a plan's simulation gives on the test data."""

    choices: dict[str, str]
    logits: Tensor
    rounding_db: float


def resnet20(folder: Path) -> Subject:
    """The recipes' ResNet-20, and all test images there are."""
    data = embedded_subset()
    images, labels = data.test_images, data.test_labels
    if folder.is_dir():
        pixels, classes = read_split("t10k", folder)
        images, labels = normalise(pixels), torch.from_numpy(classes.astype("int64"))
    calibration = data.calibration_images[:256].split(32)
    test = list(zip(images.split(50), labels.split(50), strict=True))
    return Subject(pretrained(), calibration, test, is_transformer=False)


def minilm(_: Path) -> Subject:
    """MiniLM-L6, and the half of the sentences that it was not fine-tuned on."""
    return Subject(*minilm_half(64), is_transformer=True)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {"ResNet-20": resnet20, "MiniLM-L6": minilm}


def first(test: Test, samples: int) -> Test:
    """The batches of the first samples, the last one cut."""
    found = []
    for batch, labels in test:
        taken = min(len(labels), samples)
        if taken > 0:
            cut = (
                {name: value[:taken] for name, value in batch.items()}
                if isinstance(batch, dict)
                else batch[:taken]
            )
            found.append((cut, labels[:taken]))
        samples -= taken
    return found


def planned_for(
    target: str, subject: Subject, wanted: Sequence[str]
) -> Iterator[tuple[str, fx.GraphModule, dict[str, str]]]:
    """The plans that a target has: name, graph and choices."""
    graph = fxmpq.trace(subject.model, subject.calibration[0])
    rules = TARGETS[target].rules
    defaults = [str(candidate) for candidate in rules.default_candidates]
    taken = [name for name in wanted if _takes(target, graph, name)]
    prepared = fxmpq.prepare(graph, target, candidates=sorted({*defaults, *taken}))
    calibrated = fxmpq.calibrate(prepared, subject.calibration, progress=False)
    costs = fxmpq.cost(calibrated)
    for name in taken:
        choices = costs.uniform(name)
        yield name, fxmpq.apply(calibrated, choices), choices
    if MIXED in wanted:
        choices = {
            group: costs.precisions(group)[index % len(costs.precisions(group))]
            for index, group in enumerate(costs.groups)
        }
        yield MIXED, fxmpq.apply(calibrated, choices), choices
    if PRODUCTS in wanted and subject.is_transformer and PRODUCT in rules.operators:
        int8 = "w8a8" if _takes(target, graph, "w8a8") else "we4m3tae4m3"
        prepared = fxmpq.prepare(graph, target, candidates=[int8], products=True)
        calibrated = fxmpq.calibrate(prepared, subject.calibration, progress=False)
        choices = fxmpq.cost(calibrated).uniform(int8)
        yield f"{int8}, products", fxmpq.apply(calibrated, choices), choices


def _takes(target: str, graph: fx.GraphModule, name: str) -> bool:
    """Whether a target has a precision, for some layer."""
    if name in (MIXED, PRODUCTS):
        return False
    try:
        prepared = fxmpq.prepare(graph, target, candidates=[name])
    except FxmpqError:
        return False
    return name in fxmpq.cost(prepared).uniform(name).values()


def logits_of(outputs: Callable[[Batch], Tensor], test: Test) -> Tensor:
    """Logits of all test samples."""
    with torch.no_grad():
        return torch.cat([outputs(batch).detach().cpu().float() for batch, _ in test])


def simulate(planned: fx.GraphModule, batch: Batch) -> Tensor:
    """The simulation's logits."""
    found = planned(**batch) if isinstance(batch, dict) else planned(batch)
    return found if isinstance(found, Tensor) else found.logits


def simulated(
    planned: fx.GraphModule, choices: dict[str, str], test: Test, known: list[Simulated]
) -> Simulated:
    """A simulation on the test data; one that is known is not run again.

    Targets with the same rules have the same simulations: the same choices, and the same logits of
    the first samples.
    """
    few = first(test, _LOOKED_AT)
    beginning = logits_of(lambda batch: simulate(planned, batch), few)
    for entry in known:
        if entry.choices == choices and entry.logits[: len(beginning)].equal(beginning):
            return entry
    rest = test[len(few) :]
    later = [logits_of(lambda batch: simulate(planned, batch), rest)] if rest else []
    exact = torch.cat([in_float64(planned, batch) for batch, _ in few])
    rounding = agreement_db([exact], [beginning])
    known.append(Simulated(choices, torch.cat([beginning, *later]), rounding))
    return known[-1]


def cells_of(
    planned: fx.GraphModule, choices: dict[str, str], subject: Subject, known: list[Simulated]
) -> tuple[str, ...]:
    """Convert a plan, run it, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            verify = list(subject.calibration[:2])
            made = fxmpq.convert(planned, output=Path(folder), verify=verify)
        except FxmpqError as error:
            return (f"refused: {error}", *[""] * (len(HEADINGS) - 1))
        expected = simulated(planned, choices, subject.test, known)
        return _compared(planned, made, subject, expected)


def _compared(
    planned: fx.GraphModule, made: Converted, subject: Subject, expected: Simulated
) -> tuple[str, ...]:
    layers = layer_agreements(planned, made, subject.calibration[0])
    worst = min((entry.sqnr_db for entry in layers), default=math.nan)
    found = logits_of(lambda batch: made.run(batch)[0], subject.test)
    truth = torch.cat([labels for _, labels in subject.test])
    theirs, ours = expected.logits.argmax(1), found.argmax(1)
    lost, won = (
        int(((one == truth) & (one != two)).sum()) for one, two in ((theirs, ours), (ours, theirs))
    )
    chance = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    size = max((file.stat().st_size for file in made.files), default=0)
    predicted = fxmpq.cost(planned).total("weights", expected.choices)
    return (
        f"{agreement_db([expected.logits], [found]):.1f}",
        f"{expected.rounding_db:.1f}",
        f"{worst:.1f}",
        f"{100 * float((theirs == truth).float().mean()):.2f}",
        f"{100 * float((ours == truth).float().mean()):.2f}",
        f"{int((theirs != ours).sum())}: {lost}, {won}, p={chance:.2f}",
        f"{size / 1e6:.3f}" if size else "",
        f"{100 * (size / predicted - 1):+.1f} %" if size else "",
    )


def main() -> None:
    """Convert, run and print a table a target."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--plans", nargs="+", default=list(PLANS))
    parser.add_argument("--samples", type=int, help="of each test set, the first; all by default")
    folder = Path(os.environ.get("FASHION_MNIST", DEFAULT_FOLDER))
    parser.add_argument("--fashion-mnist", type=Path, default=folder)
    asked = parser.parse_args()
    console = Console(width=150)
    for model in asked.models:
        subject = SUBJECTS[model](asked.fashion_mnist)
        if asked.samples is not None:
            test = first(subject.test, asked.samples)
            subject = Subject(subject.model, subject.calibration, test, subject.is_transformer)
        count = sum(len(labels) for _, labels in subject.test)
        known: list[Simulated] = []
        for target in asked.targets:
            table = Table("plan", title=f"{target}, {model}, {count:,} test samples")
            for heading in HEADINGS:
                table.add_column(heading, justify="right")
            for name, planned, choices in planned_for(target, subject, asked.plans):
                cells = cells_of(planned, choices, subject, known)
                console.print(target, model, name, *cells, soft_wrap=True)
                table.add_row(name, *cells)
            console.print(table)


if __name__ == "__main__":
    main()
