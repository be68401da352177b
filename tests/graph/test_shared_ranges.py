from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision
from fxmpq.granularity import Dynamic
from fxmpq.graph.fusions import find_fusions
from fxmpq.graph.groups import form_groups
from fxmpq.graph.layers import find_layers
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.graph.shared_ranges import (
    SharedRanges,
    find_shared_ranges,
    joins_for_ranges,
    share_symmetry,
)
from fxmpq.graph.sites import Site, find_sites
from fxmpq.graph.state import Group, state_of
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import ActivationQuantizer

CANDIDATES = (Precision(4, 8), Precision(8, 8))


class Branches(nn.Module):
    """Three branches that are concatenated, and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.three = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        two = nn.functional.max_pool2d(self.two(x), 1)
        found = torch.cat([self.one(x).relu(), two, self.three(x)], 1)
        return self.last(found)


def search(
    graph: fx.GraphModule,
    rules: TargetRules,
    exclude: Sequence[str] = (),
    candidates: Sequence[Precision] = CANDIDATES,
) -> tuple[SharedRanges, list[Site], tuple[Group, ...]]:
    layers = find_layers(graph).layers
    groups = form_groups(graph, layers, rules, candidates, {}, exclude).groups
    fusions = find_fusions(graph, layers, rules.fusions).fusions
    sites = find_sites(graph, groups, rules, fusions)
    return find_shared_ranges(graph, sites, rules, fusions), sites, groups


def named(shared: SharedRanges, sites: Sequence[Site]) -> list[list[str]]:
    return [[sites[index].value.name for index in members] for members in shared.classes]


@pytest.fixture(scope="module")
def branches() -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(Branches().eval(), torch.randn(2, 3, 4, 4))


def test_what_is_added_has_one_range_and_the_sum_its_own(
    conv_graph: fx.GraphModule, chip_rules: TargetRules
) -> None:
    shared, sites, _ = search(conv_graph, chip_rules)
    assert named(shared, sites) == [["conv2d_2", "conv2d_3"]]
    assert shared.missed == ()


def test_a_concatenation_passes_codes_on(branches: fx.GraphModule, chip_rules: TargetRules) -> None:
    through = replace(chip_rules, through=frozenset({torch.ops.aten.max_pool2d.default}))
    shared, sites, _ = search(branches, through)
    assert named(shared, sites) == [["conv2d", "relu", "conv2d_2", "cat"]]
    # Pooling that does not commute stands between: one of the tensors is in float.
    shared, sites, _ = search(branches, chip_rules)
    assert shared.classes == ()
    (missed,) = shared.missed
    assert (missed.rule, missed.place) == ("one range at cat", "cat")
    assert missed.reason == "max_pool2d stays in float"


def test_pooling_may_have_the_range_of_what_it_reads(
    conv_graph: fx.GraphModule, chip_rules: TargetRules
) -> None:
    rules = replace(chip_rules, shared_ranges=frozenset({"max_pool2d"}))
    shared, sites, _ = search(conv_graph, rules)
    assert named(shared, sites) == [["relu_", "max_pool2d"]]


def test_ranges_are_joined_through_several_operators(chip_rules: TargetRules) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            one, two, three, four = (layer(x) for layer in self.layers)
            return torch.cat([(one + two).relu(), (two + three).relu(), (three + four).relu()])

    graph = trace(Chain().eval(), torch.randn(2, 2, 3, 3))
    shared, sites, _ = search(graph, chip_rules)
    sums = ["relu", "relu_1", "relu_2"]
    assert named(shared, sites) == [["conv2d", "conv2d_1", "conv2d_2", "conv2d_3"], [*sums, "cat"]]


def test_an_add_in_float_asks_for_nothing(
    conv_graph: fx.GraphModule, chip_rules: TargetRules
) -> None:
    shared, _, _ = search(conv_graph, chip_rules, exclude=["conv2"])
    assert shared.classes == ()
    (missed,) = shared.missed
    assert missed.reason == "conv2.conv2d_2 stays in float"


def test_an_add_that_is_fused_into_a_layer_adds_no_codes(
    conv_graph: fx.GraphModule, chip_rules: TargetRules
) -> None:
    rules = replace(chip_rules, fusions=(("conv", "add", "relu"),))
    assert search(conv_graph, rules)[0] == SharedRanges((), ())


def test_no_rule_no_range(conv_graph: fx.GraphModule, chip_rules: TargetRules) -> None:
    rules = replace(chip_rules, shared_ranges=frozenset())
    assert search(conv_graph, rules)[0] == SharedRanges((), ())


def test_groups_are_joined_only_where_formats_differ(
    conv_graph: fx.GraphModule, chip_rules: TargetRules
) -> None:
    rules = replace(chip_rules, joins=("shared_weight", "shared_input"))
    shared, sites, groups = search(conv_graph, rules)
    assert joins_for_ranges(shared, sites, groups) == ()
    mixed = search(conv_graph, rules, candidates=[Precision(8, 4), Precision(8, 8)])
    (join,) = joins_for_ranges(*mixed)
    assert (join.rule, join.layer, join.other) == ("shared_range", "conv2", "conv1")
    with_float = search(conv_graph, rules, candidates=[Precision(8, 8), Precision()])
    assert len(joins_for_ranges(*with_float)) == 1


def test_prepare_joins_them_and_remembers(
    conv_graph: fx.GraphModule, chip_rules: TargetRules
) -> None:
    rules = replace(chip_rules, joins=("shared_weight", "shared_input"))
    candidates = [Precision(8, 4), Precision(8, 8)]
    prepared = insert_quantizers(conv_graph, rules, candidates=candidates)
    state = state_of(prepared)
    assert [[layer.name for layer in group.layers] for group in state.groups] == [
        ["stem.0"],
        ["conv1", "conv2", "downsample.0"],
        ["fc"],
    ]
    ((one, other),) = state.shared_ranges
    formats = []
    for name in (one, other):
        quantizer = prepared.get_submodule(name)
        assert isinstance(quantizer, ActivationQuantizer)
        formats.append(quantizer.formats)
    assert formats[0] == formats[1]
    assert len(formats[0]) == 2


def test_sites_of_one_range_are_symmetric_where_one_of_them_is(
    branches: fx.GraphModule, chip_rules: TargetRules
) -> None:
    shared, sites, _ = search(branches, replace(chip_rules, shared_ranges=frozenset({"cat"})))
    assert not any(site.is_symmetric for site in sites)
    ((first, *others),) = shared.classes or ((0, 1),)
    sites[others[-1]].is_symmetric = True
    share_symmetry(SharedRanges(((first, *others),), ()), sites)
    marked = {index for index, site in enumerate(sites) if site.is_symmetric}
    assert marked == {first, *others}
    assert len(marked) < len(sites)


def test_what_is_stored_shares_a_range_not_what_lies_behind_it(
    branches: fx.GraphModule, chip_rules: TargetRules
) -> None:
    rules = replace(chip_rules, through=frozenset({torch.ops.aten.max_pool2d.default}))
    shared, sites, _ = search(branches, rules)
    twice = [entry for site in sites for entry in (site, replace(site, is_output=True))]
    found = find_shared_ranges(branches, twice, rules, ())
    assert shared.classes
    assert found.classes == tuple(tuple(2 * i for i in members) for members in shared.classes)


def test_tensors_of_one_range_cannot_each_find_their_own(conv_graph: fx.GraphModule) -> None:
    widths = OperatorRule(frozenset({8}), frozenset({8}), dynamic=frozenset(Dynamic))
    rules = TargetRules(
        "chip",
        {"conv": widths, "linear": widths},
        (Precision(8, 8),),
        quantize_outputs_of=frozenset({"conv", "add"}),
        shared_ranges=frozenset({"add"}),
    )
    names = ["w8a8", "w8a8d"]
    both = [Precision.parse(name) for name in names]
    message = "candidate w8a8d finds a range on each tensor, but those of .*conv2.* and .* have one"
    with pytest.raises(PrecisionError, match=message):
        insert_quantizers(conv_graph, rules, candidates=both)
    alone = replace(rules, shared_ranges=frozenset())
    prepared = insert_quantizers(conv_graph, alone, candidates=both)
    assert [str(entry) for entry in state_of(prepared).groups[-1].candidates] == names
    pinned = {"*conv*": both[0], "stem*": both[0], "down*": both[0]}
    kept = insert_quantizers(conv_graph, rules, candidates=both, keep=pinned)
    assert [str(entry) for entry in state_of(kept).groups[-1].candidates] == names
