"""How a graph is called: the trees that map a call to placeholders, and outputs to a result."""

from __future__ import annotations

from torch.fx.graph import _PyTreeCodeGen


class CallStructure(_PyTreeCodeGen):
    """How the graph's call maps to its placeholders; frozen, so copies share it.

    Copying the trees inside would copy leaves, which torch warns about.

    Args:
        pytree_info: Names of the arguments, and the trees of the call and of the outputs.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> CallStructure:
        return self
