from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.cuda.arithmetic import channels_first, patches
from fxmpq.targets.cuda.kernels import KERNELS
from fxmpq.targets.cuda.rewrite_int8 import int8_operands
from fxmpq.targets.cuda.shape_rules import Alignment, Kernel
from fxmpq.targets.cuda.weighted import WeightedLayer, Window

Layers = Callable[..., WeightedLayer]
INT_MM = next(kernel for kernel in KERNELS if kernel.name == "_int_mm")
AS_ON_A_GPU = Kernel("_int_mm", INT_MM.takes, (), {"cpu": INT_MM.alignments["cuda"]})
POWERS = st.integers(-3, 3).map(lambda exponent: 2.0**exponent)


def drawn(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)


def real(codes: Tensor, grid: ActivationRange) -> Tensor:
    """What signed codes stand for."""
    return (codes.double() + 128 - grid.zero_point) * grid.scale


@pytest.mark.parametrize("kernel", [INT_MM, AS_ON_A_GPU])
@given(
    rows=st.integers(1, 20),
    inner=st.integers(1, 20),
    outer=st.integers(1, 20),
    zero_point=st.integers(0, 255),
    scale=POWERS,
    bits=st.sampled_from([2, 4, 8]),
)
def test_linear_layers_are_exact(
    kernel: Kernel,
    weighted: Layers,
    rows: int,
    inner: int,
    outer: int,
    zero_point: int,
    scale: float,
    bits: int,
) -> None:
    """With scales that are powers of two nothing is rounded, so results are equal."""
    grid = ActivationRange(scale, zero_point)
    weight = drawn((outer, inner), -(1 << (bits - 1)), 1 << (bits - 1), outer)
    scales = 2.0 ** torch.arange(outer).remainder(5)
    bias = torch.arange(outer).float()
    found = int8_operands(weighted(f"w{bits}a8", weight, scales, bias), kernel, grid)
    codes = drawn((rows, inner), -128, 128, rows)
    y = found.multiply(codes, *found.tensors.values(), *found.settings)
    expected = real(codes, grid) @ (weight.double() * scales[:, None]).T + bias
    assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("kernel", [INT_MM, AS_ON_A_GPU])
@given(
    channels=st.integers(1, 5),
    size=st.integers(1, 3),
    padding=st.integers(0, 2),
    stride=st.integers(1, 2),
    zero_point=st.integers(0, 255),
)
def test_convolutions_are_exact(
    kernel: Kernel,
    weighted: Layers,
    channels: int,
    size: int,
    padding: int,
    stride: int,
    zero_point: int,
) -> None:
    grid = ActivationRange(0.5, zero_point)
    weight = drawn((6, channels, size, size), -128, 128, channels)
    window = Window((size, size), (stride, stride), (padding,) * 4, (1, 1), 1)
    layer = weighted("w8a8", weight, torch.full((6,), 0.25), None, window)
    found = int8_operands(layer, kernel, grid)
    codes = drawn((2, channels, 4, 5), -128, 128, size)
    rows = patches(codes, window.kernel, window.stride, window.padding, (1, 1), found.zero)
    y = channels_first(found.multiply(rows, *found.tensors.values(), *found.settings), 2)
    expected = functional.conv2d(real(codes, grid), weight.double() * 0.25, None, stride, padding)
    assert torch.equal(y.double(), expected)


def test_operands_have_the_sizes_that_the_kernel_takes(weighted: Layers) -> None:
    layer = weighted("w8a8", drawn((10, 27), -128, 128, 0), torch.ones(10))
    kernel = Kernel("_int_mm", INT_MM.takes, (), {"cpu": Alignment(17, 8, 8)})
    found = int8_operands(layer, kernel, ActivationRange(1.0, 3))
    weight = found.tensors["weight"]
    assert weight is not None
    assert weight.shape == (16, 32)
    assert torch.equal(weight[:10, :27], layer.codes)
    assert weight.abs().sum() == layer.codes.abs().sum(dtype=torch.int64)
    assert found.settings == (17, torch.float32)
    assert found.zero == 3 - 128
