"""Layers and models on torch's kernels for codes, by target `cuda`, against float and bfloat16.

On a GPU, times are those of CUDA events and the target's kernels are NVIDIA's; without one, they
are CPU times of one thread, and the kernels are torch's for CPUs (fp8 is emulated there).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from _models import minilm_reviews, resnet18
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxmpq
from fxmpq.recipes.fashion_mnist import embedded_subset
from fxmpq.recipes.models.resnet20 import pretrained
from fxmpq.targets.divergence import layer_agreements

Run = Callable[[], object]

SHAPES = ((1, 768, 3072), (128, 768, 3072), (4096, 4096, 4096), (8192, 4096, 14336))
PRECISIONS = ("w8a8", "we4m3ae4m3", "w4b128")


@dataclass(frozen=True)
class Subject:
    """A model, how it is called, and what its ranges are found on.

    Args:
        model: In eval mode.
        calibration: Batches.
        timed: The batch that is timed.
    """

    model: nn.Module
    calibration: Sequence[object]
    timed: object


def times_of(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, run in turn; the first three rounds are not counted.

    Args:
        runs: What to time, by name.
        device: Where it runs: a GPU's times lie between two events in its own stream.
        rounds: How often each is timed.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 3):
        for name, run in runs.items():
            elapsed = gpu_milliseconds(run) if device.type == "cuda" else cpu_milliseconds(run)
            if number >= 3:
                found[name].append(elapsed)
    return {name: statistics.median(entries) for name, entries in found.items()}


def gpu_milliseconds(run: Run) -> float:
    """Time between two events around a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def cpu_milliseconds(run: Run) -> float:
    """CPU time of a call."""
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start)


def call(model: nn.Module, batch: object) -> object:
    """A model's outputs for one batch, however it takes it."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def placed(batch: object, device: torch.device) -> object:
    """A batch on a device."""
    if isinstance(batch, dict):
        return {name: tensor.to(device) for name, tensor in batch.items()}
    assert isinstance(batch, Tensor)
    return batch.to(device)


def converted(
    subject: Subject, precision: str, target: str, device: torch.device
) -> tuple[nn.Module, str, str]:
    """Quantize a model; returns what runs, its agreement in dB, and which kernels it has."""
    graph = fxmpq.trace(subject.model, subject.calibration[0])
    prepared = fxmpq.prepare(graph, target, candidates=[precision]).to(device)
    calibrated = fxmpq.calibrate(prepared, subject.calibration, progress=False)
    planned = fxmpq.apply(calibrated, fxmpq.cost(calibrated).uniform(precision))
    made = fxmpq.convert(planned, verify=subject.calibration[:1])
    worst = min(entry.sqnr_db for entry in layer_agreements(planned, made, subject.calibration[0]))
    kernels = Counter(row.kernel.partition(",")[0] for row in made.layers)
    text = ", ".join(f"{count} {name}" for name, count in kernels.most_common())
    assert isinstance(made.module, nn.Module)
    return made.module, f"{made.sqnr_db:.1f} ({worst:.1f})", text


def compiled(module: nn.Module, *, is_wanted: bool) -> nn.Module:
    """A module as `torch.compile` makes it, which fuses what lies around the products."""
    if not is_wanted:
        return module
    found = torch.compile(module)
    assert isinstance(found, nn.Module)
    return found


def rows_of(
    subject: Subject, target: str, device: torch.device, wanted: argparse.Namespace
) -> list[tuple[str, ...]]:
    """The cells of each way to run a model: time, ratios, agreement, kernels.

    A precision that a layer of it cannot have, as a convolution's in blocks, is left out.
    """
    batch = placed(subject.timed, device)
    plain = copy.deepcopy(subject.model).to(device)
    modules = {"float32": plain, "bfloat16": copy.deepcopy(plain).to(torch.bfloat16)}
    notes = dict.fromkeys(modules, ("", ""))
    for precision in wanted.precisions:
        try:
            module, agreement, kernels = converted(subject, precision, target, device)
        except fxmpq.errors.PrecisionError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        modules[precision], notes[precision] = module, (agreement, kernels)
    runs: dict[str, Run] = {}
    for name, module in modules.items():
        made = compiled(module, is_wanted=wanted.compile)
        given = in_bfloat16(batch) if name == "bfloat16" else batch
        runs[name] = lambda made=made, given=given: call(made, given)
    with torch.no_grad():
        times = times_of(runs, device, wanted.rounds)
    return [
        (
            name,
            f"{times[name]:.3f}",
            f"{times['float32'] / times[name]:.2f}",
            f"{times['bfloat16'] / times[name]:.2f}",
            *notes[name],
        )
        for name in modules
    ]


def in_bfloat16(batch: object) -> object:
    """A batch whose float tensors are rounded."""
    if isinstance(batch, dict):
        return {name: in_bfloat16(tensor) for name, tensor in batch.items()}
    assert isinstance(batch, Tensor)
    return batch.to(torch.bfloat16) if batch.is_floating_point() else batch


def linear(rows: int, inner: int, outer: int) -> Subject:
    """A single linear layer on Gaussian inputs."""
    torch.manual_seed(0)
    x = torch.randn(rows, inner)
    return Subject(nn.Linear(inner, outer).eval(), [x[:256]], x)


def models(wanted: argparse.Namespace) -> dict[str, Callable[[], Subject]]:
    """The models, made when they are called for."""

    def minilm() -> Subject:
        model, sentences, _ = minilm_reviews()
        shape = (wanted.batch, wanted.length)
        ids = torch.randint(0, 30_000, shape, generator=torch.Generator().manual_seed(0))
        full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        timed = {name: full.get(name, torch.zeros_like(ids)) for name in sentences[0]}
        return Subject(model, sentences[:2], timed)

    def residual() -> Subject:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(8, 3, wanted.size, wanted.size, generator=generator)
        batches = [{"pixel_values": part} for part in images.split(4)]
        timed = {"pixel_values": images[: wanted.batch]}
        return Subject(resnet18(), batches, timed)

    def small() -> Subject:
        data = embedded_subset()
        batches = list(data.calibration_images[:128].split(64))
        return Subject(pretrained(), batches, data.test_images[: wanted.batch])

    return {"MiniLM-L6": minilm, "ResNet-18": residual, "ResNet-20": small}


def options() -> argparse.Namespace:
    """What to run, smaller on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["MiniLM-L6"], help="of those there are")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many linear layers")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--bf16-rest", action="store_true", help="target cuda-bf16")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--rounds", type=int, default=21)
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    wanted = options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    target = "cuda-bf16" if wanted.bf16_rest else "cuda"
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread, CPU time"
    table = Table(title=f"Target {target} on {name}: median of interleaved runs")
    for heading in ("subject", "ms", "x float32", "x bfloat16", "dB (layer)", "kernels"):
        table.add_column(heading)
    found = {
        f"linear {'x'.join(map(str, shape))}": (lambda shape=shape: linear(*shape))
        for shape in SHAPES[: wanted.shapes]
    }
    makers = models(wanted)
    found |= {model: makers[model] for model in wanted.models}
    for subject, make in found.items():
        for label, *cells in rows_of(make(), target, device, wanted):
            table.add_row(f"{subject} {label}", *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
