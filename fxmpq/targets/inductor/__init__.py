"""PyTorch's own compiler on the CPU: 8-bit convolutions and linear layers through oneDNN."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from fxmpq.formats import Precision
from fxmpq.granularity import PerBlock, PerChannel, PerTensor
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.targets.target import Converted, Target

aten = torch.ops.aten

_WEIGHTS = frozenset({2, 3, 4, 6, 8})
_SHARED: frozenset[type[PerTensor | PerChannel | PerBlock]] = frozenset({PerTensor, PerChannel})
_LAYER = OperatorRule(_WEIGHTS, frozenset({8}), granularities=_SHARED)
_ACTIVATIONS = ("relu", "relu6", "hardtanh", "hardswish", "silu")


def _convert(graph: fx.GraphModule, output: Path | None) -> Converted:
    # Imported late: the compiler takes seconds to import.
    from fxmpq.targets.inductor.convert import convert_inductor

    return convert_inductor(graph, output)


def _check() -> None:
    from fxmpq.targets.inductor.compiler import check_compiler

    check_compiler()


INDUCTOR = Target(
    rules=TargetRules(
        name="inductor",
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
    ),
    convert=_convert,
    description="compiled by torch.compile to oneDNN's int8 CPU kernels; the rest float",
    packages={},
    check=_check,
)
