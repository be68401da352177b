"""TensorRT's published rules of explicit quantization, checked on an ONNX file.

Each rule says where it was read: in NVIDIA's documentation of TensorRT ("Working with Quantized
Types", "Quantization Schemes", "Explicit Quantization", the operators' reference) or in
ONNX-TensorRT's list of supported operators. What a release of TensorRT asks beyond these is not
known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.checker
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # has no types

from fxmpq.errors import TargetError
from fxmpq.targets.tensorrt.model import LintedModel, integer, is_standard, operand

_TYPES = onnx.TensorProto
_QUANTIZED = {
    _TYPES.INT8: "INT8",
    _TYPES.FLOAT8E4M3FN: "FLOAT8E4M3FN",
    _TYPES.INT4: "INT4",
    _TYPES.FLOAT4E2M1: "FLOAT4E2M1",
}
_FOUR_BIT_BLOCKS = (64, 128)
_UNSUPPORTED = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}
)

Breach = tuple[str, str]
"""A node, and what is wrong with it."""


@dataclass(frozen=True)
class Violation:
    """A place that breaks a rule.

    Args:
        rule: The rule's name.
        node: The node that breaks it, or a value; empty for the whole model.
        message: What was found, for people.
    """

    rule: str
    node: str
    message: str


@dataclass(frozen=True)
class LintRule:
    """One thing that TensorRT asks of a file.

    Args:
        name: In a few words.
        source: Where it was read.
        breaches: Yields each node that breaks it, and what was found there.
    """

    name: str
    source: str
    breaches: Callable[[LintedModel], Iterator[Breach]]


def lint_model(model: str | Path | onnx.ModelProto) -> tuple[Violation, ...]:
    """Check a model; see `fxmpq.targets.tensorrt.lint`."""
    file = "" if isinstance(model, onnx.ModelProto) else str(model)
    linted = LintedModel(_load(model), file)
    return tuple(
        Violation(rule.name, node, message)
        for rule in LINT_RULES
        for node, message in rule.breaches(linted)
    )


def _load(model: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        # The form that TensorRT reads, whatever a file's name ends in.
        found = onnx.load(Path(model), format="protobuf", load_external_data=False)
    except OSError as error:
        raise TargetError(f"cannot read the ONNX model {str(model)!r}: {error}") from error
    except DecodeError as error:
        raise TargetError(f"{str(model)!r} is no ONNX model: {error}") from error
    return found


def _valid(model: LintedModel) -> Iterator[Breach]:
    try:
        onnx.checker.check_model(model.file or model.proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield "", f"onnx.checker refuses the model: {str(error).strip().splitlines()[0]}"


def _domains(model: LintedModel) -> Iterator[Breach]:
    for name, node in zip(model.names, model.nodes, strict=True):
        if not is_standard(node):
            yield name, f"{node.op_type} is of the domain {node.domain!r}, not of ONNX itself"


def _operators(model: LintedModel) -> Iterator[Breach]:
    for operator in sorted(_UNSUPPORTED):
        for name, _ in model.pairs(operator):
            yield name, f"{operator} is not supported; QuantizeLinear and DequantizeLinear are"


def _types(model: LintedModel) -> Iterator[Breach]:
    legal = ", ".join(_QUANTIZED.values())
    for name, node, found in _coded(model):
        if found not in (*_QUANTIZED, _TYPES.UNDEFINED, _TYPES.INT32):
            yield name, f"{node.op_type} on {_TYPES.DataType.Name(found)}; there are {legal}"


def _bias(model: LintedModel) -> Iterator[Breach]:
    for name, node, found in _coded(model):
        if found == _TYPES.INT32:
            yield name, f"{node.op_type} on INT32, as of a quantized bias; biases stay float"


def _zero_points(model: LintedModel) -> Iterator[Breach]:
    for name, node, _ in _coded(model):
        zero = operand(node, 2)
        found = model.array(zero) if zero else np.zeros(1)
        if found is None:
            if not model.is_constant(zero):
                yield name, f"{node.op_type} has a zero point that is computed at run time"
        elif np.any(found.astype(np.float64)):
            value = found.astype(np.float64).ravel()
            yield name, f"{node.op_type} has the zero point {value[np.flatnonzero(value)[0]]:g}"


def _scales(model: LintedModel) -> Iterator[Breach]:
    for name, node, _ in _coded(model):
        scale = operand(node, 1)
        found = model.array(scale)
        if not model.is_constant(scale):
            yield name, f"{node.op_type} has the scale {scale!r}, which is computed at run time"
        elif found is not None and not _are_positive(found.astype(np.float64)):
            yield name, f"{node.op_type} has a scale that is not positive, or not finite"


def _are_positive(scales: npt.NDArray[np.float64]) -> bool:
    return bool(np.all((scales > 0) & np.isfinite(scales)))


def _activation_scales(model: LintedModel) -> Iterator[Breach]:
    for name, node in model.pairs("QuantizeLinear"):
        scale = model.array(operand(node, 1))
        if not model.is_constant(operand(node, 0)) and scale is not None and scale.size != 1:
            yield name, f"an activation is quantized with {scale.size} scales, not with one"


def _scale_shapes(model: LintedModel) -> Iterator[Breach]:
    for name, node, _ in _coded(model):
        scale, stored = model.array(operand(node, 1)), model.stored.get(operand(node, 0))
        zero = model.array(operand(node, 2))
        if scale is not None and zero is not None and zero.size != scale.size:
            yield name, f"{zero.size} zero points for {scale.size} scales"
        if scale is None or stored is None or scale.size == 1:
            continue
        problem = _shape_problem(tuple(stored.dims), scale.shape, node)
        if problem:
            yield name, problem


def _shape_problem(shape: tuple[int, ...], scales: tuple[int, ...], node: onnx.NodeProto) -> str:
    """What is wrong with the shape of several scales of stored codes; empty if nothing is."""
    asked = integer(node, "axis", 1)
    axis = asked + len(shape) if asked < 0 else asked
    if len(scales) == 1:
        is_found = 0 <= axis < len(shape) and scales[0] == shape[axis]
        return "" if is_found else f"{scales[0]} scales along axis {asked} of {list(shape)}"
    cut = _cut_axes(shape, scales)
    if cut is None:
        return (
            f"scales of {list(scales)} for {list(shape)}; one of the last two axes is cut into "
            "whole blocks, and the others are as they are"
        )
    blocks = [(place, shape[place] // scales[place]) for place in cut]
    block = integer(node, "block_size", 0)
    if all(found == (axis, block) for found in blocks):
        return ""
    wanted = f"blocks of {blocks[0][1]} along axis {blocks[0][0]}"
    return (
        f"scales of {list(scales)} for {list(shape)}, {wanted}, but block_size is {block} and "
        f"axis {asked}"
    )


def _four_bits(model: LintedModel) -> Iterator[Breach]:
    for name, node, found in _coded(model):
        if found != _TYPES.INT4:
            continue
        scale, stored = model.array(operand(node, 1)), model.stored.get(operand(node, 0))
        if not model.is_constant(operand(node, 0)):
            yield name, "an activation is INT4, which only weights may be"
        elif scale is not None and stored is not None:
            size = int(np.prod(stored.dims)) // max(scale.size, 1)
            is_cut = _cut_axes(tuple(stored.dims), scale.shape) is not None
            if not is_cut or size not in _FOUR_BIT_BLOCKS:
                yield (
                    name,
                    (
                        f"INT4 weights of {list(stored.dims)} with scales of {list(scale.shape)}; "
                        f"they have one for each block of {' or '.join(map(str, _FOUR_BIT_BLOCKS))}"
                    ),
                )


def _stored_codes(model: LintedModel) -> Iterator[Breach]:
    for value, tensor in model.stored.items():
        for place in model.readers.get(value, ()) if tensor.data_type in _QUANTIZED else ():
            operator = model.nodes[place].op_type
            if operator not in ("QuantizeLinear", "DequantizeLinear"):
                yield model.names[place], f"{operator} reads the codes {value!r} undequantized"


def _coded(model: LintedModel) -> Iterator[tuple[str, onnx.NodeProto, int]]:
    """Each node that makes or reads codes, with the codes' type."""
    for name, node in model.pairs("QuantizeLinear"):
        # Without a zero point that says it: an attribute, or the type that ONNX then takes.
        by_attribute = integer(node, "output_dtype", 0) or _TYPES.UINT8
        yield name, node, model.type_of(operand(node, 2)) if operand(node, 2) else by_attribute
    for name, node in model.pairs("DequantizeLinear"):
        found = model.type_of(operand(node, 0))
        yield name, node, found or model.type_of(operand(node, 2))


def _cut_axes(shape: tuple[int, ...], scales: tuple[int, ...]) -> list[int] | None:
    """The axis along which scales belong to whole blocks, one of the last two.

    None where each code has a scale of its own; `None` where they belong to no whole blocks.
    """
    if len(shape) != len(scales):
        return None
    cut = [axis for axis, sizes in enumerate(zip(shape, scales, strict=True)) if len({*sizes}) > 1]
    if len(cut) > 1:
        return None
    is_whole = all(axis >= len(shape) - 2 and scales[axis] > 0 for axis in cut)
    return cut if is_whole and all(shape[axis] % scales[axis] == 0 for axis in cut) else None


_SCHEMES = "TensorRT documentation, Quantization Schemes"
_TYPES_GUIDE = "TensorRT documentation, Working with Quantized Types"
_EXPLICIT = "TensorRT documentation, Explicit Quantization"
_REFERENCE = "TensorRT operators' reference, Quantize and Dequantize"
_SUPPORTED = "ONNX-TensorRT, Supported ONNX Operators"

LINT_RULES: tuple[LintRule, ...] = (
    LintRule("valid model", "ONNX", _valid),
    LintRule("standard operators", _SUPPORTED, _domains),
    LintRule("supported operators", _SUPPORTED, _operators),
    LintRule("quantized types", _TYPES_GUIDE, _types),
    LintRule("float bias", _SUPPORTED, _bias),
    LintRule("no zero points", _REFERENCE, _zero_points),
    LintRule("constant scales", _REFERENCE, _scales),
    LintRule("one scale an activation", f"{_EXPLICIT}: placement of Q/DQ", _activation_scales),
    LintRule("shapes of scales", _REFERENCE, _scale_shapes),
    LintRule("4 bits in blocks of weights", _SCHEMES, _four_bits),
    LintRule("dequantized codes", _EXPLICIT, _stored_codes),
)
"""Every rule, in the order in which they are checked."""
