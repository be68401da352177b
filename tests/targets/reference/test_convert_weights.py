from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.quantizers.weight_scale import mse_weight_scales
from fxmpq.targets.convert import convert
from fxmpq.targets.reference.convert import PackedWeight

Made = Callable[..., fx.GraphModule]
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


class Alike(nn.Module):
    """Two layers whose names differ only in where the dot is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_b = nn.Module(), nn.Module()
        self.a.b_c, self.a_b.c = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a_b.c(self.a.b_c(x).relu())


@pytest.fixture
def count_packed(
    calibrated: Made, uniform: Made, tmp_path: Path
) -> Callable[[nn.Module, Tensor], int]:
    """Converts a model, which has to be exact, and counts its packed weights."""

    def count(model: nn.Module, batch: Tensor) -> int:
        graph = uniform(calibrated(trace(model, batch), [batch]))
        made = convert(graph, output=tmp_path, verify=[batch])
        assert made.sqnr_db == math.inf
        assert isinstance(made.module, nn.Module)
        return sum(isinstance(module, PackedWeight) for module in made.module.modules())

    return count


def test_a_shared_weight_is_packed_once(
    count_packed: Callable[[nn.Module, Tensor], int], tied_head: nn.Module
) -> None:
    assert count_packed(tied_head, torch.arange(8).reshape(2, 4)) == 1


def test_names_that_meet(count_packed: Callable[[nn.Module, Tensor], int]) -> None:
    assert count_packed(Alike(), torch.randn(6, 4)) == 2


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_packed_weight_unpacks_to_what_was_packed(bits: int) -> None:
    number_format = NumberFormat(bits)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(
        number_format.qmin, number_format.qmax + 1, (3, 5, 2), generator=generator
    )
    scale = torch.rand(5, generator=generator)
    weight = PackedWeight(codes, scale, number_format, axis=1)
    assert torch.equal(weight(), codes.float() * scale.reshape(1, 5, 1))
    assert set(weight.state_dict()) == {"packed", "scale"}


@pytest.mark.parametrize("name", ["w4", "w4b16", "we4m3", "w16"])
def test_a_packed_weight_keeps_the_memory_layout_and_so_the_bits(name: str) -> None:
    number_format = Precision.parse(name).weight
    assert number_format is not None
    weight = torch.randn(24, 8, generator=torch.Generator().manual_seed(3)).t()
    quantizer = WeightQuantizer("w", [number_format], 0)
    quantizer.set_scale(number_format, mse_weight_scales(weight, [number_format], 0)[0])
    simulated = quantizer.quantize(weight, number_format)
    codes = quantizer.codes(weight, number_format)
    unpacked = PackedWeight(codes, quantizer.scale(number_format), number_format, 0)()
    assert torch.equal(unpacked, simulated)
    assert unpacked.stride() == simulated.stride() == (1, 8)
