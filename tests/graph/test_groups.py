from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import PatternError, PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.groups import form_groups, matching
from fxmpq.graph.layers import find_layers
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.graph.state import Group
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE

W4A8, W8A8 = Precision(4, 8), Precision(8, 8)


def groups_of(
    graph: fx.GraphModule,
    candidates: Sequence[Precision] = (W4A8, W8A8),
    keep: Mapping[str, Precision] | None = None,
    exclude: Sequence[str] = (),
    rules: TargetRules = REFERENCE.rules,
) -> dict[str, Group]:
    layers = find_layers(graph).layers
    groups = form_groups(graph, layers, rules, candidates, keep or {}, exclude)
    assert sorted(layer.name for group in groups for layer in group.layers) == sorted(
        layer.name for layer in layers
    )
    return {group.name: group for group in groups}


def members(groups: Mapping[str, Group]) -> dict[str, list[str]]:
    return {name: [layer.name for layer in group.layers] for name, group in groups.items()}


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
    with pytest.raises(PrecisionError, match="conv1 at w4a8, downsample.0 at w8a8"):
        groups_of(conv_graph, keep={"conv1": W4A8, "downsample.0": W8A8})


@pytest.mark.parametrize("option", ["keep", "exclude"])
def test_a_pattern_without_a_layer_is_an_error(conv_graph: fx.GraphModule, option: str) -> None:
    value: object = {"downsampel.0": W8A8} if option == "keep" else ["downsampel.0"]
    with pytest.raises(
        PatternError, match="no layer matches 'downsampel.0'; .* 5 layers: 'downsample.0'"
    ):
        groups_of(conv_graph, **{option: value})  # type: ignore[arg-type]


def test_patterns_are_fnmatch_and_case_sensitive() -> None:
    names = ["layer1.conv", "layer2.conv", "fc"]
    assert matching("layer?.conv", names) == names[:2]
    assert matching("layer[2-9]*", names) == ["layer2.conv"]
    assert matching("*", names) == names
    with pytest.raises(PatternError, match="closest of 3 layers: .*'fc'"):
        matching("FC", names)


def test_candidates_that_a_group_cannot_run_are_an_error(bert_graph: fx.GraphModule) -> None:
    with pytest.raises(
        PrecisionError,
        match=r"no candidate among w4 runs on layer '.*query' \(linear\); target 'onnxruntime'",
    ):
        groups_of(bert_graph, [Precision(4)], rules=ONNXRUNTIME.rules)


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
