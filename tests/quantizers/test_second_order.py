from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.quantizers import second_order
from fxmpq.quantizers.second_order import (
    Grid,
    Quadratic,
    best_codes,
    descend_codes,
    feedback_codes,
    fitted_scale,
)


def problem(
    seed: int, groups: int = 2, channels: int = 3, weights: int = 4, bits: int = 2
) -> tuple[Quadratic, Tensor, Grid]:
    """Correlated inputs with a mean, an error that they explain in part, one scale per channel."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u = draw(groups, 50, weights) @ draw(groups, weights, weights) + 0.5
    d = 0.1 * u @ draw(groups, weights, channels) + draw(groups, 50, channels)
    form = Quadratic(u.mT @ u / 50, d.mT @ u / 50)
    scale = 0.5 + draw(groups, channels, 1).abs()
    return (
        form,
        draw(groups, channels, weights),
        Grid(scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
    )


def value(form: Quadratic, weight: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    return form.values(codes * grid.scale - weight)


def optimum(form: Quadratic, weight: Tensor, grid: Grid) -> Tensor:
    """The least value of each channel over every choice of codes."""
    levels = range(grid.low, grid.high + 1)
    choices = itertools.product(levels, repeat=weight.shape[2])
    found = [
        value(form, weight, torch.tensor(choice, dtype=torch.float64).expand_as(weight), grid)
        for choice in choices
    ]
    return torch.stack(found).amin(dim=0)


def optimal_brain_rounding(form: Quadratic, weight: Tensor, grid: Grid, damping: float) -> Tensor:
    """OBQ as its paper puts it, one group and channel: shrink the inverse after each rounding."""
    codes = torch.empty_like(weight)
    damped = form.damped(damping)
    start = weight + form.minimum(damping)
    scale = grid.scale.expand_as(weight)
    for group, channel in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        inverse, left = torch.linalg.inv(damped[group]), start[group, channel].clone()
        order = damped[group].diagonal().argsort(descending=True, stable=True)
        for at in order.tolist():
            step = float(scale[group, channel, at])
            code = min(max(round(float(left[at]) / step), grid.low), grid.high)
            codes[group, channel, at] = code
            left -= (left[at] - code * step) / inverse[at, at] * inverse[:, at]
            inverse = inverse - torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
            inverse[at, at] = 1.0
    return codes


def test_values_are_the_form_written_out() -> None:
    form, weight, _ = problem(0)
    for group, channel in itertools.product(range(2), range(3)):
        d, r = weight[group, channel], form.cross[group, channel]
        expected = d @ form.second[group] @ d - 2 * (d @ r)
        assert torch.isclose(form.values(weight)[group, channel], expected)


def test_the_minimum_has_no_slope_and_damping_pulls_it_to_zero() -> None:
    form, _, _ = problem(1)
    found = form.minimum(1e-9)
    assert torch.allclose(found @ form.second, form.cross, atol=1e-6)
    assert float(form.minimum(10.0).norm()) < float(form.minimum(0.1).norm()) < float(found.norm())


def test_inputs_that_never_vary_are_no_trouble() -> None:
    form = Quadratic(torch.zeros(1, 3, 3), torch.zeros(1, 2, 3))
    weight, grid = torch.full((1, 2, 3), 0.6), Grid(torch.ones(1, 2, 1), -2, 1)
    codes = feedback_codes(form, weight, grid, damping=0.01)
    assert torch.equal(codes, grid.nearest(weight))
    assert torch.equal(descend_codes(form, weight, codes, grid, sweeps=3), codes)


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4]))
def test_feedback_is_optimal_brain_rounding_in_a_fixed_order(seed: int, bits: int) -> None:
    form, weight, grid = problem(seed, bits=bits, weights=6)
    found = feedback_codes(form, weight, grid, damping=0.05)
    assert torch.equal(found, optimal_brain_rounding(form, weight, grid, 0.05))
    assert grid.low <= float(found.min())
    assert float(found.max()) <= grid.high


@given(st.integers(0, 10_000))
def test_with_inputs_that_are_not_correlated_feedback_rounds_to_the_nearest(seed: int) -> None:
    form, weight, grid = problem(seed)
    form = Quadratic(torch.diag_embed(form.second.diagonal(dim1=1, dim2=2)), 0 * form.cross)
    assert torch.equal(feedback_codes(form, weight, grid, damping=0.01), grid.nearest(weight))


def test_the_target_moves_with_the_cross_moments() -> None:
    form, weight, grid = problem(3, bits=8)
    fine = Grid(grid.scale / 100, -(10**6), 10**6)
    codes = feedback_codes(form, weight, fine, damping=1e-9)
    wanted = weight + form.minimum(1e-9)
    ignored = feedback_codes(Quadratic(form.second, 0 * form.cross), weight, fine, damping=1e-9)
    least = form.values(form.minimum(1e-9)).sum()
    assert float(value(form, weight, codes, fine).sum() - least) < 0.01 * float(-least)
    assert float(value(form, weight, ignored, fine).sum() - least) > 0.5 * float(-least)
    assert not torch.equal(codes, fine.nearest(wanted))


def test_second_order_rounding_comes_near_the_best_of_all_codes() -> None:
    """Summed over 20 problems: nearest > feedback > descent >= the optimum, by far."""
    totals = torch.zeros(4, dtype=torch.float64)
    for seed in range(20):
        form, weight, grid = problem(seed)
        constant = form.values(form.minimum(1e-9)).sum()
        nearest = grid.nearest(weight)
        feedback = feedback_codes(form, weight, grid, damping=0.01)
        polished = descend_codes(form, weight, feedback, grid, sweeps=10)
        for at, codes in enumerate((nearest, feedback, polished)):
            totals[at] += value(form, weight, codes, grid).sum() - constant
        totals[3] += optimum(form, weight, grid).sum() - constant
    nearest, feedback, polished, best = totals.tolist()
    assert feedback < 0.7 * nearest
    assert polished < feedback
    assert best <= polished < 1.3 * best


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_descent_never_rises_and_ends_where_no_single_code_helps(seed: int, sweeps: int) -> None:
    form, weight, grid = problem(seed)
    start = grid.nearest(weight)
    some = descend_codes(form, weight, start, grid, sweeps=sweeps)
    assert (value(form, weight, some, grid) <= value(form, weight, start, grid) + 1e-9).all()
    last = descend_codes(form, weight, start, grid, sweeps=100)
    reached = value(form, weight, last, grid)
    for at, code in itertools.product(range(weight.shape[2]), range(grid.low, grid.high + 1)):
        moved = last.clone()
        moved[:, :, at] = code
        assert (value(form, weight, moved, grid) >= reached - 1e-9).all()


def test_no_sweep_changes_nothing_and_the_start_is_kept() -> None:
    form, weight, grid = problem(5)
    start = grid.nearest(weight)
    kept = start.clone()
    assert torch.equal(descend_codes(form, weight, start, grid, sweeps=0), kept)
    assert not torch.equal(descend_codes(form, weight, start, grid, sweeps=5), kept)
    assert torch.equal(start, kept)


def test_columns_in_blocks_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    form, weight, grid = problem(6, weights=11, bits=3)
    feedback = feedback_codes(form, weight, grid, damping=0.01)
    start = grid.nearest(weight)
    polished = descend_codes(form, weight, start, grid, sweeps=4)
    monkeypatch.setattr(second_order, "_COLUMNS", 4)
    assert torch.equal(feedback_codes(form, weight, grid, damping=0.01), feedback)
    assert torch.equal(descend_codes(form, weight, start, grid, sweeps=4), polished)


def test_every_weight_may_have_its_own_scale() -> None:
    form, weight, grid = problem(7)
    blocks = Grid(grid.scale * torch.tensor([1.0, 1.0, 0.25, 0.25]), grid.low, grid.high)
    found = feedback_codes(form, weight, blocks, damping=0.05)
    assert torch.equal(found, optimal_brain_rounding(form, weight, blocks, 0.05))
    polished = descend_codes(form, weight, found, blocks, sweeps=10)
    gap = value(form, weight, polished, blocks) - optimum(form, weight, blocks)
    assert float(gap.min()) >= -1e-9
    assert float(gap.max()) < 2.0


def test_the_best_codes_are_found_per_channel() -> None:
    form, weight, grid = problem(8)
    generator = torch.Generator().manual_seed(9)
    others = [torch.randint(-2, 2, weight.shape, generator=generator).double() for _ in range(6)]
    found = best_codes(form, weight, others[0], others[1:], grid)
    values = torch.stack([value(form, weight, codes, grid) for codes in others])
    assert torch.equal(value(form, weight, found, grid), values.amin(dim=0))
    assert len(values.argmin(dim=0).unique()) > 1


def test_of_equal_codes_the_first_are_kept() -> None:
    form = Quadratic(torch.zeros(1, 2, 2), torch.zeros(1, 1, 2))
    first, other = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    grid = Grid(torch.ones(1, 1, 1), -2, 1)
    assert torch.equal(best_codes(form, first, first, [other], grid), first)


@given(st.integers(0, 10_000))
def test_the_fitted_scale_is_the_bottom_of_the_parabola(seed: int) -> None:
    form, weight, grid = problem(seed, bits=3)
    codes = grid.nearest(weight)
    fitted = fitted_scale(form, weight, codes, grid.scale)
    assert (fitted > 0).all()
    least = form.values(codes * fitted - weight)
    assert (least <= form.values(codes * grid.scale - weight) + 1e-9).all()
    moved = fitted != grid.scale
    for factor in (0.99, 1.01):
        higher = form.values(codes * fitted * factor - weight)
        assert (higher[moved[:, :, 0]] >= least[moved[:, :, 0]]).all()


def test_a_channel_that_no_positive_scale_helps_keeps_its_own() -> None:
    form = Quadratic(torch.eye(2)[None], torch.zeros(1, 3, 2))
    weight = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]])
    codes = torch.tensor([[[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]]])
    found = fitted_scale(form, weight, codes, torch.full((1, 3, 1), 0.5))
    assert found.flatten().tolist() == [0.5, 0.5, 2.0]
