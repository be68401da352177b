"""Torch's matrix products on codes, and what each of them takes: one table.

The sizes are those that torch's own sources check: `_int_mm_out_cuda` (more than 16 rows, inner
and outer size multiples of 8), `_scaled_mm_out_cuda` (multiples of 16; compute capability 8.9, or
9.0 and above), `_weight_int4pack_mm_cuda` (whole blocks of 32, 64, 128 or 256; tiles of 8 output
channels and 32 inputs; a kernel body that is compiled from capability 8.0 on, and on the CPU 16
output channels). They were read, not tried on a GPU:
`operands.tried_operands` runs each kernel once before a layer relies on it.
"""

from __future__ import annotations

from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.granularity import PerBlock
from fxmpq.targets.cuda.shape_rules import Alignment, Asked, Kernel, ShapeRule

INT4_BLOCKS = (256, 128, 64, 32)
"""How many weights may share a scale in `_weight_int4pack_mm`, the largest first."""

_LARGEST_SUM = 2**31 - 1


def _is_integer(found: NumberFormat | None, bits: int) -> bool:
    return found is not None and found.is_integer and found.bits <= bits


def _takes_int8(precision: Precision) -> bool:
    activation = precision.activation
    is_static = activation is not None and activation.has_fixed_grid and activation.bits == 8
    return is_static and _is_integer(precision.weight, 8)


def _takes_e4m3(precision: Precision) -> bool:
    halves = (precision.weight, precision.activation)
    return all(half is not None and half.scheme is Scheme.E4M3 for half in halves)


def _takes_int4(precision: Precision) -> bool:
    return precision.activation is None and _is_integer(precision.weight, 4)


def _sums_fit(asked: Asked) -> bool:
    weight = asked.precision.weight
    return weight is None or asked.shape.inner * 128 * -weight.qmin <= _LARGEST_SUM


def _block_of(precision: Precision) -> int | None:
    weight = precision.weight
    granularity = None if weight is None else weight.granularity
    return granularity.size if isinstance(granularity, PerBlock) else None


_ONE_GROUP = ShapeRule(
    "one group",
    lambda asked: asked.shape.groups == 1,
    "is one matrix product; this convolution has {asked.shape.groups} groups",
)
_ONE_SCALE = ShapeRule(
    "one scale a sum",
    lambda asked: _block_of(asked.precision) is None,
    "sums codes, so a sum's weights share one scale; these have several",
)
_FITTING_SUMS = ShapeRule(
    "sums of 32 bits",
    _sums_fit,
    "sums in 32 bits, which {asked.shape.inner} products of this precision may overflow",
)
_FP8_GPU = ShapeRule(
    "capability 8.9",
    lambda asked: asked.device.reaches((8, 9)),
    "needs compute capability 8.9 or above, this is {asked.device}",
)
_INT4_GPU = ShapeRule(
    "capability 8.0",
    lambda asked: asked.device.reaches((8, 0)),
    "needs compute capability 8.0 or above, this is {asked.device}",
)
_INT4_BLOCK = ShapeRule(
    "block size",
    lambda asked: _block_of(asked.precision) in (None, *INT4_BLOCKS),
    "takes blocks of 32, 64, 128 and 256, {asked.precision} has others",
)
_NO_PATCHES = ShapeRule(
    "no patches",
    lambda asked: asked.shape.positions == 1,
    "reads float rows, which patches of this kernel would repeat {asked.shape.positions} times",
)

KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "_int_mm",
        _takes_int8,
        (_ONE_GROUP, _ONE_SCALE, _FITTING_SUMS),
        # On the CPU it mistakes strides of sizes of 1, and returns wrong numbers.
        {"cuda": Alignment(rows=17, inner=8, outer=8), "cpu": Alignment(rows=2, inner=2)},
    ),
    Kernel(
        "_scaled_mm",
        _takes_e4m3,
        (_ONE_GROUP, _ONE_SCALE, _FP8_GPU),
        {"cuda": Alignment(inner=16, outer=16), "cpu": Alignment()},
    ),
    Kernel(
        "_weight_int4pack_mm",
        _takes_int4,
        (_ONE_GROUP, _NO_PATCHES, _INT4_BLOCK, _INT4_GPU),
        {"cuda": Alignment(inner=32, outer=8), "cpu": Alignment(inner=32, outer=16)},
    ),
)
"""A layer asks the first of them that takes its precision."""


def int4_block(precision: Precision, inner: int) -> int:
    """How many weights share a scale in `_weight_int4pack_mm`.

    Those of the precision's own blocks; scales of a channel or of the tensor are repeated, in
    blocks as large as divide the inner size, else in blocks of 32.

    Examples:
        >>> [int4_block(Precision.parse(name), 384) for name in ("w4b64", "w4", "w4t")]
        [64, 128, 128]
        >>> int4_block(Precision.parse("w4"), 100)
        32
    """
    own = _block_of(precision)
    if own is not None:
        return own
    return next((size for size in INT4_BLOCKS if inner % size == 0), INT4_BLOCKS[-1])
