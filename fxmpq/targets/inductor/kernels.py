"""Reading back which kernels the compiler chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxmpq.formats import Precision
from fxmpq.graph.state import Member

_LOOK_UP = torch.ops.aten.embedding.default
_SCALES = 4
"""Where oneDNN's quantized operators take the scales of weights."""

_CONSTANT = (
    "it looks up rows that are fixed: compiled for given sizes they are held in float32; compiled "
    "for free sizes int8 codes are looked up"
)


@dataclass(frozen=True)
class Kernels:
    """The kernels of layers in the graph that is handed to code generation.

    Args:
        found: Kernels by the name of a layer.
    """

    found: Mapping[str, list[str]] = field(default_factory=dict)

    def of_quantized(self, layer: Member, precision: Precision) -> tuple[str, str]:
        """A quantized layer's kernel, and why it differs from what was asked where it does."""
        found = self.found.get(layer.name, [])
        if not found and layer.kind == "embedding":
            return "float32 constant", _CONSTANT
        if not found:
            return "float", "the compiler has no integer kernel for it, and computes in float"
        assert precision.weight is not None
        held = f"its {precision.weight.bits}-bit codes are held in int8: as large as w8, as fast"
        return ", ".join(found), "" if precision.weight.bits == 8 else held


def read_kernels(graph: fx.Graph, marks: Mapping[int, list[str]]) -> Kernels:
    """Find the layers in the compiler's graph, after its last fusions.

    Args:
        graph: Belongs to a module that holds its constants.
        marks: Names of layers by where a tensor that only they read lies in memory.
    """
    kernels: dict[str, list[str]] = {}
    for node in graph.nodes:
        if str(node.target).startswith("onednn.q") and len(node.args) > _SCALES:
            mark, text = _constant(graph, node.args[_SCALES]), _text(node)
        elif node.target is _LOOK_UP:
            mark, text = _constant(graph, node.args[0]), "aten.embedding of int8 codes"
            # Scales are looked up as well, which may be those that a layer is known by.
            mark = mark if mark is not None and mark.dtype is torch.int8 else None
        else:
            continue
        for layer in [] if mark is None else marks.get(mark.data_ptr(), []):
            found = kernels.setdefault(layer, [])
            found += [text] if text not in found else []
    return Kernels(kernels)


def _text(node: fx.Node) -> str:
    """An operator with what is fused into it and the type it returns."""
    fused = [entry for entry in node.args if isinstance(entry, str) and entry not in ("", "none")]
    dtypes = [entry for entry in node.args if isinstance(entry, torch.dtype)]
    name = str(node.target).rpartition(".")[0]
    returned = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return " ".join([name, *fused, "to", returned])


def _constant(graph: fx.Graph, node: object) -> Tensor | None:
    """The constant that a node reads, if it reads one."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    tensor = getattr(graph.owning_module, str(node.target))
    return tensor if isinstance(tensor, Tensor) else None
