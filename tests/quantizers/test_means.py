from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.quantizers.means import MeanInput


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 1000))
def test_the_sum_does_not_depend_on_the_batches(sizes: list[int], seed: int) -> None:
    samples = torch.randn(sum(sizes), 3, 2, generator=torch.Generator().manual_seed(seed))
    mean = MeanInput()
    for batch in samples.split(sizes):
        mean.update(batch)
    ((total, count),) = mean.totals()
    assert count == sum(sizes)
    assert torch.allclose(total, samples.sum(0), atol=1e-5)


def test_shapes_are_kept_apart() -> None:
    mean = MeanInput()
    mean.update(torch.ones(2, 4, 3))
    mean.update(torch.ones(5, 6, 3))
    mean.update(torch.ones(1, 4, 3))
    found = {tuple(total.shape): (float(total.mean()), count) for total, count in mean.totals()}
    assert found == {(4, 3): (3.0, 3), (6, 3): (5.0, 5)}


def test_half_precision_is_summed_in_single() -> None:
    mean = MeanInput()
    for _ in range(3):
        mean.update(torch.full((1, 1), 2048.5, dtype=torch.bfloat16))
    ((total, _),) = mean.totals()
    assert total.dtype is torch.float32
    assert float(total) == 3 * 2048.0


def test_gradients_do_not_reach_the_sums() -> None:
    mean = MeanInput()
    mean.update(torch.ones(2, 3, requires_grad=True))
    ((total, _),) = mean.totals()
    assert not total.requires_grad
