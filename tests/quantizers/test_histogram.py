from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.quantizers.histogram import StreamingHistogram

MAGNITUDES = st.floats(-30, 30).map(lambda exponent: 10.0**exponent)
VALUES = st.one_of(
    st.floats(-(2.0**99), 2.0**99, width=32),
    st.sampled_from([0.0, 1e-30, -1e-30, 1e30, -1e30, 1.0, -1.0, 0.5]),
    st.integers(-5000, 5000).map(float),
)
BATCHES = st.lists(st.lists(VALUES, min_size=1, max_size=20), min_size=1, max_size=8)


def counted(batches: list[list[float]]) -> StreamingHistogram:
    histogram = StreamingHistogram()
    for batch in batches:
        histogram.update(torch.tensor(batch, dtype=torch.float32))
    return histogram


def bin_width(histogram: StreamingHistogram) -> float:
    return float(histogram.centres[1] - histogram.centres[0])


def assert_counts(histogram: StreamingHistogram, values: np.ndarray) -> None:
    """The counted values are the given ones, each in a bin that holds it."""
    values = np.sort(values.astype(np.float32).astype(np.float64))
    counts = histogram.counts.numpy()
    assert counts.sum() == len(values)
    assert (counts >= 0).all()
    assert (counts == np.round(counts)).all()
    found = np.repeat(histogram.centres.numpy(), counts.astype(int))
    # Half a width is where the bin ends; the rest is float32 rounding at the bins' edges.
    assert np.abs(found - values).max() <= bin_width(histogram) * 0.501
    assert histogram.minimum == values[0]
    assert histogram.maximum == values[-1]


@given(BATCHES)
def test_every_value_is_counted_in_its_bin_however_the_range_grows(
    batches: list[list[float]],
) -> None:
    assert_counts(counted(batches), np.concatenate([np.array(batch) for batch in batches]))


@given(BATCHES, st.randoms(use_true_random=False))
def test_the_order_of_batches_moves_no_value_by_more_than_the_wider_bin(
    batches: list[list[float]], random: object
) -> None:
    shuffled = list(batches)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = counted(batches), counted(shuffled)
    assert (one.minimum, one.maximum) == (other.minimum, other.maximum)
    expanded = [
        np.repeat(histogram.centres.numpy(), histogram.counts.numpy().astype(int))
        for histogram in (one, other)
    ]
    limit = (bin_width(one) + bin_width(other)) * 0.501
    assert np.abs(expanded[0] - expanded[1]).max() <= limit


@given(
    st.lists(st.tuples(st.sampled_from([-1, 0, 1]), MAGNITUDES), min_size=1, max_size=12),
    st.integers(0, 2**31),
)
def test_batches_of_any_sign_and_magnitude_in_sequence(
    kinds: list[tuple[int, float]], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    batches = [
        (generator.random(30) * scale * (sign or generator.choice([-1, 1], 30))).tolist()
        for sign, scale in kinds
    ]
    assert_counts(counted(batches), np.concatenate([np.array(batch) for batch in batches]))


@pytest.mark.parametrize(
    "batches",
    [
        [[-3.0, -1.0], [-100.0], [-0.001]],
        [[5.0], [5.0], [5.0]],
        [[-5.0], [-5.0]],
        [[1e-30, -1e-30], [1e30], [-1e30]],
        [[1e30, -1e30], [1e-30]],
        [[0.0], [0.0, 0.0]],
        [[0.0], [1e-6, 2e-6]],
        [[0.0, 0.0], [-1e-6]],
        [[-1e-6], [1e6]],
        [[1e-6], [-1e6]],
        [[3.4e38], [-3.4e38]],
        [[1e-44], [1.0]],
        [[0.1, -0.1], [0.2], [-0.4], [0.8], [-1.6], [3.2], [-6.4]],
        [[2.0**k] for k in range(-20, 20)],
        [[-(2.0**k)] for k in range(-20, 20)],
        [[(-2.0) ** k] for k in range(-20, 20)],
    ],
)
def test_chosen_sequences(batches: list[list[float]]) -> None:
    assert_counts(counted(batches), np.concatenate([np.array(batch) for batch in batches]))


@given(BATCHES)
def test_zero_is_an_edge_and_every_value_lies_inside_the_bins(batches: list[list[float]]) -> None:
    histogram = counted(batches)
    width = bin_width(histogram)
    if width == 0.0:
        assert histogram.minimum == histogram.maximum == 0.0
        return
    edges = (histogram.centres / width).numpy()
    assert np.allclose(edges - np.floor(edges), 0.5, atol=1e-9)
    assert float(histogram.centres[0]) - width / 2 <= min(0.0, histogram.minimum)
    assert float(histogram.centres[-1]) + width / 2 > max(0.0, histogram.maximum)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=50))
def test_positive_values_use_at_least_a_quarter_of_the_bins(values: list[float]) -> None:
    histogram = counted([values])
    if max(values) > 1e-30:
        assert bin_width(histogram) <= max(values) / 1024


def test_many_batches_keep_a_fine_resolution() -> None:
    generator = torch.Generator().manual_seed(0)
    histogram = StreamingHistogram()
    batches = [torch.randn(1000, generator=generator) * scale for scale in (1, 0.1, 3, 2, 4)]
    for batch in batches:
        histogram.update(batch)
    span = histogram.maximum - histogram.minimum
    assert bin_width(histogram) <= span / 1000


def test_counts_equal_numpys_histogram_on_the_same_edges() -> None:
    generator = torch.Generator().manual_seed(1)
    histogram = StreamingHistogram()
    values = torch.randn(10_000, generator=generator)
    for batch in values.split(700):
        histogram.update(batch)
    width = bin_width(histogram)
    edges = np.append(
        histogram.centres.numpy() - width / 2, float(histogram.centres[-1]) + width / 2
    )
    expected, _ = np.histogram(values.double().numpy(), bins=edges)
    # float32 places may fall to the other side of an edge, a few in ten thousand.
    assert np.abs(np.cumsum(expected) - np.cumsum(histogram.counts.numpy())).max() <= 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    histogram = StreamingHistogram()
    histogram.update(torch.tensor([1.0]))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        histogram.update(torch.tensor([1.0, bad, 2.0]))
    assert float(histogram.counts.sum()) == 1
    assert histogram.maximum == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    histogram = StreamingHistogram()
    values = torch.tensor([-1.0, 0.25, 3.0], dtype=dtype)
    histogram.update(values)
    assert_counts(histogram, values.double().numpy())


def test_large_batches_are_sampled_with_exact_bounds_and_about_their_count() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3, 2**18, generator=generator)
    values[1, 77] = 40.0
    histogram = StreamingHistogram()
    histogram.update(values)
    assert histogram.maximum == 40.0
    assert float(histogram.counts.sum()) == pytest.approx(values.numel(), rel=1e-4)
    mean = float(histogram.counts @ histogram.centres) / values.numel()
    assert abs(mean) < 0.02


def test_sampling_sees_every_channel() -> None:
    # Only one channel of 384 is far from zero; a stride that divides 384 would miss it.
    values = torch.zeros(64, 128, 384)
    values[..., 5] = 1.0
    histogram = StreamingHistogram()
    histogram.update(values)
    ones = float(histogram.counts[histogram.centres > 0.5].sum())
    assert ones == pytest.approx(64 * 128, rel=0.02)


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), min_size=1))
def test_mean_and_variance_are_those_of_all_values(batches: list[list[float]]) -> None:
    histogram = counted(batches)
    values = np.concatenate([np.array(batch, dtype=np.float64) for batch in batches])
    assert histogram.mean == pytest.approx(values.mean(), rel=1e-12, abs=1e-9)
    assert histogram.variance == pytest.approx(values.var(), rel=1e-9, abs=1e-9 * values.max() ** 2)


def test_the_variance_survives_a_mean_that_is_much_larger() -> None:
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(0)) + 10_000
    histogram = StreamingHistogram()
    for part in values.chunk(7):
        histogram.update(part)
    assert histogram.variance == pytest.approx(float(values.double().var(correction=0)), rel=1e-9)


def test_moments_count_every_value_where_the_bins_hold_a_sample() -> None:
    values = torch.rand(600_000, generator=torch.Generator().manual_seed(1))
    histogram = StreamingHistogram()
    histogram.update(values)
    assert histogram.mean == pytest.approx(float(values.double().mean()), rel=1e-12)
    assert float(histogram.counts.sum()) == pytest.approx(600_000, rel=1e-4)


@given(st.lists(st.sampled_from([0.0, -0.0, 1e-30, -2.0, 3.0]), min_size=1), st.integers(1, 4))
def test_exact_zeros_are_counted(values: list[float], batches: int) -> None:
    histogram = counted([values] * batches)
    assert histogram.zeros == batches * sum(value == 0 for value in values)
