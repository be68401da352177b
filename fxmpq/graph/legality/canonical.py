"""What the canonical passes establish: a rule for each, from that pass on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from fxmpq.graph.legality.rule import Breaches, Rule, Subject, called
from fxmpq.graph.operators import argument, operator_of
from fxmpq.graph.passes.drop_identities import is_needless

aten = torch.ops.aten

_PRODUCTS: Mapping[object, int] = {
    aten.mm.default: 0,
    aten.matmul.default: 0,
    aten.addmm.default: 1,
}
_BATCHED = frozenset({aten.bmm.default, aten.matmul.default})
_TURNS = frozenset({aten.t.default, aten.numpy_T.default, aten.mT.default})


def _no_needless(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        if is_needless(node):
            yield f"node {called(node)} changes nothing"


def _one_reader(subject: Subject) -> Breaches:
    first: dict[int, fx.Node] = {}
    for node in subject.graph.graph.find_nodes(op="get_attr"):
        tensor = subject.stored(node)
        if tensor is None:
            continue
        other = first.setdefault(id(tensor), node)
        if other is not node:
            yield f"{node.target!r} is read by {other.name!r} and by {node.name!r}"


def _known_norms(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        if node.target is aten._native_batch_norm_legit_no_training.default:
            read = [user.args[1] for user in node.users if len(user.args) == 2]
            if read == [0]:
                yield f"node {called(node)} is a batch norm by another name"


def _positional(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        operator = operator_of(node)
        if operator is None:
            continue
        needed = max(place for place in (operator.input, operator.weight) if place is not None)
        if len(node.args) <= needed:
            yield f"node {called(node)} has no positional input and weight"


def _linear(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        operands = _operands(node)
        if operands is None:
            continue
        left, matrix = operands
        if subject.stored(left) is not None:
            is_behind = node.target is not aten.addmm.default and _is_matrix(subject, left)
            if is_behind and matrix not in subject.constants and _rank(matrix) >= 2:
                yield f"node {called(node)} is a linear layer by another name"
            continue
        turned = matrix.args[0] if matrix.target in _TURNS else None
        is_turned = _is_matrix(subject, turned)
        if is_turned or (_is_matrix(subject, matrix) and _only_multiplies(matrix)):
            yield f"node {called(node)} is a linear layer by another name"


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a plain product multiplies, an added vector aside."""
    place = _PRODUCTS.get(node.target)
    if place is None or node.kwargs or len(node.args) != place + 2:
        return None
    left, right = node.args[place:]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    added = node.args[0] if place else None
    # What is added by `addmm` may be a matrix or a number, which no linear layer adds.
    is_vector = added is None or (isinstance(added, fx.Node) and _is_row(added, right))
    is_stored = added is None or (isinstance(added, fx.Node) and added.op == "get_attr")
    return (left, right) if is_vector and is_stored else None


def _only_multiplies(matrix: fx.Node) -> bool:
    for user in matrix.users:
        operands = _operands(user)
        if operands is None or operands[1] is not matrix or operands[0] is matrix:
            return False
    return True


def _is_matrix(subject: Subject, node: object) -> bool:
    tensor = subject.stored(node)
    return tensor is not None and tensor.dim() == 2 and tensor.is_floating_point()


def _is_row(added: fx.Node, matrix: fx.Node) -> bool:
    """Whether a summand is a vector with a value for each column."""
    value = matrix.meta.get("val")
    columns = value.shape[-1] if isinstance(value, torch.Tensor) else None
    return _rank(added) == 1 and added.meta["val"].shape[0] == columns


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _linear_einsums(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        if node.target is not aten.einsum.default or not isinstance(node.args[1], (tuple, list)):
            continue
        stored = [subject.stored(entry) for entry in node.args[1]]
        weights = [tensor for tensor in stored if tensor is not None and min(tensor.shape) > 1]
        readers = [entry.users for entry in node.args[1] if isinstance(entry, fx.Node)]
        # A weight with a second reader keeps the shape that this one wants.
        is_alone = all(
            len(users) == 1 for users, held in zip(readers, stored, strict=True) if held is not None
        )
        if len(stored) == 2 and len(weights) == 1 and is_alone and _contracts(str(node.args[0])):
            yield f"node {called(node)} is a linear layer by another name"


def _contracts(equation: str) -> bool:
    """Whether each index is summed over both operands, or in one of them and kept."""
    terms, _, output = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    is_plain = all(part.isalpha() and len(set(part)) == len(part) for part in (left, right, output))
    summed, own = set(left) & set(right), (set(left) - set(right), set(right) - set(left))
    return is_plain and bool(summed) and all(own) and own[0] | own[1] == set(output)


def _stacks(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        if node.target not in _BATCHED or node.kwargs or len(node.args) != 2:
            continue
        factors = [entry for entry in node.args if isinstance(entry, fx.Node)]
        stored = [entry for entry in factors if _is_stack(subject, entry)]
        computed = [entry for entry in factors if entry not in subject.constants]
        if len(stored) != 1 or len(computed) != 1 or len(stored[0].users) != 1:
            continue
        # A stack times a vector has no rows.
        if factors[0] is computed[0] or _rank(computed[0]) >= 2:
            yield f"node {called(node)} is a layer of several matrices by another name"


def _is_stack(subject: Subject, node: fx.Node) -> bool:
    tensor = subject.stored(node)
    return tensor is not None and tensor.dim() == 3 and tensor.dtype is torch.float32


def _stored_weights(subject: Subject) -> Breaches:
    constants = subject.constants
    for node in subject.nodes.values():
        operator = operator_of(node)
        for place in () if operator is None else (operator.weight, operator.bias):
            source = argument(node, place)
            if isinstance(source, fx.Node) and source in constants and source.op != "get_attr":
                yield f"node {called(node)} reads {source.name!r}, which is the same in each call"


def _folded(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        if node.target is not aten.batch_norm.default or node.args[5]:
            continue
        layer = node.args[0]
        operator = operator_of(layer) if isinstance(layer, fx.Node) else None
        if operator is None or operator.kind != "conv":
            continue
        assert isinstance(layer, fx.Node)
        owned = (argument(layer, operator.weight), argument(layer, operator.bias))
        is_own = all(_is_own(subject, entry) for entry in owned if entry is not None)
        is_stored = all(
            subject.stored(entry) is not None for entry in node.args[1:5] if entry is not None
        )
        weight = subject.stored(owned[0])
        # One sample's channels come first, a norm's second.
        is_batch = weight is not None and _rank(layer) == weight.dim()
        is_alone = len(layer.users) == 1 and None not in node.args[3:5]
        if is_own and is_stored and is_alone and is_batch:
            yield f"node {called(node)} stands behind the convolution {layer.name!r} alone"


def _is_own(subject: Subject, node: object) -> bool:
    is_stored = isinstance(node, fx.Node) and subject.stored(node) is not None
    return is_stored and isinstance(node, fx.Node) and len(node.users) == 1


NO_NEEDLESS = Rule(
    "nothing needless",
    "no dropout that is off, no detach, no cast to what a tensor is, no assertion on metadata",
    _no_needless,
)
ONE_READER = Rule("one reader", "every stored tensor is read by one node", _one_reader)
KNOWN_NORMS = Rule(
    "known norms", "inference batch norms are calls of aten.batch_norm", _known_norms
)
POSITIONAL = Rule(
    "positional operands",
    "weighted operators take input and weight as positional arguments",
    _positional,
    needed=True,
)
LINEAR = Rule(
    "linear layers",
    "products with a stored matrix are calls of aten.linear or fxmpq.linear",
    _linear,
)
LINEAR_EINSUMS = Rule(
    "linear einsums",
    "einsums that are products with a weight of their own are calls of fxmpq.linear",
    _linear_einsums,
)
STACKS = Rule(
    "stacked weights",
    "batched products with a weight of their own are calls of fxmpq.batched_linear",
    _stacks,
)
STORED_WEIGHTS = Rule(
    "stored weights", "no weight or bias is computed from stored tensors alone", _stored_weights
)
FOLDED = Rule("folded norms", "no batch norm stands behind a convolution of its own", _folded)
