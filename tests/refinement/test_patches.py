from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fxmpq.graph.trace import trace
from fxmpq.refinement import patches
from fxmpq.refinement.patches import Rows, Window, conv_rows, linear_rows

CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (3, 7, 6)),
    "padded": (nn.Conv2d(3, 4, 3, padding=(2, 1)), (3, 7, 6)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 7, 6)),
    "strided along rows": (nn.Conv2d(3, 4, 3, stride=(1, 2), padding=1), (3, 7, 6)),
    "strided across rows": (nn.Conv2d(3, 4, 3, stride=(2, 1), padding=1), (3, 7, 6)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding=1), (3, 7, 6)),
    "dilated along rows": (nn.Conv2d(3, 4, 3, dilation=(1, 2)), (3, 7, 6)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (4, 5, 5)),
    "pointwise": (nn.Conv2d(4, 5, 1), (4, 3, 5)),
    "taller than its output": (nn.Conv2d(2, 3, (5, 1)), (2, 6, 4)),
    "same": (nn.Conv2d(3, 4, (3, 2), padding="same"), (3, 7, 6)),
    "valid": (nn.Conv2d(3, 4, (2, 3), padding="valid"), (3, 5, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "conv1d strided": (nn.Conv1d(3, 4, 3, stride=2), (3, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2, padding=1, bias=False), (2, 4, 4, 3)),
}


@cache
def window_of(name: str) -> Window:
    """As the exported call of the layer says."""
    layer, shape = CONVOLUTIONS[name]
    graph = trace(nn.Sequential(layer), torch.zeros(2, *shape))
    node = next(node for node in graph.graph.nodes if node.op == "call_function")
    return Window.of(node, layer.weight)


def unfolded(rows: Rows) -> Tensor:
    """Patches from rows, shape `[groups, weights, outputs * rest]`, weights as in the weight."""
    groups, values = rows.values.shape[:2]
    taps = [rows.between(tap, tap + rows.outputs) for tap in range(rows.taps)]
    stacked = torch.stack([tap.reshape(groups, -1, rows.places, tap.shape[2]) for tap in taps], 2)
    assert stacked.shape[1:4].numel() == values * rows.taps
    return stacked.flatten(1, 3)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_the_weight_are_the_outputs(name: str) -> None:
    layer, shape = CONVOLUTIONS[name]
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    weight = layer.weight.detach()
    window = window_of(name)
    output = layer(x).detach()
    if layer.bias is not None:
        output = output - layer.bias.detach().reshape(-1, *[1] * (output.dim() - 2))
    (rows,) = conv_rows(window, x, output)
    by_group = weight.reshape(window.groups, weight.shape[0] // window.groups, -1)
    assert torch.allclose(by_group @ unfolded(rows), rows.residual, atol=1e-5)
    assert rows.residual.shape[2] == output[:, 0].numel()


def test_rows_below_each_other_are_shared_where_they_can_be() -> None:
    taps = {name: window_of(name).taps for name in CONVOLUTIONS}
    assert taps["plain"] == taps["padded"] == taps["strided along rows"] == taps["conv1d"] == 3
    assert taps["dilated along rows"] == 3
    assert taps["taller than its output"] == 5
    assert taps["strided"] == taps["strided across rows"] == taps["dilated"] == 1
    assert taps["pointwise"] == taps["conv1d strided"] == 1


@pytest.mark.parametrize("name", ["padded", "strided", "grouped"])
def test_pieces_of_few_samples_together_are_the_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, shape = CONVOLUTIONS[name]
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    window = window_of(name)
    (whole,) = conv_rows(window, x, layer(x).detach())
    monkeypatch.setattr(patches, "_VALUES_AT_ONCE", 1)
    pieces = list(conv_rows(window, x, layer(x).detach()))
    assert len(pieces) == 5
    both = ([whole], pieces)
    second, cross = (
        [sum(f(piece) for piece in found) for found in both]
        for f in (
            lambda piece: unfolded(piece) @ unfolded(piece).mT,
            lambda piece: piece.residual @ unfolded(piece).mT,
        )
    )
    assert torch.allclose(*second, rtol=1e-4, atol=1e-4)
    assert torch.allclose(*cross, rtol=1e-4, atol=1e-4)


def test_one_sample_needs_no_dimension_of_samples() -> None:
    layer, shape = CONVOLUTIONS["grouped"]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    window = window_of("grouped")
    (alone,) = conv_rows(window, x, layer(x[None])[0].detach())
    (batch,) = conv_rows(window, x[None], layer(x[None]).detach())
    assert torch.equal(alone.values, batch.values)
    assert torch.equal(alone.residual, batch.residual)


@pytest.mark.parametrize(
    ("shape", "at_once"), list(itertools.product([(6,), (4, 6), (4, 2, 6)], [1, 999]))
)
def test_linear_inputs_are_one_row_whatever_their_shape(
    shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "_VALUES_AT_ONCE", at_once)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    found = list(linear_rows(x, x @ weight.T))
    assert {piece.outputs for piece in found} == {1}
    assert sum(piece.residual.shape[2] for piece in found) == x.numel() // 6
    for piece in found:
        assert torch.allclose(weight @ unfolded(piece)[0], piece.residual[0], atol=1e-5)
