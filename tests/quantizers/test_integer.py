from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.integer import fake_quantize_activation, per_channel

WIDTHS = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])
SCALES = st.floats(2.0**-13, 10, width=32)
TENSORS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30).map(torch.tensor)


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 5))
def test_channel_values_broadcast_along_their_axis_only(rank: int, axis: int, size: int) -> None:
    axis %= rank
    shaped = per_channel(torch.arange(size), rank, axis)
    assert shaped.shape == tuple(size if dim == axis else 1 for dim in range(rank))
    assert shaped.flatten().tolist() == list(range(size))


@given(TENSORS, SCALES, WIDTHS, st.floats(0, 1))
def test_activations_land_on_the_grid_and_keep_zero(
    x: torch.Tensor, scale: float, bits: int, place: float
) -> None:
    number_format = NumberFormat(bits, Scheme.AFFINE)
    zero_point = round(place * number_format.qmax)
    quantized = fake_quantize_activation(x, scale, zero_point, number_format)
    codes = quantized.double() / scale + zero_point
    assert torch.allclose(codes, codes.round(), atol=1e-2)
    assert float(codes.min()) >= number_format.qmin - 1e-2
    assert float(codes.max()) <= number_format.qmax + 1e-2
    zero = fake_quantize_activation(torch.zeros(1), scale, zero_point, number_format)
    assert zero.tolist() == [0.0]


@given(TENSORS, SCALES, st.sampled_from([2, 4, 8]))
def test_activations_inside_the_range_move_by_at_most_half_a_step(
    x: torch.Tensor, scale: float, bits: int
) -> None:
    number_format = NumberFormat(bits, Scheme.AFFINE)
    zero_point = number_format.qmax // 2
    low, high = -zero_point * scale, (number_format.qmax - zero_point) * scale
    inside = x.clamp(low, high)
    error = fake_quantize_activation(inside, scale, zero_point, number_format) - inside
    assert float(error.abs().max()) <= scale / 2 * (1 + 1e-5) + 1e-5


def test_the_gradient_is_one_inside_and_zero_outside() -> None:
    x = torch.tensor([-1.0, 0.3, 9.0], requires_grad=True)
    fake_quantize_activation(x, 0.1, 0, NumberFormat(4, Scheme.AFFINE)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0]
