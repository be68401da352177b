from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.sensitivity.shards import ProjectionShard, join_shards, stack_rows


def made_shard(first: int = 0, samples: int = 2, **changes: object) -> ProjectionShard:
    entries = (("fc", "w2a8"), ("fc", "w4a8"))
    generator = np.random.default_rng(first)
    rows, powers = generator.normal(size=(samples, 1, 2)), generator.random(samples)
    shard = ProjectionShard(rows, powers, first, entries, "model", 0)
    return dataclasses.replace(shard, **changes)  # type: ignore[arg-type]


def test_joined_values_from_their_definition() -> None:
    one, two = made_shard(3), made_shard(5, rows=np.ones((2, 3, 2)))
    found = join_shards([two, one])
    expected = (np.square(one.rows[:, 0, 1]).sum() + 2) / (one.powers.sum() + two.powers.sum())
    assert found.value("fc", "w4a8") == pytest.approx(expected)
    assert found.projections is not None
    assert found.projections.shape == (12, 2)
    np.testing.assert_allclose(np.diag(found.pairs()), list(found.values["fc"].values()))


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "no shards to join"),
        ([made_shard(0), made_shard(1)], "expected a shard from sample 2, found one from 1"),
        ([made_shard(0), made_shard(4)], "expected a shard from sample 2, found one from 4"),
        ([made_shard(0), made_shard(2, seed=1)], "sample 2 differs from the first in its seed"),
        ([made_shard(0), made_shard(2, fingerprint="other")], "in its fingerprint"),
        ([made_shard(0), made_shard(2, entries=(("fc", "w2a8"),))], "in its entries"),
    ],
)
def test_shards_that_do_not_fit(shards: list[ProjectionShard], message: str) -> None:
    with pytest.raises(FxmpqError, match=message):
        join_shards(shards)


def test_outputs_of_zero_are_refused() -> None:
    with pytest.raises(CalibrationError, match="all zero"):
        join_shards([made_shard(powers=np.zeros(2))])


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_stacked_rows_keep_their_means_over_probes(counts: list[int]) -> None:
    parts = [np.random.default_rng(count).normal(size=(2, count, 3)) for count in counts]
    stacked = stack_rows(parts)
    assert stacked.shape == (2 * len(parts), max(counts), 3)
    expected = np.concatenate([np.einsum("npa,npb->nab", p, p) / p.shape[1] for p in parts])
    found = np.einsum("npa,npb->nab", stacked, stacked) / max(counts)
    np.testing.assert_allclose(found, expected, atol=1e-12)
