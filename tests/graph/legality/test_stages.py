from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError, LegalityError
from fxmpq.graph.legality.exported import PURE
from fxmpq.graph.legality.rule import Rule, Subject
from fxmpq.graph.legality.stages import (
    ESTABLISHED,
    STAGES,
    check_rules,
    check_stage,
    rules_behind,
    stage_of,
)
from fxmpq.graph.passes import CANONICAL_PASSES
from fxmpq.graph.passes.merge_weights import merge_weights
from fxmpq.graph.passes.restore_batch_norm import restore_batch_norm
from fxmpq.graph.state import copy_graph, state_of
from fxmpq.graph.trace import trace

aten = torch.ops.aten
Made = Callable[..., fx.GraphModule]


class Everything(nn.Module):
    """Something for each pass: writes, casts, ties, weight norm, products and norms.

    A write through a view has the export make all writes pure, and the norms functional.
    """

    def __init__(self, *, writes_through_view: bool) -> None:
        super().__init__()
        self.writes_through_view = writes_through_view
        self.conv = nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.matrix = nn.Parameter(torch.randn(4, 6))
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("offset", torch.arange(6.0))
        self.experts = nn.Parameter(torch.randn(2, 4, 3))
        self.mixer = nn.Parameter(torch.randn(6, 2, 3))

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        y = self.conv(x).relu_()
        if self.writes_through_view:
            y[:, 0] += 1
        z = self.normed(y.mean(2).float()) + self.table(ids)
        z = nn.functional.dropout(z, 0.1, self.training)
        scores = self.head(z)
        return {
            "product": torch.addmm(self.offset, z, self.matrix),
            "scores": scores,
            "experts": torch.matmul(z, self.experts),
            "mixed": torch.einsum("ij,jkl->ikl", scores, self.mixer),
        }


def everything(*, writes_through_view: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Everything(writes_through_view=writes_through_view)
    return model, (torch.randn(3, 3, 8), torch.tensor([1, 2, 3]))


def models(request: pytest.FixtureRequest) -> dict[str, tuple[nn.Module, object]]:
    found = {
        "conv_net": ("conv_net", "images"),
        "resnet": ("resnet", "resnet_batches"),
        "bert": ("bert", "token_batches"),
    }
    made = {
        name: (request.getfixturevalue(model), request.getfixturevalue(batches)[0])
        for name, (model, batches) in found.items()
    }
    return {
        **made,
        "everything": everything(writes_through_view=False),
        "functional": everything(writes_through_view=True),
    }


@pytest.mark.parametrize("name", ["conv_net", "resnet", "bert", "everything", "functional"])
def test_behind_each_pass_holds_what_it_establishes_and_it_is_not_needed_again(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = models(request)[name]
    walked = []

    def watched(canonical_pass: Callable[[fx.GraphModule], int]) -> Callable:
        def run(graph: fx.GraphModule) -> int:
            changed = canonical_pass(graph)
            check_rules(graph, rules_behind(canonical_pass), after=canonical_pass.__name__)
            again = copy_graph(graph)
            assert canonical_pass(again) == 0, canonical_pass
            assert str(again.graph) == str(graph.graph)
            walked.append(canonical_pass)
            return changed

        return run

    monkeypatch.setattr(
        "fxmpq.graph.trace.CANONICAL_PASSES", tuple(watched(each) for each in CANONICAL_PASSES)
    )
    graph = trace(model, batch)
    assert walked == list(CANONICAL_PASSES)
    check_stage(graph, "canonical")


# The export reads each tensor once itself, tied ones by one of their names; to merge what is
# planted is shown with the rule.
@pytest.mark.parametrize(
    "left_out",
    [each for each in CANONICAL_PASSES if each is not merge_weights],
    ids=lambda each: each.__name__,
)
def test_a_pass_that_is_left_out_is_missed(
    left_out: Callable[[fx.GraphModule], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass does something on this model that its own rules ask for."""
    others = tuple(each for each in CANONICAL_PASSES if each is not left_out)
    monkeypatch.setattr("fxmpq.graph.trace.CANONICAL_PASSES", others)
    monkeypatch.setattr("fxmpq.graph.trace._check_canonical", lambda model, graph: None)
    model, batch = everything(writes_through_view=left_out is restore_batch_norm)
    graph = trace(model, batch)
    own = {rule.name for rule in ESTABLISHED[left_out]}
    subject = Subject(graph, state_of(graph))
    broken = {rule.name for rule in STAGES["canonical"] if list(rule.breaches(subject))}
    assert broken & own, broken


def test_every_pass_establishes_something() -> None:
    assert set(ESTABLISHED) == set(CANONICAL_PASSES)
    assert all(ESTABLISHED.values())
    behind = [set(map(id, rules_behind(each))) for each in CANONICAL_PASSES]
    assert all(first < second for first, second in itertools.pairwise(behind))


def test_rules_are_told_apart_by_name() -> None:
    every = {id(rule): rule for rules in STAGES.values() for rule in rules}.values()
    assert len({rule.name for rule in every}) == len(list(every))
    assert all(rule.says for rule in every)


def test_the_state_tells_the_stage(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Made, uniform: Made
) -> None:
    found = calibrated(conv_graph, images)
    graphs = {"canonical": conv_graph, "calibrated": found, "planned": uniform(found)}
    for stage, graph in graphs.items():
        assert stage_of(state_of(graph)) == stage
        check_stage(graph, stage)
    assert stage_of(replace(state_of(found), calibrated=False)) == "prepared"


def test_an_error_names_rule_places_and_what_ran(conv_graph: fx.GraphModule) -> None:
    graph = copy_graph(conv_graph)
    for node in graph.graph.nodes:
        if node.target is aten.conv2d.default:
            node.target = aten.relu_.default
    with pytest.raises(LegalityError) as caught:
        check_rules(graph, (PURE,), after="the pass 'mine'")
    message = str(caught.value)
    assert message.startswith(
        "after the pass 'mine' the graph breaks the rule 'pure' (no operator writes to its "
        "arguments): node 'conv2d' (aten.relu_.default) writes to its arguments; "
    )
    assert message.endswith(" and 1 more")
    assert message.count("; ") == 2


def test_rules_behind_a_broken_one_are_not_looked_at(conv_graph: fx.GraphModule) -> None:
    looked = []
    broken = Rule("broken", "nothing", lambda _: iter(["here"]))
    later = Rule("later", "nothing", lambda _: iter(looked.append("looked") or ()))
    with pytest.raises(LegalityError, match="'broken'"):
        check_rules(conv_graph, (broken, later))
    assert looked == []
    check_rules(conv_graph, (later,))
    assert looked == ["looked"]


def test_only_what_is_needed_is_checked_where_that_is_asked(conv_graph: fx.GraphModule) -> None:
    graph = copy_graph(conv_graph)
    graph.plain = graph.fc.bias.detach()
    for node in graph.graph.find_nodes(op="get_attr"):
        if node.target == "fc.bias":
            node.target = "plain"
    check_stage(graph, "canonical", needed_only=True)
    with pytest.raises(LegalityError, match="'registered tensors'"):
        check_stage(graph, "canonical")


def test_unknown_stages_and_graphs_of_others_are_errors(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="no stage 'planed'; the closest are 'planned'"):
        check_stage(conv_graph, "planed")
    with pytest.raises(FxmpqError, match="call fxmpq.trace"):
        check_stage(fx.symbolic_trace(nn.ReLU()), "canonical")
