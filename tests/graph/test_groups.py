from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import PatternError, PrecisionError
from fxmpq.formats import Precision
from fxmpq.granularity import PerBlock, PerChannel
from fxmpq.graph.groups import form_groups
from fxmpq.graph.layers import find_layers
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE

from .conftest import W4A8, W8A8, groups_of, members


def test_a_downsample_shares_its_input_with_the_blocks_first(conv_graph: fx.GraphModule) -> None:
    assert members(groups_of(conv_graph)) == {
        "stem.0": ["stem.0"],
        "conv1": ["conv1", "downsample.0"],
        "conv2": ["conv2"],
        "fc": ["fc"],
    }


def test_query_key_and_value_share_their_input(bert_graph: fx.GraphModule) -> None:
    found = members(groups_of(bert_graph))
    for index in range(2):
        layer = f"bert.encoder.layer.{index}"
        attention = f"{layer}.attention.self"
        assert found[f"{attention}.query"] == [
            f"{attention}.query",
            f"{attention}.key",
            f"{attention}.value",
        ]
        assert found[f"{layer}.intermediate.dense"] == [f"{layer}.intermediate.dense"]
    # 3 tables, 4 groups a layer, pooler and classifier.
    assert len(found) == 3 + 2 * 4 + 2


def test_an_embedding_takes_the_weight_half(bert_graph: fx.GraphModule) -> None:
    groups = groups_of(bert_graph)
    assert groups["bert.embeddings.word_embeddings"].candidates == (Precision(4), Precision(8))
    assert groups["classifier"].candidates == (W4A8, W8A8)


def test_candidates_are_ordered_by_bits(conv_graph: fx.GraphModule) -> None:
    groups = groups_of(conv_graph, [W8A8, Precision(), W4A8])
    assert groups["fc"].candidates == (W4A8, W8A8, Precision())


def test_excluded_layers_stand_alone_in_float(conv_graph: fx.GraphModule) -> None:
    groups = groups_of(conv_graph, exclude=["conv1", "f*"])
    assert members(groups)["conv1"] == ["conv1"]
    assert members(groups)["downsample.0"] == ["downsample.0"]
    for name in ("conv1", "fc"):
        assert groups[name].candidates == (Precision(),)
    assert groups["downsample.0"].candidates == (W4A8, W8A8)


def test_pins_hold_for_the_whole_group(conv_graph: fx.GraphModule) -> None:
    groups = groups_of(conv_graph, keep={"downsample.*": W8A8, "stem*": Precision(2, 8)})
    assert groups["conv1"].candidates == (W8A8,)
    assert groups["stem.0"].candidates == (Precision(2, 8),)
    assert groups["conv2"].candidates == (W4A8, W8A8)


def test_a_later_pin_wins(conv_graph: fx.GraphModule) -> None:
    groups = groups_of(conv_graph, keep={"*": W4A8, "fc": W8A8})
    assert {name: group.candidates for name, group in groups.items()} == {
        "stem.0": (W4A8,),
        "conv1": (W4A8,),
        "conv2": (W4A8,),
        "fc": (W8A8,),
    }


def test_pins_that_disagree_in_a_group_are_an_error(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(
        PrecisionError,
        match="conv1 at w4a8, downsample.0 at w8a8. downsample.0 reads the input of conv1",
    ):
        groups_of(conv_graph, keep={"conv1": W4A8, "downsample.0": W8A8})


@pytest.mark.parametrize("option", ["keep", "exclude"])
def test_a_pattern_without_a_layer_is_an_error(conv_graph: fx.GraphModule, option: str) -> None:
    value: object = {"downsampel.0": W8A8} if option == "keep" else ["downsampel.0"]
    with pytest.raises(
        PatternError, match="no layer matches 'downsampel.0'; .* 5 layers: 'downsample.0'"
    ):
        groups_of(conv_graph, **{option: value})  # type: ignore[arg-type]


def test_candidates_that_a_group_cannot_run_are_an_error(bert_graph: fx.GraphModule) -> None:
    with pytest.raises(
        PrecisionError,
        match=r"no candidate among w3a8 runs on layer '.*query' \(linear\); target 'onnxruntime' .*"
        r"key reads the input of .*query; .*value reads the input of",
    ):
        groups_of(bert_graph, [Precision(3, 8)], rules=ONNXRUNTIME.rules, exclude=["*embeddings*"])


def test_a_kind_that_the_target_lacks_stays_float(bert_graph: fx.GraphModule) -> None:
    rules = TargetRules("chip", {"linear": OperatorRule(frozenset({8}), frozenset({8}))}, (W8A8,))
    groups = groups_of(bert_graph, [W8A8], rules=rules)
    assert groups["bert.embeddings.word_embeddings"].candidates == (Precision(),)
    assert groups["classifier"].candidates == (W8A8,)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(ids)))


def test_tied_weights_share_a_group_whose_table_follows_the_weights() -> None:
    groups = groups_of(trace(Tied(), torch.ones(2, 3, dtype=torch.long)))
    assert members(groups) == {"table": ["table", "table#2"], "inner": ["inner"]}
    assert [layer.kind for layer in groups["table"].layers] == ["embedding", "linear"]
    assert groups["table"].candidates == (W4A8, W8A8)


class Thrice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(self.fc(x).relu()).relu())


def test_excluding_one_call_leaves_the_others_together() -> None:
    graph = trace(Thrice(), torch.ones(2, 4))
    assert members(groups_of(graph)) == {"fc": ["fc", "fc#2", "fc#3"]}
    groups = groups_of(graph, exclude=["fc"])
    assert members(groups) == {"fc": ["fc"], "fc#2": ["fc#2", "fc#3"]}
    assert groups["fc"].candidates == (Precision(),)


def test_a_tie_puts_layers_into_one_group(conv_graph: fx.GraphModule) -> None:
    groups = groups_of(conv_graph, ties=[("fc", "stem*")])
    assert members(groups) == {
        "stem.0": ["stem.0", "fc"],
        "conv1": ["conv1", "downsample.0"],
        "conv2": ["conv2"],
    }
    assert groups["stem.0"].candidates == (W4A8, W8A8)


def test_ties_that_meet_are_one(conv_graph: fx.GraphModule) -> None:
    found = members(groups_of(conv_graph, ties=[("fc", "conv2"), ("down*", "fc")]))
    assert found == {"stem.0": ["stem.0"], "conv1": ["conv1", "conv2", "downsample.0", "fc"]}


def test_a_kept_layer_keeps_what_is_tied_to_it(conv_graph: fx.GraphModule) -> None:
    groups = groups_of(conv_graph, ties=[("fc", "conv2")], keep={"fc": W8A8})
    assert groups["conv2"].candidates == (W8A8,)
    with pytest.raises(PrecisionError, match="conv2 at w4a8, fc at w8a8. fc is tied to conv2"):
        groups_of(conv_graph, ties=[("fc", "conv2")], keep={"fc": W8A8, "conv2": W4A8})


def test_tied_layers_that_share_no_candidate_are_an_error(conv_graph: fx.GraphModule) -> None:
    rules = TargetRules(
        "chip",
        {
            "conv": OperatorRule(frozenset({4}), frozenset({8})),
            "linear": OperatorRule(frozenset({8}), frozenset({8})),
        },
        (W4A8, W8A8),
    )
    assert groups_of(conv_graph, rules=rules)["fc"].candidates == (W8A8,)
    with pytest.raises(
        PrecisionError,
        match=r"no candidate among w4a8, w8a8 runs on layer 'conv2' \(conv, linear\).*"
        "fc is tied to conv2",
    ):
        groups_of(conv_graph, rules=rules, ties=[("fc", "conv2")])


def test_an_excluded_layer_is_in_no_tie(conv_graph: fx.GraphModule) -> None:
    groups = groups_of(conv_graph, ties=["*"], exclude=["conv1"])
    assert members(groups) == {
        "stem.0": ["stem.0", "conv2", "downsample.0", "fc"],
        "conv1": ["conv1"],
    }
    with pytest.raises(PatternError, match="no layer matches 'fcc'"):
        groups_of(conv_graph, ties=[("fc", "fcc")])


def test_a_target_may_tie_residual_branches(
    conv_graph: fx.GraphModule, chip_rules: TargetRules
) -> None:
    assert members(groups_of(conv_graph, rules=chip_rules)) == {
        "stem.0": ["stem.0"],
        "conv1": ["conv1", "conv2", "downsample.0"],
        "fc": ["fc"],
    }


def test_a_target_of_weights_alone_may_leave_shared_inputs_apart(
    bert_graph: fx.GraphModule,
) -> None:
    rule = OperatorRule(frozenset({4, 8}), frozenset({None}))
    rules = TargetRules(
        "chip", {"linear": rule, "embedding": rule}, (Precision(4),), joins=("shared_weight",)
    )
    groups = groups_of(bert_graph, [Precision(4), Precision(8)], rules=rules)
    assert all(len(group.layers) == 1 for group in groups.values())


def test_a_grouping_tells_its_joins_and_what_did_not_join(
    bert_graph: fx.GraphModule, chip_rules: TargetRules
) -> None:
    layers = find_layers(bert_graph).layers
    found = form_groups(bert_graph, layers, chip_rules, [W8A8], {}, ["*pooler*"], [("*key",)])
    assert {join.rule for join in found.joins} == {"shared_input", "tied"}
    assert {entry.rule for entry in found.missed} == {"added"}
    assert all("layer_norm" in entry.reason for entry in found.missed)


def test_weights_that_are_no_whole_blocks_have_the_other_candidates() -> None:
    graph = trace(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 4)), torch.ones(2, 64))
    whole = OperatorRule(
        frozenset({4, 8}),
        frozenset({8, None}),
        granularities=frozenset({PerChannel, PerBlock}),
        blocks_are_whole=True,
    )
    rules = replace(REFERENCE.rules, operators={"linear": whole})
    in_blocks = Precision.parse("w4b64")
    found = groups_of(graph, [in_blocks, W8A8], rules=rules)
    assert {name: group.candidates for name, group in found.items()} == {
        "0": (in_blocks, W8A8),
        "2": (W8A8,),
    }
    words = r"w4b64 runs on layer '2' .*\. 2 has 96 weights a channel, no whole .* blocks of w4b64"
    with pytest.raises(PrecisionError, match=words):
        groups_of(graph, [in_blocks], rules=rules)
