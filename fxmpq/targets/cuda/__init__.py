"""NVIDIA GPUs with plain torch: int8, fp8 and int4 products; no package beside torch.

Not run on a GPU so far: see `fxmpq.targets.cuda.convert`.
"""

from __future__ import annotations

from pathlib import Path

from torch import fx

from fxmpq.formats import Precision, Scheme
from fxmpq.granularity import PerBlock, PerChannel, PerTensor
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.targets.cuda.convert import convert_cuda
from fxmpq.targets.cuda.kernels import INT4_BLOCKS
from fxmpq.targets.reference.convert import convert_reference
from fxmpq.targets.target import Converted, Target

_WEIGHTS = frozenset({2, 3, 4, 6, 8})
_FLOATS = frozenset({Scheme.E4M3})
_SHARED: frozenset[type[PerTensor | PerChannel | PerBlock]] = frozenset({PerTensor, PerChannel})
_BLOCKS = frozenset(INT4_BLOCKS)

_OPERATORS = {
    "conv": OperatorRule(_WEIGHTS, frozenset({8, None}), _FLOATS, _SHARED),
    "linear": OperatorRule(
        _WEIGHTS,
        frozenset({8, None}),
        _FLOATS,
        _SHARED | {PerBlock},
        block_sizes=_BLOCKS,
        blocks_are_weight_only=True,
    ),
    "embedding": OperatorRule(
        _WEIGHTS, frozenset({None}), _FLOATS, _SHARED | {PerBlock}, block_sizes=_BLOCKS
    ),
}


def _target(name: str, description: str, *, is_bfloat16: bool) -> Target:
    def convert(graph: fx.GraphModule, output: Path | None) -> Converted:
        return convert_cuda(graph, output, name, is_bfloat16=is_bfloat16)

    rules = TargetRules(
        name=name,
        operators=_OPERATORS,
        default_candidates=tuple(map(Precision.parse, ("w4a8", "w8a8", "we4m3ae4m3"))),
        # Sums come out in float, and torch fuses and adds in float: nothing else is tied.
        joins=("shared_weight", "shared_input"),
    )
    # Its files are those of the reference, for which no kernel has to be tried.
    return Target(rules, convert, description, packages={}, write=convert_reference)


CUDA = _target(
    "cuda",
    "torch's int8, fp8 and int4 products on NVIDIA GPUs, or the same on a CPU; the rest float",
    is_bfloat16=False,
)
CUDA_BF16 = _target(
    "cuda-bf16",
    "the same, with float products and convolutions computed in bfloat16",
    is_bfloat16=True,
)
