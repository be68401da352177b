from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import Precision
from fxmpq.targets.cuda.device import DeviceFacts
from fxmpq.targets.cuda.shape_rules import (
    Alignment,
    Asked,
    Choice,
    Kernel,
    ProductShape,
    ShapeRule,
    choose_kernel,
)

W8A8 = Precision.parse("w8a8")
CPU = DeviceFacts("cpu")


def narrow(width: int) -> ShapeRule:
    reason = f"wants less than {width}, not {{asked.shape.outer}}"
    return ShapeRule("narrow", lambda asked: asked.shape.outer < width, reason)


def kernel(name: str, *rules: ShapeRule, takes: bool = True) -> Kernel:
    return Kernel(name, lambda precision: takes, rules, {"cpu": Alignment()})


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 200), st.integers(1, 200))
def test_padding_is_the_least_that_aligns(inner: int, outer: int, k: int, n: int) -> None:
    padded = Alignment(inner=inner, outer=outer).padded(k, n)
    expected = (
        min(size for size in range(k, k + inner) if size % inner == 0),
        min(size for size in range(n, n + outer) if size % outer == 0),
    )
    assert padded == expected


def test_the_first_kernel_that_takes_the_precision_is_asked() -> None:
    kernels = [kernel("other", takes=False), kernel("first", narrow(4)), kernel("second")]
    assert choose_kernel(kernels, Asked(ProductShape(8, 3), W8A8, CPU)).kernel is kernels[1]
    refused = choose_kernel(kernels, Asked(ProductShape(8, 5), W8A8, CPU))
    assert refused == Choice(None, "first wants less than 4, not 5")


def test_the_first_rule_that_fails_is_the_reason() -> None:
    both = [kernel("product", narrow(8), narrow(4))]
    assert choose_kernel(both, Asked(ProductShape(1, 5), W8A8, CPU)).reason.endswith("4, not 5")
    assert choose_kernel(both, Asked(ProductShape(1, 9), W8A8, CPU)).reason.endswith("8, not 9")


def test_precisions_and_devices_without_a_kernel_are_told() -> None:
    none = choose_kernel([kernel("other", takes=False)], Asked(ProductShape(1, 1), W8A8, CPU))
    assert none == Choice(None, "there is no kernel on codes for w8a8")
    elsewhere = Asked(ProductShape(1, 1), W8A8, DeviceFacts("mps"))
    assert choose_kernel([kernel("product")], elsewhere).reason == "product is used on cpu only"
