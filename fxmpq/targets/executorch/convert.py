"""Convert to an ExecuTorch file whose layers XNNPACK runs on integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import Tensor, fx

from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import state_of
from fxmpq.targets.executorch.exposure import return_activations
from fxmpq.targets.executorch.kernels import Kernels, executed_kernels
from fxmpq.targets.executorch.loaded import ExecutorchModel
from fxmpq.targets.executorch.lowered import Lowered, lower_program
from fxmpq.targets.executorch.rewrite import stored_names, to_xnnpack_form
from fxmpq.targets.executorch.sizes import LARGEST, FreeSizes
from fxmpq.targets.outcome import layer_names, layer_reports
from fxmpq.targets.program import free_limits, rewritten_program
from fxmpq.targets.qdq import active_quantizers, computed_by
from fxmpq.targets.target import Converted, LayerValue


def convert_executorch(graph: fx.GraphModule, output: Path | None, rules: TargetRules) -> Converted:
    """Write a quantized ExecuTorch program, load it, and read back the kernels it runs.

    Args:
        graph: With chosen precisions; not changed.
        output: Folder to write `model.pte` to, made if missing.
        rules: The target's.

    Returns:
        The converted model; its `module` is an `ExecutorchModel`.

    Raises:
        TargetError: If ExecuTorch cannot take the model, or has no kernel for an operator.
    """
    rewritten = to_xnnpack_form(graph, rules)
    names = stored_names(graph, rewritten)
    lowered, sizes = _lower(rewritten)
    loaded = ExecutorchModel(lowered.data, sizes)
    files = () if output is None else (_write(lowered.data, output),)

    def run(batch: Batch) -> Sequence[Tensor]:
        return loaded(flat_inputs(graph, batch))

    layers = layer_names(graph)
    layers |= computed_by(graph)

    @cache
    def exposed() -> tuple[ExecutorchModel, list[str]]:
        all_shown = to_xnnpack_form(graph, rules)
        names = return_activations(all_shown, active_quantizers(graph))
        further, all_sizes = _lower(all_shown)
        return ExecutorchModel(further.data, all_sizes), names

    def layer_values(batch: Batch) -> Sequence[LayerValue]:
        model, names = exposed()
        values = model(flat_inputs(graph, batch))[-len(names) :] if names else ()
        pairs = zip(names, values, strict=True)
        return [LayerValue(layers[name], name, value) for name, value in pairs if name in layers]

    traced = ExecutorchModel(lowered.data, sizes, is_traced=True)
    executed = executed_kernels(traced, state_of(graph).example)
    kernels = Kernels(lowered.places, executed, names)
    reports = layer_reports(graph, kernels.of_quantized, kernels.of_float)
    return Converted("executorch", run, loaded, files, reports, layer_values=layer_values)


def _lower(rewritten: fx.GraphModule) -> tuple[Lowered, FreeSizes]:
    limits = free_limits(rewritten, LARGEST)
    program = rewritten_program(rewritten, limits)
    return lower_program(program), FreeSizes.of(program, limits)


def _write(data: bytes, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    file, temporary = output / "model.pte", output / "model.pte.partial"
    temporary.write_bytes(data)
    temporary.replace(file)
    return file
