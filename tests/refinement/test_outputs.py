from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmpq.errors import FxmpqError
from fxmpq.graph.run import float_outputs, run_batch
from fxmpq.refinement.outputs import model_outputs, output_error
from fxmpq.refinement.refine import refine

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
    # Not backward(), which would leave gradients in a graph that other tests use.
    [gradient] = torch.autograd.grad(found.sum(), batch)
    assert float(gradient.abs().sum()) > 0


class Decides(nn.Module):
    """Returns classes, not logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).argmax(-1)


@pytest.mark.parametrize("method", ["equalization", "brecq", "bias_tuning"])
def test_a_model_without_floating_point_outputs_is_a_clear_error(
    method: str, plan_of: Callable
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), Decides())
    subject = plan_of(model, [torch.randn(6, 5)])
    with pytest.raises(FxmpqError, match="no floating-point tensor.*layer by layer, with 'gptq'"):
        refine(subject.planned, None, subject.batches, method=method, progress=False)
    refine(subject.planned, None, subject.batches, method="light", progress=False)
