"""Write einsums with one stored operand as linear layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor, replace_stored
from fxmpq.graph.batches import fixed_size
from fxmpq.graph.inserting import Inserter

aten = torch.ops.aten


@dataclass(frozen=True)
class _Contraction:
    """An einsum of an activation and a stored weight.

    Args:
        source_node: The activation.
        weight_node: The stored weight.
        source: The activation's indices.
        weight: The weight's.
        output: The result's.
        is_behind: Whether the weight comes first.
    """

    source_node: fx.Node
    weight_node: fx.Node
    source: str
    weight: str
    output: str
    is_behind: bool

    @property
    def summed(self) -> str:
        """Indices of both operands that are summed over, in the order in which einsum does."""
        first = self.weight if self.is_behind else self.source
        return "".join(index for index in sorted(first) if index not in self.output)

    @property
    def rows(self) -> str:
        """The activation's own indices, in the order of the result."""
        return "".join(index for index in self.output if index in self.source)

    @property
    def columns(self) -> str:
        """The weight's own indices, in the order of the result."""
        return "".join(index for index in self.output if index in self.weight)

    @property
    def matrix(self) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """The weight's dimensions that make the matrix's rows and columns, and its layout."""
        dimensions = [
            tuple(self.weight.index(index) for index in indices)
            for indices in (self.columns, self.summed)
        ]
        return dimensions[0], dimensions[1], self.is_behind

    @property
    def is_linear(self) -> bool:
        """Whether each index is either summed over both operands or in one of them and kept."""
        operands = set(self.source), set(self.weight)
        is_simple = all(len(set(term)) == len(term) for term in (self.source, self.weight))
        kept = operands[0] ^ operands[1] == set(self.output) and len(self.summed) > 0
        has_both = bool(self.rows and self.columns)
        return is_simple and kept and has_both and len(set(self.output)) == len(self.output)


def make_linear_einsum(graph: fx.GraphModule) -> int:
    """Replace einsums that are products with a stored weight by `fxmpq.linear`, in place.

    `einsum("ibh,hnd->ibnd", x, W)` becomes a linear layer of the matrix `[n d, h]` whose result
    is seen as `[i, b, n, d]`: the summed dimensions of the activation are brought behind the
    others, and the weight is stored as the matrix, once. It is computed by the kernel that einsum
    takes for it (a `bmm`), so the graph gives the same bits. An einsum stays where an index is
    kept of both operands, summed over one alone or repeated, where it has more or fewer than two
    operands or dots, and where something else reads the weight.

    Args:
        graph: A graph of ATen operators; changed in place.

    Returns:
        How many einsums were replaced.
    """
    found: dict[fx.Node, _Contraction] = {}
    for node in graph.graph.nodes:
        contraction = _contraction(graph, node)
        if contraction is not None:
            found[node] = contraction
    replaced = 0
    for weight in dict.fromkeys(contraction.weight_node for contraction in found.values()):
        readers = [node for node in weight.users if node in found]
        seen = {found[node].matrix for node in readers}
        if len(readers) < len(weight.users) or len(seen) > 1:
            continue
        sizes = get_tensor(graph, str(weight.target)).shape
        _store_matrix(graph, weight, found[readers[0]])
        for node in readers:
            _replace(graph, node, found[node], sizes)
            replaced += 1
    if replaced:
        graph.recompile()
    return replaced


def _contraction(graph: fx.GraphModule, node: fx.Node) -> _Contraction | None:
    """Read an einsum; `None` if it is no linear layer of a stored weight."""
    if node.target is not aten.einsum.default or not isinstance(node.args[1], (list, tuple)):
        return None
    operands = [entry for entry in node.args[1] if isinstance(entry, fx.Node)]
    terms, arrow, output = str(node.args[0]).replace(" ", "").partition("->")
    names = terms.split(",")
    stored = [_is_weight(graph, operand) for operand in operands]
    if len(operands) != 2 or sum(stored) != 1 or not arrow or "." in terms:
        return None
    is_behind = stored[0]
    source, weight = operands[::-1] if is_behind else operands
    term, other = names[::-1] if is_behind else names
    found = _Contraction(source, weight, term, other, output, is_behind)
    return found if found.is_linear and _fits(graph, found) else None


def _is_weight(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and get_tensor(graph, str(node.target)).is_floating_point()


def _fits(graph: fx.GraphModule, found: _Contraction) -> bool:
    """Whether no dimension is broadcast, nor left out by einsum for having one value."""
    value = found.source_node.meta.get("val")
    shape = get_tensor(graph, str(found.weight_node.target)).shape
    if not isinstance(value, Tensor) or min(shape) < 2:
        return False
    sizes = dict(zip(found.source, value.shape, strict=True))
    own = dict(zip(found.weight, shape, strict=True))
    return all(fixed_size(sizes[index]) == own[index] for index in found.summed)


def _store_matrix(graph: fx.GraphModule, node: fx.Node, found: _Contraction) -> None:
    """Store a weight as `[columns, summed]`, in the memory layout that einsum gives it."""
    tensor = get_tensor(graph, str(node.target)).detach()
    columns, summed = found.matrix[:2]
    if found.is_behind:
        matrix = tensor.permute(*columns, *summed).flatten(len(columns)).flatten(0, -2)
    else:
        matrix = tensor.permute(*summed, *columns).flatten(len(summed)).flatten(0, -2).T
    replace_stored(graph, node, matrix)


def _replace(graph: fx.GraphModule, node: fx.Node, found: _Contraction, sizes: torch.Size) -> None:
    """Put a linear layer between views in an einsum's place."""
    rows, summed = ([found.source.index(i) for i in axes] for axes in (found.rows, found.summed))
    columns = [sizes[found.weight.index(index)] for index in found.columns]
    inner = [*found.rows, *found.columns]
    # An earlier replacement may have taken the place of the activation that was found.
    source = node.all_input_nodes[1 if found.is_behind else 0]
    call = Inserter(graph, node)
    if found.is_behind:
        # einsum brings the summed dimensions to the front of its second operand.
        moved = _permuted(call, source, [*summed, *rows])
        joined = _joined(call, moved, 0, len(summed))
        source = _permuted(call, joined, [*range(1, len(rows) + 1), 0])
    else:
        moved = _permuted(call, source, [*rows, *summed])
        source = _joined(call, moved, len(rows), len(summed))
    form = "batched_behind" if found.is_behind else "batched"
    product = call(torch.ops.fxmpq.linear.default, source, found.weight_node, None, form)
    if len(columns) != 1:
        product = call(aten.unflatten.int, product, -1, columns)
    result = _permuted(call, product, [inner.index(index) for index in found.output])
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)


def _permuted(call: Inserter, source: fx.Node, order: list[int]) -> fx.Node:
    if order == sorted(order):
        return source
    return call(aten.permute.default, source, order)


def _joined(call: Inserter, source: fx.Node, start: int, count: int) -> fx.Node:
    """Make one dimension of `count` consecutive ones."""
    if count == 1:
        return source
    return call(aten.flatten.using_ints, source, start, start + count - 1)
