from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxmpq.graph.operators import KINDS
from fxmpq.sensitivity import weight_projection
from fxmpq.sensitivity.weight_projection import (
    WEIGHT_PROJECTIONS,
    conv_geometry,
    project_conv,
    project_conv_transpose,
    project_embedding,
    project_experts,
    project_linear,
)

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
# rank, input channels, output channels, kernel, sizes, arguments behind the bias
CASES = {
    "conv1d": (1, 3, 4, (3,), (9,), ()),
    "conv1d strided": (1, 3, 4, (3,), (9,), ([2], [1])),
    "conv1d same": (1, 3, 4, (4,), (9,), ([1], "same", [2])),
    "conv2d": (2, 3, 4, (3, 2), (7, 6), ()),
    "conv2d padded": (2, 3, 4, (3, 3), (7, 6), ([1, 1], [2, 0])),
    "conv2d strided": (2, 3, 4, (3, 3), (7, 6), ([2, 3], [1, 1])),
    "conv2d dilated": (2, 3, 4, (3, 3), (7, 6), ([1, 1], [2, 2], [2, 2])),
    "conv2d one number": (2, 3, 4, (3, 3), (7, 6), ([2], [1], [1])),
    "conv2d grouped": (2, 4, 8, (3, 3), (5, 5), ([1, 1], [1, 1], [1, 1], 2)),
    "conv2d depthwise": (2, 4, 4, (3, 3), (5, 5), ([2, 2], [1, 1], [1, 1], 4)),
    "conv2d same": (2, 3, 4, (3, 5), (5, 6), ([1, 1], "same")),
    "conv2d same dilated": (2, 3, 4, (3, 4), (9, 9), ([1, 1], "same", [2, 2])),
    "conv2d valid": (2, 3, 4, (3, 2), (5, 6), ([2, 2], "valid")),
    "conv3d": (3, 2, 3, (2, 3, 2), (4, 5, 4), ([1, 2, 1], [1, 1, 0])),
    "conv3d same": (3, 2, 3, (3, 3, 1), (4, 5, 4), ([1, 1, 1], "same")),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def explicit(outputs: Sequence[Tensor], gradient: Tensor, samples: int) -> Tensor:
    """`<g_n, op(x_n, dW_c)>` for every sample and candidate, one product at a time."""
    return torch.stack(
        [
            torch.stack(
                [
                    (one * other).sum()
                    for one, other in zip(
                        output.reshape(samples, -1), gradient.reshape(samples, -1), strict=True
                    )
                ]
            )
            for output in outputs
        ],
        dim=1,
    )


@pytest.mark.parametrize("branch", ["weight gradients", "convolutions"])
@pytest.mark.parametrize("name", CASES)
def test_convolutions(name: str, branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, channels, outputs, kernel, sizes, arguments = CASES[name]
    heavy = 10**9 if branch == "weight gradients" else 0
    monkeypatch.setattr(weight_projection, "_KERNEL_HEAVY", heavy)
    groups = arguments[3] if len(arguments) > 3 else 1
    x = draw(3, channels, *sizes)
    changes = draw(5, outputs, channels // groups, *kernel)
    convolve = CONVOLUTIONS[rank - 1]
    results = [convolve(x, change, None, *arguments) for change in changes]
    gradient = draw(*results[0].shape)
    found = project_conv(x, gradient, changes, arguments, 3)
    assert found.shape == (3, 5)
    assert torch.allclose(found, explicit(results, gradient, 3), atol=1e-3, rtol=1e-4)


def test_the_branch_is_chosen_by_the_kernels_share(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    convolution, backward = torch.convolution, torch.ops.aten.convolution_backward.default

    def spy(name: str, function: object) -> object:
        def called(*args: object) -> object:
            calls.append(name)
            return function(*args)  # type: ignore[operator]

        return called

    monkeypatch.setattr(torch, "convolution", spy("forward", convolution))
    monkeypatch.setattr(torch.ops.aten.convolution_backward, "default", spy("backward", backward))
    project_conv(draw(2, 3, 16, 16), draw(2, 4, 14, 14), draw(2, 4, 3, 3, 3), (), 2)
    assert set(calls) == {"backward"}
    calls.clear()
    project_conv(draw(2, 64, 3, 3), draw(2, 64, 1, 1), draw(2, 64, 64, 3, 3), (), 2)
    assert set(calls) == {"forward"}


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 2, 5, 6)])
def test_linear_layers(shape: tuple[int, ...]) -> None:
    x, changes = draw(*shape), draw(4, 7, 6)
    gradient = draw(*shape[:-1], 7)
    results = [functional.linear(x, change) for change in changes]
    found = project_linear(x, gradient, changes, (), 3)
    assert torch.allclose(found, explicit(results, gradient, 3), atol=1e-3)


def test_linear_layers_on_flattened_positions() -> None:
    x, gradient, changes = draw(12, 6), draw(12, 7), draw(4, 7, 6)
    results = [functional.linear(x, change) for change in changes]
    found = project_linear(x, gradient, changes, (), 3)
    assert torch.allclose(found, explicit(results, gradient, 3), atol=1e-3)


def test_linear_layers_in_chunks_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gradient, changes = draw(7, 2, 6), draw(7, 2, 5), draw(4, 5, 6)
    whole = project_linear(x, gradient, changes, (), 7)
    for workspace in (1, 65):
        monkeypatch.setattr(weight_projection, "_WORKSPACE", workspace)
        assert torch.allclose(project_linear(x, gradient, changes, (), 7), whole, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4)])
def test_embeddings(shape: tuple[int, ...]) -> None:
    rows = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0))
    changes, gradient = draw(4, 9, 6), draw(*shape, 6)
    results = [functional.embedding(rows, change) for change in changes]
    found = project_embedding(rows, gradient, changes, (), 3)
    assert torch.allclose(found, explicit(results, gradient, 3), atol=1e-3)


TRANSPOSED = {
    "conv_transpose1d": (1, 3, 4, (3,), (6,), ()),
    "conv_transpose2d strided": (2, 3, 4, (3, 2), (4, 5), ([2, 1], [1, 0])),
    "conv_transpose2d grouped": (2, 4, 6, (3, 3), (4, 4), ([2, 2], [1, 1], [1, 0], 2)),
    "conv_transpose2d dilated": (2, 2, 3, (2, 2), (4, 4), ([1], [0], [0], 1, [2])),
    "conv_transpose3d": (3, 2, 3, (2, 1, 2), (3, 4, 3), ([1, 2, 1],)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(name: str) -> None:
    rank, channels, outputs, kernel, sizes, arguments = TRANSPOSED[name]
    operators = (functional.conv_transpose1d, functional.conv_transpose2d)
    operator = (*operators, functional.conv_transpose3d)[rank - 1]
    groups = arguments[3] if len(arguments) > 3 else 1
    x, changes = draw(3, channels, *sizes), draw(2, channels, outputs // groups, *kernel)
    results = [operator(x, change, None, *arguments) for change in changes]
    gradient = draw(*results[0].shape)
    found = project_conv_transpose(x, gradient, changes, arguments, 3)
    assert torch.allclose(found, explicit(results, gradient, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_turned", [False, True])
def test_experts_on_the_whole_batch(is_turned: bool) -> None:
    x, changes, ends = draw(7, 5), draw(2, 3 * 4, 5), torch.tensor([2, 2, 7])
    operator = torch.ops.fxmpq.grouped_linear
    results = [operator(x, change, ends, is_turned) for change in changes]
    gradient = draw(7, 4)
    found = project_experts(x, gradient, changes, (ends, is_turned), 1)
    assert torch.allclose(found, explicit(results, gradient, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 6, 5), (2, 3, 6, 5), (6, 5), (2, 1, 6, 5)])
def test_batched_products_on_the_whole_batch(shape: tuple[int, ...]) -> None:
    x, changes = draw(*shape), draw(2, 3 * 4, 5)
    operator = torch.ops.fxmpq.batched_linear
    results = [operator(x, change, None, 3, "plain") for change in changes]
    gradient = draw(*results[0].shape)
    found = project_experts(x, gradient, changes, (None, 3, "plain"), 1)
    assert torch.allclose(found, explicit(results, gradient, 1), rtol=1e-4, atol=1e-4)


def test_geometry_has_atens_defaults() -> None:
    assert conv_geometry((), 2) == ([1, 1], [0, 0], [1, 1], 1)
    assert conv_geometry(([2], [1, 0]), 2) == ([2, 2], [1, 0], [1, 1], 1)
    assert conv_geometry((2, "same", [3], 4), 3) == ([2, 2, 2], "same", [3, 3, 3], 4)


def test_every_kind_has_a_projection() -> None:
    assert set(WEIGHT_PROJECTIONS) == set(KINDS)
