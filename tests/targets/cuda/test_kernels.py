from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import Precision
from fxmpq.targets.cuda.device import DeviceFacts
from fxmpq.targets.cuda.kernels import INT4_BLOCKS, KERNELS, int4_block
from fxmpq.targets.cuda.rewrite import MAKERS
from fxmpq.targets.cuda.shape_rules import Asked, Choice, ProductShape, choose_kernel

AMPERE, ADA, HOPPER = (DeviceFacts("cuda", found) for found in ((8, 0), (8, 9), (9, 0)))
TURING, CPU = DeviceFacts("cuda", (7, 5)), DeviceFacts("cpu")
LINEAR = ProductShape(768, 3072)


def chosen(precision: str, shape: ProductShape = LINEAR, device: DeviceFacts = HOPPER) -> Choice:
    return choose_kernel(KERNELS, Asked(shape, Precision.parse(precision), device))


def name_of(choice: Choice) -> str | None:
    return None if choice.kernel is None else choice.kernel.name


@pytest.mark.parametrize(
    ("precision", "kernel"),
    [
        ("w8a8", "_int_mm"),
        ("w4a8", "_int_mm"),
        ("w2ta8", "_int_mm"),
        ("we4m3ae4m3", "_scaled_mm"),
        ("we4m3tae4m3", "_scaled_mm"),
        ("w4b128", "_weight_int4pack_mm"),
        ("w4", "_weight_int4pack_mm"),
        ("w2b32", "_weight_int4pack_mm"),
        ("w8", None),
        ("w8b32", None),
        ("w8a4", None),
        ("w8a8d", None),
        ("we4m3a8", None),
        ("w8ae4m3", None),
        ("we4m3", None),
        ("we5m2ae5m2", None),
        ("w16a8", None),
    ],
)
def test_every_precision_has_its_kernel(precision: str, kernel: str | None) -> None:
    for device in (HOPPER, CPU):
        found = chosen(precision, device=device)
        assert name_of(found) == kernel
        if kernel is None:
            assert found.reason == f"there is no kernel on codes for {precision}"


@pytest.mark.parametrize(
    ("precision", "devices"),
    [
        ("w8a8", (TURING, AMPERE, ADA, HOPPER, CPU)),
        ("we4m3ae4m3", (ADA, HOPPER, CPU)),
        ("w4b32", (AMPERE, ADA, HOPPER, CPU)),
    ],
)
def test_capabilities_decide(precision: str, devices: tuple[DeviceFacts, ...]) -> None:
    for device in (TURING, AMPERE, ADA, HOPPER, CPU):
        found = chosen(precision, device=device)
        assert (found.kernel is not None) is (device in devices)
        if device not in devices:
            assert "needs compute capability 8." in found.reason
            assert found.reason.endswith(f"this is {device}")


@pytest.mark.parametrize("precision", ["w8a8", "we4m3ae4m3", "w4"])
def test_groups_are_no_single_product(precision: str) -> None:
    assert "has 4 groups" in chosen(precision, ProductShape(9, 8, 4, 9)).reason


def test_patches_of_codes_but_not_of_floats() -> None:
    patches = ProductShape(27, 8, positions=9)
    assert name_of(chosen("w8a8", patches)) == "_int_mm"
    assert name_of(chosen("we4m3ae4m3", patches)) == "_scaled_mm"
    assert chosen("w4", patches).reason.endswith("would repeat 9 times")


@pytest.mark.parametrize("precision", ["w8b32a8", "we4m3b32ae4m3"])
def test_sums_have_one_scale(precision: str) -> None:
    assert "share one scale" in chosen(precision).reason


def test_blocks_of_other_sizes_are_refused() -> None:
    assert chosen("w4b16").reason == (
        "_weight_int4pack_mm takes blocks of 32, 64, 128 and 256, w4b16 has others"
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sums_stay_inside_32_bits(bits: int) -> None:
    """The largest product of codes is `2^7 * 2^(bits - 1)`."""
    most = (2**31 - 1) // (128 << (bits - 1))
    assert name_of(chosen(f"w{bits}a8", ProductShape(most, 8))) == "_int_mm"
    assert "may overflow" in chosen(f"w{bits}a8", ProductShape(most + 1, 8)).reason


def test_other_devices_have_no_kernels() -> None:
    assert chosen("w8a8", device=DeviceFacts("xpu")).reason == (
        "_int_mm is used on cuda and cpu only"
    )


def test_every_kernel_can_be_made() -> None:
    assert set(MAKERS) == {kernel.name for kernel in KERNELS}
    assert all(set(kernel.alignments) == {"cuda", "cpu"} for kernel in KERNELS)


@given(st.integers(1, 5000))
def test_scales_of_channels_are_repeated_in_the_largest_whole_blocks(inner: int) -> None:
    found = int4_block(Precision.parse("w4"), inner)
    whole = [size for size in INT4_BLOCKS if inner % size == 0]
    assert found == (max(whole) if whole else 32)
    assert int4_block(Precision.parse("w4b64"), inner) == 64
