"""What the whole search costs on ResNet-18 and on a 6x384 BERT, against a float pass.

One run, one thread, CPU time, medians of three. Random weights, 64 calibration samples,
candidates w2a8, w4a8, w8a8, 4.5 bits on average; SQNR on 64 other samples.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from _models import Batch, random_images, random_tokens, resnet18, small_bert
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxmpq

Result = TypeVar("Result")

CANDIDATES = ["w2a8", "w4a8", "w8a8"]
REPEATS = 3


def timed(work: Callable[..., Result], *args: object) -> tuple[float, Result]:
    """CPU seconds of one call, and what it returned."""
    start = time.process_time()
    result = work(*args)
    return time.process_time() - start, result


def float_pass(model: nn.Module, batches: list[Batch]) -> None:
    """One float forward pass over all samples."""
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def output(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Logits of all samples."""
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in batches])


def sqnr(signal: Tensor, found: Tensor) -> float:
    """Decibels of signal over error power."""
    return float(10 * torch.log10(signal.square().sum() / (found - signal).square().sum()))


def measure_search(
    name: str, model: nn.Module, calibration: list[Batch], held_out: list[Batch], budget: object
) -> list[str]:
    """One row: the search's parts in forward equivalents, and the plan's SQNR."""
    exclude = ["*embeddings*"] if name.startswith("BERT") else []
    graph = fxmpq.trace(model, calibration[0])
    prepared = fxmpq.prepare(graph, "reference", candidates=CANDIDATES, exclude=exclude)
    costs = fxmpq.cost(prepared)
    float_pass(model, calibration[:1])
    ratios: list[tuple[float, ...]] = []
    for _ in range(REPEATS):
        passes, _ = timed(float_pass, model, calibration)
        calibrating, calibrated = timed(fxmpq.calibrate, prepared, calibration)
        measuring, sensitivity = timed(fxmpq.measure, calibrated, calibration)
        solving, plan = timed(fxmpq.solve, sensitivity, costs, budget)
        parts = (calibrating, measuring, solving)
        ratios.append(tuple(part / passes for part in (*parts, sum(parts))))
    medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
    signal, found = output(model, held_out), output(fxmpq.apply(calibrated, plan), held_out)
    centred = sqnr(signal - signal.mean(0), found - found.mean(0))
    return [
        name,
        *(f"{ratio:.2f}" for ratio in medians),
        f"{sqnr(signal, found):.1f}",
        f"{centred:.1f}",
    ]


def peak_memory(what: str) -> float:
    """Megabytes a fresh process peaks at beyond its peak before the work."""
    text = subprocess.run(
        [sys.executable, __file__, what], check=True, capture_output=True, text=True
    ).stdout
    return float(text.split()[-1])


def memory_probe(what: str) -> None:
    """The work of one memory measurement, in a process of its own."""
    torch.set_num_threads(1)
    model, batches = resnet18(), random_images(64, 1)
    if what == "search":
        graph = fxmpq.trace(model, batches[0])
        prepared = fxmpq.prepare(graph, "reference", candidates=CANDIDATES)
    before = high_water_mark()
    if what == "search":
        calibrated = fxmpq.calibrate(prepared, batches)
        fxmpq.measure(calibrated, batches)
    else:
        for batch in batches:
            model(**batch).logits.sum().backward()
    sys.stdout.write(f"{high_water_mark() - before:.0f}\n")


def high_water_mark() -> float:
    """This process's peak memory so far in megabytes.

    Read from Linux's own books: `getrusage` would count the parent's peak in as well.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    table = Table(title="Search cost in float forward passes (CPU time, one thread)")
    for column in ("model", "calibrate", "measure", "solve", "whole", "SQNR dB", "centred dB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    images, others = random_images(64, 1), random_images(64, 2)
    table.add_row(
        *measure_search("ResNet-18, 64 images", resnet18(), images, others, "avg_weight_bits=4.5")
    )
    bert = small_bert()
    sizes = {
        kind: sum(m.weight.numel() for m in bert.modules() if isinstance(m, kind))
        for kind in (nn.Linear, nn.Embedding)
    }
    # 4.5 bits on average over the linear layers; the embeddings stay float.
    budget = {"weight_bits": 4.5 * sizes[nn.Linear] + 32 * sizes[nn.Embedding]}
    tokens, other_tokens = random_tokens(64, 1), random_tokens(64, 2)
    name = "BERT 6x384, 64 x 128 tokens"
    table.add_row(*measure_search(name, bert, tokens, other_tokens, budget))
    console = Console(width=120)
    console.print(table)
    search, gradients = peak_memory("search"), peak_memory("gradients")
    console.print(
        f"Peak memory on ResNet-18: search {search:.0f} MB, a pass with gradients "
        f"{gradients:.0f} MB, ratio {search / gradients:.2f}"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        memory_probe(sys.argv[1])
    else:
        main()
