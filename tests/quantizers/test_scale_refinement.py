from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.formats import NumberFormat, Precision
from fxmpq.quantizers.codes import round_in_place
from fxmpq.quantizers.scale_refinement import refine_scales

FORMATS = [NumberFormat(2), NumberFormat(4), NumberFormat(8), Precision.parse("we4m3").weight]


def errors(rows: Tensor, scale: Tensor, number_format: NumberFormat, p: float = 2.0) -> Tensor:
    spread = scale[:, None]
    rounded = round_in_place(rows / spread, number_format) * spread
    return (rounded - rows).double().abs().pow(p).sum(dim=1)


@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=5, max_size=5), min_size=1, max_size=6),
    st.sampled_from(FORMATS),
    st.floats(1e-3, 2),
    st.sampled_from([1.0, 2.0, 2.4]),
)
def test_it_is_never_worse_than_any_start(
    values: list[list[float]], number_format: NumberFormat, first: float, p: float
) -> None:
    rows = torch.tensor(values)
    starts = [torch.full((len(rows),), scale) for scale in (first, first / 3)]
    found = errors(rows, refine_scales(rows, starts, number_format, p=p), number_format, p)
    for start in starts:
        assert (found <= errors(rows, start, number_format, p) * (1 + 1e-5) + 1e-12).all()


def test_the_fit_is_the_least_squares_scale_of_its_codes() -> None:
    """Codes that stay as they are give the answer in closed form."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (20, 200), generator=generator).float()
    rows = 0.3 * codes + 0.02 * torch.randn(20, 200, generator=generator)
    found = refine_scales(rows, [torch.full((20,), 0.303)], NumberFormat(4))
    assert round_in_place(rows / found[:, None], NumberFormat(4)).equal(codes)
    fit = (rows * codes).sum(dim=1) / codes.square().sum(dim=1)
    assert torch.allclose(found, fit, rtol=1e-6)


@pytest.mark.parametrize("size", [3, 9, 27])
def test_short_rows_at_eight_bits_are_searched_finely(size: int) -> None:
    """Their error jumps with each value; 1,500 scales by brute force find little more."""
    rows = torch.randn(30, size, generator=torch.Generator().manual_seed(size))
    start = rows.abs().amax(dim=1) / 127
    found = errors(rows, refine_scales(rows, [start], NumberFormat(8)), NumberFormat(8))
    trials = [start * ratio for ratio in torch.linspace(0.5, 1.5, 1500).tolist()]
    brute = torch.stack([errors(rows, trial, NumberFormat(8)) for trial in trials]).amin(dim=0)
    assert float((found / brute.clamp(min=1e-12)).median()) < 1.01
    assert float(found.sum()) < 0.8 * float(errors(rows, start, NumberFormat(8)).sum())


def test_a_row_does_not_depend_on_the_others() -> None:
    rows = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1))
    start = rows.abs().amax(dim=1) / 128
    together = refine_scales(rows, [start], NumberFormat(8))
    assert together[2990:].equal(refine_scales(rows[2990:], [start[2990:]], NumberFormat(8)))


def test_zeros_keep_a_positive_scale() -> None:
    found = refine_scales(torch.zeros(2, 4), [torch.ones(2)], NumberFormat(4))
    assert (found > 0).all()
