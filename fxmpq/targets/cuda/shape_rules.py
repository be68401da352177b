"""When a kernel can compute a layer: rules as data, decided before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fxmpq.formats import Precision
from fxmpq.targets.cuda.device import DeviceFacts


@dataclass(frozen=True)
class ProductShape:
    """The matrix product `[rows, inner] x [inner, outer]` that a layer is; its rows are free.

    Args:
        inner: Values that each sum runs over: a linear layer's inputs, or those of one patch.
        outer: Output channels.
        groups: Groups of a convolution, whose channels do not meet.
        positions: Positions of a convolution's kernel: how often patches repeat a value.
    """

    inner: int
    outer: int
    groups: int = 1
    positions: int = 1


@dataclass(frozen=True)
class Asked:
    """What a kernel is asked to compute.

    Args:
        shape: The product that a layer is.
        precision: The layer's own.
        device: Where it is to run.
    """

    shape: ProductShape
    precision: Precision
    device: DeviceFacts


@dataclass(frozen=True)
class ShapeRule:
    """A condition under which a kernel computes a layer.

    Args:
        name: In a word or two.
        allows: Whether it holds.
        reason: Why not, for people; may quote fields, as `{asked.device}`.
    """

    name: str
    allows: Callable[[Asked], bool]
    reason: str


@dataclass(frozen=True)
class Alignment:
    """The sizes that a kernel takes; operands are filled up with zeros to reach them.

    Args:
        rows: The fewest rows, which are filled up at run time, since their number is free.
        inner: What the inner size is a multiple of.
        outer: What the outer size is a multiple of.
    """

    rows: int = 1
    inner: int = 1
    outer: int = 1

    def padded(self, inner: int, outer: int) -> tuple[int, int]:
        """The inner and the outer size that the kernel gets.

        Examples:
            >>> Alignment(inner=16, outer=8).padded(27, 8)
            (32, 8)
        """
        return inner + -inner % self.inner, outer + -outer % self.outer


@dataclass(frozen=True)
class Kernel:
    """A matrix product of torch on codes.

    Args:
        name: Torch's name for it.
        takes: Whether it is made for a precision at all.
        rules: What must hold beside that, in the order in which it is checked.
        alignments: What sizes it takes, by the device's kind.
    """

    name: str
    takes: Callable[[Precision], bool]
    rules: tuple[ShapeRule, ...]
    alignments: Mapping[str, Alignment]


@dataclass(frozen=True)
class Choice:
    """What computes a layer.

    Args:
        kernel: A kernel on codes, or `None` where weights are dequantized.
        reason: Why there is none; empty if there is one.
    """

    kernel: Kernel | None
    reason: str = ""


def choose_kernel(kernels: Sequence[Kernel], asked: Asked) -> Choice:
    """Find the kernel that computes a layer on a device, or why there is none.

    Args:
        kernels: In order of preference; the first that takes the precision is asked.
        asked: The layer's shape, precision and device.

    Returns:
        The kernel, or the reason of the first rule that does not hold.

    Examples:
        >>> from fxmpq.targets.cuda.kernels import KERNELS
        >>> e4m3 = Precision.parse("we4m3ae4m3")
        >>> asked = Asked(ProductShape(64, 64), e4m3, DeviceFacts("cuda", (8, 0)))
        >>> choose_kernel(KERNELS, asked).reason
        '_scaled_mm needs compute capability 8.9 or above, this is cuda sm_80'
    """
    kernel = next((entry for entry in kernels if entry.takes(asked.precision)), None)
    if kernel is None:
        return Choice(None, f"there is no kernel on codes for {asked.precision}")
    if asked.device.kind not in kernel.alignments:
        return Choice(None, f"{kernel.name} is used on {' and '.join(kernel.alignments)} only")
    for rule in kernel.rules:
        if not rule.allows(asked):
            return Choice(None, f"{kernel.name} {rule.reason.format(asked=asked)}")
    return Choice(kernel)
