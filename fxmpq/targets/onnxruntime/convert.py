"""Convert to an ONNX file that ONNX Runtime executes on integers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from fxmpq.graph.batches import Batch, fixed_size, flat_inputs
from fxmpq.graph.export import quiet_torch
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import state_of
from fxmpq.targets.onnxruntime.kernels import kernel_rule
from fxmpq.targets.onnxruntime.rewrite import to_integer_operators
from fxmpq.targets.onnxruntime.storage import narrow_codes
from fxmpq.targets.onnxruntime.translate import TRANSLATIONS
from fxmpq.targets.outcome import layer_reports
from fxmpq.targets.target import Converted

_OPSET = 21


class OnnxModel:
    """An ONNX model loaded in ONNX Runtime.

    Args:
        model: The serialized model.
        threads: Threads inside an operator; 0 leaves it to the runtime.
    """

    def __init__(self, model: bytes, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        handle, name = tempfile.mkstemp(suffix=".onnx")
        os.close(handle)
        self._optimized = Path(name)
        options.optimized_model_filepath = name
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.executed = onnx.load(name, load_external_data=False)
        self._optimized.unlink()

    def __call__(self, inputs: Sequence[object]) -> list[Tensor]:
        """Run on flat tensor inputs and return the flat outputs."""
        names = [entry.name for entry in self.session.get_inputs()]
        tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        feed = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
        found = self.session.run(None, feed)
        return [torch.from_numpy(np.asarray(value)) for value in found]


def convert_onnxruntime(
    graph: fx.GraphModule, output: Path | None, rules: TargetRules
) -> Converted:
    """Write a quantized ONNX model, check it, load it, and read back the kernels it runs.

    Args:
        graph: With chosen precisions; not changed.
        output: Folder to write `model.onnx` to, made if missing.
        rules: The target's.

    Returns:
        The converted model; its `module` is an `OnnxModel`.
    """
    rewritten = to_integer_operators(graph, rules)
    model = _export(rewritten)
    _drop_notes(model)
    narrow_codes(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    serialized = proto.SerializeToString()
    loaded = OnnxModel(serialized, torch.get_num_threads())
    files = () if output is None else (_write(serialized, output),)

    def run(batch: Batch) -> Sequence[Tensor]:
        return loaded(flat_inputs(graph, batch))

    reports = layer_reports(graph, kernel_rule(loaded.executed))
    return Converted("onnxruntime", run, loaded, files, reports)


def _export(graph: fx.GraphModule) -> ir.Model:
    """Export a rewritten graph with the sizes free that were free in its trace."""
    state = state_of(graph)
    args, kwargs = pytree.tree_unflatten(list(state.example), state.call_spec)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    free = [_free_dimensions(node) for node in placeholders]
    shapes = pytree.tree_unflatten(free, state.call_spec)
    dynamic_shapes = (*shapes[0], *shapes[1].values())
    _move_to_cpu(graph)
    with quiet_torch(), torch.no_grad():
        program = torch.export.export(
            graph, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=_OPSET, custom_translation_table=dict(TRANSLATIONS)
        )
    assert exported is not None
    return exported.model


def _move_to_cpu(graph: fx.GraphModule) -> None:
    """Move a rewritten graph's tensors and constants to the CPU, in place.

    `Module.to` would also move the tensors it shares with the planned graph.
    """
    for module in graph.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.detach().cpu(), False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.cpu())

    def on_cpu(argument: Argument) -> Argument:
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, on_cpu)
        node.kwargs = fx.node.map_aggregate(node.kwargs, on_cpu)
    graph.recompile()


def _drop_notes(model: ir.Model) -> None:
    """Drop the exporter's notes on every node: a third of the file, with paths of the machine."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()


def _free_dimensions(placeholder: fx.Node) -> Mapping[int, object] | None:
    value = placeholder.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return {axis: Dim.AUTO for axis, size in enumerate(value.shape) if fixed_size(size) is None}


def _write(serialized: bytes, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    file, temporary = output / "model.onnx", output / "model.onnx.partial"
    temporary.write_bytes(serialized)
    temporary.replace(file)
    return file
