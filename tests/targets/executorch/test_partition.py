from __future__ import annotations

import pytest
import torch

# Defines `quantized_decomposed`.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torch.export import Dim, export

from fxmpq.errors import TargetError
from fxmpq.graph.export import quiet_torch
from fxmpq.targets.executorch.loaded import ExecutorchModel
from fxmpq.targets.executorch.lowered import lower_program
from fxmpq.targets.executorch.places import Place
from fxmpq.targets.executorch.sizes import FreeSizes


class Stored(nn.Module):
    """A linear layer on real numbers whose weight is 4-bit codes."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(-8, 8, (3, 6), generator=generator, dtype=torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.tensor([0.5, 0.1, 2.0]))
        self.register_buffer("zeros", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scales, self.zeros, 0, -8, 7, torch.int8
        )
        return nn.functional.linear(x * 2, weight, self.bias)


def test_a_layer_of_real_numbers_and_codes_is_handed_over() -> None:
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    model = Stored(None)
    with quiet_torch():
        lowered = lower_program(export(model, (x,)))
    assert lowered.places == {"codes": [Place("aten.linear", 0, 0)]}
    (found,) = ExecutorchModel(lowered.data, FreeSizes(({},), (True,)))([x])
    assert torch.allclose(found, model(x), atol=1e-5)


class Widened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x).unsqueeze(-1) * 2


def test_new_dimensions_beside_two_free_sizes_stay_outside() -> None:
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    sizes = {0: Dim("n", max=4), 1: Dim("m", max=8)}
    with quiet_torch():
        lowered = lower_program(export(Widened(), (x,), dynamic_shapes=(sizes,)))
    (found,) = ExecutorchModel(lowered.data, FreeSizes(({0: 4, 1: 8},), (True,)))([x])
    assert torch.allclose(found, Widened()(x), atol=1e-6)


def test_one_with_a_bias_is_not() -> None:
    with quiet_torch():
        program = export(Stored(torch.ones(3)), (torch.ones(2, 6),))
    with pytest.raises(TargetError, match="XNNPACK leaves .*dequantize_per_channel"):
        lower_program(program)
