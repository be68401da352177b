from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.errors import BatchError
from fxmpq.report.metrics import accuracy, collect_outputs, output_sqnr_db


@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 7), st.integers(0, 2**31))
def test_accuracy_is_the_share_of_samples_whose_highest_logit_is_the_label(
    batches: int, classes: int, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = [[torch.randn(size, classes, generator=generator)] for _ in range(batches)]
    labels = torch.randint(0, classes, (batches * size,), generator=generator)
    right = 0
    for row, label in zip(torch.cat([batch[0] for batch in outputs]), labels, strict=True):
        right += int(max(range(classes), key=lambda index: float(row[index])) == int(label))
    assert accuracy(outputs, labels) == pytest.approx(right / len(labels))


@pytest.mark.parametrize(
    ("outputs", "labels", "words"),
    [
        ([[torch.zeros(3, 2)]], [0, 1], "2 labels for 3 samples"),
        ([[torch.zeros(2, 2)]], [0, 2], "0 to 2, but the model has 2 classes"),
        ([[torch.zeros(2, 2)]], [-1, 0], "-1 to 0"),
        ([[torch.zeros(2)]], [0, 1], r"\[samples, classes\]"),
        ([[]], [0], "no floating-point output"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    outputs: list[list[Tensor]], labels: list[int], words: str
) -> None:
    with pytest.raises(BatchError, match=words):
        accuracy(outputs, torch.tensor(labels))


@given(st.floats(-30, 60), st.integers(0, 2**31))
def test_sqnr_of_noise_with_a_known_power(decibels: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    noise *= signal.norm() / noise.norm() * 10 ** (-decibels / 20)
    reference = [[signal[:1]], [signal[1:]]]
    outputs = [[(signal + noise)[:1]], [(signal + noise)[1:]]]
    assert output_sqnr_db(reference, outputs) == pytest.approx(decibels, abs=1e-6)


def test_equal_outputs_have_infinite_sqnr_and_other_batches_are_refused() -> None:
    outputs = [[torch.ones(2, 3)], [torch.ones(1, 3)]]
    assert output_sqnr_db(outputs, outputs) == math.inf
    with pytest.raises(BatchError, match=r"2 tensors \(\[2, 3\], \[1, 3\]\) against 1 tensors"):
        output_sqnr_db(outputs, outputs[:1])


def test_collecting_keeps_floating_point_outputs_without_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)

    def run(batch: Tensor) -> list[object]:
        return [batch * weight, torch.arange(2), None]

    found = collect_outputs(run, [torch.ones(2, 3), torch.zeros(1, 3)])
    assert [[tuple(tensor.shape) for tensor in batch] for batch in found] == [[(2, 3)], [(1, 3)]]
    assert not found[0][0].requires_grad
