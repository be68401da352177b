"""TensorRT: an ONNX file that keeps to its rules of explicit quantization."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from fxmpq.formats import Precision, Scheme
from fxmpq.granularity import PerBlock, PerChannel, PerTensor
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.targets.target import Converted, Target

if TYPE_CHECKING:
    import onnx

    from fxmpq.targets.tensorrt.rules import Violation

_E4M3 = frozenset({Scheme.E4M3})
_EIGHT_BITS = frozenset(map(Precision.parse, ("w8a8", "w8ta8", "we4m3tae4m3")))
_FOUR_BITS = frozenset(map(Precision.parse, ("w4b64", "w4b128")))

_RULES = TargetRules(
    name="tensorrt",
    operators={
        "conv": OperatorRule(
            frozenset({8}),
            frozenset({8}),
            _E4M3,
            frozenset({PerChannel, PerTensor}),
            only=_EIGHT_BITS,
        ),
        # Weights of 4 bits have a scale per block of 64 or 128 of them, and float activations.
        "linear": OperatorRule(
            frozenset({4, 8}),
            frozenset({8, None}),
            _E4M3,
            frozenset({PerChannel, PerTensor, PerBlock}),
            block_sizes=frozenset({64, 128}),
            blocks_are_weight_only=True,
            blocks_are_whole=True,
            only=_EIGHT_BITS | _FOUR_BITS,
        ),
        "matmul": OperatorRule(frozenset(), frozenset({8}), _E4M3, granularities=frozenset()),
    },
    default_candidates=(Precision(8, 8), Precision()),
    fusions=(("conv", "add", "relu"), ("conv", "add"), ("conv", "relu")),
    joins=("shared_weight", "shared_input"),
    # There are no zero points.
    symmetric_inputs_of=frozenset({"conv", "linear", "matmul", "add"}),
    # A convolution writes codes only if what is added to its result is in codes too.
    quantize_residuals_of=frozenset({"conv"}),
)


def _convert(graph: fx.GraphModule, output: Path | None) -> Converted:
    # Imported late: the packages are an optional extra.
    from fxmpq.targets.tensorrt.convert import convert_tensorrt

    return convert_tensorrt(graph, output)


TENSORRT = Target(
    rules=_RULES,
    convert=_convert,
    description="an ONNX file by TensorRT's rules of explicit quantization; not run on TensorRT",
    packages={"onnx": "tensorrt", "onnxscript": "tensorrt", "onnxruntime": "tensorrt"},
)


def lint(model: str | Path | onnx.ModelProto) -> tuple[Violation, ...]:
    """Where an ONNX model breaks TensorRT's published rules of explicit quantization.

    The rules are those of `fxmpq.targets.tensorrt.rules.LINT_RULES`. A model that breaks none need
    not build: which operators have kernels depends on the release and on the GPU.

    Args:
        model: A file, or a model that is loaded.

    Returns:
        A violation for each place that breaks a rule, rule by rule; empty if there is none.

    Raises:
        TargetError: If the file is missing or no ONNX model.

    Examples:
        >>> import onnx
        >>> node = onnx.helper.make_node("QLinearConv", ["x"] * 8, ["y"], name="first")
        >>> graph = onnx.helper.make_graph([node], "g", [], [])
        >>> [found.rule for found in lint(onnx.helper.make_model(graph))]
        ['valid model', 'supported operators']
    """
    from fxmpq.targets.tensorrt.rules import lint_model

    return lint_model(model)
