from __future__ import annotations

import operator
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.attributes import set_tensor
from fxmpq.graph.legality import canonical
from fxmpq.graph.legality.canonical import (
    FOLDED,
    KNOWN_NORMS,
    LINEAR,
    LINEAR_EINSUMS,
    NO_NEEDLESS,
    ONE_READER,
    POSITIONAL,
    STACKS,
    STORED_WEIGHTS,
)
from fxmpq.graph.legality.rule import Rule, Subject
from fxmpq.graph.passes import CANONICAL_PASSES
from fxmpq.graph.state import copy_graph

aten = torch.ops.aten
Plant = Callable[[fx.GraphModule], None]


def first(graph: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in graph.graph.nodes if node.target is target)


def behind(graph: fx.GraphModule, node: fx.Node, target: Callable, *rest: object) -> fx.Node:
    """Put an operator behind a node: its readers read the new one."""
    with graph.graph.inserting_after(node):
        new = graph.graph.call_function(target, (node, *rest))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    new.meta = dict(node.meta)
    return new


def dropout(graph: fx.GraphModule) -> None:
    behind(graph, first(graph, aten.relu.default), aten.dropout.default, 0.5, False)


def cast(graph: fx.GraphModule) -> None:
    behind(graph, first(graph, aten.relu.default), aten.to.dtype, torch.float32)


def assertion(graph: fx.GraphModule) -> None:
    relu = first(graph, aten.relu.default)
    with graph.graph.inserting_after(relu):
        graph.graph.call_function(aten._assert_tensor_metadata.default, (relu,))


def second_reader(graph: fx.GraphModule) -> None:
    linear = first(graph, aten.linear.default)
    with graph.graph.inserting_before(linear):
        linear.args = (linear.args[0], graph.graph.get_attr("fc.weight"), linear.args[2])


def second_name(graph: fx.GraphModule) -> None:
    graph.fc.other = graph.fc.weight
    linear = first(graph, aten.linear.default)
    with graph.graph.inserting_before(linear):
        behind(graph, linear, aten.add.Tensor, graph.graph.get_attr("fc.other"))


def norm_behind(graph: fx.GraphModule, target: Callable, *rest: object) -> fx.Node:
    conv = first(graph, aten.conv2d.default)
    with graph.graph.inserting_before(conv):
        stored = []
        for name in ("gamma", "beta", "mean", "var"):
            set_tensor(graph, f"norm.{name}", torch.ones(8))
            stored.append(graph.graph.get_attr(f"norm.{name}"))
    return behind(graph, conv, target, *stored, *rest)


def functional_norm(graph: fx.GraphModule) -> None:
    target = aten._native_batch_norm_legit_no_training.default
    norm = norm_behind(graph, target, 0.1, 1e-5)
    behind(graph, norm, operator.getitem, 0)


def folding_norm(graph: fx.GraphModule) -> None:
    norm_behind(graph, aten.batch_norm.default, False, 0.1, 1e-5, False)


def keyword_operands(graph: fx.GraphModule) -> None:
    conv = first(graph, aten.conv2d.default)
    conv.kwargs, conv.args = {"weight": conv.args[1]}, conv.args[:1]


def product(graph: fx.GraphModule) -> None:
    linear = first(graph, aten.linear.default)
    set_tensor(graph, "matrix", torch.ones(5, 4))
    with graph.graph.inserting_before(linear):
        matrix = graph.graph.get_attr("matrix")
    matrix.meta["val"] = torch.ones(5, 4)
    behind(graph, linear, aten.matmul.default, matrix)


def product_behind(graph: fx.GraphModule) -> None:
    product(graph)
    matmul = first(graph, aten.matmul.default)
    rows, matrix = matmul.args
    set_tensor(graph, "matrix", torch.ones(4, 5))
    matrix.meta["val"] = torch.ones(4, 5)
    with graph.graph.inserting_before(matmul):
        turned = graph.graph.call_function(aten.t.default, (rows,))
    turned.meta["val"] = rows.meta["val"].t()
    matmul.args = (matrix, turned)


def turned_product(graph: fx.GraphModule) -> None:
    product(graph)
    matmul = first(graph, aten.matmul.default)
    with graph.graph.inserting_before(matmul):
        turned = graph.graph.call_function(aten.t.default, (matmul.args[1],))
        # Its matrix has a reader that is no product.
        graph.graph.call_function(aten.neg.default, (matmul.args[1],))
    matmul.args = (matmul.args[0], turned)


def biased_product(graph: fx.GraphModule) -> None:
    product(graph)
    matmul = first(graph, aten.matmul.default)
    set_tensor(graph, "offset", torch.ones(4))
    with graph.graph.inserting_before(matmul):
        offset = graph.graph.get_attr("offset")
    offset.meta["val"] = torch.ones(4)
    matmul.target, matmul.args = aten.addmm.default, (offset, *matmul.args)


def einsum(graph: fx.GraphModule) -> None:
    product(graph)
    matmul = first(graph, aten.matmul.default)
    matmul.target, matmul.args = aten.einsum.default, ("ij,jk->ki", list(matmul.args))


def stack(graph: fx.GraphModule) -> None:
    linear = first(graph, aten.linear.default)
    set_tensor(graph, "stack", torch.ones(2, 5, 4))
    with graph.graph.inserting_before(linear):
        matrices = graph.graph.get_attr("stack")
    matrices.meta["val"] = torch.ones(2, 5, 4)
    behind(graph, linear, aten.matmul.default, matrices)


def computed_weight(graph: fx.GraphModule) -> None:
    linear = first(graph, aten.linear.default)
    weight, bias = linear.args[1:]
    with graph.graph.inserting_before(linear):
        absolute = graph.graph.call_function(aten.abs.default, (weight,))
    linear.args = (linear.args[0], absolute, bias)


PLANTS: list[tuple[Rule, Plant, str]] = [
    (NO_NEEDLESS, dropout, r"'dropout.*' \(aten.dropout.default\) changes nothing"),
    (NO_NEEDLESS, cast, r"\(aten.to.dtype\) changes nothing"),
    (NO_NEEDLESS, assertion, r"\(aten._assert_tensor_metadata.default\) changes nothing"),
    (ONE_READER, second_reader, "'fc.weight' is read by 'fc_weight' and by 'fc_weight_1'"),
    (ONE_READER, second_name, "'fc.other' is read by 'fc_weight' and by 'fc_other'"),
    (KNOWN_NORMS, functional_norm, "is a batch norm by another name"),
    (POSITIONAL, keyword_operands, "'conv2d' .* has no positional input and weight"),
    (LINEAR, product, r"\(aten.matmul.default\) is a linear layer by another name"),
    (LINEAR, product_behind, r"\(aten.matmul.default\) is a linear layer by another name"),
    (LINEAR, turned_product, r"\(aten.matmul.default\) is a linear layer by another name"),
    (LINEAR, biased_product, r"\(aten.addmm.default\) is a linear layer by another name"),
    (LINEAR_EINSUMS, einsum, r"\(aten.einsum.default\) is a linear layer by another name"),
    (STACKS, stack, r"\(aten.matmul.default\) is a layer of several matrices by another name"),
    (STORED_WEIGHTS, computed_weight, "'linear' .* reads 'abs.*', which is the same in each call"),
    (FOLDED, folding_norm, "'batch_norm.*' .* stands behind the convolution 'conv2d' alone"),
]


def breaches(rule: Rule, graph: fx.GraphModule) -> list[str]:
    return list(rule.breaches(Subject(graph)))


@pytest.mark.parametrize(
    ("rule", "plant", "words"), PLANTS, ids=[plant.__name__ for _, plant, _ in PLANTS]
)
def test_a_planted_breach_is_found_and_the_passes_mend_it(
    rule: Rule, plant: Plant, words: str, conv_graph: fx.GraphModule
) -> None:
    graph = copy_graph(conv_graph)
    assert breaches(rule, graph) == []
    plant(graph)
    (found,) = breaches(rule, graph)
    assert re.search(words, found), found
    if rule is not POSITIONAL:
        for canonical_pass in CANONICAL_PASSES:
            canonical_pass(graph)
        assert breaches(rule, graph) == []


def test_every_rule_has_its_breach() -> None:
    rules = {rule.name for rule in vars(canonical).values() if isinstance(rule, Rule)}
    assert {rule.name for rule, _, _ in PLANTS} == rules


def keep_training_dropout(graph: fx.GraphModule) -> None:
    behind(graph, first(graph, aten.relu.default), aten.dropout.default, 0.5, True)


def norm_with_another_reader(graph: fx.GraphModule) -> None:
    folding_norm(graph)
    conv = first(graph, aten.conv2d.default)
    norm = first(graph, aten.batch_norm.default)
    with graph.graph.inserting_after(norm):
        graph.graph.call_function(aten.neg.default, (conv,))


def random_weight(graph: fx.GraphModule) -> None:
    computed_weight(graph)
    first(graph, aten.abs.default).target = aten.rand_like.default


def einsum_that_keeps_an_index_of_both(graph: fx.GraphModule) -> None:
    einsum(graph)
    node = first(graph, aten.einsum.default)
    node.args = ("ij,jk->ijk", node.args[1])


def product_with_a_shared_matrix(graph: fx.GraphModule) -> None:
    product(graph)
    matrix = first(graph, aten.matmul.default).args[1]
    with graph.graph.inserting_after(matrix):
        graph.graph.call_function(aten.neg.default, (matrix,))


def product_plus_a_number(graph: fx.GraphModule) -> None:
    biased_product(graph)
    offset = first(graph, aten.addmm.default).args[0]
    set_tensor(graph, "offset", torch.ones(1))
    offset.meta["val"] = torch.ones(1)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (NO_NEEDLESS, keep_training_dropout),
        (FOLDED, norm_with_another_reader),
        (STORED_WEIGHTS, random_weight),
        (LINEAR_EINSUMS, einsum_that_keeps_an_index_of_both),
        (LINEAR, product_with_a_shared_matrix),
        (LINEAR, product_plus_a_number),
    ],
)
def test_what_no_pass_can_take_away_is_legal(
    rule: Rule, change: Plant, conv_graph: fx.GraphModule
) -> None:
    graph = copy_graph(conv_graph)
    change(graph)
    assert breaches(rule, graph) == []


def test_a_product_of_two_activations_is_no_linear_layer() -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.mT

    graph = torch.export.export(Scores(), (torch.ones(3, 3),)).module(check_guards=False)
    assert breaches(LINEAR, graph) == []
