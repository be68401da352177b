from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.quantizers.codes import dequantize
from fxmpq.quantizers.floating import fake_quantize_float, float_codes
from fxmpq.quantizers.integer import fake_quantize_activation
from fxmpq.quantizers.scales import scale_shape, spread_scale
from fxmpq.targets.cuda import arithmetic
from fxmpq.targets.cuda.arithmetic import (
    channels_first,
    dequantized,
    e4m3_product,
    int4_product,
    int8_product,
    looked_up,
    padded_rows,
    patches,
    to_e4m3,
    to_int8,
)
from fxmpq.targets.cuda.rewrite_int4 import packed_int4
from fxmpq.targets.cuda.weighted import in_rows

UINT8 = NumberFormat(8, Scheme.AFFINE)
E4M3 = NumberFormat(8, Scheme.E4M3)
SIZES = st.integers(1, 12)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def int8(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=drawn(seed), dtype=torch.int8)


@given(st.floats(2**-12, 8, width=32), st.integers(0, 255), st.integers(0, 10**6))
def test_int8_codes_are_those_of_the_simulation(scale: float, zero_point: int, seed: int) -> None:
    x = 200 * scale * torch.randn(64, generator=drawn(seed))
    inverse = float(1 / torch.tensor(scale))
    codes = to_int8(x, inverse, zero_point - 128)
    found = (codes.int() - (zero_point - 128)) * torch.tensor(scale)
    assert torch.equal(found, fake_quantize_activation(x, scale, zero_point, UINT8))


@given(st.floats(2**-12, 8, width=32), st.integers(0, 10**6))
def test_e4m3_codes_are_those_of_the_simulation(scale: float, seed: int) -> None:
    x = 300 * scale * torch.randn(64, generator=drawn(seed))
    found = to_e4m3(x, scale).view(torch.float8_e4m3fn).float() * scale
    assert torch.equal(found, fake_quantize_float(x, scale, E4M3))


@given(SIZES, SIZES, SIZES, st.integers(2, 20), st.integers(1, 9), st.integers(0, 9))
def test_int8_products_are_exact(
    rows: int, inner: int, outer: int, least: int, more_inner: int, more_outer: int
) -> None:
    codes, weight = int8((2, rows, inner), rows), int8((outer, inner), outer)
    filled = functional.pad(weight, (0, more_inner, 0, more_outer))
    bias = torch.arange(outer).float()
    scale = torch.full((outer,), 0.5)
    found = int8_product(codes, filled, scale, bias, least, torch.float32)
    # Sums of so few products are exact in float32, and halves of them too.
    expected = (codes.long() @ weight.T.long()).float() * 0.5 + bias
    assert torch.equal(found, expected)


@given(SIZES, SIZES, SIZES, st.integers(0, 9), st.integers(0, 9))
def test_e4m3_products_are_those_of_their_numbers(
    rows: int, inner: int, outer: int, more_inner: int, more_outer: int
) -> None:
    x = torch.randn(rows, inner, generator=drawn(rows))
    w = torch.randn(outer, inner, generator=drawn(outer))
    codes, weight = to_e4m3(x, 1.0), to_e4m3(w, 1.0)
    filled = functional.pad(weight, (0, more_inner, 0, more_outer))
    one, bias = torch.ones(()), torch.zeros(outer)
    found = e4m3_product(codes, filled, torch.ones(outer), bias, one, torch.float32)
    real = [entry.view(torch.float8_e4m3fn).double() for entry in (codes, weight)]
    torch.testing.assert_close(found.double(), real[0] @ real[1].T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 18])
def test_kernels_never_get_fewer_rows_than_they_take(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply = torch._int_mm
    seen = []

    def strict(a: Tensor, b: Tensor) -> Tensor:
        """Checks what torch's sources check on a GPU."""
        seen.append(a.shape[0])
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == b.shape[1] % 8 == 0
        assert a.is_contiguous()
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    codes, weight = int8((rows, 5), 0), int8((3, 5), 1)
    filled = functional.pad(weight, (0, 3, 0, 5))
    found = int8_product(codes, filled, torch.ones(3), torch.zeros(3), 17, torch.float32)
    assert torch.equal(found, (codes.long() @ weight.T.long()).float())
    assert seen == [max(rows, 17)]


def test_rows_that_fit_are_not_copied() -> None:
    x = torch.ones(4, 5, 8)
    assert padded_rows(x, 8, 17).data_ptr() == x.data_ptr()
    assert padded_rows(x, 8, 21).shape == (21, 8)
    assert padded_rows(x, 16, 17).shape == (20, 16)


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
)
def test_patches_are_what_a_convolution_reads(
    rank: int, channels: int, size: int, stride: int, padding: int, dilation: int
) -> None:
    kernel = tuple(size + axis % 2 for axis in range(rank))
    space = tuple(2 * dilation * extent + axis for axis, extent in enumerate(kernel))
    x = torch.randint(-9, 9, (2, channels, *space), generator=drawn(rank)).double()
    weight = torch.randint(-9, 9, (4, channels, *kernel), generator=drawn(size)).double()
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    expected = convolve(x, weight, None, stride, padding, dilation)
    around, each = (padding, padding) * rank, (1,) * rank
    reach = (
        kernel,
        tuple(stride * one for one in each),
        around,
        tuple(dilation * one for one in each),
    )
    found = patches(x.to(torch.int8), *reach, 0).double() @ in_rows(weight).T
    assert torch.equal(channels_first(found, rank), expected)
    single = patches(x[0].to(torch.int8), *reach, 0).double() @ in_rows(weight).T
    assert torch.equal(channels_first(single, rank), expected[0])


def test_convolutions_hand_on_their_channels_last() -> None:
    """The next one's patches are then copied in whole runs."""
    rows = torch.ones(2, 4, 5, 3)
    assert channels_first(rows, 2).is_contiguous(memory_format=torch.channels_last)
    x = channels_first(rows.to(torch.int8), 2)
    found = patches(x, (2, 2), (1, 1), (0,) * 4, (1, 1), 0)
    assert (found.shape, found.is_contiguous()) == ((2, 3, 4, 12), True)


def test_patches_are_filled_with_the_code_of_zero() -> None:
    found = patches(torch.ones(1, 1, 2, dtype=torch.int8), (2,), (1,), (1, 0), (1,), -7)
    assert found.tolist() == [[[-7, 1], [1, 1]]]


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_int4_products_agree_within_bfloat16(block: int) -> None:
    generator = drawn(block)
    codes = torch.randint(-8, 8, (16, 256), generator=generator, dtype=torch.int8)
    scale = torch.rand(16, 256 // block, generator=generator) + 0.5
    x = torch.randn(2, 3, 250, generator=generator)
    pairs = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1)
    stored = pairs.to(torch.bfloat16).contiguous()
    bias = torch.arange(10.0)
    found = int4_product(x, packed_int4(codes), stored, bias, (256, 10), block, torch.float32)
    weight = codes.float() * scale.repeat_interleave(block, 1)
    expected = x @ weight[:10, :250].T + bias
    assert found.shape == (2, 3, 10)
    noise = (found - expected).square().sum() / expected.square().sum()
    assert float(noise) < 10**-4.5
    none = int4_product(x[:0], packed_int4(codes), stored, bias, (256, 10), block, torch.float32)
    assert none.shape == (0, 3, 10)


def test_gpu_kernels_take_what_they_get() -> None:
    """Torch's own shape checks for GPUs, on tensors without values."""
    with FakeTensorMode():
        device = torch.device("cuda")
        codes = torch.empty(3, 5, 32, dtype=torch.uint8, device=device)
        weight = torch.empty(16, 32, dtype=torch.uint8, device=device)
        scale, one = torch.empty(10, device=device), torch.empty((), device=device)
        found = e4m3_product(codes, weight, scale, scale, one, torch.float32)
        assert (found.shape, found.device.type) == ((3, 5, 10), "cuda")
        short = torch.empty(2, 20, dtype=torch.uint8, device=device)
        with pytest.raises(RuntimeError, match="divisible by 16"):
            e4m3_product(short, short, scale, scale, one, torch.float32)
        packed = packed_int4(torch.empty(16, 64, dtype=torch.int8, device=device))
        assert packed.shape == (2, 1, 32, 2)
        stored = torch.empty(2, 16, 2, dtype=torch.bfloat16, device=device)
        x = torch.empty(2, 3, 60, device=device)
        four = int4_product(x, packed, stored, scale, (64, 10), 32, torch.float32)
        assert (four.shape, four.dtype) == ((2, 3, 10), torch.float32)


SHAPES = [("channels", None, (3,)), ("tensor", None, (1,)), ("blocks", 2, (3, 3))]


@pytest.mark.parametrize(("name", "block", "scales"), SHAPES)
@pytest.mark.parametrize("is_float", [False, True])
def test_dequantized_weights_are_those_of_the_simulation(
    name: str, block: int | None, scales: tuple[int, ...], is_float: bool
) -> None:
    precision = {"channels": "", "tensor": "t", "blocks": "b2"}[name]
    kind = f"we4m3{precision}" if is_float else f"w4{precision}"
    number_format = weight_format(kind)
    weight = torch.randn(3, 5, generator=drawn(1))
    codes = float_codes(weight, Scheme.E4M3) if is_float else int8((3, 5), 2) // 16
    scale = torch.rand(scales, generator=drawn(3)) + 0.1
    assert scale_shape((3, 5), 0, number_format.granularity) == scales
    spread = spread_scale(scale, (3, 5), 0, number_format.granularity)
    expected = dequantize(codes, spread, number_format)
    assert torch.equal(dequantized(codes, scale, block), expected)
    indices = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(looked_up(codes, scale, indices, block), expected[indices])


def weight_format(name: str) -> NumberFormat:
    found = Precision.parse(name).weight
    assert found is not None
    return found


def test_results_have_the_models_dtype() -> None:
    codes, weight = int8((2, 3), 0), int8((4, 3), 1)
    found = int8_product(codes, weight, torch.ones(4), torch.zeros(4), 1, torch.bfloat16)
    assert found.dtype is torch.bfloat16
    assert torch.finfo(torch.float8_e4m3fn).max == arithmetic.LARGEST_E4M3
