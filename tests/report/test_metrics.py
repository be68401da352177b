from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.text import perplexity

from fxmpq.errors import BatchError
from fxmpq.report.metrics import (
    IGNORED,
    METRICS,
    Tally,
    collect_outputs,
    count_right,
    next_token_loss,
)


@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 7), st.integers(0, 2**31))
def test_accuracy_is_the_share_of_samples_whose_highest_logit_is_the_label(
    batches: int, classes: int, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batches * size, classes, generator=generator)
    labels = torch.randint(0, classes, (batches * size,), generator=generator)
    right = 0
    for row, label in zip(logits, labels, strict=True):
        right += int(max(range(classes), key=lambda index: float(row[index])) == int(label))
    tally = Tally(METRICS["accuracy"])
    for part, expected in zip(logits.split(size), labels.split(size), strict=True):
        tally.add([part], expected)
    assert tally.value == pytest.approx(right / len(labels))


@given(
    st.integers(1, 3), st.integers(2, 6), st.integers(1, 9), st.booleans(), st.integers(0, 2**31)
)
def test_perplexity_is_that_of_torchmetrics_on_shifted_logits(
    samples: int, length: int, vocabulary: int, ignored: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, length, vocabulary, generator=generator)
    ids = torch.randint(0, vocabulary, (samples, length), generator=generator)
    if ignored and length > 2:
        ids[0, 2:] = IGNORED
    tally = Tally(METRICS["perplexity"])
    for part, labels in zip(logits, ids, strict=True):
        tally.add([part[None]], labels[None])
    expected = perplexity(logits[:, :-1], ids[:, 1:], ignore_index=IGNORED)
    assert tally.value == pytest.approx(float(expected), rel=1e-4)


def test_perplexity_of_an_all_but_impossible_token_is_finite() -> None:
    logits = torch.tensor([[[0.0, 200.0], [0.0, 0.0]]])
    loss, tokens = next_token_loss([logits], torch.tensor([[0, 0]]))
    assert (loss, tokens) == (200.0, 1)


@pytest.mark.parametrize(
    ("outputs", "labels", "words"),
    [
        ([torch.zeros(3, 2)], [0, 1], "2 labels for 3 samples"),
        ([torch.zeros(2, 2)], [0, 2], "0 to 2, but the model has 2 classes"),
        ([torch.zeros(2, 2)], [-1, 0], "-1 to 0"),
        ([torch.zeros(2)], [0, 1], r"\[samples, classes\] .* found \[2\]"),
        ([], [0], "no floating-point output"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    outputs: list[Tensor], labels: list[int], words: str
) -> None:
    with pytest.raises(BatchError, match=words):
        count_right(outputs, torch.tensor(labels))


@pytest.mark.parametrize(
    ("outputs", "labels", "words"),
    [
        ([torch.zeros(1, 2, 4)], [[0, 1, 2]], r"shape \[1, 3\] for logits of shape \[1, 2, 4\]"),
        ([torch.zeros(1, 2, 4)], [[0, 4]], "4 to 4, but the model has 4 tokens"),
        ([torch.zeros(1, 4)], [[0]], r"vocabulary\] .* found \[1, 4\]"),
        ([], [[0]], "no floating-point output"),
    ],
)
def test_token_ids_that_do_not_fit_are_refused(
    outputs: list[Tensor], labels: list[list[int]], words: str
) -> None:
    with pytest.raises(BatchError, match=words):
        next_token_loss(outputs, torch.tensor(labels))


def test_nothing_that_counts_has_no_value() -> None:
    tally = Tally(METRICS["perplexity"])
    tally.add([torch.zeros(1, 2, 4)], torch.tensor([[0, IGNORED]]))
    with pytest.raises(BatchError, match="perplexity of no labels"):
        _ = tally.value


def output_sqnr_db(reference: list[list[Tensor]], outputs: list[list[Tensor]]) -> float:
    """Of all batches, as a report adds it up."""
    tally = Tally(METRICS["accuracy"])
    for expected, found in zip(reference, outputs, strict=True):
        tally.add(found, torch.zeros(len(found[0]), dtype=torch.int64), expected)
    return tally.sqnr_db


@given(st.floats(-30, 60), st.integers(0, 2**31))
def test_sqnr_of_noise_with_a_known_power(decibels: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    noise *= signal.norm() / noise.norm() * 10 ** (-decibels / 20)
    reference = [[signal[:1]], [signal[1:]]]
    outputs = [[(signal + noise)[:1]], [(signal + noise)[1:]]]
    assert output_sqnr_db(reference, outputs) == pytest.approx(decibels, abs=1e-6)


def test_equal_outputs_have_infinite_sqnr_and_other_ones_are_refused() -> None:
    outputs = [[torch.ones(2, 3)], [torch.ones(1, 3)]]
    assert output_sqnr_db(outputs, outputs) == math.inf
    with pytest.raises(BatchError, match=r"2 tensors \(\[2, 3\], \[2, 3\]\) against 1 tensors"):
        output_sqnr_db([[*outputs[0], *outputs[0]]], outputs[:1])


def test_a_silent_reference_has_no_signal() -> None:
    assert output_sqnr_db([[torch.zeros(1, 2)]], [[torch.ones(1, 2)]]) == -math.inf


def test_a_perplexity_beyond_a_float_is_infinite() -> None:
    metric = METRICS["perplexity"]
    assert metric.finish(709.0) == math.exp(709.0)
    assert metric.finish(710.0) == math.inf
    assert metric.text(math.inf, 2) == "inf"
    assert metric.difference(math.inf, 20.0) == "+inf %"
    assert metric.difference(math.inf, math.inf) == "+0.0 %"
    tally = Tally(metric)
    tally.add([torch.tensor([[[800.0, 0.0], [0.0, 0.0]]])], torch.tensor([[0, 1]]))
    assert tally.value == math.inf


def test_differences_are_written_in_the_metrics_own_unit() -> None:
    accuracy, perplexities = METRICS["accuracy"], METRICS["perplexity"]
    assert accuracy.text(0.935, 1) == "93.5 %"
    assert accuracy.difference(0.93, 0.9325) + accuracy.unit == "-0.25 points"
    assert perplexities.text(16.423, 2) == "16.42"
    assert perplexities.difference(16.5, 15.0) + perplexities.unit == "+10.0 %"


def test_collecting_keeps_floating_point_outputs_without_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)

    def run(batch: Tensor) -> list[object]:
        return [batch * weight, torch.arange(2), None]

    found = collect_outputs(run, [torch.ones(2, 3), torch.zeros(1, 3)])
    assert [[tuple(tensor.shape) for tensor in batch] for batch in found] == [[(2, 3)], [(1, 3)]]
    assert not found[0][0].requires_grad
