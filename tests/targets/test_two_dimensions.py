from __future__ import annotations

import pytest
import torch
from torch import fx

from fxmpq.targets.two_dimensions import IN_TWO_DIMENSIONS, geometry_of_two

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "geometry"),
    [
        (aten.conv1d.default, ()),
        (aten.conv1d.default, ([2], [1])),
        (aten.conv1d.default, ([2], [3], [2], 2)),
        (aten.conv1d.padding, ([1], "same", [2], 2)),
        (aten.conv_transpose1d.default, ([3], [1], [2], 2, [2])),
    ],
    ids=str,
)
def test_two_dimensions_compute_what_one_does(target: object, geometry: tuple[object, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    grouped = 2 in geometry
    x, bias = torch.randn(2, 4, 9, generator=generator), torch.randn(4, generator=generator)
    weight = torch.randn(4, 2 if grouped else 4, 3, generator=generator)
    graph = fx.Graph()
    names = [graph.placeholder(name) for name in ("x", "weight", "bias")]
    conv = graph.call_function(target, (*names, *geometry))
    expected = target(x, weight, bias, *geometry)
    wide = IN_TWO_DIMENSIONS[target]
    found = wide(x.unsqueeze(2), weight.unsqueeze(2), bias, *geometry_of_two(conv)).squeeze(2)
    torch.testing.assert_close(found, expected)
