from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmpq.graph.state import copy_graph
from fxmpq.refinement.channel_statistics import ChannelStatistics, channel_statistics
from fxmpq.refinement.scalable_pairs import channel_dimension
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk

Subject = Any


def channels(view: LayerView, values: list[Tensor]) -> Tensor:
    """Outputs of all batches, `float64`, shape `[channels, values]`."""
    rows = []
    for value in values:
        axis = channel_dimension(view.layer, value.dim())
        rows.append(value.double().movedim(axis, 0).reshape(value.shape[axis], -1))
    return torch.cat(rows, dim=1)


def outputs(view: LayerView) -> tuple[Tensor, Tensor]:
    """Float and quantized outputs of a layer, `[channels, values]`."""
    with torch.no_grad():
        expected = [view.float_output(batch) for batch in range(len(view))]
        found = [view.quantized_output(batch) for batch in range(len(view))]
    return channels(view, expected), channels(view, found)


def variance(values: Tensor) -> Tensor:
    return values.var(dim=1, correction=0)


def test_they_are_the_moments_of_all_outputs_together(subject: Subject) -> None:
    seen = 0
    for view in Walk(copy_graph(subject.planned), subject.batches).layers():
        if view.operator.kind == "embedding":
            continue
        expected, found = outputs(view)
        statistics = channel_statistics(view)
        size = expected.square().mean(dim=1) + found.square().mean(dim=1)
        assert statistics.count == expected.shape[1]
        errors = {
            "mean": (statistics.mean - expected.mean(dim=1)) ** 2,
            "error mean": (statistics.error_mean - (found - expected).mean(dim=1)) ** 2,
            "variance": statistics.variance - variance(expected),
            "error variance": statistics.error_variance - variance(found - expected),
            "quantized mean": (statistics.quantized_mean - found.mean(dim=1)) ** 2,
            "quantized variance": statistics.quantized_variance - variance(found),
        }
        for name, error in errors.items():
            assert (error.abs() <= 1e-5 * size).all(), name
        assert statistics.error == pytest.approx(view.error(), rel=1e-4)
        seen += 1
    assert seen > 1


def test_the_error_after_scaling_is_that_of_the_scaled_output(subject_of: Callable) -> None:
    subject = subject_of("conv")
    generator = torch.Generator().manual_seed(0)
    for view in Walk(copy_graph(subject.planned), subject.batches).layers():
        expected, found = outputs(view)
        statistics = channel_statistics(view)
        factors = torch.rand(len(expected), generator=generator, dtype=torch.float64) + 0.5
        scaled = factors[:, None] * (found - found.mean(dim=1, keepdim=True))
        scaled += expected.mean(dim=1, keepdim=True)
        wanted = float((scaled - expected).square().sum() / expected.square().sum())
        assert statistics.error_after(factors) == pytest.approx(wanted, rel=1e-4)


class OfTheMean(nn.Module):
    """Its layer reads a vector without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] + self.fc(x.mean(0))


def test_a_sample_alone_has_channels_too(plan_of: Callable) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(5, 4), torch.randn(3, 4)]
    graph = plan_of(OfTheMean(), batches, ("w3a8",)).planned
    view = next(Walk(graph, batches).layers())
    statistics = channel_statistics(view)
    expected, found = outputs(view)
    assert statistics.count == 2
    assert expected.shape == (3, 2)
    assert torch.allclose(statistics.mean, expected.mean(dim=1), atol=1e-6)
    assert torch.allclose(statistics.error_mean, (found - expected).mean(dim=1), atol=1e-6)


def test_an_error_without_a_signal_is_infinite_and_none_is_zero() -> None:
    zeros, ones = torch.zeros(2).double(), torch.ones(2).double()
    silent = ChannelStatistics(4, zeros, zeros, ones, zeros, zeros)
    assert silent.error == math.inf
    assert ChannelStatistics(4, zeros, zeros, zeros, zeros, zeros).error == 0.0
