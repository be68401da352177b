"""How a graph is called: the trees that map a call to placeholders, and outputs to a result."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree


class CallStructure(_PyTreeCodeGen):
    """How the graph's call maps to its placeholders; frozen, so copies share it.

    Copying the trees inside would copy leaves, which torch warns about.

    Args:
        pytree_info: Names of the arguments, and the trees of the call and of the outputs.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> CallStructure:
        return self


def return_flat(graph: fx.GraphModule, values: Sequence[fx.Node]) -> None:
    """Let a graph that is called as before return a flat tuple, in place.

    Args:
        graph: Whose call maps trees to placeholders.
        values: What it is to return.
    """
    graph.graph.output_node().args = (tuple(values),)
    found = graph.graph._codegen
    assert isinstance(found, _PyTreeCodeGen)
    outputs = pytree.tree_structure((0,) * len(values))
    graph.graph.set_codegen(CallStructure(found.pytree_info._replace(out_spec=outputs)))
    graph.recompile()
