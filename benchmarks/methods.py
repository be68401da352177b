"""Every sensitivity method on trained models: plan quality against search time.

ResNet-20 on Fashion-MNIST and MiniLM-L6 (BERT architecture) on movie-review sentences; weight
budgets with weights of {2, 3, 4, 6, 8} bits and 8-bit activations, and a budget on bit operations
with {2, 4, 8}-bit weights and {4, 8}-bit activations. Measured: search time in float passes over
the calibration data, Kendall's tau to the exact sweep over all (group, precision), and output SQNR
and accuracy of every plan on test data.

Measurements are kept in the cache folder, so that methods can be run one at a time
(`methods.py measure resnet20 hessian`, with a case behind it for that one alone) and the table
printed from what is there (`methods.py table`, `methods.py table resnet20 bops`). `methods.py`
alone does everything.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _models import CACHE, minilm_calibration_labels, minilm_reviews
from agreement import logits, sqnr, tau
from rich.console import Console
from rich.table import Table
from torch import fx, nn

import fxmpq
from fxmpq.recipes.fashion_mnist import embedded_subset
from fxmpq.recipes.models.resnet20 import pretrained
from fxmpq.training.loss import classification_loss

FOLDER = CACHE / "methods"
WEIGHTS = ("weights=9%", "weights=12.5%", "weights=16%")
CASES: Mapping[str, tuple[list[str], tuple[str, ...]]] = {
    "weights": (["w2a8", "w3a8", "w4a8", "w6a8", "w8a8"], WEIGHTS),
    "bops": (["w2a4", "w4a4", "w8a4", "w2a8", "w4a8", "w8a8"], ("bops=3%",)),
    "two widths": (["w2a8", "w4a8"], ("weights=9%",)),
}


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Args:
        method: Of `fxmpq.measure`.
        options: Of the method.
        programs: Forms of the program to solve with.
        share: Which part of the calibration data it gets.
        cases: Cases it runs in.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    programs: tuple[str, ...] = ("ilp",)
    share: float = 1.0
    cases: tuple[str, ...] = ("weights", "bops")


ENTRIES: Mapping[str, Entry] = {
    "projected": Entry("projected", programs=("ilp", "quadratic")),
    "projected, probes=4": Entry("projected", {"probes": 4}, programs=("ilp", "quadratic")),
    "sqnr": Entry("sqnr", programs=("ilp", "greedy"), cases=("weights", "bops", "two widths")),
    "sqnr, score=kl": Entry("sqnr", {"score": "kl"}, cases=("weights",)),
    "layer_loss": Entry("layer_loss"),
    "layer_loss, labels": Entry("layer_loss", {"score": classification_loss}, cases=("weights",)),
    "hessian": Entry("hessian", {"loss": classification_loss}, share=0.125),
    "orthogonality": Entry("orthogonality", programs=("ilp", "lp")),
    "entropy": Entry("entropy"),
    "entropy, two widths": Entry(
        "entropy", {"gain": "entropy"}, programs=("knapsack",), cases=("two widths",)
    ),
    "learned_scales": Entry("learned_scales", {"loss": classification_loss}),
    "finetune": Entry("finetune", {"loss": classification_loss}),
    "finetune, two widths": Entry(
        "finetune", {"loss": classification_loss}, programs=("knapsack",), cases=("two widths",)
    ),
    "pairwise": Entry("pairwise", programs=("ilp", "quadratic"), share=0.125),
}


@dataclass(frozen=True)
class Subject:
    """A trained model with its data.

    Args:
        model: In eval mode.
        inputs: Calibration batches.
        labelled: The same as `(inputs, labels)`.
        test: Test batches with labels.
    """

    model: nn.Module
    inputs: list[Any]
    labelled: list[Any]
    test: list[Any]


def _resnet20() -> Subject:
    data = embedded_subset()
    inputs = list(data.calibration_images[:512].split(32))
    labels = list(data.calibration_labels[:512].split(32))
    test = list(zip(data.test_images.split(250), data.test_labels.split(250), strict=True))
    return Subject(pretrained(), inputs, list(zip(inputs, labels, strict=True)), test)


def _minilm() -> Subject:
    model, sentences, test = minilm_reviews()
    labelled = list(zip(sentences, minilm_calibration_labels(), strict=True))[:8]
    return Subject(model, sentences[:8], labelled, test)


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "resnet20": cache(_resnet20),
    "minilm": cache(_minilm),
}


@cache
def calibrated(subject: str, case: str) -> fx.GraphModule:
    """A calibrated graph with the case's candidates."""
    found = SUBJECTS[subject]()
    graph = fxmpq.trace(found.model, found.inputs[0])
    prepared = fxmpq.prepare(graph, "reference", candidates=CASES[case][0])
    return fxmpq.calibrate(prepared, found.inputs)


# Of the plans of one table that were simulated already, by their choices.
_QUALITIES: dict[tuple[str, ...], tuple[float, float]] = {}


def float_pass(subject: str) -> float:
    """CPU seconds of one float pass over the calibration data, the median of three."""
    found = SUBJECTS[subject]()

    def run() -> float:
        start = time.process_time()
        with torch.no_grad():
            for batch in found.inputs:
                found.model(**batch) if isinstance(batch, dict) else found.model(batch)
        return time.process_time() - start

    run()
    return sorted(run() for _ in range(3))[1]


def measure(subject: str, name: str, cases: Sequence[str] = ()) -> None:
    """Measure one row in all its cases, and keep the results with their cost in float passes."""
    entry, found = ENTRIES[name], SUBJECTS[subject]()
    labels = {"loss", "score"} & {k for k, v in entry.options.items() if callable(v)}
    data = found.labelled if labels else found.inputs
    part = data[: max(1, round(entry.share * len(data)))]
    for case in cases or entry.cases:
        graph = calibrated(subject, case)
        unit = float_pass(subject)
        start = time.process_time()
        sensitivity = fxmpq.measure(graph, part, method=entry.method, **entry.options)
        passes = (time.process_time() - start) / unit
        FOLDER.mkdir(parents=True, exist_ok=True)
        text = {"passes": passes, "sensitivity": sensitivity.to_json()}
        _file(subject, case, name).write_text(json.dumps(text), encoding="utf-8")
        print(f"{subject}, {case}: {name} took {passes:.1f} float passes", flush=True)


def table(subject: str, case: str, console: Console) -> None:
    """Solve, simulate and print the table of one model and case from what has been measured."""
    exact = _load(subject, case, "sqnr")[1]
    _QUALITIES.clear()
    graph, found = calibrated(subject, case), SUBJECTS[subject]()
    costs = fxmpq.cost(graph)
    signal, accuracy = logits(found.model, found.test)
    budgets = CASES[case][1]
    result = Table(title=f"{subject}, {case}: float accuracy {accuracy:.2f} %")
    for column in ("method", "program", "passes", "tau", *(f"{b}: dB, %" for b in budgets)):
        result.add_column(column)
    for name, entry in ENTRIES.items():
        if case not in entry.cases or not _file(subject, case, name).exists():
            continue
        passes, sensitivity = _load(subject, case, name)
        for program in entry.programs:
            start = time.process_time()
            cells = [
                _quality(graph, costs, sensitivity, budget, program, signal, found.test)
                for budget in budgets
            ]
            console.log(f"{name}, {program}: {cells}, {time.process_time() - start:.1f} s")
            agreement = f"{tau(sensitivity, exact):.3f}"
            result.add_row(name, program, f"{passes:.1f}", agreement, *cells)
    for precision in CASES[case][0]:
        choices = costs.uniform(precision)
        metric = budgets[0].partition("=")[0]
        share = 100 * costs.total(metric, choices) / costs.float_total[metric]
        planned, score = logits(fxmpq.apply(graph, choices), found.test)
        result.add_row(
            f"uniform {precision}",
            f"{share:.2f} %",
            "",
            "",
            f"{sqnr(signal, planned):.2f}, {score:.2f}",
        )
    console.print(result)


def _quality(
    graph: fx.GraphModule,
    costs: fxmpq.CostTable,
    sensitivity: fxmpq.Sensitivity,
    budget: str,
    program: str,
    signal: torch.Tensor,
    test: Sequence[Any],
) -> str:
    plan = fxmpq.solve(sensitivity, costs, budget, program=program)
    key = tuple(plan.choices.values())
    if key not in _QUALITIES:
        found, accuracy = logits(fxmpq.apply(graph, plan), test)
        _QUALITIES[key] = sqnr(signal, found), accuracy
    decibels, accuracy = _QUALITIES[key]
    proven = (
        "" if plan.status == "optimal" or program in ("greedy", "lp") else f" (gap {plan.gap:.1%})"
    )
    return f"{decibels:.2f}, {accuracy:.2f}{proven}"


def _file(subject: str, case: str, name: str) -> Path:
    words = f"{subject} {case} {name}".replace(",", "").replace("=", " ")
    return FOLDER / f"{'_'.join(words.split())}.json"


def _load(subject: str, case: str, name: str) -> tuple[float, fxmpq.Sensitivity]:
    found = json.loads(_file(subject, case, name).read_text(encoding="utf-8"))
    return float(found["passes"]), fxmpq.Sensitivity.from_json(str(found["sensitivity"]))


def main(arguments: Sequence[str]) -> None:
    """Measure what is asked for, and print the tables."""
    torch.set_num_threads(1)
    console = Console(width=160)
    if arguments[:1] == ["measure"]:
        measure(arguments[1], arguments[2], arguments[3:])
        return
    for subject in arguments[1:2] or SUBJECTS:
        if not arguments:
            for name in ENTRIES:
                measure(subject, name)
        for case in arguments[2:] or CASES:
            table(subject, case, console)


if __name__ == "__main__":
    main(sys.argv[1:])
