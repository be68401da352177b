from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxmpq.graph.run import float_outputs, run_batch
from fxmpq.refinement.outputs import model_outputs, output_error

Subject = Any


def test_they_are_the_float_and_the_planned_models(subject: Subject) -> None:
    for batch in subject.batches:
        for graph, quantized in ((subject.calibrated, False), (subject.planned, True)):
            wanted = float_outputs(run_batch(graph, batch))
            with torch.no_grad():
                found = model_outputs(subject.planned, batch, quantized=quantized)
            assert len(found) == len(wanted)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_their_error_is_over_all_batches_and_outputs(subject_of: Callable) -> None:
    subject = subject_of("two_inputs")
    expected = [float_outputs(run_batch(subject.calibrated, batch)) for batch in subject.batches]
    found = [float_outputs(run_batch(subject.planned, batch)) for batch in subject.batches]
    pairs = [pair for y, q in zip(expected, found, strict=True) for pair in zip(y, q, strict=True)]
    assert len(pairs) == 3 * len(subject.batches)
    noise = sum(float((q - y).square().sum()) for y, q in pairs)
    signal = sum(float(y.square().sum()) for y, _ in pairs)
    error = output_error(subject.planned, subject.batches, expected)
    assert error == pytest.approx(noise / signal, rel=1e-5)
    assert error > 0
    assert output_error(subject.planned, subject.batches, found) == 0.0


def test_gradients_flow_to_what_requires_them(subject_of: Callable) -> None:
    subject = subject_of("conv")
    batch = subject.batches[0].clone().requires_grad_()
    [found] = model_outputs(subject.planned, batch, quantized=True)
    found.sum().backward()
    assert batch.grad is not None
    assert float(batch.grad.abs().sum()) > 0
