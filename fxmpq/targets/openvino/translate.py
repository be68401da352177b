"""Reading an exported program into OpenVINO: its PyTorch frontend, and three operators of ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import openvino as ov
import torch
from openvino import opset13
from openvino.frontend import (
    FrontEndManager,
    GeneralFailure,
    NodeContext,
    NotImplementedFailure,
    OpConversionFailure,
    OpValidationFailure,
)
from openvino.frontend.pytorch import ConversionExtension
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
from torch import Tensor, fx
from torch.export import ExportedProgram, default_decompositions
from torch.utils import _pytree as pytree

from fxmpq.errors import TargetError
from fxmpq.graph.export import quiet_torch
from fxmpq.targets import qdq  # noqa: F401  (registers torch.ops.fxmpq)
from fxmpq.targets.openvino.intervals import interval

aten = torch.ops.aten

_STORED = {2: ov.Type.u2, 3: ov.Type.u3, 4: ov.Type.i4, 6: ov.Type.u6, 8: ov.Type.i8}
"""OpenVINO has no signed integers of 2, 3 or 6 bits: those codes are stored shifted."""

_FAILURES = (GeneralFailure, NotImplementedFailure, OpConversionFailure, OpValidationFailure)

_COUNTED = re.compile(r"([A-Za-z]+)_\d+")


def openvino_model(program: ExportedProgram) -> ov.Model:
    """Translate an exported program, with weight codes stored in their width.

    Args:
        program: On the CPU, with the operators of `fxmpq.targets.qdq`.

    Returns:
        The model. Constants of codes are named as `codes_name` says, quantizations of activations
        as `quantization_name` says; all other names depend on the model alone.

    Raises:
        TargetError: If OpenVINO has no translation for an operator, naming it, or fails otherwise.
    """
    frontend = FrontEndManager().load_by_framework("pytorch")
    for name, translation in TRANSLATIONS.items():
        frontend.add_extension(ConversionExtension(name, translation))
    with quiet_torch():
        # The decoder and what was loaded from it are read until the conversion is over.
        graph, outputs = _flat_graph(program)
        decoder = TorchFXPythonDecoder(graph)
        try:
            loaded = frontend.load(decoder)
            model = frontend.convert(loaded)
        except _FAILURES as error:
            version = str(ov.__version__).partition("-")[0]
            raise TargetError(
                f"OpenVINO {version} cannot take this model: {_summary(str(error))}. Target "
                "'onnxruntime' may, and 'reference' does"
            ) from error
    _drop_copies(model)
    for result in model.get_results()[outputs:]:
        model.remove_result(result)
    _shape_biases(model)
    _name_by_order(model)
    return model


def codes_name(layer: int) -> str:
    """Name of the constant that holds the codes of a layer, by its index."""
    return f"layer {layer}/codes"


def widened_name(layer: int) -> str:
    """Name of what widens these codes, and of the constant that the runtime makes of it."""
    return f"{codes_name(layer)}/widened"


def quantization_name(index: int) -> str:
    """Name of the operation that quantizes an activation, by its index."""
    return f"activation {index}"


def _flat_graph(program: ExportedProgram) -> tuple[fx.GraphModule, int]:
    """Decompose what OpenVINO has no operator for; keep tensors only among inputs and outputs.

    Returns:
        The graph, and how many outputs it has: what lies behind them is to be dropped.
    """
    table = default_decompositions()
    # Taken apart to batches of matrices, a product is no more found by what fuses attention.
    for operator in {*ops_to_not_decompose(), aten.matmul.default} & set(table):
        del table[operator]
    graph = program.run_decompositions(table).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    output = graph.graph.output_node()
    leaves = [leaf for leaf in pytree.tree_leaves(output.args) if _is_tensor(leaf)]
    for node in graph.graph.find_nodes(op="placeholder"):
        if not _is_tensor(node):
            graph.graph.erase_node(node)
    first = next(iter(graph.graph.find_nodes(op="placeholder")))
    # The frontend drops a first input that nothing reads: it takes it for a module's `self`.
    read = leaves if first.users else [*leaves, first]
    with graph.graph.inserting_before(output):
        # The frontend takes no value twice among the outputs; `_drop_copies` removes these.
        output.args = (tuple(_copy(graph, leaf) for leaf in read),)
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()
    return graph, len(leaves)


def _is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def _copy(graph: fx.GraphModule, leaf: fx.Node) -> fx.Node:
    """A cast of a value to the type it has."""
    value = leaf.meta["val"]
    found = graph.graph.call_function(aten._to_copy.default, (leaf,), {"dtype": value.dtype})
    found.meta["val"] = value
    return found


def _drop_copies(model: ov.Model) -> None:
    """Let results read what was computed, not a cast of it to the type it has."""
    for result in model.get_results():
        cast = result.input_value(0).get_node()
        if cast.get_type_name() != "Convert":
            continue
        source = cast.input_value(0)
        if source.get_element_type() == cast.get_output_element_type(0):
            result.input(0).replace_source_output(source)
            # The frontend also numbers its tensors.
            names = {name for name in source.get_names() if not name.isdigit()}
            source.get_tensor().set_names(names)
            result.output(0).set_names(names)


def _summary(message: str) -> str:
    """What the frontend names at the end of its report: operators, where those are the reason."""
    _, _, summary = message.rpartition("Summary:")
    lines = [line.strip().removeprefix("-- ") for line in summary.splitlines()]
    return "; ".join(line for line in lines if line)


def _shape_biases(model: ov.Model) -> None:
    """Store biases in their final shape, into which the frontend brings them at every run."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Reshape":
            continue
        stored, shape = node.input_value(0).get_node(), node.get_output_partial_shape(0)
        if stored.get_type_name() != "Constant" or not shape.is_static:
            continue
        shaped = opset13.constant(stored.data.reshape(list(shape.to_shape())))
        shaped.output(0).set_names(stored.output(0).get_names())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(shaped.output(0))


def _name_by_order(model: ov.Model) -> None:
    """Rename what is numbered by a counter of the process, so that files are reproducible."""
    model.set_friendly_name("fxmpq")
    seen: Counter[str] = Counter()
    for node in model.get_ordered_ops():
        match = _COUNTED.fullmatch(node.get_friendly_name())
        if match is not None and match[1] == node.get_type_name():
            seen[match[1]] += 1
            node.set_friendly_name(f"{match[1]}_{seen[match[1]]}")


def _fake_quantize(context: NodeContext) -> list[ov.Output]:
    scale = float(context.get_values_from_const_input(1))
    zero_point, bits, index = _constants(context, 2, 3, 4)
    levels = 1 << bits
    low, high = (opset13.constant(end) for end in interval(scale, zero_point, levels))
    found = opset13.fake_quantize(context.get_input(0), low, high, low, high, levels)
    found.set_friendly_name(quantization_name(index))
    return list(found.outputs())


def _widened_codes(context: NodeContext) -> list[ov.Output]:
    # Integer kernels are only found behind a cast to int8 and an integer shift.
    stored, shift = _stored_codes(context)
    if stored.get_element_type() == ov.Type.i8:
        return list(stored.outputs())
    codes = opset13.convert(stored, "i8")
    if shift:
        codes = opset13.subtract(codes, opset13.constant(np.int8(shift)))
    codes.set_friendly_name(widened_name(*_constants(context, 2)))
    return list(codes.outputs())


def _stored_numbers(context: NodeContext) -> list[ov.Output]:
    stored, shift = _stored_codes(context)
    real = opset13.convert(stored, "f32")
    if shift:
        real = opset13.subtract(real, opset13.constant(np.float32(shift)))
    return list(real.outputs())


def _product(context: NodeContext) -> list[ov.Output]:
    left, right = (context.get_input(position) for position in range(2))
    return list(opset13.matmul(left, right, transpose_a=False, transpose_b=False).outputs())


def _stored_codes(context: NodeContext) -> tuple[ov.Node, int]:
    """A constant of codes in their width, and what was added to make them unsigned."""
    codes = context.get_input(0).get_node().data
    bits, layer = _constants(context, 1, 2)
    stored = _STORED[bits]
    shift = 0 if stored.is_signed() else 1 << (bits - 1)
    shifted = (codes.astype(np.int16) + shift).astype(np.uint8 if shift else np.int8)
    constant = opset13.constant(shifted, dtype=stored)
    constant.set_friendly_name(codes_name(layer))
    return constant, shift


def _constants(context: NodeContext, *positions: int) -> list[int]:
    return [int(context.get_values_from_const_input(position)) for position in positions]


TRANSLATIONS: Mapping[str, Callable[[NodeContext], list[ov.Output]]] = {
    "fxmpq.fake_quantize.default": _fake_quantize,
    "fxmpq.widened_codes.default": _widened_codes,
    "fxmpq.stored_numbers.default": _stored_numbers,
    "aten.matmul.default": _product,
}
