"""Write matrix products with a stored weight as linear layers."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor, replace_stored
from fxmpq.graph.constants import constant_nodes
from fxmpq.graph.inserting import Inserter

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.mm.default, aten.matmul.default})
_TRANSPOSES = frozenset(
    {aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default}
)


def make_linear(graph: fx.GraphModule) -> int:
    """Replace products of an activation and a stored matrix by `linear`, in place on the graph.

    `x @ W.T` becomes `linear(x, W)`; `x @ W` and `addmm(b, x, W)` (GPT-2's Conv1D) become
    `linear(x, W.T, b)` with the stored matrix turned round, if nothing but such products reads
    it. The stored tensor stays a view of the old layout, so the same kernel runs on the same
    memory and gives the same bits. `W @ y` becomes `linear(y.T, W).T` in the form that computes
    `W @ y`. A matrix that is computed from stored ones alone, such as a slice, counts as stored:
    `fold_constants` computes it once.

    Args:
        graph: A graph of ATen operators; changed in place.

    Returns:
        How many products were replaced.
    """
    replaced = 0
    turned: set[fx.Node] = set()
    constants = constant_nodes(graph)
    for node in list(graph.graph.nodes):
        if _is_behind(graph, node, constants):
            _replace_behind(graph, node)
            replaced += 1
            continue
        operands = _operands(graph, node)
        if operands is None:
            continue
        source, factor, bias = operands
        weight = _as_linear_weight(graph, factor, turned)
        if weight is None and _is_computed(factor, constants) and source not in constants:
            # A clone is dense, and stored with its strides, and so with its kernel.
            call = Inserter(graph, node)
            weight = call(aten.t.default, call(aten.clone.default, factor))
        if weight is None:
            continue
        with graph.graph.inserting_before(node):
            arguments = (source, weight) if bias is None else (source, weight, bias)
            linear = graph.graph.call_function(aten.linear.default, arguments)
        linear.meta = dict(node.meta)
        if node in constants:
            constants[linear] = linear
        node.replace_all_uses_with(linear)
        graph.graph.erase_node(node)
        if factor is not weight and not factor.users:
            graph.graph.erase_node(factor)
        replaced += 1
    if replaced:
        graph.recompile()
    return replaced


def _is_behind(graph: fx.GraphModule, node: fx.Node, constants: Collection[fx.Node]) -> bool:
    """Whether a node is `W @ y` with a stored matrix."""
    if node.op != "call_function" or node.kwargs or node.target not in _PRODUCTS:
        return False
    factor, source = node.args
    if not isinstance(factor, fx.Node) or not isinstance(source, fx.Node) or source in constants:
        return False
    value = source.meta.get("val")
    is_matrix = isinstance(value, Tensor) and value.dim() >= 2
    return is_matrix and (_is_matrix(graph, factor) or _is_computed(factor, constants))


def _is_computed(factor: fx.Node, constants: Collection[fx.Node]) -> bool:
    """Whether a node computes a matrix from stored tensors alone."""
    value = factor.meta.get("val")
    is_matrix = isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
    return is_matrix and factor.op == "call_function" and factor in constants


def _replace_behind(graph: fx.GraphModule, node: fx.Node) -> None:
    weight, source = node.args
    assert isinstance(weight, fx.Node) and isinstance(source, fx.Node)
    call = Inserter(graph, node)
    if weight.op != "get_attr":
        weight = call(aten.clone.default, weight)
    rows = _untransposed(source) or call(aten.transpose.int, source, -2, -1)
    product = call(torch.ops.fxmpq.linear.default, rows, weight, None, "behind")
    call.replace(aten.transpose.int, product, -2, -1)
    if not source.users:
        graph.graph.erase_node(source)


def _untransposed(node: fx.Node) -> fx.Node | None:
    """What a node is the transpose of in its last two dimensions."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.op != "call_function":
        return None
    if node.target is aten.mT.default:
        return source
    if node.target is not aten.transpose.int:
        return None
    rank = node.meta["val"].dim()
    axes = {axis % rank for axis in node.args[1:3]}
    return source if axes == {rank - 2, rank - 1} else None


def _operands(
    graph: fx.GraphModule, node: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Activation, matrix and bias of a product; `None` if it is none that `linear` computes."""
    if node.op != "call_function" or node.kwargs:
        return None
    if node.target in _PRODUCTS:
        found, bias = node.args, None
    elif node.target is aten.addmm.default and isinstance(node.args[0], fx.Node):
        bias, found = node.args[0], node.args[1:]
    else:
        return None
    if len(found) != 2 or not all(isinstance(entry, fx.Node) for entry in found):
        return None
    source, factor = found
    assert isinstance(source, fx.Node) and isinstance(factor, fx.Node)
    fits = source.op != "get_attr" and _is_bias(graph, bias, factor)
    return (source, factor, bias) if fits else None


def _as_linear_weight(
    graph: fx.GraphModule, factor: fx.Node, turned: set[fx.Node]
) -> fx.Node | None:
    """The node that reads `[out, in]` where `factor` is `[in, out]`; `None` if it is not stored.

    Matrices that are turned round for it are added to `turned`.
    """
    stored = factor if factor in turned else _transposed(graph, factor)
    if stored is not None:
        return stored
    if not _is_matrix(graph, factor) or not all(
        _multiplies_by(graph, user, factor) for user in factor.users
    ):
        return None
    turned.add(factor)
    replace_stored(graph, factor, get_tensor(graph, str(factor.target)).detach().t())
    return factor


def _multiplies_by(graph: fx.GraphModule, node: fx.Node, factor: fx.Node) -> bool:
    operands = _operands(graph, node)
    return operands is not None and operands[1] is factor


def _transposed(graph: fx.GraphModule, factor: fx.Node) -> fx.Node | None:
    """The stored matrix that a node transposes."""
    source = factor.args[0] if factor.op == "call_function" and factor.args else None
    if not isinstance(source, fx.Node) or not _is_matrix(graph, source):
        return None
    is_transpose = factor.target in _TRANSPOSES
    if factor.target is aten.permute.default:
        is_transpose = list(factor.args[1]) in ([1, 0], [-1, -2])  # type: ignore[arg-type]
    elif factor.target is aten.transpose.int:
        is_transpose = {axis % 2 for axis in factor.args[1:3]} == {0, 1}  # type: ignore[operator]
    return source if is_transpose else None


def _is_matrix(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    found = get_tensor(graph, str(node.target))
    return found.dim() == 2 and found.is_floating_point()


def _is_bias(graph: fx.GraphModule, bias: fx.Node | None, factor: fx.Node) -> bool:
    """Whether a summand is a stored vector with one value per column of the matrix."""
    if bias is None:
        return True
    value = factor.meta.get("val")
    if bias.op != "get_attr" or not isinstance(value, Tensor):
        return False
    return tuple(get_tensor(graph, str(bias.target)).shape) == (value.shape[-1],)
