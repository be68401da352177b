"""ExecuTorch on the CPU: XNNPACK's 8-bit kernels, those of linear layers with 4-bit weights too."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from fxmpq.costs.latency.runtime import Conditions
from fxmpq.formats import Precision
from fxmpq.granularity import Dynamic, PerBlock, PerChannel, PerTensor
from fxmpq.graph.export import quiet_torch
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.targets.target import Converted, Target

aten = torch.ops.aten

_SCALES: frozenset[type[PerTensor | PerChannel | PerBlock]] = frozenset({PerTensor, PerChannel})
_BLOCKS = frozenset({32, 64, 128, 256})
# Blocks only go with ranges found at every run.
_LINEAR = frozenset(
    Precision.parse(name)
    for name in (
        *(
            f"w{bits}{shared}{on}"
            for bits in "48"
            for shared in ("", "t")
            for on in ("", "a8", "a8dt")
        ),
        *(f"w4b{size}a8dt" for size in _BLOCKS),
    )
)
_RULES = TargetRules(
    name="executorch",
    operators={
        "conv": OperatorRule(frozenset({8}), frozenset({8}), granularities=_SCALES, bias_width=0),
        "linear": OperatorRule(
            frozenset({4, 8}),
            frozenset({8, None}),
            granularities=_SCALES | {PerBlock},
            block_sizes=_BLOCKS,
            dynamic=frozenset({Dynamic.ROW}),
            blocks_are_whole=True,
            only=_LINEAR,
            bias_width=0,
        ),
        # Looked up as stored codes, which portable kernels cast and scale.
        "embedding": OperatorRule(
            frozenset({2, 4, 8}), frozenset({None}), granularities=_SCALES | {PerBlock}
        ),
    },
    # Ranges of rows are of linear layers alone; convolutions have the last one.
    default_candidates=tuple(map(Precision.parse, ("w4a8dt", "w8a8dt", "w8a8"))),
    # XNNPACK has no integer kernel that reads codes with a calibrated range and writes real
    # numbers. Sums in codes are a matter of speed: those of convolutional networks, not those
    # that normalisation reads.
    quantize_outputs_of=frozenset({"conv", "linear", "add"}),
    stored_if_read=frozenset({"add"}),
    own_outputs=True,
    # ExecuTorch has no kernel for more.
    convolved_dimensions=2,
    fusions=tuple(
        (first, activation)
        for first in ("conv", "linear", "add")
        for activation in (("relu",) if first == "add" else ("relu", "relu6", "hardtanh"))
    ),
    # Each operand of its integer add has a scale of its own.
    joins=("shared_weight", "shared_input"),
    through=frozenset({aten.max_pool2d.default}),
)


def _convert(graph: fx.GraphModule, output: Path | None) -> Converted:
    # Imported late: the package is an optional extra.
    with quiet_torch():
        from fxmpq.targets.executorch.convert import convert_executorch

    return convert_executorch(graph, output, _RULES)


def _conditions() -> Conditions:
    with quiet_torch():
        from fxmpq.targets.executorch.loaded import fixed_threads

    return {"threads": fixed_threads()}


EXECUTORCH = Target(
    rules=_RULES,
    convert=_convert,
    description="an ExecuTorch file on XNNPACK's int8 CPU kernels; linear weights also in 4 bits",
    packages={"executorch": "executorch", "torchao": "executorch"},
    latency=("executorch.version",),
    conditions=_conditions,
)
