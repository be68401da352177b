"""Convert to a graph that torch compiles to integer kernels in this process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import Tensor, fx

from fxmpq.errors import TargetError
from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.reasons import first_line
from fxmpq.graph.state import Member, state_of
from fxmpq.targets.inductor.compiled import CompiledGraph
from fxmpq.targets.inductor.compiler import check_compiler
from fxmpq.targets.inductor.exposure import ExposedGraph
from fxmpq.targets.inductor.program import inductor_program
from fxmpq.targets.outcome import computed_elsewhere, layer_reports
from fxmpq.targets.reference.convert import convert_reference
from fxmpq.targets.target import Converted, LayerValue


def convert_inductor(
    graph: fx.GraphModule, output: Path | None, name: str, *, is_bfloat16: bool
) -> Converted:
    """Compile a planned graph, and read back the kernels that it runs.

    What is compiled lives in this process: compiled code, if it were written, would have to be
    run to be loaded. With `output`, a folder, the files are those of the target `reference`,
    codes in the plan's widths as data.

    Args:
        graph: With chosen precisions; not changed.
        output: Folder to write to, made if missing.
        name: The target's.
        is_bfloat16: Whether float layers and products are computed in bfloat16.

    Returns:
        The converted model; its `module` is a `CompiledGraph`.

    Raises:
        TargetError: If there is no C++ compiler, or what it made of the model fails.
    """
    check_compiler()
    program = inductor_program(graph, is_bfloat16=is_bfloat16)
    compiled = CompiledGraph(program)
    try:
        compiled(state_of(graph).example)
    except Exception as error:
        raise TargetError(
            f"torch's compiler cannot run this model: {first_line(error)}. Target 'onnxruntime' "
            "may, and 'reference' does"
        ) from error

    def run(batch: Batch) -> Sequence[Tensor]:
        return compiled(flat_inputs(graph, batch))

    @cache
    def exposed() -> ExposedGraph:
        return ExposedGraph(graph, is_bfloat16=is_bfloat16)

    def layer_values(batch: Batch) -> Sequence[LayerValue]:
        return exposed()(batch)

    files = () if output is None else convert_reference(graph, output).files

    def float_kernel(found: Member) -> str:
        return "bfloat16" if found.node in program.narrowed else "float"

    reports = layer_reports(graph, compiled.kernels.of_quantized, float_kernel)
    # A product that no group has is named by its place.
    reports = computed_elsewhere(reports, program.narrowed.values(), "bfloat16")
    return Converted(name, run, compiled, files, reports, layer_values=layer_values)
