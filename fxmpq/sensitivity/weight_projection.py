"""Projections of weight errors: what a change of a layer's weight does, seen through a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_WORKSPACE = 2**19
"""Floats of scratch memory that one chunk of samples may take: what stays in a cache."""

_KERNEL_HEAVY = 16
"""Weights per feature-map value above which convolving beats weight gradients (measured)."""

# (input, gradient at the output, weight changes [candidates, *weight], call arguments behind the
# bias, samples) -> [samples, candidates]
WeightProjection = Callable[[Tensor, Tensor, Tensor, Sequence[object], int], Tensor]


def project_linear(
    x: Tensor, gradient: Tensor, changes: Tensor, arguments: Sequence[object], samples: int
) -> Tensor:
    """Project weight changes of a linear layer: `a_nc = sum_t g_nt^T dW_c x_nt`.

    The per-sample weight gradient `sum_t g_nt x_nt^T` is formed once for a chunk of samples
    and serves every candidate.

    Args:
        x: Input, `[samples or samples * k, ..., in]`.
        gradient: At the output, the same leading shape, `[..., out]`.
        changes: Weight changes, `[candidates, out, in]`.
        arguments: Of the call behind the bias; a linear layer has none.
        samples: Number of samples.

    Returns:
        Shape `[samples, candidates]`.
    """
    rows = x.reshape(samples, -1, x.shape[-1])
    slopes = gradient.reshape(samples, -1, gradient.shape[-1])
    flat = changes.flatten(1).T
    chunk = max(1, _WORKSPACE // len(flat))
    parts = [
        (slopes[start : start + chunk].transpose(1, 2) @ rows[start : start + chunk]).flatten(1)
        @ flat
        for start in range(0, samples, chunk)
    ]
    return torch.cat(parts)


def project_conv(
    x: Tensor, gradient: Tensor, changes: Tensor, arguments: Sequence[object], samples: int
) -> Tensor:
    """Project weight changes of a convolution of any rank: `a_nc = <g_n, conv(x_n, dW_c)>`.

    Large feature maps take the per-sample weight gradient, which serves every candidate;
    where the kernel is much larger than the maps, writing that gradient would cost more than
    one convolution per candidate, which is done then.

    Args:
        x: Input, `[samples * k, channels, *space]`.
        gradient: At the output, `[samples * k, out, *positions]`.
        changes: Weight changes, `[candidates, out, channels/groups, *kernel]`.
        arguments: Of the call behind the bias: `(stride, padding, dilation, groups)`.
        samples: Number of samples.

    Returns:
        Shape `[samples, candidates]`.
    """
    stride, padding, dilation, groups = conv_geometry(arguments, x.dim() - 2)
    if isinstance(padding, str):
        x = functional.pad(x, _string_padding(padding, changes.shape[3:], dilation))
        padding = [0] * (x.dim() - 2)
    geometry = (stride, padding, dilation, False, [0] * (x.dim() - 2), groups)
    maps = (x.numel() + gradient.numel()) // samples
    if changes[0].numel() > _KERNEL_HEAVY * maps:
        outputs = (torch.convolution(x, change, None, *geometry) for change in changes)
        return torch.stack([(y * gradient).reshape(samples, -1).sum(1) for y in outputs], dim=1)
    return _by_slopes(x, gradient, changes, geometry, samples)


def project_conv_transpose(
    x: Tensor, gradient: Tensor, changes: Tensor, arguments: Sequence[object], samples: int
) -> Tensor:
    """Project weight changes of a transposed convolution: `a_nc = <g_n, op(x_n, dW_c)>`.

    The per-sample weight gradient is formed once and serves every candidate.

    Args:
        x: Input, `[samples * k, channels, *space]`.
        gradient: At the output, `[samples * k, out, *positions]`.
        changes: Weight changes, `[candidates, channels, out/groups, *kernel]`.
        arguments: Of the call behind the bias: `(stride, padding, output_padding, groups,
            dilation)`.
        samples: Number of samples.

    Returns:
        Shape `[samples, candidates]`.
    """
    rank = x.dim() - 2
    stride, padding, output_padding, groups, dilation = [*arguments, *[None] * 5][:5]
    geometry = (
        _sizes(stride, 1, rank),
        _sizes(padding, 0, rank),
        _sizes(dilation, 1, rank),
        True,
        _sizes(output_padding, 0, rank),
        groups if isinstance(groups, int) else 1,
    )
    return _by_slopes(x, gradient, changes, geometry, samples)


def _by_slopes(
    x: Tensor, gradient: Tensor, changes: Tensor, geometry: tuple[object, ...], samples: int
) -> Tensor:
    """Project the changes on each sample's weight gradient, which is formed once for all."""
    flat = changes.flatten(1).T
    rows = []
    for slopes, inputs in zip(gradient.chunk(samples), x.chunk(samples), strict=True):
        _, slope, _ = torch.ops.aten.convolution_backward.default(
            slopes, inputs, changes[0], None, *geometry, [False, True, False]
        )
        rows.append(slope.flatten() @ flat)
    return torch.stack(rows)


def project_experts(
    x: Tensor, gradient: Tensor, changes: Tensor, arguments: Sequence[object], samples: int
) -> Tensor:
    """Project weight changes of experts on the whole batch: `a_c = <g, op(x, dW_c)>`.

    Rows of all samples are sorted by expert, so that they cannot be told apart.

    Args:
        x: Input of `grouped_linear`, `[rows, in]`, or of `batched_linear`.
        gradient: At the output.
        changes: Weight changes, `[candidates, experts * out, in]`.
        arguments: Of the call behind the weight, the first being where each expert's rows end;
            a batched product has none there.
        samples: 1.

    Returns:
        Shape `[1, candidates]`.
    """
    ends = arguments[0]
    if isinstance(ends, Tensor) and not ends.is_floating_point():
        slope: Tensor = torch.ops.fxmpq.grouped_outer(gradient, x, ends)
    else:
        rows = x.expand(*gradient.shape[:-1], x.shape[-1])
        slope = torch.einsum("...bro,...bri->boi", gradient, rows)
    return slope.reshape(1, -1) @ changes.flatten(1).T


def project_embedding(
    x: Tensor, gradient: Tensor, changes: Tensor, arguments: Sequence[object], samples: int
) -> Tensor:
    """Project changes of an embedding table: `a_nc = sum_t <g_nt, dW_c[x_nt]>`.

    Args:
        x: Row numbers, `[samples, ...]`.
        gradient: At the output, `[samples, ..., width]`.
        changes: Table changes, `[candidates, rows, width]`.
        arguments: Of the call behind the indices; not needed.
        samples: Number of samples.

    Returns:
        Shape `[samples, candidates]`.
    """
    picked = gradient.reshape(samples, -1)
    return torch.stack(
        [
            (functional.embedding(x, change).reshape(samples, -1) * picked).sum(1)
            for change in changes
        ],
        dim=1,
    )


WEIGHT_PROJECTIONS: Mapping[str, WeightProjection] = {
    "conv": project_conv,
    "conv_transpose": project_conv_transpose,
    "linear": project_linear,
    "experts": project_experts,
    "embedding": project_embedding,
}


def conv_geometry(
    arguments: Sequence[object], rank: int
) -> tuple[list[int], list[int] | str, list[int], int]:
    """Read a convolution's `(stride, padding, dilation, groups)`, with ATen's defaults.

    Args:
        arguments: What the call passes behind the bias.
        rank: Number of spatial dimensions.
    """
    stride, padding, dilation, groups = [*arguments, *[None] * 4][:4]
    return (
        _sizes(stride, 1, rank),
        padding if isinstance(padding, str) else _sizes(padding, 0, rank),
        _sizes(dilation, 1, rank),
        groups if isinstance(groups, int) else 1,
    )


def _sizes(value: object, default: int, rank: int) -> list[int]:
    if value is None:
        return [default] * rank
    found = [int(size) for size in value] if isinstance(value, Sequence) else [int(str(value))]
    return found * rank if len(found) == 1 else found


def _string_padding(padding: str, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """`same` and `valid` as `functional.pad` wants them: last dimension first, both sides."""
    if padding == "valid":
        return [0] * (2 * len(kernel))
    whole = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
    return [side for total in reversed(whole) for side in (total // 2, total - total // 2)]
