from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.targets.cuda.arithmetic import dequantized
from fxmpq.targets.cuda.kernels import KERNELS
from fxmpq.targets.cuda.rewrite_int4 import in_pairs, int4_operands
from fxmpq.targets.cuda.weighted import WeightedLayer

Layers = Callable[..., WeightedLayer]
INT4PACK = next(kernel for kernel in KERNELS if kernel.name == "_weight_int4pack_mm")


def layer_of(
    weighted: Layers, precision: str, outer: int, inner: int, *, has_bias: bool = True
) -> WeightedLayer:
    generator = torch.Generator().manual_seed(inner)
    bits = int(precision[1])
    codes = torch.randint(
        -(1 << (bits - 1)), 1 << (bits - 1), (outer, inner), generator=generator, dtype=torch.int8
    )
    _, is_blocked, block = precision.partition("b")
    shape = (outer, -(-inner // int(block))) if is_blocked else (outer,)
    scale = torch.rand((1,) if precision.endswith("t") else shape, generator=generator) + 0.1
    bias = torch.randn(outer, generator=generator) if has_bias else None
    return weighted(precision, codes, scale, bias)


def expected(layer: WeightedLayer, x: Tensor) -> Tensor:
    y = x @ dequantized(layer.codes, layer.scale, layer.block).T
    return y if layer.bias is None else y + layer.bias


@given(
    st.sampled_from(["w4b32", "w4b64", "w4b128", "w4b256", "w4", "w4t", "w3", "w2b32", "w2"]),
    st.integers(1, 40),
    st.integers(1, 300),
    st.booleans(),
)
def test_layers_agree_within_bfloat16(
    weighted: Layers, precision: str, outer: int, inner: int, has_bias: bool
) -> None:
    layer = layer_of(weighted, precision, outer, inner, has_bias=has_bias)
    found = int4_operands(layer, INT4PACK, None)
    x = torch.randn(2, 3, inner, generator=torch.Generator().manual_seed(1))
    y = found.multiply(x, *found.tensors.values(), *found.settings)
    wanted = expected(layer, x)
    assert y.shape == wanted.shape
    weight = dequantized(layer.codes, layer.scale, layer.block)
    usual = x.norm() * weight.norm() / inner**0.5
    assert (y - wanted).norm() <= 0.02 * usual


def test_whole_blocks_are_asked_for(weighted: Layers) -> None:
    found = int4_operands(layer_of(weighted, "w4b64", 10, 100), INT4PACK, None)
    packed, scales = found.tensors["packed"], found.tensors["scales"]
    assert packed is not None
    assert scales is not None
    # 100 values are filled up to two blocks of 64, 10 channels to a tile of 16, two codes a byte.
    assert packed.numel() == 128 * 16 / 2
    assert scales.shape == (2, 16, 2)
    assert scales.is_contiguous()
    assert not scales[..., 1].any()
    assert found.settings == ((128, 10), 64, torch.float32)


@pytest.mark.parametrize("seed", [0, 1])
def test_pairs_hold_the_first_code_in_their_upper_half(seed: int) -> None:
    codes = torch.randint(0, 16, (3, 8), generator=torch.Generator().manual_seed(seed))
    pairs = in_pairs(codes)
    assert pairs.dtype is torch.uint8
    assert torch.equal(pairs // 16, codes[:, ::2])
    assert torch.equal(pairs % 16, codes[:, 1::2])
