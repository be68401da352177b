from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openvino import opset13

from fxmpq.quantizers.grids import SMALLEST_SCALE
from fxmpq.targets.openvino.intervals import Ends, interval

SCALES = st.floats(SMALLEST_SCALE, 1e33)
GRIDS = [(0.05100110545754433, 139), (0.0195, 157), (0.0137, 217)]


def rounded_ends(scale: float, zero_point: int, levels: int) -> tuple[np.float32, np.float32]:
    return np.float32(-zero_point * scale), np.float32((levels - 1 - zero_point) * scale)


def shifts(low: np.float32, high: np.float32, levels: int) -> tuple[float, float]:
    """The two shifts that the runtime computes from an interval, in float32."""
    most = np.float32(levels - 1)
    return float(-low * most / (high - low)), float(-low * (most / (high - low)))


@given(SCALES, st.integers(2, 8), st.data())
def test_the_grid_comes_back_better_than_from_rounded_ends(
    scale: float, bits: int, data: st.DataObject
) -> None:
    levels = 1 << bits
    zero_point = data.draw(st.integers(0, levels - 1))

    def error(low: np.float32, high: np.float32) -> float:
        factor = float(np.float32(levels - 1) / (high - low))
        moved = sum(abs(shift - zero_point) for shift in shifts(low, high, levels))
        return moved + (levels - 1) / 4 * abs(factor * scale - 1)

    rounded = rounded_ends(scale, zero_point, levels)
    found = interval(scale, zero_point, levels)
    assert error(*found) <= error(*rounded)
    np.testing.assert_allclose(found, rounded, rtol=2**-20)
    assert [end == 0 for end in found] == [end == 0 for end in rounded]


@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_the_largest_ranges_have_ends(zero_point: int) -> None:
    found = interval(1.2e36, zero_point, 256)
    np.testing.assert_allclose(found, rounded_ends(1.2e36, zero_point, 256), rtol=2**-20)


def test_both_shifts_are_nearly_always_the_zero_point() -> None:
    generator = np.random.default_rng(0)
    scales, zero_points = np.exp(generator.normal(-3, 2, 300)), generator.integers(0, 256, 300)
    off = rounded_off = 0
    for scale, zero_point in zip(scales.tolist(), zero_points.tolist(), strict=True):
        both = {zero_point}
        off += set(shifts(*interval(scale, zero_point, 256), 256)) != both
        rounded_off += set(shifts(*rounded_ends(scale, zero_point, 256), 256)) != both
    assert off < 45
    assert rounded_off > 90


def codes_of(values: Ends, scale: float, zero_point: int, *, is_integer: bool) -> Ends:
    """Codes that the runtime quantizes values to, alone or in front of an integer kernel."""
    low, high = interval(scale, zero_point, 256)
    x = opset13.parameter([-1, len(values)], np.float32)
    found = opset13.fake_quantize(x, low, high, low, high, 256)
    if is_integer:
        codes = opset13.constant(64 * np.eye(len(values), dtype=np.int8))
        scales = opset13.constant(np.full((len(values), 1), 1 / 64, np.float32))
        weight = opset13.multiply(opset13.convert(codes, "f32"), scales)
        found = opset13.matmul(found, weight, transpose_a=False, transpose_b=True)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(ov.Model([found], [x]), "CPU", options)
    kernels = {
        node.get_rt_info()["primitiveType"].value
        for node in compiled.get_runtime_model().get_ordered_ops()
    }
    assert any(kernel.endswith("I8") for kernel in kernels) == is_integer
    return np.round(compiled([values[None]])[0][0] / scale)


@pytest.mark.parametrize("is_integer", [True, False])
@pytest.mark.parametrize(("scale", "zero_point"), GRIDS)
def test_the_runtime_rounds_values_next_to_a_tie_as_they_are(
    scale: float, zero_point: int, *, is_integer: bool
) -> None:
    # Sums of value and shift have steps of 2^-16 where they are largest.
    codes = np.arange(-30, 30)
    for side, expected in ((-1, codes), (1, codes + 1)):
        values = ((codes + 0.5 + side * 1.2 * 2**-16) * scale).astype(np.float32)
        found = codes_of(values, scale, zero_point, is_integer=is_integer)
        np.testing.assert_array_equal(found, expected)
