"""ONNX Runtime on the CPU: 8-bit activations, 8-, 4- and 2-bit weights on int8 kernels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from fxmpq.formats import Precision
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.targets.target import Converted, Target

aten = torch.ops.aten

_WEIGHTS = frozenset({2, 4, 8})
_RULES = TargetRules(
    name="onnxruntime",
    operators={
        "conv": OperatorRule(_WEIGHTS, frozenset({8})),
        "linear": OperatorRule(_WEIGHTS, frozenset({8})),
        "embedding": OperatorRule(_WEIGHTS, frozenset({None})),
    },
    default_candidates=tuple(Precision(bits, 8) for bits in (2, 4, 8)),
    # Its convolution kernels write codes; one without a quantized output runs in float.
    quantize_outputs_of=frozenset({"conv"}),
    quantize_adds=True,
    fused_activations=frozenset({aten.relu.default}),
    through=frozenset({aten.max_pool2d.default}),
)


def _convert(graph: fx.GraphModule, output: Path | None) -> Converted:
    # Imported late: the packages are an optional extra.
    from fxmpq.targets.onnxruntime.convert import convert_onnxruntime

    return convert_onnxruntime(graph, output, _RULES)


ONNXRUNTIME = Target(
    rules=_RULES,
    convert=_convert,
    description="an ONNX file on ONNX Runtime's int8 CPU kernels; weights stored in 8, 4, 2 bits",
    packages={"onnx": "onnxruntime", "onnxscript": "onnxruntime", "onnxruntime": "onnxruntime"},
)
