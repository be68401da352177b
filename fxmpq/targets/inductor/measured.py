"""What measuring how fast compiled models run takes: loading them, and what decides it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa

from fxmpq.costs.latency.runtime import Conditions, Run
from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.targets.inductor.compiled import CompiledGraph
from fxmpq.targets.inductor.program import inductor_program

_DIGITS = 16
_OTHER_DEVICES = ("cuda.", "cutlass.", "mtia.", "rocm.", "xpu.")


def load_inductor(graph: fx.GraphModule, *, is_bfloat16: bool = False) -> Run:
    """Make a planned graph run, compiled for the sizes of the first batch that it is given.

    Args:
        graph: With chosen precisions; not changed.
        is_bfloat16: Whether float layers and products are computed in bfloat16.
    """
    compiled = CompiledGraph(inductor_program(graph, is_bfloat16=is_bfloat16))

    def run(batch: Batch) -> Sequence[Tensor]:
        return compiled(flat_inputs(graph, batch))

    return run


def compiler_conditions() -> Conditions:
    """What decides how fast compiled graphs run besides torch, the CPU and threads.

    Returns:
        The C++ compiler that torch calls with a digest of all that it tells about itself, the
        vector instructions that it compiles for, and a digest of the options of torch's compiler.
    """
    # Options of other devices name folders, one of them that in which the program was started.
    options = config.save_config_portable().items()
    own = [(name, value) for name, value in options if not name.startswith(_OTHER_DEVICES)]
    compiler = get_cpp_compiler()
    told = hashlib.sha256(get_compiler_version_info(compiler).encode())
    return {
        "compiler": f"{compiler} {told.hexdigest()[:_DIGITS]}",
        "instructions": str(pick_vec_isa()),
        "options": hashlib.sha256(repr(sorted(own)).encode()).hexdigest()[:_DIGITS],
    }
