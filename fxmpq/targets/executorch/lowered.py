"""Lowering an exported program to an ExecuTorch file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.export import ExportedProgram

from fxmpq.errors import TargetError
from fxmpq.graph.reasons import first_line
from fxmpq.targets.executorch.packages import (
    EdgeCompileConfig,
    Runtime,
    quiet_packages,
    to_edge_transform_and_lower,
)
from fxmpq.targets.executorch.partition import partitioner
from fxmpq.targets.executorch.places import Place, layer_places


@dataclass(frozen=True)
class Lowered:
    """A program as it is written to a file.

    Args:
        data: The file's content.
        places: Where the layers that read a stored weight run, by the weight's name, in the order
            they run.
    """

    data: bytes
    places: dict[str, list[Place]]


def lower_program(program: ExportedProgram) -> Lowered:
    """Hand all that XNNPACK runs to it, and the rest to ExecuTorch's portable kernels.

    Args:
        program: In XNNPACK's form, with bounds on all free sizes.

    Raises:
        TargetError: If ExecuTorch cannot take the program, or has no kernel for an operator,
            naming it.
    """
    with quiet_packages():
        try:
            # What it checks is that operators are core ATen; those with kernels are more.
            config = EdgeCompileConfig(_check_ir_validity=False)
            edge = to_edge_transform_and_lower(
                program, partitioner=[partitioner()], compile_config=config
            )
            graph = edge.exported_program().graph_module
            places = layer_places(edge.exported_program())
            _check_integers(graph)
            written = edge.to_executorch()
        except TargetError:
            raise
        except Exception as error:
            raise TargetError(
                f"ExecuTorch cannot take this model: {first_line(error)}. Target 'onnxruntime' "
                "may, and 'reference' does"
            ) from error
    _check_operators(written.executorch_program)
    return Lowered(bytes(written.buffer), places)


def _check_integers(graph: fx.GraphModule) -> None:
    """Refuse codes that are left to kernels that no build of ExecuTorch must have."""
    left = [
        node.name
        for node in graph.graph.nodes
        if node.op == "call_function" and "quantized_decomposed" in str(node.target)
    ]
    if left:
        raise TargetError(
            f"XNNPACK leaves {', '.join(left[:3])} of this model to kernels outside of it; target "
            "'onnxruntime' may take it, and 'reference' does"
        )


def _check_operators(program: object) -> None:
    """Refuse operators that the runtime has no kernel for."""
    known = Runtime.get().operator_registry.operator_names
    missing = [
        name
        for plan in getattr(program, "execution_plan", ())
        for operator in plan.operators
        if (name := f"{operator.name}.{operator.overload}".removesuffix(".")) not in known
    ]
    if missing:
        raise TargetError(
            f"ExecuTorch has no kernel for {', '.join(missing)}; target 'onnxruntime' may run this "
            "model, and 'reference' does"
        )
