"""A graph compiled by torch, with its constants part of the compiled code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._inductor import config
from torch.utils import _pytree as pytree

from fxmpq.graph.export import quiet_torch
from fxmpq.targets.inductor.kernels import Kernels, read_kernels
from fxmpq.targets.inductor.program import InductorProgram

# For images at most: of one, of a batch, of what a data set's last batch has left, and one more.
SIZES_COMPILED_FOR = 4


class CompiledGraph:
    """Compiles a graph when it is first called, and again for sizes that it was not compiled for.

    A graph with convolutions of one element is compiled for each of the first
    `SIZES_COMPILED_FOR` sizes: where the batch size is free, these convolutions arrange their
    weights anew at every call, which makes ResNet-50 1.7 times as slow. After that, and in all
    other graphs from the first size on, a further compilation leaves the sizes that changed free,
    if not always in all their range. Options of the compiler are set for the time of a call and
    in its thread only. Loops get as many threads as torch has when they are compiled.

    Args:
        program: Not changed.
    """

    def __init__(self, program: InductorProgram) -> None:
        self.kernels = Kernels()
        self._marks = {
            tensor.data_ptr(): program.marks[name]
            for name, tensor in program.graph.named_buffers()
            if name in program.marks
        }
        # `forward` of a graph is a function of its own, so that compilations are counted for it
        # alone. Without `fullgraph` more of them than torch allows would go unnoticed.
        self._free = torch.compile(program.graph.forward, fullgraph=True)
        twin = fx.GraphModule(program.graph, program.graph.graph)
        self._fixed = torch.compile(twin.forward, fullgraph=True, dynamic=False)
        # The code that calls the kernels is C++ too: in Python it costs up to 6 % of a small model.
        self._options = {
            "freezing": True,
            "cpp_wrapper": True,
            "post_grad_custom_pre_pass": self._read,
        }
        self._to_fix = SIZES_COMPILED_FOR if program.is_pointwise else 0
        self._runs: dict[tuple[object, ...], Callable[..., object]] = {}

    def __call__(self, inputs: Sequence[object]) -> list[Tensor]:
        """Run on flat inputs and return the tensors among the flat outputs."""
        with torch.inference_mode(False), torch.no_grad(), config.patch(self._options):
            placed = [_placed(leaf) if isinstance(leaf, Tensor) else leaf for leaf in inputs]
            sizes = tuple(leaf.shape for leaf in placed if isinstance(leaf, Tensor))
            if sizes in self._runs:
                outputs = self._runs[sizes](*placed)
            else:
                run = self._fixed if len(self._runs) < self._to_fix else self._free
                with quiet_torch():
                    outputs = run(*placed)
                self._runs[sizes] = run
        return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]

    def _read(self, graph: fx.Graph) -> None:
        """Called by the compiler with its graph, after its own fusions of constants."""
        self.kernels = read_kernels(graph, self._marks)


def _placed(leaf: Tensor) -> Tensor:
    """A tensor as all calls pass it, or else the graph is compiled for each kind."""
    return (leaf.clone() if leaf.is_inference() else leaf.detach()).cpu().contiguous()
