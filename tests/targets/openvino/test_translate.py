from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13
from openvino.frontend import GeneralFailure
from torch import Tensor, nn

from fxmpq.errors import TargetError
from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.integer import fake_quantize_activation
from fxmpq.targets import qdq  # noqa: F401  (registers torch.ops.fxmpq)
from fxmpq.targets.openvino import translate
from fxmpq.targets.openvino.translate import (
    TRANSLATIONS,
    codes_name,
    openvino_model,
    quantization_name,
)

STORED_BYTES = {2: 1 / 4, 3: 3 / 8, 4: 1 / 2, 6: 3 / 4, 8: 1}


class Context:
    """What a translation is given: constants, and the input of an operation."""

    def __init__(self, *inputs: object) -> None:
        self._inputs = inputs

    def get_input(self, position: int) -> ov.Output:
        found = self._inputs[position]
        assert isinstance(found, ov.Node)
        return found.output(0)

    def get_values_from_const_input(self, position: int) -> object:
        return self._inputs[position]


def computed(output: ov.Output, *inputs: object, parameters: Sequence[ov.Node] = ()) -> np.ndarray:
    model = ov.Model([output], list(parameters))
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return ov.Core().compile_model(model, "CPU", options)(list(inputs))[0]


@settings(max_examples=15)
@given(st.sampled_from(sorted(STORED_BYTES)), st.integers(1, 9), st.integers(1, 40), st.data())
def test_codes_of_any_width_survive(bits: int, rows: int, width: int, data: st.DataObject) -> None:
    found = NumberFormat(bits)
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(found.qmin, found.qmax + 1, (rows, width))
    codes = codes.astype(np.int8)
    for name in ("widened_codes", "stored_numbers"):
        context = Context(opset13.constant(codes), bits, 7)
        (output,) = TRANSLATIONS[f"fxmpq.{name}.default"](context)
        np.testing.assert_array_equal(computed(output), codes)
        operations = {node.get_friendly_name(): node for node in ov.Model([output], []).get_ops()}
        stored = operations[codes_name(7)]
        # Three- and six-bit codes are packed by eight and by four.
        assert stored.get_byte_size() == pytest.approx(codes.size * STORED_BYTES[bits], abs=3)


@pytest.mark.parametrize("zero_point", [0, 120, 255])
def test_a_quantization_is_the_simulated_one(zero_point: int) -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    source = opset13.parameter([-1, 50], np.float32)
    context = Context(source, 0.03125, zero_point, 8, 2)
    (output,) = TRANSLATIONS["fxmpq.fake_quantize.default"](context)
    assert output.get_node().get_friendly_name() == quantization_name(2)
    found = computed(output, x.numpy(), parameters=[source])
    expected = fake_quantize_activation(x, 0.03125, zero_point, NumberFormat(8, Scheme.AFFINE))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (4, 5)), ((2, 3, 4), (4,)), ((5, 1, 3, 4), (2, 4, 6)), ((4,), (4,))],
)
def test_products_broadcast_as_in_torch(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator) for shape in (left, right))
    sources = [opset13.parameter(list(shape), np.float32) for shape in (left, right)]
    (output,) = TRANSLATIONS["aten.matmul.default"](Context(*sources))
    found = computed(output, x.numpy(), y.numpy(), parameters=sources)
    np.testing.assert_allclose(found, torch.matmul(x, y).numpy(), rtol=1e-5, atol=1e-6)


def exported(model: nn.Module, *inputs: object) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), inputs, strict=False)


class Mixture(nn.Module):
    """Options among the inputs, constants among the outputs, and a bias behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, flag: bool, times: float, mask: Tensor) -> tuple[object, ...]:
        y = self.conv(x) * times
        return y.masked_fill(mask, 0.0), None, 3, {"label": y.argmax(1)}


@pytest.fixture(scope="module")
def mixture() -> tuple[nn.Module, tuple[object, ...]]:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 3, 5, 5), torch.zeros(2, 4, 3, 3, dtype=torch.bool)
    mask[1] = True
    return Mixture(), (x, True, 2.0, mask)


def test_only_tensors_come_in_and_out(mixture: tuple[nn.Module, tuple[object, ...]]) -> None:
    model, inputs = mixture
    made = openvino_model(exported(model, *inputs))
    assert [value.any_name for value in made.inputs] == ["x", "mask"]
    compiled = ov.Core().compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([inputs[0].numpy(), inputs[3].numpy()])
    y, *_, labels = model(*inputs)
    assert len(found) == 2
    np.testing.assert_allclose(found[0], y.detach().numpy(), atol=1e-5)
    np.testing.assert_array_equal(found[1], labels["label"].numpy())


def test_biases_are_stored_in_their_shape_and_names_are_reproducible(
    mixture: tuple[nn.Module, tuple[object, ...]],
) -> None:
    model, inputs = mixture
    first, second = (openvino_model(exported(model, *inputs)) for _ in range(2))
    kinds = [node.get_type_name() for node in first.get_ordered_ops()]
    assert "Convolution" in kinds
    assert "Reshape" not in kinds
    assert "ShapeOf" not in kinds
    names = [[node.get_friendly_name() for node in m.get_ordered_ops()] for m in (first, second)]
    assert names[0] == names[1]
    assert len(set(names[0])) == len(names[0])


class Choosy(nn.Module):
    """Reads one of its inputs alone."""

    def forward(self, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        return third * 2


def test_inputs_that_nothing_reads_stay() -> None:
    inputs = torch.ones(2, 3), torch.ones(2), torch.full((2, 4), 3.0)
    made = openvino_model(exported(Choosy(), *inputs))
    assert [value.any_name for value in made.inputs] == ["first", "second", "third"]
    compiled = ov.Core().compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([tensor.numpy() for tensor in inputs])
    assert len(found) == 1
    np.testing.assert_array_equal(found[0], np.full((2, 4), 6.0))


class Repeating(nn.Module):
    """Returns its input, a parameter and one value several times, also under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.offset = nn.Linear(4, 4), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.fc(x)
        return x, y, y.clone(), self.offset, y.half(), y, self.offset, x


def test_values_may_be_returned_several_times() -> None:
    torch.manual_seed(0)
    model, x = Repeating(), torch.randn(3, 4)
    made = openvino_model(exported(model, x))
    # No cast is left but the model's own, and outputs are named as what computes them.
    assert [node.get_type_name() for node in made.get_ordered_ops()].count("Convert") == 1
    names = [value.any_name for value in made.outputs]
    cast = "_to_copy:0"
    assert names == ["x", *["linear:0"] * 2, "offset:0", cast, "linear:0", "offset:0", "x"]
    compiled = ov.Core().compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([x.numpy()])
    for index, expected in enumerate(model(x)):
        np.testing.assert_allclose(found[index], expected.detach().numpy(), atol=1e-3)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


def test_an_operator_without_translation_is_named() -> None:
    with pytest.raises(
        TargetError, match=r"OpenVINO [\d.]+ cannot take this model: .*linalg_eigh.*'reference'"
    ):
        openvino_model(exported(Unknown(), torch.eye(3)))


class FailingFrontend:
    """A frontend that has translations and fails all the same."""

    def load_by_framework(self, framework: str) -> FailingFrontend:
        return self

    def add_extension(self, extension: object) -> None:
        return None

    def load(self, decoder: object) -> object:
        raise GeneralFailure("Check 'rank' failed:\nno such rank")


def test_what_else_the_frontend_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "FrontEndManager", FailingFrontend)
    with pytest.raises(
        TargetError, match=r"cannot take this model: Check 'rank' failed:; no such rank\. Target"
    ):
        openvino_model(exported(nn.ReLU(), torch.ones(2)))
