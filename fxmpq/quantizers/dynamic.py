"""Dynamic ranges: the grid of an activation found on the values of each run."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat
from fxmpq.granularity import Dynamic
from fxmpq.quantizers.grids import middle_code


def dynamic_grid(
    x: Tensor, number_format: NumberFormat, *, is_symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """The scale and zero point that a tensor's own values give, 0 among them.

    With `low = min(0, min x)` and `high = max(0, max x)`,

        scale = (high - low) / (qmax - qmin)
        zero_point = round(clamp(qmin - low / scale, qmin, qmax))

    in `x`'s own arithmetic, halves to even: ONNX's `DynamicQuantizeLinear`, to the last bit. If
    symmetric, `zero_point = 2^(bits - 1)` and
    `scale = max(high / (2^(bits - 1) - 1), -low / 2^(bits - 1))`. A range of no width has scale 1.

    Args:
        x: Any shape, at least one value.
        number_format: Dynamic.
        is_symmetric: Whether the zero point is the middle of the codes.

    Returns:
        Scale and zero point, both like `x`: of shape `[]` for a range per tensor, `[..., 1]` for
        one per row.

    Examples:
        >>> from fxmpq.formats import Precision
        >>> x = torch.tensor([[-1.0, 254.0], [0.0, 51.0]])
        >>> dynamic_grid(x, Precision.parse("w8a8d").activation)
        (tensor(1.), tensor(1.))
        >>> dynamic_grid(x, Precision.parse("w8a8dt").activation)[0].flatten()
        tensor([1.0000, 0.2000])
    """
    if number_format.dynamic is Dynamic.ROW and x.dim():
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        low, high = x.amin(), x.amax()
    low, high = low.clamp(max=0), high.clamp(min=0)
    qmin, qmax, middle = number_format.qmin, number_format.qmax, middle_code(number_format)
    if is_symmetric:
        scale = torch.maximum(high / (middle - 1), -low / middle)
    else:
        scale = (high - low) / (qmax - qmin)
    # A range of denormal width would make a step of zero.
    scale = torch.where(scale > 0, scale, 1.0)
    if is_symmetric:
        return scale, torch.full_like(scale, middle)
    return scale, torch.round((qmin - low / scale).clamp(qmin, qmax))


def fake_quantize_dynamic(
    x: Tensor, number_format: NumberFormat, *, is_symmetric: bool = False
) -> Tensor:
    """Round an activation to the grid of its own values, returned in real numbers.

    `x_q = scale * (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point)` on the grid of
    `dynamic_grid`; the gradient is 1, since nothing lies outside of the range (straight-through).

    Args:
        x: Any shape.
        number_format: Dynamic.
        is_symmetric: Whether the zero point is the middle of the codes.

    Returns:
        A tensor like `x`.

    Examples:
        >>> from fxmpq.formats import Precision
        >>> fake_quantize_dynamic(torch.tensor([0.0, 0.4, 3.0]), Precision.parse("a2d").activation)
        tensor([0., 0., 3.])
    """
    if not x.numel():
        return x
    found = x.detach()
    scale, zero_point = dynamic_grid(found, number_format, is_symmetric=is_symmetric)
    codes = (torch.round(found / scale) + zero_point).clamp(number_format.qmin, number_format.qmax)
    rounded = codes.sub_(zero_point).mul_(scale)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    return rounded + (x - found)
