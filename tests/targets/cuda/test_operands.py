from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.cuda.kernels import KERNELS
from fxmpq.targets.cuda.operands import (
    Operands,
    filled_up,
    float_bias,
    product_scale,
    tried_operands,
)
from fxmpq.targets.cuda.rewrite import MAKERS
from fxmpq.targets.cuda.weighted import WeightedLayer

Layers = Callable[..., WeightedLayer]
GRID = ActivationRange(0.5, 100)
BY_PRECISION = {"w8a8": "_int_mm", "we4m3ae4m3": "_scaled_mm", "w4b32": "_weight_int4pack_mm"}


def layer_at(precision: str, weighted: Layers, inner: int = 64) -> WeightedLayer:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (10, inner), generator=generator, dtype=torch.int8)
    if precision == "we4m3ae4m3":
        codes = codes.float().to(torch.float8_e4m3fn).view(torch.uint8)
    blocks = (10, inner // 32) if precision == "w4b32" else (10,)
    scale = torch.rand(blocks, generator=generator) + 0.1
    return weighted(precision, codes, scale, torch.arange(10.0))


def made(found: WeightedLayer) -> Callable[[], Operands]:
    name = BY_PRECISION[str(found.precision)]
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    return partial(MAKERS[name], found, kernel, GRID)


@pytest.mark.parametrize("precision", BY_PRECISION)
def test_kernels_that_work_pass_their_trial(precision: str, weighted: Layers) -> None:
    found = layer_at(precision, weighted)
    assert isinstance(tried_operands(made(found), found), Operands)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, NotImplementedError])
def test_what_a_kernel_says_against_a_shape_is_told(
    error: type[Exception], weighted: Layers
) -> None:
    def refuses() -> Operands:
        raise error("expect N to be dividable by 16\nException raised from ...")

    found = layer_at("w8a8", weighted)
    assert tried_operands(refuses, found) == "expect N to be dividable by 16"


def test_other_errors_are_not_swallowed(weighted: Layers) -> None:
    def broken() -> Operands:
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        tried_operands(broken, layer_at("w8a8", weighted))


@pytest.mark.parametrize("precision", BY_PRECISION)
@pytest.mark.parametrize(
    "spoil", [torch.zeros_like, lambda y: y + 500, lambda y: y.flip(-1), lambda y: y * torch.nan]
)
def test_kernels_that_return_wrong_numbers_are_found_out(
    precision: str, spoil: Callable[[Tensor], Tensor], weighted: Layers
) -> None:
    found = layer_at(precision, weighted)
    operands = made(found)()
    spoilt = Operands(
        lambda *operands_: spoil(operands.multiply(*operands_)),
        operands.tensors,
        operands.settings,
        operands.row,
        operands.numbers,
    )
    assert tried_operands(lambda: spoilt, found) == "it returns wrong numbers"


def test_a_layer_of_zeros_passes(weighted: Layers) -> None:
    found = weighted("w8a8", torch.zeros(3, 8, dtype=torch.int8), torch.ones(3))
    assert isinstance(tried_operands(made(found), found), Operands)


def test_scales_and_biases_have_an_entry_a_channel(weighted: Layers) -> None:
    codes = torch.ones(3, 2, dtype=torch.int8)
    one = weighted("w8ta8", codes, torch.tensor([0.25]))
    assert product_scale(one, GRID).tolist() == [0.125] * 3
    assert float_bias(one).tolist() == [0.0] * 3
    several = weighted("w8a8", codes, torch.tensor([1.0, 2.0, 4.0]), torch.arange(3.0))
    assert product_scale(several, GRID).tolist() == [0.5, 1.0, 2.0]
    assert float_bias(several).tolist() == [0.0, 1.0, 2.0]


def test_matrices_are_filled_up_on_the_right_and_below() -> None:
    found = filled_up(torch.tensor([[1, 2]], dtype=torch.uint8), (2, 3))
    assert found.tolist() == [[1, 2, 0], [0, 0, 0]]
    assert found.dtype is torch.uint8
