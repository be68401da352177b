"""Refinement, step by step: what each method adds, on trained models, over three seeds.

ResNet-20 on Fashion-MNIST (512 of 1,024 unlabelled calibration images, 4,000 test images) and
MiniLM-L6 (BERT architecture) on movie-review sentences (256 of 1,024 unlabelled sentences, 1,000
test sentences). Rows that begin with + go on from the one above, the others from the calibrated
plan: accuracy and output SQNR of the simulated plan on test data, and what the step cost in float
passes over the calibration data. A seed draws the calibration samples and the methods' own random
numbers.

Results are kept in the cache folder, row by row: `refine.py measure resnet20 w4a8 0` measures one
case with one seed (with `ladder` behind it, of the methods alone only `light`), `refine.py table`
prints what is there, and `refine.py` alone does everything.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _models import CACHE, minilm_reviews
from agreement import logits, sqnr
from rich.console import Console
from rich.table import Table
from torch import fx, nn

import fxmpq
from fxmpq.recipes.fashion_mnist import embedded_subset
from fxmpq.recipes.models.resnet20 import pretrained
from fxmpq.refinement.methods import METHODS, options_of

FOLDER = CACHE / "refine"
SEEDS = (0, 1, 2)
CASES: Mapping[str, tuple[tuple[str, ...], str | None]] = {
    "w4a8": (("w4a8",), None),
    "w4a4": (("w4a4",), None),
    "w3": (("w2a8", "w3a8", "w4a8", "w8a8"), "avg_weight_bits=3"),
    "w2.5": (("w2a8", "w3a8", "w4a8", "w8a8"), "avg_weight_bits=2.5"),
}
SUBJECT_CASES = {"resnet20": ("w4a8", "w4a4", "w3", "w2.5"), "minilm": ("w4a8", "w3")}

Row = tuple[str, str, Mapping[str, Any]]
"""Label, what is done (`calibrate` or a refinement method), and its options."""

START: Sequence[Row] = (
    (
        "nearest, min-max ranges",
        "calibrate",
        {"ranges": "minmax", "weight_scales": "minmax", "bias_correction": False},
    ),
    ("MSE ranges and scales", "calibrate", {"bias_correction": False}),
    ("+ bias correction", "calibrate", {}),
)
LADDER: Sequence[Row] = (
    ("+ adaround", "adaround", {"steps": 300}),
    ("+ adaquant", "adaquant", {"steps": 100}),
    ("+ brecq", "brecq", {"steps": 100}),
    ("+ norm re-estimation", "norm_reestimation", {}),
    ("+ bias tuning", "bias_tuning", {"epochs": 2}),
)
ALONE: Sequence[Row] = (
    ("light", "light", {}),
    ("equalization alone", "equalization", {}),
    ("bias_correction alone", "bias_correction", {}),
    ("norm_reestimation alone", "norm_reestimation", {}),
    ("adaquant alone", "adaquant", {"steps": 100}),
    ("brecq alone", "brecq", {"steps": 100}),
    ("advanced", "advanced", {}),
)


@dataclass(frozen=True)
class Subject:
    """A trained model with its data.

    Args:
        model: In eval mode.
        calibration: Batches to draw a seed's samples from.
        drawn: How many batches a seed draws.
        test: Test batches with labels.
    """

    model: nn.Module
    calibration: list[Any]
    drawn: int
    test: list[Any]

    def draw(self, seed: int) -> list[Any]:
        """The calibration batches of a seed."""
        order = torch.randperm(len(self.calibration), generator=torch.Generator().manual_seed(seed))
        return [self.calibration[index] for index in order[: self.drawn].tolist()]


def _resnet20() -> Subject:
    data = embedded_subset()
    test = list(zip(data.test_images.split(250), data.test_labels.split(250), strict=True))
    return Subject(pretrained(), list(data.calibration_images.split(64)), 8, test)


def _minilm() -> Subject:
    model, sentences, test = minilm_reviews(calibration=1024)
    return Subject(model, sentences, 16, test)


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "resnet20": cache(_resnet20),
    "minilm": cache(_minilm),
}


def measure(subject: str, case: str, seed: int, *, alone: bool = True) -> None:
    """Walk down the ladder with one seed, then each method `alone`, and keep every row."""
    found, (candidates, budget) = SUBJECTS[subject](), CASES[case]
    batches = found.draw(seed)
    signal, _ = logits(found.model, found.test)
    prepared = fxmpq.prepare(
        fxmpq.trace(found.model, batches[0]), "reference", candidates=candidates
    )
    unit = _float_pass(found.model, batches)
    plan: fxmpq.Plan | dict[str, str] | None = None
    graph = prepared

    def keep(label: str, result: fx.GraphModule, seconds: float) -> None:
        outputs, accuracy = logits(result, found.test)
        row = [sqnr(signal, outputs), accuracy, seconds / unit]
        _save(subject, case, seed, label, row)
        print(f"{subject}, {case}, {seed}: {label}: {row}", flush=True)

    plan = _plan(prepared, batches, candidates, budget)
    for label, _, options in START:
        seconds, calibrated = _timed(
            lambda options=options: fxmpq.calibrate(prepared, batches, progress=False, **options)
        )
        graph = fxmpq.apply(calibrated, plan)
        keep(label, graph, seconds)
    start = graph
    for label, method, options in LADDER:
        seconds, graph = _timed(
            lambda graph=graph, method=method, options=options: fxmpq.refine(
                graph,
                None,
                batches,
                method=method,
                progress=False,
                **_seeded(method, options, seed),
            )
        )
        keep(label, graph, seconds)
    for label, method, options in ALONE if alone else ALONE[:1]:
        seconds, graph = _timed(
            lambda method=method, options=options: fxmpq.refine(
                start,
                None,
                batches,
                method=method,
                progress=False,
                **_seeded(method, options, seed),
            )
        )
        keep(label, graph, seconds)


def _seeded(method: str, options: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
    """A method's options with the seed, if it takes one."""
    return (
        {**options, "seed": seed} if method in METHODS and "seed" in options_of(method) else options
    )


def _plan(
    prepared: fx.GraphModule, batches: list[Any], candidates: Sequence[str], budget: str | None
) -> Mapping[str, str] | fxmpq.Plan:
    costs = fxmpq.cost(prepared)
    if budget is None:
        return costs.uniform(candidates[0])
    calibrated = fxmpq.calibrate(prepared, batches, progress=False)
    sensitivity = fxmpq.measure(calibrated, batches[:8], progress=False)
    return fxmpq.solve(sensitivity, costs, budget)


def _timed(work: Callable[[], fx.GraphModule]) -> tuple[float, fx.GraphModule]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def _float_pass(model: nn.Module, batches: list[Any]) -> float:
    """CPU seconds of one float pass over the calibration data, the median of three."""

    def run() -> float:
        start = time.process_time()
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch)
        return time.process_time() - start

    run()
    return sorted(run() for _ in range(3))[1]


def _file(subject: str, case: str, seed: int) -> Path:
    return FOLDER / f"{subject}_{case}_{seed}.json"


def _load(subject: str, case: str, seed: int) -> dict[str, list[float]]:
    file = _file(subject, case, seed)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _save(subject: str, case: str, seed: int, label: str, row: list[float]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = {**_load(subject, case, seed), label: row}
    _file(subject, case, seed).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def table(subject: str, console: Console) -> None:
    """Print means over the seeds, with the range of the accuracy in brackets."""
    _, accuracy = logits(SUBJECTS[subject]().model, SUBJECTS[subject]().test)
    cases = SUBJECT_CASES[subject]
    result = Table(title=f"{subject}: float accuracy {accuracy:.2f} %")
    for column in ("step", *(f"{case}: dB, %, passes" for case in cases)):
        result.add_column(column)
    for label, _, _ in (*START, *LADDER, *ALONE):
        cells = []
        for case in cases:
            rows = [_load(subject, case, seed).get(label) for seed in SEEDS]
            cells.append(_cell([row for row in rows if row is not None]))
        result.add_row(label, *cells)
    console.print(result)


def _cell(rows: Sequence[Sequence[float]]) -> str:
    if not rows:
        return ""
    decibels, accuracy, passes = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    low, high = min(row[1] for row in rows), max(row[1] for row in rows)
    return f"{decibels:.2f}, {accuracy:.2f} ({low:.2f} to {high:.2f}), {passes:.1f}"


def main(arguments: Sequence[str]) -> None:
    """Measure what is asked for, and print the tables."""
    torch.set_num_threads(1)
    console = Console(width=180)
    if arguments[:1] == ["measure"]:
        is_ladder = arguments[4:] == ["ladder"]
        measure(arguments[1], arguments[2], int(arguments[3]), alone=not is_ladder)
        return
    for subject in arguments[1:2] or SUBJECTS:
        if not arguments:
            for case in SUBJECT_CASES[subject]:
                for seed in SEEDS:
                    measure(subject, case, seed)
        table(subject, console)


if __name__ == "__main__":
    main(sys.argv[1:])
