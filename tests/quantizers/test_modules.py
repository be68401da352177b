from __future__ import annotations

import pytest
import torch

from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.granularity import Dynamic, PerTensor
from fxmpq.quantizers.codes import dequantize, round_in_place
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.quantizers.scales import scale_rows, scale_shape

UINT8, UINT4 = NumberFormat(8, Scheme.AFFINE), NumberFormat(4, Scheme.AFFINE)
INT8, INT4 = NumberFormat(8), NumberFormat(4)


@pytest.fixture
def activation() -> ActivationQuantizer:
    quantizer = ActivationQuantizer("relu", [UINT4, UINT8])
    quantizer.ranges = {"uint4": ActivationRange(0.5, 2), "uint8": ActivationRange(0.01, 0)}
    return quantizer


def test_an_activation_passes_untouched_while_off(activation: ActivationQuantizer) -> None:
    x = torch.randn(5)
    assert activation(x) is x


@pytest.mark.parametrize(("is_symmetric", "expected"), [(False, [-1.0, 2.0]), (True, [-2.0, 2.0])])
def test_a_dynamic_format_keeps_to_a_symmetric_range(
    is_symmetric: bool, expected: list[float]
) -> None:
    number_format = NumberFormat(2, Scheme.AFFINE, dynamic=Dynamic.TENSOR)
    quantizer = ActivationQuantizer("linear", [number_format], is_symmetric)
    quantizer.activate(number_format)
    # Steps of 1 from -1 to 2, or of 2 from -4 to 2.
    assert quantizer(torch.tensor([-1.01, 2.0])).round().tolist() == expected


def test_an_activation_takes_the_grid_of_the_active_format(
    activation: ActivationQuantizer,
) -> None:
    x = torch.tensor([-3.0, 0.26, 1.234])
    activation.activate(UINT4)
    assert torch.allclose(activation(x), torch.tensor([-1.0, 0.5, 1.0]))
    activation.activate(UINT8)
    assert torch.allclose(activation(x), torch.tensor([0.0, 0.26, 1.23]))
    activation.activate(None)
    assert activation(x) is x


def test_an_output_is_left_alone_by_ranges_of_the_layers_input() -> None:
    dynamic = NumberFormat(8, Scheme.AFFINE, dynamic=Dynamic.ROW)
    quantizer = ActivationQuantizer("linear", [UINT8, dynamic], is_output=True)
    quantizer.ranges = {"uint8": ActivationRange(0.5, 0)}
    x = torch.tensor([0.3, 0.8])
    quantizer.activate(dynamic)
    assert quantizer.active is None
    assert quantizer(x) is x
    assert quantizer.quantize(x, dynamic) is x
    quantizer.activate(UINT8)
    assert quantizer(x).tolist() == [0.5, 1.0]
    found = [quantizer.leaves_alone(entry) for entry in (None, UINT8, dynamic)]
    assert found == [True, False, True]


def test_an_uncalibrated_format_is_an_error(activation: ActivationQuantizer) -> None:
    activation.activate(NumberFormat(2, Scheme.AFFINE))
    with pytest.raises(KeyError, match="uint2"):
        activation(torch.ones(1))


def test_a_dynamic_format_finds_its_range_on_each_tensor() -> None:
    found = NumberFormat(2, Scheme.AFFINE, dynamic=Dynamic.TENSOR)
    quantizer = ActivationQuantizer("relu", [UINT4, found])
    quantizer.activate(found)
    for scale in (1.0, 100.0):
        x = torch.tensor([0.0, 0.9, 3.0]) * scale
        assert torch.equal(quantizer(x), torch.tensor([0.0, 1.0, 3.0]) * scale)
    assert quantizer.ranges == {}


def test_a_weight_has_codes_and_values_per_format() -> None:
    quantizer = WeightQuantizer("fc.weight", [INT4, INT8], axis=0)
    quantizer.set_scale(INT4, torch.tensor([0.5, 1.0]))
    quantizer.set_scale(INT8, torch.tensor([0.1, 0.1]))
    weight = torch.tensor([[0.6, -9.0], [0.6, -0.2]])
    assert quantizer(weight) is weight
    assert quantizer.codes(weight, INT4).tolist() == [[1, -8], [1, 0]]
    quantizer.activate(INT4)
    assert quantizer(weight).tolist() == [[0.5, -4.0], [1.0, 0.0]]
    quantizer.activate(INT8)
    assert torch.allclose(quantizer(weight), torch.tensor([[0.6, -9.0], [0.6, -0.2]]))


BLOCKS = ["w4b4", "w4t", "we4m3", "we2m1t", "we2m1b16", "we2m1b32", "we5m2b5"]


def weight_format(name: str) -> NumberFormat:
    found = Precision.parse(name).weight
    assert found is not None
    return found


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_weight_of_any_format_agrees_with_itself(name: str, axis: int) -> None:
    number_format = weight_format(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    shape = scale_shape(weight.shape, axis, number_format.granularity)
    quantizer = WeightQuantizer("conv.weight", [number_format], axis)
    quantizer.set_scale(number_format, torch.rand(shape, generator=generator) * 0.2 + 0.05)
    assert quantizer.scale(number_format).shape == shape
    spread = quantizer.spread_scale(weight, number_format)
    assert torch.broadcast_shapes(spread.shape, weight.shape) == weight.shape
    codes = quantizer.codes(weight, number_format)
    found = quantizer.quantize(weight, number_format)
    assert torch.equal(found, dequantize(codes, spread, number_format))
    # Each row of values that share a scale is what that scale alone makes of it.
    rows = scale_rows(weight, axis, number_format.granularity)
    alone = quantizer.scale(number_format).reshape(-1, 1)
    expected = round_in_place(rows / alone, number_format) * alone
    assert torch.equal(scale_rows(found, axis, number_format.granularity), expected)
    # Stored codes take the place of the nearest.
    quantizer.set_codes(number_format, codes.flip(0))
    assert quantizer.stored_codes(number_format) is not None
    assert torch.equal(quantizer.codes(weight, number_format), codes.flip(0))
    flipped = quantizer.quantize(weight, number_format)
    assert torch.equal(flipped, dequantize(codes.flip(0), spread, number_format))
    assert set(quantizer.state_dict()) == {
        f"scale_{number_format.name}",
        f"codes_{number_format.name}",
    }


def test_scales_are_kept_as_the_format_stores_them() -> None:
    mx, nv = weight_format("we2m1b32"), weight_format("we2m1b16")
    quantizer = WeightQuantizer("fc.weight", [mx, nv], axis=0)
    for entry in (mx, nv):
        quantizer.set_scale(entry, torch.tensor([[0.3, 0.71]]))
    assert quantizer.scale(mx).tolist() == [[0.25, 1.0]]
    assert quantizer.scale(nv).tolist() == [[0.3125, 0.6875]]


def test_an_activation_takes_floats_too() -> None:
    number_format = NumberFormat(4, Scheme.E2M1, PerTensor())
    quantizer = ActivationQuantizer("gelu", [number_format])
    quantizer.ranges = {number_format.name: ActivationRange(0.5, 0)}
    quantizer.activate(number_format)
    assert quantizer(torch.tensor([-9.0, -0.3, 0.6, 1.2])).tolist() == [-3.0, -0.25, 0.5, 1.0]


def test_scales_travel_with_the_module() -> None:
    quantizer = WeightQuantizer("fc.weight", [INT4], axis=0)
    quantizer.set_scale(INT4, torch.ones(2))
    assert set(quantizer.state_dict()) == {"scale_int4"}
    assert quantizer.to(torch.float64).scale(INT4).dtype is torch.float64


def test_a_bias_is_shifted_only_for_the_active_format() -> None:
    correction = BiasCorrection("fc")
    correction.set_shift(INT4, torch.tensor([1.0, -1.0]))
    bias = torch.tensor([2.0, 2.0])
    assert correction(bias) is bias
    assert correction(None) is None
    correction.activate(INT4)
    assert correction(bias).tolist() == [3.0, 1.0]
    assert correction(None).tolist() == [1.0, -1.0]
    correction.activate(INT8)
    assert correction(bias) is bias
    assert correction.shift(INT8) is None


def test_a_rounding_of_the_bias_goes_with_one_precision() -> None:
    correction, bias = BiasCorrection("fc"), torch.tensor([2.0, 2.0])
    correction.set_shift(INT4, torch.tensor([1.0, -1.0]))
    correction.activate(INT4)
    correction.set_rounding(torch.tensor([0.25, 0.0]))
    assert correction(bias).tolist() == [3.25, 1.0]
    assert correction(None).tolist() == [1.25, -1.0]
    assert set(correction.state_dict()) == {"shift_int4", "rounding"}
    correction.activate(INT8)
    assert correction.added is None
    correction.set_rounding(torch.tensor([0.5, 0.0]))
    assert correction(bias).tolist() == [2.5, 2.0]
    assert correction(None).tolist() == [0.5, 0.0]
    correction.activate(INT4)
    assert correction(bias).tolist() == [3.0, 1.0]


@pytest.mark.parametrize("active", [None, INT8])
def test_modules_print_their_name_and_state(active: NumberFormat | None) -> None:
    for module in (WeightQuantizer("fc.weight", [INT8], 0), BiasCorrection("fc")):
        module.activate(active)
        state = "None" if active is None else "int8"
        assert f"{module.name}, active={state}" in repr(module)
    quantizer = ActivationQuantizer("relu", [UINT8])
    quantizer.activate(UINT8)
    assert "relu, active=uint8" in repr(quantizer)
