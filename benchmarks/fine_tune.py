"""Quantization-aware training of a 4/2-bit plan: the accuracy it brings back, and what it costs.

ResNet-20 on Fashion-MNIST (55,000 training images, 4,000 test images) and MiniLM-L6 (BERT
architecture) on movie-review sentences (9,070 training sentences, 1,000 test sentences), planned
with 2- or 4-bit weights and 8-bit activations at 3 bits a weight on average.

`fine_tune.py resnet20 FOLDER SEED` and `fine_tune.py minilm SEED`; FOLDER holds Fashion-MNIST's
four files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _models import minilm_reviews, minilm_training
from agreement import logits, sqnr
from torch import nn

import fxmpq
from fxmpq.recipes.fashion_mnist import embedded_subset, hold_out, normalise, read_split
from fxmpq.recipes.models.resnet20 import pretrained
from fxmpq.training.loss import classification_loss


def run(
    model: nn.Module, inputs: list[Any], labelled: list[Any], test: list[Any], seed: int
) -> None:
    """Plan, refine without training, train with and without labels; print each."""
    signal, accuracy = logits(model, test)
    print(f"float: {accuracy:.2f} %", flush=True)
    graph = fxmpq.trace(model, inputs[0])
    graph = fxmpq.prepare(graph, "reference", candidates=["w2a8", "w4a8"])
    graph = fxmpq.calibrate(graph, inputs, progress=False)
    sensitivity = fxmpq.measure(graph, inputs[:8], progress=False)
    plan = fxmpq.solve(sensitivity, fxmpq.cost(graph), "avg_weight_bits=3")

    def show(label: str, result: nn.Module, seconds: float) -> None:
        found, score = logits(result, test)
        print(f"{label}: {score:.2f} %, {sqnr(signal, found):.2f} dB, {seconds:.0f} s", flush=True)

    show("planned", fxmpq.apply(graph, plan), 0)
    start = time.process_time()
    refined = fxmpq.refine(graph, plan, inputs, method="gptq", progress=False)
    show("gptq", refined, time.process_time() - start)
    unlabelled = [batch for batch, _ in labelled]
    for label, data, options in (
        ("qat", labelled, {"loss": classification_loss}),
        ("qat without labels", unlabelled, {"distillation": 1.0}),
    ):
        start = time.process_time()
        trained = fxmpq.refine(
            refined, None, data, method="qat", progress=False, seed=seed, **options
        )
        show(label, trained, time.process_time() - start)
        start = time.process_time()
        matched = fxmpq.refine(trained, None, inputs, method="norm_reestimation", progress=False)
        show(f"{label}, norms re-estimated", matched, time.process_time() - start)


def _resnet20(folder: Path, seed: int) -> None:
    data = embedded_subset()
    images, labels = read_split("train", folder)
    kept, _ = hold_out(labels)
    training = zip(
        normalise(images[kept]).split(64),
        torch.tensor(labels[kept], dtype=torch.int64).split(64),
        strict=True,
    )
    test = list(zip(data.test_images.split(250), data.test_labels.split(250), strict=True))
    run(pretrained(), list(data.calibration_images.split(64)), list(training), test, seed)


def _minilm(seed: int) -> None:
    model, sentences, test = minilm_reviews()
    run(model, sentences, minilm_training(), test, seed)


def main(arguments: Sequence[str]) -> None:
    """Run one subject with one seed."""
    torch.set_num_threads(1)
    if arguments[0] == "resnet20":
        _resnet20(Path(arguments[1]), int(arguments[2]))
    else:
        _minilm(int(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
