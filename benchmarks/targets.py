"""How fast converted plans run: fxmpq's against the runtime's own quantization, and float.

For each model and batch size, every contestant is a file in the same runtime, on one thread; they
run in turn, in rounds, and medians of CPU time are compared. Ratios mean something on a shared
machine, milliseconds do not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from _models import minilm_reviews, random_images, resnet18, resnet50
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxmpq
from fxmpq.report.compare import float_graph
from fxmpq.targets.divergence import layer_agreements

Batch = dict[str, Tensor]
Feed = dict[str, NDArray[np.generic]]

FLOAT = "float"
FXMPQ_INT8, FXMPQ_MIXED = "fxmpq w8a8", "fxmpq mixed"
OWN_STATIC, OWN_DYNAMIC = "quantize_static", "quantize_dynamic"


@dataclass(frozen=True)
class Subject:
    """A model to run.

    Args:
        model: In eval mode.
        calibration: Batches for ranges and sensitivities.
        is_transformer: Whether the runtime's own route is dynamic quantization as well.
    """

    model: nn.Module
    calibration: list[Batch]
    is_transformer: bool = False


@dataclass(frozen=True)
class Contestant:
    """A file to run.

    Args:
        file: What the runtime loads.
        agreement_db: SQNR against the simulation, of the outputs and of the layer that agrees
            least on the inputs it got, where there is one.
        predicted: Bytes that the cost model predicts for the weights, where it does.
    """

    file: Path
    agreement_db: tuple[float, float] | None = None
    predicted: float | None = None


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


class Reader(CalibrationDataReader):  # type: ignore[misc]  # the runtime comes without types
    """Feeds the runtime's own calibration, a sample at a time."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._feeds = iter([feed_of(batch) for batch in batches])

    def get_next(self) -> Feed | None:
        """The next batch, `None` after the last."""
        return next(self._feeds, None)


def feed_of(batch: Batch) -> Feed:
    """A batch as the runtime takes it."""
    return {name: tensor.numpy() for name, tensor in batch.items()}


def contestants(subject: Subject, budget: str, folder: Path) -> dict[str, Contestant]:
    """Quantize a model in every way; returns the files."""
    batches = subject.calibration
    graph = fxmpq.trace(subject.model, batches[0])
    calibrated = fxmpq.calibrate(fxmpq.prepare(graph, "onnxruntime"), batches, progress=False)
    costs = fxmpq.cost(calibrated)
    sensitivity = fxmpq.measure(calibrated, batches, progress=False)
    plan = fxmpq.solve(sensitivity, costs, budget)
    made = fxmpq.convert(float_graph(calibrated), output=folder / "float", verify=batches[:1])
    found = {FLOAT: Contestant(made.files[0])}
    plans = {FXMPQ_INT8: costs.uniform("w8a8"), FXMPQ_MIXED: dict(plan.choices)}
    for name, choices in plans.items():
        planned = fxmpq.apply(calibrated, choices)
        made = fxmpq.convert(planned, output=folder / name, verify=batches[:2])
        layers = [entry.sqnr_db for entry in layer_agreements(planned, made, batches[0])]
        agreement = (made.sqnr_db, min(layers))
        found[name] = Contestant(made.files[0], agreement, costs.total("weights", choices))
    return found | own_routes(found[FLOAT].file, subject, folder)


def own_routes(file: Path, subject: Subject, folder: Path) -> dict[str, Contestant]:
    """The runtime's own quantization of the float file, as its documentation recommends it."""
    prepared = folder / "prepared.onnx"
    quant_pre_process(file, prepared, skip_symbolic_shape=subject.is_transformer)
    static, dynamic = folder / "static.onnx", folder / "dynamic.onnx"
    quantize_static(
        prepared,
        static,
        Reader(subject.calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    found = {OWN_STATIC: Contestant(static)}
    if subject.is_transformer:
        # Its shape inference does not take what the preparation makes of this model.
        quantize_dynamic(file, dynamic, per_channel=True, weight_type=QuantType.QInt8)
        found[OWN_DYNAMIC] = Contestant(dynamic)
    return found


def session_of(file: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """Load a file with one thread, and write the graph that is executed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def inputs_of(subject: Subject, samples: int, length: int) -> Feed:
    """One batch of this many samples; token sequences are drawn at this length."""
    example = subject.calibration[0]
    if not subject.is_transformer:
        images = torch.cat([batch["pixel_values"] for batch in subject.calibration])
        return {"pixel_values": images[:samples].numpy()}
    ids = torch.randint(0, 30_000, (samples, length), generator=torch.Generator().manual_seed(0))
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return feed_of({name: full.get(name, torch.zeros_like(ids)) for name in example})


def medians(
    sessions: Mapping[str, onnxruntime.InferenceSession], feed: Feed, rounds: int
) -> dict[str, float]:
    """Median CPU milliseconds of each contestant, run in turn.

    Args:
        sessions: By contestant.
        feed: One batch.
        rounds: Runs of each; the first two are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(rounds + 2):
        for name, session in sessions.items():
            wanted = {entry.name for entry in session.get_inputs()}
            given = {key: value for key, value in feed.items() if key in wanted}
            start = time.process_time()
            session.run(None, given)
            if number >= 2:
                times[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(found) for name, found in times.items()}


def rows_of(
    found: Mapping[str, Contestant], times: Mapping[str, float]
) -> Iterator[tuple[str, ...]]:
    """The cells of each contestant: time, ratios, size and agreement."""
    own = min(times[name] for name in (OWN_STATIC, OWN_DYNAMIC) if name in times)
    for name, entry in found.items():
        size = entry.file.stat().st_size
        over = "" if entry.predicted is None else f"{100 * (size / entry.predicted - 1):+.1f} %"
        output, layer = entry.agreement_db or (None, None)
        agreement = "" if output is None else f"{output:.1f} ({layer:.1f})"
        yield (
            name,
            f"{times[name]:.2f}",
            f"{times[FLOAT] / times[name]:.2f}",
            f"{own / times[name]:.2f}",
            f"{size / 1e6:.2f}",
            over,
            agreement,
        )


def kernels_of(file: Path, folder: Path) -> str:
    """What the runtime executes for a file, the most frequent first."""
    optimized = folder / "executed.onnx"
    session_of(file, optimized)
    counts = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def options() -> argparse.Namespace:
    """What to run, smaller on request."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    """Measure and print the table."""
    torch.set_num_threads(1)
    wanted = options()
    table = Table(title="ONNX Runtime, one thread: CPU time, median of interleaved runs")
    headings = ("model", "batch", "file", "ms", "x float", "x own", "MB", "over plan", "dB (layer)")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("model", "file") else "right")
    console = Console(width=140)
    makers = subjects(wanted.size, wanted.samples)
    for model in wanted.models:
        subject = makers[model]()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = contestants(subject, wanted.budget, folder)
            if wanted.kernels:
                for contestant, entry in found.items():
                    console.print(f"{model}, {contestant}: {kernels_of(entry.file, folder)}")
            sessions = {contestant: session_of(entry.file) for contestant, entry in found.items()}
            for batch in wanted.batches:
                feed = inputs_of(subject, batch, wanted.length)
                times = medians(sessions, feed, wanted.rounds)
                for cells in rows_of(found, times):
                    table.add_row(model, str(batch), *cells)
    console.print(table)


if __name__ == "__main__":
    main()
