from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.granularity import Dynamic
from fxmpq.quantizers.dynamic import dynamic_grid, fake_quantize_dynamic

widths = st.sampled_from([2, 3, 4, 8, 16])
tensors = st.builds(
    lambda seed, scale, shift: draw(4, 9, seed=seed) * scale + shift,
    st.integers(0, 10_000),
    st.floats(1e-3, 1e3),
    st.sampled_from([-9.0, 0.0, 0.1, 9.0]),
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def affine(bits: int, dynamic: Dynamic) -> NumberFormat:
    return NumberFormat(bits, Scheme.AFFINE, dynamic=dynamic)


PER_TENSOR, PER_ROW = affine(8, Dynamic.TENSOR), affine(8, Dynamic.ROW)


@given(tensors, widths)
def test_the_grid_is_that_of_onnx(x: Tensor, bits: int) -> None:
    scale, zero_point = dynamic_grid(x, affine(bits, Dynamic.TENSOR))
    values, zero, largest = x.numpy(), np.float32(0), np.float32(2**bits - 1)
    low, high = min(values.min(), zero), max(values.max(), zero)
    expected = (high - low) / largest
    assert scale.dtype is torch.float32
    assert scale.numpy() == expected
    assert zero_point.numpy() == np.rint(np.clip(zero - low / expected, zero, largest))


@given(tensors, widths, st.sampled_from(Dynamic))
def test_every_value_is_rounded_to_a_neighbour_and_zero_stays(
    x: Tensor, bits: int, dynamic: Dynamic
) -> None:
    x[:, 3] = 0.0
    found = affine(bits, dynamic)
    scale, zero_point = dynamic_grid(x, found)
    rounded = fake_quantize_dynamic(x, found)
    codes = rounded / scale + zero_point
    assert torch.allclose(codes, codes.round(), atol=0.02 if bits == 16 else 1e-3)
    assert float(codes.round().min()) >= found.qmin
    assert float(codes.round().max()) <= found.qmax
    # The rounding of the zero point moves the ends of the range by up to half a step.
    assert bool(((rounded - x).abs() <= scale * 1.01).all())
    assert bool((rounded[:, 3] == 0).all())


@given(tensors, widths)
def test_a_row_is_quantized_as_if_it_were_alone(x: Tensor, bits: int) -> None:
    whole, rows = (affine(bits, dynamic) for dynamic in (Dynamic.TENSOR, Dynamic.ROW))
    alone = torch.stack([fake_quantize_dynamic(row, whole) for row in x])
    assert torch.equal(fake_quantize_dynamic(x, rows), alone)
    deep = x.reshape(2, 2, 9)
    assert torch.equal(fake_quantize_dynamic(deep, rows).reshape(4, 9), alone)


@given(tensors, widths, st.sampled_from(Dynamic))
def test_a_symmetric_grid_is_the_smallest_that_reaches_both_ends(
    x: Tensor, bits: int, dynamic: Dynamic
) -> None:
    found, middle = affine(bits, dynamic), 2 ** (bits - 1)
    scale, zero_point = dynamic_grid(x, found, is_symmetric=True)
    assert bool((zero_point == middle).all())
    assert zero_point.shape == scale.shape == dynamic_grid(x, found)[0].shape
    rows = x.double().reshape(1, -1) if dynamic is Dynamic.TENSOR else x.double()
    needed = torch.maximum(rows.amax(1) / (middle - 1), -rows.amin(1) / middle)
    assert torch.allclose(scale.double().flatten(), needed)
    rounded = fake_quantize_dynamic(x, found, is_symmetric=True)
    assert bool(((rounded - x).abs() <= scale * (0.52 if bits == 16 else 0.501)).all())


def test_halves_go_to_even_codes() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 255.0])
    assert fake_quantize_dynamic(x, PER_TENSOR).tolist() == [0.0, 2.0, 2.0, 255.0]
    # low = -127.5 puts the zero point half way between 127 and 128.
    assert float(dynamic_grid(torch.tensor([-127.5, 127.5]), PER_TENSOR)[1]) == 128.0
    assert float(dynamic_grid(torch.tensor([-126.5, 128.5]), PER_TENSOR)[1]) == 126.0


@pytest.mark.parametrize("dynamic", list(Dynamic))
@pytest.mark.parametrize("value", [0.0, 1e-44, -1e-44])
def test_a_range_of_no_width_gives_zeros(dynamic: Dynamic, value: float) -> None:
    found = fake_quantize_dynamic(torch.full((2, 3), value), affine(8, dynamic))
    assert found.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("dynamic", list(Dynamic))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_small_shapes_stay(dynamic: Dynamic, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 2.5)
    assert torch.equal(fake_quantize_dynamic(x, affine(8, dynamic)), x)


@pytest.mark.parametrize("dynamic", list(Dynamic))
def test_gradients_pass_as_they_are(dynamic: Dynamic) -> None:
    x, weights = draw(3, 5).requires_grad_(), draw(3, 5, seed=1)
    found = fake_quantize_dynamic(x, affine(3, dynamic))
    assert torch.equal(found, fake_quantize_dynamic(x.detach(), affine(3, dynamic)))
    (found * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)


def test_the_tensor_itself_is_left_alone() -> None:
    x = draw(3, 5)
    before = x.clone()
    fake_quantize_dynamic(x, PER_ROW)
    assert torch.equal(x, before)
    assert Precision.parse("w8a8dt").activation == PER_ROW
