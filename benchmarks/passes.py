"""What tracing and preparing takes, by depth, and for ResNet-50 and BERT-base.

CPU seconds on one thread, without garbage collection. `export` is torch.export with the unlifting
of its program; `passes` is the rest of `fxmpq.trace`, `prepare` is `fxmpq.prepare` for ONNX
Runtime; `us/node` is what the last two take for each node of the traced graph. Narrow nets show
how time grows with depth: each depth once, after a small net that fills the caches. The two models
of usual size are traced and prepared three times in turn, and medians are shown.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import fxmpq
from fxmpq.graph.export import export_program

DEPTHS = (12, 24, 48, 96)
REPEATS = 3

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Seconds:
    """What one model took.

    Args:
        nodes: Of the traced graph.
        export: CPU seconds of torch.export.
        passes: CPU seconds of the rest of the trace.
        prepare: CPU seconds of `prepare`.
    """

    nodes: int
    export: float
    passes: float
    prepare: float

    @property
    def per_node(self) -> float:
        """Seconds of what is fxmpq's own, for each node."""
        return (self.passes + self.prepare) / self.nodes

    @property
    def total(self) -> float:
        """All of it."""
        return self.export + self.passes + self.prepare


class _Program:
    """An exported program whose module has been made."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._made = program.module(check_guards=False)

    def module(self, **_options: object) -> nn.Module:
        return self._made


def measure(model: nn.Module, batch: Batch) -> Seconds:
    """Trace and prepare a model once."""
    export = 0.0

    def timed(*arguments: object) -> tuple[object, ...]:
        nonlocal export
        start = time.process_time()
        program, *rest = export_program(*arguments)  # type: ignore[arg-type]
        made = _Program(program)
        export = time.process_time() - start
        return (made, *rest)

    gc.collect()
    gc.disable()
    start = time.process_time()
    with mock.patch("fxmpq.graph.trace.export_program", timed):
        graph = fxmpq.trace(model, batch)
    traced = time.process_time()
    fxmpq.prepare(graph, "onnxruntime")
    prepared = time.process_time()
    gc.enable()
    return Seconds(len(graph.graph.nodes), export, traced - start - export, prepared - traced)


def narrow_bert(layers: int) -> tuple[nn.Module, Batch]:
    """A BERT of width 16."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config).eval(), _tokens(40, 8)


def narrow_resnet(layers: int) -> tuple[nn.Module, Batch]:
    """A ResNet of width 8, with basic blocks of two convolutions."""
    config = ResNetConfig(
        layer_type="basic", depths=[layers // 2], hidden_sizes=[8], embedding_size=8
    )
    return ResNetForImageClassification(config).eval(), _image(32)


def resnet50() -> tuple[nn.Module, Batch]:
    """Transformers' default ResNet."""
    return ResNetForImageClassification(ResNetConfig()).eval(), _image(224)


def bert_base() -> tuple[nn.Module, Batch]:
    """Transformers' default BERT."""
    return BertForSequenceClassification(BertConfig()).eval(), _tokens(30_000, 128)


def _tokens(vocabulary: int, length: int) -> Batch:
    ids = torch.randint(1, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image(size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}


def row(name: str, layers: str, found: Seconds) -> list[str]:
    """Cells of one line."""
    times = [f"{seconds:.2f}" for seconds in (found.export, found.passes, found.prepare)]
    return [name, layers, str(found.nodes), *times, f"{found.per_node * 1e6:.0f}"]


def median(runs: list[Seconds]) -> Seconds:
    """The median of each part."""
    parts = zip(*((run.export, run.passes, run.prepare) for run in runs), strict=True)
    return Seconds(runs[0].nodes, *(statistics.median(part) for part in parts))


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(title="Tracing and preparing, CPU seconds on one thread")
    for heading in ("model", "layers", "nodes", "export", "passes", "prepare", "us/node"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    narrow: dict[str, Callable[[int], tuple[nn.Module, Batch]]] = {
        "BERT, width 16": narrow_bert,
        "ResNet, width 8": narrow_resnet,
    }
    for name, make in narrow.items():
        measure(*make(2))
        for layers in DEPTHS:
            table.add_row(*row(name, str(layers), measure(*make(layers))))
    usual = {"ResNet-50": resnet50(), "BERT-base": bert_base()}
    runs: dict[str, list[Seconds]] = {name: [] for name in usual}
    for _ in range(REPEATS):
        for name, made in usual.items():
            runs[name].append(measure(*made))
    for name, found in runs.items():
        table.add_row(*row(name, "", median(found)))
    console = Console(width=100)
    console.print(table)
    together = statistics.median(
        sum(run.total for run in pair) for pair in zip(*runs.values(), strict=True)
    )
    console.print(f"ResNet-50 and BERT-base together: {together:.1f} s (median of {REPEATS})")


if __name__ == "__main__":
    main()
