"""Convert to torch's own kernels on codes: `_int_mm`, `_scaled_mm`, `_weight_int4pack_mm`.

What runs is decided by rules (`kernels`) for the device that the graph's tensors lie on, and then
by the kernel itself, which is tried once. Everything runs on a CPU too, by the same functions, and
was checked there; **it has not been run on a GPU**: the rules for GPUs are those that torch's
sources state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, fx

from fxmpq.graph.batches import Batch, graph_device
from fxmpq.graph.run import run_batch
from fxmpq.targets.cuda.activations import ActivationCodes
from fxmpq.targets.cuda.bf16 import compute_in_bfloat16
from fxmpq.targets.cuda.device import device_facts
from fxmpq.targets.cuda.rewrite import rewrite_layer
from fxmpq.targets.cuda.weighted import read_layer
from fxmpq.targets.layer_outputs import LayerOutputs
from fxmpq.targets.lowering import finish, lower
from fxmpq.targets.outcome import computed_elsewhere, layer_names, layer_reports
from fxmpq.targets.qdq import layers_of
from fxmpq.targets.reference.convert import convert_reference
from fxmpq.targets.target import Converted, LayerValue


def convert_cuda(
    graph: fx.GraphModule, output: Path | None, name: str, *, is_bfloat16: bool
) -> Converted:
    """Let a planned graph's layers compute on codes, on the device where its tensors lie.

    With `output`, a folder, it writes the files that target `reference` writes, with codes in
    their width and no device's layout: what is packed for a kernel is packed again from codes.

    Args:
        graph: With chosen precisions; not changed.
        output: Folder to write, made if missing.
        name: The target's.
        is_bfloat16: Whether float products and convolutions are computed in bfloat16.

    Returns:
        The converted model; its `module` is a graph module called like the original, for this
        device.
    """
    float_name = "bfloat16" if is_bfloat16 else "float"
    device = device_facts(graph_device(graph))
    converted = lower(graph)
    nodes = {node.name: node for node in converted.graph.nodes}
    codes = ActivationCodes(converted)
    outcomes: dict[str, tuple[str, str]] = {}
    for layer, precision in layers_of(graph):
        found = read_layer(converted, nodes[layer.node], layer, precision)
        if found is not None:
            outcome = rewrite_layer(converted, found, codes, device, float_name)
            outcomes[layer.name] = outcome
    narrowed = compute_in_bfloat16(converted) if is_bfloat16 else frozenset[str]()
    finish(converted)
    files = () if output is None else convert_reference(graph, output).files

    def run(batch: Batch) -> Sequence[Tensor]:
        return [leaf for leaf in run_batch(converted, batch) if isinstance(leaf, Tensor)]

    def layer_values(batch: Batch) -> Sequence[LayerValue]:
        return LayerOutputs(converted, layers).collect(batch)

    layers = layer_names(graph)
    reports = layer_reports(graph, lambda member, _: outcomes[member.name], lambda _: float_name)
    reports = computed_elsewhere(reports, narrowed, float_name)
    return Converted(name, run, converted, files, reports, layer_values=layer_values)
