"""A small decoder with block-wise weight formats: perplexity in the simulation and on a runtime.

A Llama-shaped model of 3.7 million parameters, trained on the sources of Python's standard library
(`_decoder.py`), with weights in 2 to 8 bits, per channel and in blocks, and activations in float.
Perplexity is that of 128 held-out sequences of 256 tokens. A seed draws 32 calibration sequences
from the training texts.

Results are kept in the cache folder, row by row: `decoder.py measure SEED` measures what is missing
of one seed, `decoder.py table` prints what is there, and `decoder.py` alone does everything.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import onnx
import torch
from _decoder import FOLDER, decoder, sequences, sources, unigram_perplexity
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx
from torch.nn import functional

import fxmpq
from fxmpq.targets.target import Converted

SEEDS = (0, 1, 2)
TESTED, CALIBRATION, BATCH = 128, 32, 8
FORMATS = ("w4b32", "w3b32", "w4b128", "w4", "w2b32", "w8")
WIDTHS = ("w2b32", "w3b32", "w4b32", "w8b32")
BUDGETS = ("avg_weight_bits=4", "avg_weight_bits=3")
RUNTIME = ("w4b32", "w4b128", "w4", "w8")
RUNTIME_WIDTHS = ("w2b32", "w4b32", "w8b32")

Run = Callable[[Mapping[str, Tensor]], Tensor]
"""Takes a batch and returns logits."""


@cache
def test_ids() -> Tensor:
    """Held-out token ids, spread evenly over the held-out texts."""
    ids = sequences(sources()[1])
    return ids[torch.linspace(0, len(ids) - 1, TESTED).long()]


@cache
def train_ids() -> Tensor:
    """Training token ids."""
    return sequences(sources()[0])


def calibration(seed: int) -> list[dict[str, Tensor]]:
    """The calibration batches of a seed."""
    order = torch.randperm(len(train_ids()), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in train_ids()[order[:CALIBRATION]].split(BATCH)]


def perplexity(run: Run) -> float:
    """`exp` of the mean negative log-likelihood of each token after the first of its sequence."""
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for ids in test_ids().split(BATCH):
            logits = run({"input_ids": ids})[:, :-1].flatten(0, 1)
            found = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
            loss, tokens = loss + float(found), tokens + ids[:, 1:].numel()
    return math.exp(loss / tokens)


def simulated(graph: fx.GraphModule) -> float:
    """Perplexity of a planned graph."""
    return perplexity(lambda batch: graph(**batch).logits)


def converted(graph: fx.GraphModule) -> dict[str, float]:
    """What ONNX Runtime makes of a planned graph, or of a float one."""
    with tempfile.TemporaryDirectory() as folder:
        made: Converted = fxmpq.convert(graph, output=folder)
        size = made.files[0].stat().st_size
        model = onnx.load(made.files[0])
    stored = sum(len(entry.raw_data) for entry in model.graph.initializer)
    kernels = sorted({row.kernel for row in made.layers if not row.kernel.startswith("float")})
    start = time.process_time()
    found = perplexity(lambda batch: made.run(batch)[0])
    return {
        "runtime": found,
        "runtime seconds": time.process_time() - start,
        "agreement": min(made.sqnr_db, 999.0),
        "file": size,
        "tensors": stored,
        "kernels": kernels,
    }


def measure(seed: int) -> None:
    """Measure what is missing of a seed."""
    batches = calibration(seed)
    traced = fxmpq.trace(decoder(), batches[0])
    _keep(seed, "float", lambda: {"simulated": simulated(traced), "weights": _float_bytes(traced)})
    _mixed(seed, traced, batches, "reference", WIDTHS, BUDGETS[0])
    for name in FORMATS:
        _uniform(seed, traced, batches, name)
    if seed == SEEDS[0]:
        _mixed(seed, traced, batches, "onnxruntime", RUNTIME_WIDTHS, BUDGETS[0])
        for name in RUNTIME:
            _runtime_uniform(seed, traced, batches, name)
        _keep(seed, "float, onnxruntime", lambda: converted(_float_plan(traced, batches)))
    _mixed(seed, traced, batches, "reference", WIDTHS, BUDGETS[1])


def _uniform(
    seed: int, traced: fx.GraphModule, batches: list[dict[str, Tensor]], name: str
) -> None:
    prepared = fxmpq.prepare(traced, "reference", candidates=[name])
    costs = fxmpq.cost(prepared)
    plan = costs.uniform(name)
    weights = costs.total("weights", plan)

    def planned(*, bias_correction: bool) -> fx.GraphModule:
        ready = fxmpq.calibrate(prepared, batches, bias_correction=bias_correction, progress=False)
        return fxmpq.apply(ready, plan)

    def nearest(*, bias_correction: bool) -> dict[str, float]:
        graph = planned(bias_correction=bias_correction)
        return {"simulated": simulated(graph), "weights": weights}

    def refined() -> dict[str, float]:
        start = time.process_time()
        graph = planned(bias_correction=False)
        graph = fxmpq.refine(graph, None, batches, method="light", progress=False)
        seconds = time.process_time() - start
        return {"simulated": simulated(graph), "weights": weights, "seconds": seconds}

    if seed == SEEDS[0]:
        _keep(seed, f"{name}, nearest", lambda: nearest(bias_correction=False))
    if seed == SEEDS[0] and name == "w4b32":
        _keep(seed, f"{name}, bias correction", lambda: nearest(bias_correction=True))
    _keep(seed, f"{name}, light", refined)


def _mixed(
    seed: int,
    traced: fx.GraphModule,
    batches: list[dict[str, Tensor]],
    target: str,
    widths: Sequence[str],
    budget: str,
) -> None:
    label = f"{budget}, {target}, light"

    def found() -> dict[str, object]:
        start = time.process_time()
        prepared = fxmpq.prepare(traced, target, candidates=widths)
        ready = fxmpq.calibrate(prepared, batches, bias_correction=False, progress=False)
        sensitivity = fxmpq.measure(ready, batches, progress=False)
        costs = fxmpq.cost(prepared)
        plan = fxmpq.solve(sensitivity, costs, budget)
        plain = simulated(fxmpq.apply(ready, plan))
        graph = fxmpq.refine(ready, plan, batches, method="light", progress=False)
        row: dict[str, object] = {
            "seconds": time.process_time() - start,
            "nearest": plain,
            "simulated": simulated(graph),
            "weights": costs.total("weights", plan.choices),
            "plan": dict(plan.choices),
        }
        return row | (converted(graph) if target == "onnxruntime" else {})

    _keep(seed, label, found)


def _runtime_uniform(
    seed: int, traced: fx.GraphModule, batches: list[dict[str, Tensor]], name: str
) -> None:
    def found() -> dict[str, object]:
        prepared = fxmpq.prepare(traced, "onnxruntime", candidates=[name])
        ready = fxmpq.calibrate(prepared, batches, bias_correction=False, progress=False)
        costs = fxmpq.cost(prepared)
        graph = fxmpq.refine(ready, costs.uniform(name), batches, method="light", progress=False)
        row = {
            "simulated": simulated(graph),
            "weights": costs.total("weights", costs.uniform(name)),
        }
        return row | converted(graph)

    _keep(seed, f"{name}, onnxruntime, light", found)


def _float_plan(traced: fx.GraphModule, batches: list[dict[str, Tensor]]) -> fx.GraphModule:
    prepared = fxmpq.prepare(traced, "onnxruntime", candidates=["w8"], exclude=["*"])
    ready = fxmpq.calibrate(prepared, batches[:1], progress=False)
    return fxmpq.apply(ready, fxmpq.cost(prepared).uniform("fp32"))


def _float_bytes(traced: fx.GraphModule) -> int:
    prepared = fxmpq.prepare(traced, "reference", candidates=["w8"])
    return fxmpq.cost(prepared).float_total["weights"]


def _file(seed: int) -> Path:
    return FOLDER / f"rows_{seed}.json"


def _load(seed: int) -> dict[str, dict[str, object]]:
    file = _file(seed)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _keep(seed: int, label: str, work: Callable[[], Mapping[str, object]]) -> None:
    rows = _load(seed)
    if label in rows:
        return
    row = dict(work())
    print(f"{seed}: {label}: {row}", flush=True)
    _file(seed).write_text(json.dumps({**rows, label: row}, indent=1), encoding="utf-8")


def table(console: Console) -> None:
    """Print means over the seeds, with the range of the perplexity in brackets."""
    rows = [_load(seed) for seed in SEEDS]
    unigram = unigram_perplexity(train_ids(), test_ids())
    result = Table(title=f"Perplexity on held-out sources (unigrams: {unigram:.0f})")
    for column in ("weights", "kB", "simulated", "ONNX Runtime", "file, kB", "agreement, dB"):
        result.add_column(column)
    labels = dict.fromkeys(label for row in rows for label in row)
    for label in labels:
        found = [row[label] for row in rows if label in row]
        result.add_row(
            label,
            _mean(found, "weights", 1e-3),
            _mean(found, "simulated"),
            _mean(found, "runtime"),
            _mean(found, "file", 1e-3),
            _mean(found, "agreement"),
        )
    console.print(result)


def _mean(rows: Sequence[Mapping[str, object]], key: str, unit: float = 1.0) -> str:
    values = [float(row[key]) * unit for row in rows if key in row]  # type: ignore[arg-type]
    if not values:
        return ""
    mean, low, high = sum(values) / len(values), min(values), max(values)
    spread = f" ({low:.2f} to {high:.2f})" if high - low >= 0.01 else ""
    return f"{mean:.2f}{spread}"


def main(arguments: Sequence[str]) -> None:
    """Measure what is asked for, and print the table."""
    torch.set_num_threads(1)
    if arguments[:1] == ["measure"]:
        measure(int(arguments[1]))
        return
    if not arguments:
        for seed in SEEDS:
            measure(seed)
    table(Console(width=140))


if __name__ == "__main__":
    main(sys.argv[1:])
