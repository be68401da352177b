from __future__ import annotations

from dataclasses import replace

import numpy as np
import openvino as ov
import pytest
from openvino import opset13

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer, Product
from fxmpq.targets.openvino.compiled import compile_options
from fxmpq.targets.openvino.kernels import Kernels, name_layers, name_products
from fxmpq.targets.openvino.translate import codes_name, quantization_name, widened_name

NAMES = ["first", "second", "third", "table"]


def layer(name: str) -> Layer:
    return Layer(name, "linear", "linear", f"{name}.weight", 0, (1,), 0)


def codes_of(index: int, rows: int, columns: int) -> ov.Node:
    """Stored codes, named as the translation names them."""
    codes = np.random.default_rng(index).integers(-8, 8, (rows, columns)).astype(np.int8)
    stored = opset13.constant(codes, dtype=ov.Type.i4)
    stored.set_friendly_name(codes_name(index))
    return stored


def weight(index: int, rows: int, columns: int, *, widened: bool) -> ov.Node:
    """Stored codes in real numbers."""
    stored = codes_of(index, rows, columns)
    if widened:
        stored = opset13.convert(stored, "i8")
        stored.set_friendly_name(widened_name(index))
    real = opset13.convert(stored, "f32")
    return opset13.multiply(real, opset13.constant(np.full((rows, 1), 0.1, np.float32)))


def quantized(value: ov.Node) -> ov.Node:
    low, high = (opset13.constant(np.float32(edge)) for edge in (-3.0, 4.0))
    return opset13.fake_quantize(value, low, high, low, high, 256)


@pytest.fixture(scope="module")
def model() -> ov.Model:
    """A layer on integers, one with narrow weights, one hidden from the runtime, a look-up."""
    ids = opset13.parameter([-1], np.int64)
    axis = opset13.constant(np.int64(0))
    rows = opset13.gather(opset13.convert(codes_of(3, 9, 32), "i8"), ids, axis)
    rows = opset13.multiply(opset13.convert(rows, "f32"), opset13.constant(np.float32(0.1)))
    bias = opset13.constant(np.ones((1, 64), np.float32))
    first = opset13.matmul(quantized(rows), weight(0, 64, 32, widened=True), False, True)
    first = opset13.add(first, bias)
    second = opset13.matmul(first, weight(1, 64, 64, widened=False), False, True)
    second = opset13.add(second, bias)
    third = opset13.matmul(quantized(second), weight(2, 64, 64, widened=False), False, True)
    made = ov.Model([third], [ids])
    name_layers(made, [layer(name) for name in NAMES])
    return made


@pytest.fixture(scope="module")
def executed(model: ov.Model) -> ov.Model:
    compiled = ov.Core().compile_model(model, "CPU", compile_options("f32"))
    compiled([np.arange(4)])
    return compiled.get_runtime_model()


def test_layers_and_their_biases_get_names(model: ov.Model) -> None:
    kinds = {node.get_friendly_name(): node.get_type_name() for node in model.get_ops()}
    assert {name: kinds[name] for name in NAMES} == {
        "first": "MatMul",
        "second": "MatMul",
        "third": "MatMul",
        "table": "Gather",
    }
    assert [kinds[f"{name}/bias"] for name in NAMES[:2]] == ["Add", "Add"]
    assert "third/bias" not in kinds


def test_integer_kernels_are_read_back(executed: ov.Model) -> None:
    kernel, reason = Kernels(executed).of_quantized(layer("first"), Precision(4, 8))
    assert kernel.startswith("FullyConnected ")
    assert kernel.lower().endswith("i8")
    assert reason == ""


def test_a_float_kernel_where_integers_were_asked_has_a_reason(executed: ov.Model) -> None:
    kernel, reason = Kernels(executed).of_quantized(layer("third"), Precision(4, 8))
    assert kernel.endswith("f32")
    assert "no integer kernel" in reason


def test_weight_only_kernels_read_codes(executed: ov.Model) -> None:
    kernel, reason = Kernels(executed).of_quantized(layer("second"), Precision(4))
    assert kernel.startswith("FullyConnected ")
    assert kernel.endswith("on i4 weights")
    assert reason == ""
    kernel, reason = Kernels(executed).of_quantized(layer("table"), Precision(8))
    assert kernel.startswith("Gather ")
    assert kernel.endswith("on i8 weights")
    assert reason == ""


def test_weights_that_were_expanded_have_a_reason() -> None:
    x = opset13.parameter([2, 4, 6, 6], np.float32)
    codes = np.ones((8, 4, 3, 3), np.int8)
    stored = opset13.constant(codes, dtype=ov.Type.i4)
    stored.set_friendly_name(codes_name(0))
    real = opset13.multiply(opset13.convert(stored, "f32"), opset13.constant(np.float32(0.1)))
    model = ov.Model([opset13.convolution(x, real, [1, 1], [0, 0], [0, 0], [1, 1])], [x])
    name_layers(model, [layer("conv")])
    compiled = ov.Core().compile_model(model, "CPU", compile_options("f32"))
    kernel, reason = Kernels(compiled.get_runtime_model()).of_quantized(layer("conv"), Precision(4))
    assert kernel.startswith("Convolution ")
    assert "expands its weights to float" in reason


def test_a_layer_that_vanished_has_a_reason(executed: ov.Model) -> None:
    kernel, reason = Kernels(executed).of_quantized(layer("fourth"), Precision(4, 8))
    assert kernel == "unknown"
    assert "does not show it" in reason


def test_float_layers_are_found_by_their_own_weights() -> None:
    x = opset13.parameter([2, 8], np.float32)
    own, shared = (opset13.constant(np.eye(8, dtype=np.float32)) for _ in range(2))
    own.output(0).set_names({"own_weight:0"})
    shared.output(0).set_names({"shared_weight:0"})
    hidden = opset13.relu(opset13.matmul(x, own, False, True))
    hidden = opset13.relu(opset13.matmul(hidden, shared, False, True))
    model = ov.Model([opset13.matmul(hidden, shared, False, True)], [x])
    twice = [replace(layer(name), weight="shared.weight") for name in ("shared", "shared#2")]
    name_layers(model, [layer("own"), *twice])
    compiled = ov.Core().compile_model(model, "CPU", compile_options("f32"))
    kernels = Kernels(compiled.get_runtime_model())
    assert kernels.of_float(layer("own")).startswith("FullyConnected ")
    assert kernels.of_float(twice[0]) == "float"


def test_a_kernel_that_lost_its_name_is_found_by_its_codes() -> None:
    """What subtracts a layer's result takes its bias, and its name with it."""
    x, other = (opset13.parameter([-1, 64], np.float32) for _ in range(2))
    real = opset13.matmul(quantized(x), weight(0, 64, 64, widened=True), False, True)
    real = opset13.add(real, opset13.constant(np.ones((1, 64), np.float32)))
    model = ov.Model([opset13.relu(opset13.subtract(other, real))], [x, other])
    lost = layer("lost")
    name_layers(model, [lost])
    compiled = ov.Core().compile_model(model, "CPU", compile_options("f32"))
    compiled([np.ones((2, 64), np.float32)] * 2)
    executed = compiled.get_runtime_model()
    assert Kernels(executed).of_quantized(lost, Precision(4, 8))[0] == "unknown"
    kernel, reason = Kernels(executed, [lost]).of_quantized(lost, Precision(4, 8))
    assert kernel.startswith("FullyConnected ")
    assert kernel.lower().endswith("i8")
    assert reason == ""


def test_names_with_separators_are_found() -> None:
    """Slashes and commas separate names in the graph that the runtime executes."""
    x = opset13.parameter([-1, 64], np.float32)
    hidden = opset13.matmul(quantized(x), weight(0, 64, 64, widened=True), False, True)
    hidden = opset13.matmul(quantized(hidden), weight(1, 64, 64, widened=True), False, True)
    model = ov.Model([hidden], [x])
    layers = [layer("left/right"), layer("one,two")]
    name_layers(model, layers)
    compiled = ov.Core().compile_model(model, "CPU", compile_options("f32"))
    compiled([np.ones((2, 64), np.float32)])
    kernels = Kernels(compiled.get_runtime_model())
    for one in layers:
        kernel, reason = kernels.of_quantized(one, Precision(4, 8))
        assert kernel.lower().endswith("i8")
        assert reason == ""


def test_products_are_found_by_what_quantizes_their_operands() -> None:
    x = opset13.parameter([2, 64, 64], np.float32)
    codes = [quantized(x), quantized(opset13.relu(x)), quantized(opset13.abs(x))]
    for index, node in enumerate(codes):
        node.set_friendly_name(quantization_name(index))
    turned = opset13.transpose(codes[1], opset13.constant(np.array([0, 2, 1])))
    scores = opset13.matmul(codes[0], turned, False, False)
    scaled = opset13.multiply(scores, opset13.constant(np.float32(0.1)))
    other = opset13.matmul(codes[2], codes[0], False, False)
    plain = opset13.matmul(codes[0], opset13.relu(scaled), False, False)
    made = ov.Model([scaled, other, plain], [x])
    name_products(made, [("a/b", (0, 1)), ("gone", (1, 0)), ("c", (2, 0))])
    kinds = {node.get_friendly_name(): node.get_type_name() for node in made.get_ops()}
    assert kinds["a_b"] == kinds["c"] == "MatMul"
    assert kinds["a_b/scaled"] == "Multiply"
    assert "gone" not in kinds
    assert other.get_friendly_name() == "c"
    assert plain.get_friendly_name() not in ("a_b", "c")


def test_a_fused_kernel_is_a_products_alone() -> None:
    x = opset13.parameter([4], np.float32)
    model = ov.Model([x], [x])
    result = model.get_results()[0]
    result.set_friendly_name("one")
    for key, value in {
        "layerType": "Subgraph",
        "primitiveType": "jit_avx512_i8",
        "runtimePrecision": "i8",
        "originalLayersNames": "one/scaled,two",
    }.items():
        result.get_rt_info()[key] = value
    for node in model.get_ordered_ops():
        for key in ("layerType", "primitiveType", "runtimePrecision", "originalLayersNames"):
            if key not in node.get_rt_info():
                node.get_rt_info()[key] = ""
    kernels = Kernels(model)
    product = Product("one", "one", 0, 0)
    assert kernels.of_quantized(product, Precision.parse("a8")) == ("Subgraph jit_avx512_i8", "")
    assert kernels.of_quantized(layer("one"), Precision(4, 8))[0] == "unknown"
