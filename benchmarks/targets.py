"""How fast converted plans run: fxmpq's against the runtime's own quantization, and float.

For each runtime, model and batch size, all contestants run in turn, in rounds, on one thread, and
medians of CPU time are compared. Ratios mean something on a shared machine, milliseconds do not.
NNCF and torchao quantize in environments of their own, which are made the first time; what they
write is run beside fxmpq's in the same process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _models import minilm_reviews, random_images, resnet18, resnet50
from _peers import Batch
from _runtimes import DEFAULT, RUNTIMES, Run, Runtime, Subject
from rich.console import Console
from rich.table import Table
from torch import fx, nn

import fxmpq
from fxmpq.graph.products import PRODUCT
from fxmpq.graph.state import state_of
from fxmpq.report.compare import float_graph
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.registry import TARGETS
from fxmpq.targets.target import Converted

FLOAT, INT8, MIXED = "float", "fxmpq w8a8", "fxmpq mixed"
PRODUCTS = "fxmpq w8a8, products"
OURS = (INT8, PRODUCTS, MIXED)
_WARM_UP = 3


@dataclass(frozen=True)
class Contestant:
    """What is timed.

    Args:
        run: Takes a batch.
        size: Bytes of its main file, where one is written.
        predicted: Bytes that the cost model predicts for the weights, where it does.
        agreement_db: SQNR against the simulation, of the outputs and of the layer that agrees
            least on the inputs it got, where there is one.
    """

    run: Run
    size: int | None = None
    predicted: float | None = None
    agreement_db: tuple[float, float] | None = None


def with_norm_statistics(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Give a network with random weights the batch statistics of its data."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return model.eval()


def subjects(size: int, samples: int) -> dict[str, Callable[[], Subject]]:
    """The models, made when they are called for."""

    def images() -> list[Batch]:
        return random_images(samples, seed=1, size=size, batch=8)

    def residual(make: Callable[[], nn.Module]) -> Subject:
        return Subject(with_norm_statistics(make(), images()), images())

    def transformer() -> Subject:
        model, sentences, _ = minilm_reviews()
        return Subject(model, sentences[: max(samples // 16, 1)], is_transformer=True)

    return {
        "ResNet-18": lambda: residual(resnet18),
        "ResNet-50": lambda: residual(resnet50),
        "MiniLM-L6": transformer,
    }


def contestants(
    name: str, runtime: Runtime, subject: Subject, budget: str, folder: Path, *, kernels: bool
) -> dict[str, Contestant]:
    """Quantize a model in every way."""
    batches = subject.calibration
    graph = fxmpq.trace(subject.model, batches[0])
    prepared = fxmpq.prepare(graph, name, candidates=_candidates(name))
    calibrated = fxmpq.calibrate(prepared, batches, progress=False)
    costs = fxmpq.cost(calibrated)
    in_float = fxmpq.convert(float_graph(calibrated), output=folder / "float", verify=batches[:1])
    found = {FLOAT: Contestant(runtime.run(in_float), _size(in_float))}
    planned = {INT8: fxmpq.apply(calibrated, costs.uniform("w8a8"))}
    sensitivity = fxmpq.measure(calibrated, batches, progress=False)
    try:
        planned[MIXED] = fxmpq.apply(calibrated, fxmpq.solve(sensitivity, costs, budget))
    except fxmpq.InfeasibleBudgetError:
        print(f"{name} has no plan of {budget} for this model")
    if subject.is_transformer and PRODUCT in TARGETS[name].rules.operators:
        planned[PRODUCTS] = _with_products(name, subject)
    for title, simulated in planned.items():
        made = fxmpq.convert(simulated, output=folder / title, verify=batches[:2])
        layers = [entry.sqnr_db for entry in layer_agreements(simulated, made, batches[0])]
        agreement = (made.sqnr_db, min(layers, default=float("nan")))
        predicted = fxmpq.cost(simulated).total("weights", state_of(simulated).choices)
        found[title] = Contestant(runtime.run(made), _size(made), predicted, agreement)
        if kernels:
            print(f"{name}, {title}: {runtime.kernels(made)}")
    own = runtime.own(subject, in_float, folder)
    return found | {title: Contestant(run) for title, run in own.items()}


def _candidates(name: str) -> list[str]:
    """Weights of few bits that a target runs on 8-bit activations."""
    rules = TARGETS[name].rules.operators.values()
    return [
        candidate
        for candidate in ("w2a8", "w4a8", "w8a8")
        if any(rule.runs(fxmpq.Precision.parse(candidate)) for rule in rules)
    ]


def _with_products(name: str, subject: Subject) -> fx.GraphModule:
    """The uniform plan with the products of attention in 8 bits too."""
    batches = subject.calibration
    graph = fxmpq.trace(subject.model, batches[0])
    prepared = fxmpq.prepare(graph, name, candidates=["w8a8"], products=True)
    calibrated = fxmpq.calibrate(prepared, batches, progress=False)
    return fxmpq.apply(calibrated, fxmpq.cost(calibrated).uniform("w8a8"))


def _size(made: Converted) -> int | None:
    """Bytes of the weights' file: of two, the larger."""
    return max((file.stat().st_size for file in made.files), default=None)


def inputs_of(subject: Subject, samples: int, length: int) -> Batch:
    """One batch of this many samples; token sequences are drawn at this length."""
    example = subject.calibration[0]
    if not subject.is_transformer:
        images = torch.cat([batch["pixel_values"] for batch in subject.calibration])
        return {"pixel_values": images[:samples]}
    ids = torch.randint(0, 30_000, (samples, length), generator=torch.Generator().manual_seed(0))
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: full.get(name, torch.zeros_like(ids)) for name in example}


def medians(found: Mapping[str, Contestant], batch: Batch, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each contestant, run in turn.

    Args:
        found: By name.
        batch: One batch.
        rounds: Runs of each that are counted; a few before them are not.
    """
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + _WARM_UP):
        for name, contestant in found.items():
            start = time.process_time()
            contestant.run(batch)
            if number >= _WARM_UP:
                times[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(taken) for name, taken in times.items()}


def rows_of(
    found: Mapping[str, Contestant], times: Mapping[str, float]
) -> Iterator[tuple[str, ...]]:
    """The cells of each contestant: time, ratios, size and agreement."""
    own = [times[name] for name in found if name not in (FLOAT, DEFAULT, *OURS)]
    for name, entry in found.items():
        output, layer = entry.agreement_db or (None, None)
        over = "" if not (entry.size and entry.predicted) else entry.size / entry.predicted - 1
        yield (
            name,
            f"{times[name]:.2f}",
            f"{times[FLOAT] / times[name]:.2f}",
            f"{min(own) / times[name]:.2f}" if own else "",
            "" if entry.size is None else f"{entry.size / 1e6:.2f}",
            "" if isinstance(over, str) else f"{100 * over:+.1f} %",
            "" if output is None else f"{output:.1f} ({layer:.1f})",
        )


def options() -> argparse.Namespace:
    """What to run, smaller on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--models", nargs="+", default=["ResNet-18", "ResNet-50", "MiniLM-L6"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--samples", type=int, default=32, help="for ranges and sensitivities")
    parser.add_argument("--budget", default="weights=15%")
    parser.add_argument("--kernels", action="store_true", help="list what the runtime executes")
    return parser.parse_args()


def main() -> None:
    """Measure and print a table a runtime."""
    torch.set_num_threads(1)
    wanted = options()
    console = Console(width=140)
    makers = subjects(wanted.size, wanted.samples)
    headings = (
        "model",
        "batch",
        "contestant",
        "ms",
        "x float",
        "x own",
        "MB",
        "over plan",
        "dB (layer)",
    )
    for name in wanted.runtimes:
        table = Table(title=f"{name}, one thread: CPU time, median of interleaved runs")
        for heading in headings:
            is_text = heading in ("model", "contestant")
            table.add_column(heading, justify="left" if is_text else "right")
        for model in wanted.models:
            subject = makers[model]()
            with tempfile.TemporaryDirectory() as folder:
                found = contestants(
                    name,
                    RUNTIMES[name],
                    subject,
                    wanted.budget,
                    Path(folder),
                    kernels=wanted.kernels,
                )
                for batch in wanted.batches:
                    inputs = inputs_of(subject, batch, wanted.length)
                    times = medians(found, inputs, wanted.rounds)
                    for cells in rows_of(found, times):
                        table.add_row(model, str(batch), *cells)
        console.print(table)


if __name__ == "__main__":
    main()
