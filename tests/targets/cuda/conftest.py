"""Layers made by hand, as the rewrites of target `cuda` read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer
from fxmpq.targets.cuda.weighted import WeightedLayer, Window


def weighted_layer(
    precision: str,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    window: Window | None = None,
) -> WeightedLayer:
    kind = "linear" if window is None else "conv"
    layer = Layer("layer", kind, "node", "layer.weight", 0, tuple(codes.shape), 0)
    return WeightedLayer(
        layer=layer,
        node=fx.Graph().placeholder("node"),
        precision=Precision.parse(precision),
        codes=codes,
        scale=scale,
        bias=bias,
        window=window,
        dtype=torch.float32,
    )


@pytest.fixture(scope="session")
def weighted() -> Callable[..., WeightedLayer]:
    """Makes a layer: `weighted(precision, codes, scale, bias, window)`."""
    return weighted_layer
