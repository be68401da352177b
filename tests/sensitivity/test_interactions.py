from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import FxmpqError
from fxmpq.sensitivity.interactions import shrinkage, shrunk_pairs
from fxmpq.sensitivity.sensitivity import Sensitivity


def drawn(rows: np.ndarray, method: str = "projected") -> Sensitivity:
    power = np.square(rows).mean(axis=0).tolist()
    values = {
        f"g{index}": {"w4a8": power[2 * index], "w8a8": power[2 * index + 1]}
        for index in range(len(power) // 2)
    }
    return Sensitivity(values, method, None, rows)


def samples(draws: int, mix: float, seed: int = 0) -> np.ndarray:
    """Rows of eight entries whose true correlation is `mix`."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(draws, 1))
    return mix**0.5 * shared + (1 - mix) ** 0.5 * generator.normal(size=(draws, 8))


def test_independent_errors_are_shrunk_almost_to_the_diagonal() -> None:
    found = [shrinkage(drawn(samples(200, 0.0, seed))) for seed in range(20)]
    assert 0.8 < np.mean(found) <= 1


def test_true_interactions_are_kept_when_there_are_many_draws() -> None:
    assert shrinkage(drawn(samples(5000, 0.5))) < 0.01


def test_more_draws_need_less_shrinkage() -> None:
    found = [shrinkage(drawn(samples(draws, 0.2))) for draws in (20, 200, 2000)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 3 * found[2]


def test_the_formula_is_that_of_schaefer_and_strimmer() -> None:
    rows = samples(30, 0.3)
    scaled = rows / np.sqrt(np.square(rows).mean(axis=0))
    noise = signal = 0.0
    for i in range(8):
        for j in range(8):
            if i // 2 != j // 2:
                products = scaled[:, i] * scaled[:, j]
                noise += products.var(ddof=1) / 30
                signal += products.mean() ** 2
    assert shrinkage(drawn(rows)) == pytest.approx(noise / signal, rel=1e-12)


def test_shrinkage_brings_the_estimate_closer_to_the_truth() -> None:
    truth = np.full((8, 8), 0.2) + 0.8 * np.eye(8)
    across = np.arange(8)[:, None] // 2 != np.arange(8) // 2
    raw = shrunk = 0.0
    for seed in range(20):
        sensitivity = drawn(samples(20, 0.2, seed))
        raw += np.square(sensitivity.pairs() - truth)[across].sum()
        shrunk += np.square(shrunk_pairs(sensitivity) - truth)[across].sum()
    assert shrunk < 0.9 * raw


@given(seed=st.integers(0, 10**6), draws=st.integers(1, 12), intensity=st.none() | st.floats(0, 1))
def test_the_diagonal_stays_and_no_eigenvalue_is_negative(
    seed: int, draws: int, intensity: float | None
) -> None:
    sensitivity = drawn(samples(draws, 0.4, seed))
    found, given_pairs = shrunk_pairs(sensitivity, intensity), sensitivity.pairs()
    assert np.array_equal(found.diagonal(), given_pairs.diagonal())
    assert np.linalg.eigvalsh(found)[0] > -1e-12 * np.trace(found)
    assert 0 <= shrinkage(sensitivity) <= 1


def test_a_factor_of_a_measured_matrix_is_not_a_sample() -> None:
    sensitivity = drawn(samples(10, 0.0), method="pairwise")
    assert shrinkage(sensitivity) == 0
    assert np.array_equal(shrunk_pairs(sensitivity), sensitivity.pairs())


def test_one_draw_shows_no_interaction_and_dead_entries_do_no_harm() -> None:
    assert shrinkage(drawn(samples(1, 0.5))) == 1
    rows = samples(50, 0.5)
    rows[:, 3] = 0
    assert 0 < shrinkage(drawn(rows)) < 0.2
    assert shrinkage(drawn(np.zeros((5, 4)))) == 1


@pytest.mark.parametrize("intensity", [-0.1, 1.1, float("nan")])
def test_an_intensity_outside_zero_and_one_is_refused(intensity: float) -> None:
    with pytest.raises(FxmpqError, match="shrinkage is"):
        shrunk_pairs(drawn(samples(5, 0.1)), intensity)


def test_a_method_without_projections_is_refused() -> None:
    plain = Sensitivity({"a": {"w4a8": 1.0}}, "sqnr")
    for ask in (shrinkage, shrunk_pairs):
        with pytest.raises(FxmpqError, match="'sqnr' measures no interactions"):
            ask(plain)
