from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.histogram import StreamingHistogram
from fxmpq.quantizers.ranges import ActivationRange

WIDTHS = [2, 3, 4, 6, 8, 16]
SHAPES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": lambda g: torch.randn(20_000, generator=g),
    "relu": lambda g: torch.randn(20_000, generator=g).relu(),
    "negative": lambda g: -torch.rand(20_000, generator=g) - 0.5,
    "shifted": lambda g: torch.randn(20_000, generator=g) * 0.1 + 3,
    "heavy tail": lambda g: torch.randn(20_000, generator=g) ** 5,
    "two values": lambda g: torch.randint(0, 2, (20_000,), generator=g) * 3.0 - 1,
}
FLOATS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30)


def affine(bits: int) -> NumberFormat:
    return NumberFormat(bits, Scheme.AFFINE)


def draw(shape: str, seed: int = 0) -> Tensor:
    return SHAPES[shape](torch.Generator().manual_seed(seed))


def histogram_of(values: Tensor | Sequence[float]) -> StreamingHistogram:
    histogram = StreamingHistogram()
    histogram.update(torch.as_tensor(values, dtype=torch.float32))
    return histogram


def ends(found: ActivationRange, number_format: NumberFormat) -> tuple[float, float]:
    """The smallest and the largest number that the codes reach."""
    return (
        (number_format.qmin - found.zero_point) * found.scale,
        (number_format.qmax - found.zero_point) * found.scale,
    )
