from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fxmpq.refinement import moments as module
from fxmpq.refinement.moments import Moments, layer_moments
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk

MODELS = {
    "rows shared": (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 6)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (4, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 7, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 7, 6)),
    "few rows": (nn.Conv2d(4, 6, (5, 2)), (4, 6, 6)),
    "same": (nn.Conv2d(4, 6, (3, 2), padding="same"), (4, 7, 6)),
    "conv1d": (nn.Conv1d(4, 6, 4, padding=2), (4, 9)),
    "conv3d": (nn.Conv3d(4, 6, 2, padding=1, bias=False), (4, 4, 4, 3)),
    "linear": (nn.Linear(4, 6), (4,)),
    "linear over positions": (nn.Linear(4, 6, bias=False), (3, 4)),
}


def batches_of(shape: tuple[int, ...]) -> list[Tensor]:
    """Uneven batches whose mean is far from zero and differs by position."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(shape, generator=generator)
    return [mean + torch.randn(n, *shape, generator=generator) for n in (5, 2, 3)]


def second_layer(
    plan_of: Callable[..., object], layer: nn.Module, shape: tuple[int, ...]
) -> LayerView:
    """The walk's view of a layer behind another one, so that its input carries errors."""
    kind = type(layer)
    torch.manual_seed(1)
    first = nn.Linear(4, 4) if kind is nn.Linear else kind(4, 4, 1)
    subject = plan_of(nn.Sequential(first, nn.Hardtanh(-1, 2), layer), batches_of(shape), ("w3a4",))
    views: Iterator[LayerView] = Walk(subject.planned, subject.batches).layers()
    next(views)
    return next(views)


def changes(found: Moments, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(found.cross.shape, generator=generator, dtype=torch.float64)
    shift = torch.randn(found.residual.shape, generator=generator, dtype=torch.float64)
    return 0.2 * change, 0.3 * shift


def explicit(view: LayerView, change: Tensor, shift: Tensor) -> tuple[Tensor, float]:
    """Squared error per channel and the signal's power, both sums, from outputs in `float64`."""
    bias = torch.zeros(view.weight.shape[0]) if view.float_bias is None else view.float_bias
    weight = view.weight.double() + change.reshape(view.weight.shape)
    axis = -1 if view.operator.kind == "linear" else 1
    noise, signal = torch.zeros(len(bias), dtype=torch.float64), 0.0
    for batch in range(len(view)):
        x, u = view.float_input(batch).double(), view.input(batch).double()
        exact = view.output(x, view.weight.double(), bias.double())
        found = view.output(u, weight, bias.double() + shift.reshape(-1))
        noise += (found - exact).square().movedim(axis, 0).flatten(1).sum(1)
        signal += float(exact.square().sum())
    return noise, signal


@pytest.mark.parametrize("name", MODELS)
def test_the_error_is_that_of_the_outputs(name: str, plan_of: Callable[..., object]) -> None:
    with torch.no_grad():
        view = second_layer(plan_of, *MODELS[name])
        found = layer_moments(view)
        for seed in range(3):
            change, shift = changes(found, seed)
            noise, signal = explicit(view, change, shift)
            assert found.error(change, shift) == pytest.approx(
                float(noise.sum()) / signal, rel=1e-4
            )
        still = torch.zeros_like(found.cross), torch.zeros_like(found.residual)
        noise, signal = explicit(view, *still)
        assert found.error(*still) == pytest.approx(float(noise.sum()) / signal, rel=1e-4)
        assert found.error(*still) > 1e-5
        present = found.rows(view.quantized_weight - view.weight)
        bias = view.quantized_bias
        shift = bias if view.float_bias is None else bias - view.float_bias
        assert found.error(present, shift.double().reshape(found.residual.shape)) == pytest.approx(
            view.error(), rel=1e-4
        )


@pytest.mark.parametrize("name", MODELS)
def test_forms_differ_from_the_error_by_a_constant(
    name: str, plan_of: Callable[..., object]
) -> None:
    with torch.no_grad():
        found = layer_moments(second_layer(plan_of, *MODELS[name]))
    zero, still = torch.zeros_like(found.cross), torch.zeros_like(found.residual)
    change, _ = changes(found)
    fixed = found.quadratic(free_bias=False).values(change).sum()
    expected = (found.error(change, still) - found.error(zero, still)) * found.signal
    assert float(fixed) == pytest.approx(expected, rel=1e-9)
    free = found.quadratic(free_bias=True).values(change).sum()
    expected = found.error(change, found.shift(change)) - found.error(zero, found.shift(zero))
    assert float(free) == pytest.approx(expected * found.signal, rel=1e-9)


@pytest.mark.parametrize("name", ["rows shared", "grouped", "linear"])
def test_no_bias_is_better_than_the_best(name: str, plan_of: Callable[..., object]) -> None:
    with torch.no_grad():
        found = layer_moments(second_layer(plan_of, *MODELS[name]))
    change, other = changes(found)
    best = found.shift(change)
    least = found.error(change, best)
    for sign in (-1, 1):
        assert found.error(change, best + sign * 1e-3 * other) > least
    assert found.error(change, other) > least


def test_second_moments_are_symmetric_and_those_of_the_input(
    plan_of: Callable[..., object],
) -> None:
    with torch.no_grad():
        view = second_layer(plan_of, *MODELS["rows shared"])
        found = layer_moments(view)
        x = torch.cat([view.input(batch) for batch in range(len(view))])
    patches = nn.functional.unfold(x, 3, padding=1).transpose(0, 1).flatten(1).double()
    assert torch.equal(found.second, found.second.mT)
    assert torch.allclose(found.second[0], patches @ patches.T / patches.shape[1], atol=1e-6)
    assert torch.allclose(found.mean[0], patches.mean(1), atol=1e-6)


def test_large_symmetric_products_are_computed_in_parts(
    plan_of: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        view = second_layer(plan_of, *MODELS["strided"])
        whole = layer_moments(view)
        monkeypatch.setattr(module, "_WIDE", 8)
        parts = layer_moments(view)
    assert torch.equal(parts.second, parts.second.mT)
    assert torch.allclose(parts.second, whole.second, rtol=1e-5, atol=1e-7)


def test_without_a_signal_there_is_no_relative_error() -> None:
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    found = Moments(zero, zero[0], zero, zero[0], zero[0], 0.0)
    assert found.error(zero, zero[0]) == 0.0
    assert found.error(zero, zero[0] + 1) == float("inf")
