"""Convert to an OpenVINO file whose layers run on integers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import openvino as ov
import torch
from torch import Tensor, fx

from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.products import product_operands
from fxmpq.graph.state import state_of
from fxmpq.targets.openvino.compiled import DEVICE, OpenvinoModel, compile_options
from fxmpq.targets.openvino.exposure import ExposedModel
from fxmpq.targets.openvino.kernels import Kernels, Operands, name_layers, name_products
from fxmpq.targets.openvino.translate import openvino_model
from fxmpq.targets.outcome import layer_reports
from fxmpq.targets.program import rewritten_program
from fxmpq.targets.qdq import active_quantizers, layers_of, to_qdq
from fxmpq.targets.target import Converted, LayerValue

_READ_NARROW = frozenset({2, 4, 8})
"""Widths that linear layers on float input read as they are stored, at every run."""

_STORABLE_OPTION = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
"""The one option that the runtime reads from the file itself."""


def convert_openvino(
    graph: fx.GraphModule, output: Path | None, name: str, float_type: str
) -> Converted:
    """Write a quantized OpenVINO model, compile it, and read back the kernels it runs.

    With `output`, a folder, it writes `model.xml`, `model.bin` and `compile.json`, which holds
    what `Core.compile_model` must be told: `{"CPU": {option: value}}`.

    Args:
        graph: With chosen precisions; not changed.
        output: Folder to write to, made if missing.
        name: The target's.
        float_type: In which all that is not quantized is computed, `f32` or `bf16`.

    Returns:
        The converted model; its `module` is an `OpenvinoModel`.

    Raises:
        TargetError: If OpenVINO has no translation for an operator, or this CPU no `bf16`.
    """
    options = compile_options(float_type)
    model = openvino_model(rewritten_program(to_qdq(graph, _READ_NARROW)))
    layers = [layer for layer, _ in layers_of(graph)]
    name_layers(model, layers)
    name_products(model, _products(graph))
    model.set_rt_info(options[_STORABLE_OPTION], ["runtime_options", _STORABLE_OPTION])
    files = () if output is None else _write(model, options, output)
    threads = torch.get_num_threads()
    loaded = OpenvinoModel(model, options, threads)

    def run(batch: Batch) -> Sequence[Tensor]:
        return loaded(flat_inputs(graph, batch))

    @cache
    def exposed() -> ExposedModel:
        return ExposedModel(graph, model, options, threads)

    def layer_values(batch: Batch) -> Sequence[LayerValue]:
        return exposed()(batch)

    loaded(state_of(graph).example)
    kernels = Kernels(loaded.compiled.get_runtime_model(), layers)
    reports = layer_reports(graph, kernels.of_quantized, kernels.of_float)
    return Converted(name, run, loaded, files, reports, layer_values=layer_values)


def _products(graph: fx.GraphModule) -> list[tuple[str, Operands]]:
    """The products that a plan quantizes, with the indices of their operands' quantizers."""
    indices = {name: index for index, name in enumerate(active_quantizers(graph))}
    nodes = {node.name: node for node in graph.graph.nodes}
    order = {name: position for position, name in enumerate(nodes)}
    state = state_of(graph)
    found = [
        product
        for group in state.groups
        if group.candidate(state.choices[group.name]).activation is not None
        for product in group.products
    ]
    named = []
    for product in sorted(found, key=lambda entry: order[entry.node]):
        left, right = (_quantizer(node, indices) for node in product_operands(nodes[product.node]))
        named.append((product.name, (left, right)))
    return named


def _quantizer(node: fx.Node, indices: Mapping[str, int]) -> int:
    """The quantizer of an operand, past what only rearranges it."""
    while node.name not in indices:
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return indices[node.name]


def _write(model: ov.Model, options: Mapping[str, str], output: Path) -> tuple[Path, ...]:
    output.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, output / "partial.xml", compress_to_fp16=False)
    (output / "partial.json").write_text(json.dumps({DEVICE: dict(options)}, indent=1))
    written = {
        "partial.json": "compile.json",
        "partial.bin": "model.bin",
        "partial.xml": "model.xml",
    }
    files = [(output / old).replace(output / new) for old, new in written.items()]
    return tuple(reversed(files))
