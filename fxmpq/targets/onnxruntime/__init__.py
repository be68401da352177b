"""ONNX Runtime on the CPU: 8-, 4- and 2-bit weights, with 8-bit activations or alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from fxmpq.formats import Precision
from fxmpq.granularity import Dynamic, PerBlock, PerChannel
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.targets.target import Converted, Target

aten = torch.ops.aten

_WEIGHTS = frozenset({2, 4, 8})
_GRANULARITIES = frozenset({PerChannel, PerBlock})
_BLOCKS = frozenset({16, 32, 64, 128, 256})
FINE_BITS = 7
"""Width that codes of fewer bits are multiplied up to. Two products of such codes with a byte add
up within an `int16`, in which CPUs without VNNI instructions add them."""

_RULES = TargetRules(
    name="onnxruntime",
    operators={
        "conv": OperatorRule(_WEIGHTS, frozenset({8, None}), bias_width=FINE_BITS),
        "linear": OperatorRule(
            _WEIGHTS,
            frozenset({8, None}),
            granularities=_GRANULARITIES,
            block_sizes=_BLOCKS,
            blocks_are_weight_only=True,
            dynamic=frozenset({Dynamic.TENSOR}),
        ),
        "embedding": OperatorRule(
            _WEIGHTS, frozenset({None}), granularities=_GRANULARITIES, block_sizes=_BLOCKS
        ),
        # Without integer kernels: stored as codes, and dequantized when the file is loaded.
        "conv_transpose": OperatorRule(_WEIGHTS, frozenset({None})),
        "experts": OperatorRule(_WEIGHTS, frozenset({None})),
        "matmul": OperatorRule(frozenset(), frozenset({8}), granularities=frozenset()),
    },
    default_candidates=tuple(Precision(bits, 8) for bits in (2, 4, 8)),
    # Its convolution kernels write codes; one without a quantized output runs in float.
    quantize_outputs_of=frozenset({"conv", "add"}),
    # Zero is the smallest code of what follows a ReLU, so that writing codes does its work.
    fusions=(("conv", "relu"), ("add", "relu")),
    # Each operand of its integer add has a scale of its own, so residual branches are free.
    joins=("shared_weight", "shared_input"),
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
    latency=("onnxruntime",),
)
