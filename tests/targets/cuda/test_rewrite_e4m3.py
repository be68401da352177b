from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.floating import fake_quantize_float, float_codes, float_values
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.cuda.arithmetic import to_e4m3
from fxmpq.targets.cuda.kernels import KERNELS
from fxmpq.targets.cuda.rewrite_e4m3 import e4m3_operands
from fxmpq.targets.cuda.shape_rules import Alignment, Kernel
from fxmpq.targets.cuda.weighted import WeightedLayer

Layers = Callable[..., WeightedLayer]
SCALED_MM = next(kernel for kernel in KERNELS if kernel.name == "_scaled_mm")
AS_ON_A_GPU = Kernel("_scaled_mm", SCALED_MM.takes, (), {"cpu": SCALED_MM.alignments["cuda"]})


@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from([SCALED_MM, AS_ON_A_GPU]),
    st.booleans(),
)
def test_layers_are_those_of_the_simulation(
    weighted: Layers, rows: int, inner: int, outer: int, kernel: Kernel, is_shared: bool
) -> None:
    generator = torch.Generator().manual_seed(inner)
    x = torch.randn(rows, inner, generator=generator)
    codes = float_codes(40 * torch.randn(outer, inner, generator=generator), Scheme.E4M3)
    scale = torch.rand(1 if is_shared else outer, generator=generator) + 0.01
    bias = torch.randn(outer, generator=generator)
    name = "we4m3tae4m3" if is_shared else "we4m3ae4m3"
    found = e4m3_operands(weighted(name, codes, scale, bias), kernel, ActivationRange(0.007, 0))
    y = found.multiply(to_e4m3(x, 0.007), *found.tensors.values(), *found.settings)
    simulated = fake_quantize_float(x, 0.007, NumberFormat(8, Scheme.E4M3)).double()
    weight = float_values(codes, Scheme.E4M3).double() * scale.reshape(-1, 1)
    largest = (simulated.abs() @ weight.abs().T).max()
    assert (y - simulated @ weight.T - bias).abs().max() <= 1e-5 * (largest + 1)


def test_operands_have_the_sizes_that_the_kernel_takes(weighted: Layers) -> None:
    codes = torch.full((10, 27), 0x38, dtype=torch.uint8)
    kernel = Kernel("_scaled_mm", SCALED_MM.takes, (), {"cpu": Alignment(1, 16, 16)})
    layer = weighted("we4m3ae4m3", codes, torch.ones(10))
    weight = e4m3_operands(layer, kernel, ActivationRange(1.0, 0)).tensors["weight"]
    assert weight is not None
    assert weight.shape == (16, 32)
    numbers = weight.view(torch.float8_e4m3fn).float()
    assert numbers[:10, :27].eq(1).all()
    assert numbers.sum() == 270
