from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.refinement.relative_error import relative_error

numbers = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=6)


@given(numbers, st.floats(-2, 2))
def test_a_scaled_output_is_wrong_by_the_squared_scale(values: list[float], factor: float) -> None:
    wanted = torch.tensor(values, dtype=torch.float64)
    found = relative_error(lambda batch: wanted * (1 + factor), lambda batch: wanted, 2)
    if float(wanted.square().sum()) > 1e-6:
        assert found == pytest.approx(factor**2, rel=1e-9, abs=1e-12)


def test_batches_are_weighted_by_their_power() -> None:
    wanted = [torch.tensor([3.0]), torch.tensor([1.0, 0.0])]
    outputs = [torch.tensor([3.0]), torch.tensor([0.0, 2.0])]
    assert relative_error(outputs.__getitem__, wanted.__getitem__, 2) == pytest.approx(5 / 10)
    assert relative_error(outputs.__getitem__, wanted.__getitem__, 1) == 0


def test_zeros_have_no_error_or_an_infinite_one() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert relative_error(lambda batch: zeros, lambda batch: zeros, 1) == 0
    assert relative_error(lambda batch: ones, lambda batch: zeros, 1) == math.inf
