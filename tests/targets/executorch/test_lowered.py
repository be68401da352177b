from __future__ import annotations

import logging

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
from fxmpq.targets.executorch.sizes import FreeSizes


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * 2


class Coded(nn.Module):
    """Dequantizes its input for each channel, which XNNPACK does for weights alone."""

    def forward(self, codes: Tensor) -> Tensor:
        scales, zeros = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)
        return torch.ops.quantized_decomposed.dequantize_per_channel(
            codes, scales, zeros, 0, -128, 127, torch.int8
        )


def test_a_program_with_bounds_takes_all_sizes_within() -> None:
    with quiet_torch():
        program = export(Doubled(), (torch.ones(2, 3),), dynamic_shapes=({0: Dim("n", max=4)},))
    before, handlers = torch.random.get_rng_state(), list(logging.root.handlers)
    loaded = ExecutorchModel(lower_program(program).data, FreeSizes(({0: 4},), (True,)))
    # Nothing that the whole process shares is left changed.
    assert torch.equal(torch.random.get_rng_state(), before)
    assert logging.root.handlers == handlers
    for rows in (1, 4, 9):
        x = torch.linspace(-2, 2, rows * 3).reshape(rows, 3)
        (found,) = loaded([x])
        assert torch.allclose(found, torch.sigmoid(x) * 2, atol=1e-6)


def test_codes_outside_of_xnnpack_are_refused() -> None:
    with quiet_torch():
        program = export(Coded(), (torch.ones(2, 3, dtype=torch.int8),))
    with pytest.raises(TargetError, match="XNNPACK leaves .*dequantize_per_channel.* outside"):
        lower_program(program)
