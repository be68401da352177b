"""OpenVINO on the CPU: weights of 8, 6, 4, 3 and 2 bits, with 8-bit activations or alone."""

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
_OPERATORS = {
    "conv": OperatorRule(
        _WEIGHTS, frozenset({8, None}), granularities=frozenset({PerTensor, PerChannel})
    ),
    "linear": OperatorRule(
        _WEIGHTS,
        frozenset({8, None}),
        granularities=frozenset({PerTensor, PerChannel, PerBlock}),
        blocks_are_weight_only=True,
    ),
    "embedding": OperatorRule(
        _WEIGHTS, frozenset({None}), granularities=frozenset({PerTensor, PerChannel, PerBlock})
    ),
    "matmul": OperatorRule(frozenset(), frozenset({8}), granularities=frozenset()),
}
_VIEWS = frozenset(
    {aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default}
)


def _target(name: str, float_type: str, description: str) -> Target:
    """OpenVINO with all that is not quantized computed in one type, `f32` or `bf16`."""
    rules = TargetRules(
        name=name,
        operators=_OPERATORS,
        default_candidates=tuple(Precision(bits, 8) for bits in sorted(_WEIGHTS)),
        # Its convolutions run on integers whatever they write, and are fastest writing codes.
        quantize_outputs_of=frozenset({"conv", "add"}),
        # Left apart, its clamp of codes to [0, 6] may be off by a step.
        fusions=(
            ("conv", "add", "relu"),
            ("conv", "add"),
            *((first, act) for first in ("conv", "add") for act in ("relu", "relu6", "hardtanh")),
        ),
        # Each operand of an add has a scale of its own.
        joins=("shared_weight", "shared_input"),
        through=frozenset({aten.max_pool2d.default}),
        # Products are multiplied in int8 if their operands are signed codes, the first one unsigned
        # codes that begin at zero. In front of what splits heads the layer before writes them.
        symmetric_inputs_of=frozenset({"matmul"}),
        unsigned_outputs_of=frozenset({"softmax", "_safe_softmax", "relu", "sigmoid"}),
        product_through=_VIEWS,
    )

    def convert(graph: fx.GraphModule, output: Path | None) -> Converted:
        # Imported late: the package is an optional extra.
        from fxmpq.targets.openvino.convert import convert_openvino

        return convert_openvino(graph, output, name, float_type)

    packages = {"openvino": "openvino"}
    return Target(rules, convert, description, packages, latency=("openvino",))


OPENVINO = _target(
    "openvino",
    "f32",
    "an OpenVINO file on its int8 CPU kernels; weights stored in 8, 6, 4, 3, 2 bits; the rest f32",
)
OPENVINO_BF16 = _target(
    "openvino-bf16",
    "bf16",
    "the same, with all that is not quantized computed in bfloat16, on CPUs that have it",
)
