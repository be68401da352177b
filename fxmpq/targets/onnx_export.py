"""Writing a rewritten graph as an ONNX file, for the targets that are given one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import fx

from fxmpq.errors import TargetError
from fxmpq.graph.export import quiet_torch
from fxmpq.targets.exportable import make_exportable, return_tensors_alone
from fxmpq.targets.onnx_attention import write_attention, write_safe_softmax
from fxmpq.targets.program import rewritten_program

Translations = Mapping[Callable[..., object], Callable[..., object]]
"""How operators of one's own are written in ONNX: by overload, functions of onnxscript."""

_OWN: Translations = {
    torch.ops.aten.scaled_dot_product_attention.default: write_attention,
    torch.ops.aten._safe_softmax.default: write_safe_softmax,
}
"""Of operators that torch's exporter writes wrong or slow where a mask leaves nothing of a row."""

_LARGEST = 2**31 - 1
"""Bytes that one file may have: what readers of its format take."""


def export_onnx(graph: fx.GraphModule, translations: Translations, opset: int) -> ir.Model:
    """Export a rewritten graph to ONNX, without the exporter's notes.

    They are a third of a file, and hold paths of the machine. Fused attention and safe softmax
    are written by functions of one's own: in the exporter's form a row of which a mask leaves
    nothing is a mean or NaN, or every score is tested for it.

    Args:
        graph: A lowered copy of a planned graph; changed in place.
        translations: Of the operators that are no ATen operators.
        opset: The version of ONNX's operators to write.

    Returns:
        The model, with the sizes free that are free in the graph's trace.

    Raises:
        TargetError: If torch's ONNX exporter has no translation for a node, naming it.
    """
    make_exportable(graph)
    return_tensors_alone(graph)
    program = rewritten_program(graph)
    with quiet_torch(), torch.no_grad():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                custom_translation_table={**_OWN, **translations},
            )
        except torch.onnx.OnnxExporterError as error:
            raise TargetError(
                f"the ONNX exporter of torch cannot write this model: {_reason(error)}. The target "
                "'reference' takes every model"
            ) from error
    assert exported is not None
    for node in ir.traversal.RecursiveGraphIterator(exported.model.graph):
        node.metadata_props.clear()
    return exported.model


def check_size(proto: onnx.ModelProto) -> None:
    """Refuse a model that one file cannot hold.

    Args:
        proto: A model about to be written, with all data inside.

    Raises:
        TargetError: If its stored tensors have 2 GiB or more.
    """
    size = sum(len(entry.raw_data) for entry in proto.graph.initializer)
    if size > _LARGEST:
        raise TargetError(
            f"the stored tensors have {size / 1e9:.2f} GB, and an ONNX file holds "
            f"{_LARGEST / 1e9:.2f} GB. Store more layers in fewer bits; or take the target "
            "'openvino' or 'reference', whose files may be larger"
        )


def write_onnx(serialized: bytes, output: Path) -> Path:
    """Write `model.onnx`, whole or not at all.

    Args:
        serialized: The model.
        output: Folder, made if missing.

    Returns:
        The file.
    """
    output.mkdir(parents=True, exist_ok=True)
    file, temporary = output / "model.onnx", output / "model.onnx.partial"
    temporary.write_bytes(serialized)
    temporary.replace(file)
    return file


def _reason(error: BaseException) -> str:
    """What an exporter's error comes from: the node, and why it cannot be translated."""
    messages: list[str] = []
    found: BaseException | None = error
    while found is not None:
        messages.append(str(found).partition(" See the stack trace")[0].rstrip("."))
        found = found.__cause__
    return ": ".join(messages[1:] or messages)
