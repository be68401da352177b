"""Writing fused attention in ONNX's operators, with masks that may leave nothing of a row."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript import opset21
from onnxscript.onnx_types import BOOL, FLOAT

# The exporter calls this with values of its own; opset21's annotations describe eager tensors.
op: Any = opset21

_INFINITE = float("-inf")


def write_attention(
    query: FLOAT,
    key: FLOAT,
    value: FLOAT,
    attn_mask: FLOAT | BOOL | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FLOAT:
    """Translate `scaled_dot_product_attention`: `softmax(scale * q k^T + mask) v`.

    A row of which a mask leaves nothing is zero, as from the operator. That is told from the mask,
    which is as large as one head's scores or smaller and often the same in all layers, and not
    from the scores of all heads. The test takes rows, not elements: a row whose mask is minus
    infinity everywhere is computed without it, so that it stays finite, and is multiplied by zero
    behind the second product. So a NaN in scores or values stays one, in such rows too.

    Args:
        query: `[..., heads, queries, d]`, or without heads.
        key: `[..., heads, keys, d]`.
        value: `[..., heads, keys, channels]`.
        attn_mask: Broadcast against the scores: added, or where it is of booleans, what it has
            `False` is taken away.
        dropout_p: Left out, as all dropout is outside of training.
        is_causal: Whether a query sees the keys up to its own position only.
        scale: `1 / sqrt(d)` where none is given.
        enable_gqa: Whether key and value may have fewer heads, which are repeated.

    Returns:
        `[..., heads, queries, channels]`.
    """
    kind, rank = query.dtype, len(_sizes(key))
    if enable_gqa:
        key, value = (_repeated(heads, query) for heads in (key, value))
    factor = 1 / math.sqrt(_sizes(query)[-1]) if scale is None else scale
    turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, _number(factor, kind)), turned)
    if is_causal:
        scores = op.Add(scores, _causal(query, key))
    kept: FLOAT | None = None
    if attn_mask is not None:
        added: Any = attn_mask
        if attn_mask.dtype == ir.DataType.BOOL:
            added = op.Where(attn_mask, _number(0.0, kind), _number(_INFINITE, kind))
        bias, kept = _without_empty_rows(added, -1, kind)
        scores = op.Add(scores, bias)
    context: FLOAT = op.MatMul(op.Softmax(scores, axis=-1), value)
    if kept is not None:
        context = op.Mul(context, kept)
    return context


def write_safe_softmax(x: FLOAT, dim: int, dtype: int | None = None) -> FLOAT:
    """Translate `_safe_softmax`, which is zero along rows that are minus infinity everywhere.

    Args:
        x: Of any shape; a row is what lies along `dim`.
        dim: The axis that is summed over.
        dtype: ONNX's number of the type to compute in; that of `x` where none is given.

    Returns:
        The shape of `x`. A row with a NaN in it is NaN.
    """
    kind = x.dtype if dtype is None else ir.DataType(dtype)
    cast = x if dtype is None else op.Cast(x, to=dtype)
    lifted, kept = _without_empty_rows(cast, dim, kind)
    result: FLOAT = op.Mul(op.Softmax(lifted, axis=dim), kept)
    return result


def _without_empty_rows(x: FLOAT, axis: int, kind: ir.DataType) -> tuple[FLOAT, FLOAT]:
    """Zeros for rows of minus infinity alone, and for each row a factor: 0 for those, 1 else.

    A maximum may or may not see a NaN: the row of one is kept, or lifted to zero where it has
    nothing else, and stays NaN in both.
    """
    zero, infinite = _number(0.0, kind), _number(_INFINITE, kind)
    is_empty = op.Equal(op.ReduceMax(x, _integers(axis), keepdims=1), infinite)
    lifted = op.Max(x, op.Where(is_empty, zero, infinite))
    return lifted, op.Where(is_empty, zero, _number(1.0, kind))


def _causal(query: FLOAT, key: FLOAT) -> FLOAT:
    """The least number above the diagonal of one matrix of scores, and zeros elsewhere."""
    sizes = [op.Shape(operand, start=-2, end=-1) for operand in (query, key)]
    least = ir.tensor([float(query.dtype.min)], dtype=query.dtype)
    full = op.ConstantOfShape(op.Concat(*sizes, axis=0), value=least)
    result: FLOAT = op.Trilu(full, op.Constant(value_int=1), upper=1)
    return result


def _repeated(heads: FLOAT, query: FLOAT) -> FLOAT:
    """Each head as often as queries share it, one behind the other."""
    sizes, wanted = _sizes(heads), _sizes(query)[-3]
    if wanted == sizes[-3]:
        return heads
    *before, found, _, size = sizes
    each = op.Unsqueeze(heads, _integers(len(before) + 1))
    each = op.Expand(each, _integers(wanted // found, 1, 1))
    result: FLOAT = op.Reshape(each, _integers(*[0] * len(before), wanted, -1, size))
    return result


def _sizes(value: FLOAT) -> Any:  # noqa: ANN401  (the exporter's values know their shapes)
    return value.shape


def _number(value: float, kind: ir.DataType) -> FLOAT:
    result: FLOAT = op.Constant(value=ir.tensor(value, dtype=kind))
    return result


def _integers(*values: int) -> Any:  # noqa: ANN401  (a constant of the exporter's)
    return op.Constant(value_ints=list(values))
