"""PyTorch's own compiler on the CPU: 8-bit convolutions and linear layers through oneDNN."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from fxmpq.costs.latency.runtime import Conditions, Run
from fxmpq.formats import Precision
from fxmpq.granularity import PerBlock, PerChannel, PerTensor
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.targets.reference.convert import convert_reference
from fxmpq.targets.target import Converted, Target

aten = torch.ops.aten

_WEIGHTS = frozenset({2, 3, 4, 6, 8})
_SHARED: frozenset[type[PerTensor | PerChannel | PerBlock]] = frozenset({PerTensor, PerChannel})
_LAYER = OperatorRule(_WEIGHTS, frozenset({8}), granularities=_SHARED)
_ACTIVATIONS = ("relu", "relu6", "hardtanh", "hardswish", "silu")


def _conditions() -> Conditions:
    from fxmpq.targets.inductor.measured import compiler_conditions

    return compiler_conditions()


def _target(name: str, description: str, *, is_bfloat16: bool) -> Target:
    """The compiler with all that is not quantized computed in `float32`, or products in less."""

    # Imported late: the compiler takes seconds to import.
    def convert(graph: fx.GraphModule, output: Path | None) -> Converted:
        from fxmpq.targets.inductor.convert import convert_inductor

        return convert_inductor(graph, output, name, is_bfloat16=is_bfloat16)

    def load(graph: fx.GraphModule) -> Run:
        from fxmpq.targets.inductor.measured import load_inductor

        return load_inductor(graph, is_bfloat16=is_bfloat16)

    def check() -> None:
        from fxmpq.targets.inductor.compiler import check_bfloat16, check_compiler

        check_compiler()
        if is_bfloat16:
            check_bfloat16()

    rules = TargetRules(
        name=name,
        operators={
            "conv": _LAYER,
            "linear": _LAYER,
            "embedding": OperatorRule(_WEIGHTS, frozenset({None}), granularities=_SHARED),
        },
        # Fewer bits are neither smaller nor faster here: what a plan can save on is float.
        default_candidates=(Precision(8, 8), Precision()),
        # A convolution adds codes to its result as it goes, and hands on codes or real numbers,
        # whichever is read.
        quantize_residuals_of=frozenset({"conv"}),
        fusions=(
            ("conv", "add", "relu"),
            ("conv", "add"),
            *(("conv", activation) for activation in _ACTIVATIONS),
        ),
        joins=("shared_weight", "shared_input"),
        through=frozenset({aten.max_pool2d.default}),
    )
    return Target(
        rules,
        convert,
        description,
        packages={},
        # Versions of torch are always among what decides.
        latency=(),
        load=load,
        conditions=_conditions,
        check=check,
        # Its files are those of the reference, for which nothing has to be compiled.
        write=convert_reference,
    )


INDUCTOR = _target(
    "inductor",
    "compiled by torch.compile to oneDNN's int8 CPU kernels; the rest float",
    is_bfloat16=False,
)
INDUCTOR_BF16 = _target(
    "inductor-bf16",
    "the same, with float layers and products computed in bfloat16, on CPUs that have it",
    is_bfloat16=True,
)
