from __future__ import annotations

import pytest
import torch
from torch import fx
from transformers import ResNetConfig, ResNetForImageClassification

from fxmpq.costs.cost import COSTS, count
from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE


@pytest.mark.parametrize(
    ("kind", "depths", "sizes", "weights", "macs"),
    [
        ("basic", [2, 2, 2, 2], [64, 128, 256, 512], 11_678_912, 1_814_073_344),
        ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048], 25_502_912, 4_089_184_256),
    ],
    ids=["resnet18", "resnet50"],
)
def test_published_totals(
    kind: str, depths: list[int], sizes: list[int], weights: int, macs: int
) -> None:
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=sizes, depths=depths, layer_type=kind, num_labels=1000
    )
    with torch.device("meta"):
        model = ResNetForImageClassification(config)
    model = model.to_empty(device="cpu").eval()
    graph = trace(model, {"pixel_values": torch.zeros(1, 3, 224, 224)})
    table = count(insert_quantizers(graph, REFERENCE.rules, candidates=[Precision(8, 8)]))
    assert table.float_total == {
        "weights": 4 * weights,
        "weight_bits": 32 * weights,
        "macs": macs,
        "bops": 1024 * macs,
    }
    uniform = table.uniform("w8a8")
    assert table.total("weight_bits", uniform) == 8 * weights
    assert table.total("bops", uniform) == 64 * macs


def test_every_group_and_candidate_is_costed_by_every_rule(conv_graph: fx.GraphModule) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules)
    state = require(prepared, stage="prepared")
    table = count(prepared)
    assert table.metrics == tuple(COSTS)
    assert table.fingerprint == state.fingerprint
    for metric, rule in COSTS.items():
        for group in state.groups:
            for candidate in group.candidates:
                found = table.cost(metric, group.name, candidate)
                assert found == rule(group, candidate)
                assert isinstance(found, int)


def test_attention_is_a_fixed_part_of_the_operations(bert_graph: fx.GraphModule) -> None:
    table = count(insert_quantizers(bert_graph, ONNXRUNTIME.rules))
    attention = 2 * (2 * 8 * 8 * 16)
    assert table.fixed == {
        "weights": 0,
        "weight_bits": 0,
        "macs": attention,
        "bops": attention * 1024,
    }
    smallest = table.total("macs", table.uniform("w2a8"))
    assert smallest == table.float_total["macs"] == table.smallest("macs")


def test_excluded_layers_cost_what_float_costs(conv_graph: fx.GraphModule) -> None:
    table = count(insert_quantizers(conv_graph, REFERENCE.rules, exclude=["*"]))
    for metric in table.metrics:
        assert table.smallest(metric) == table.float_total[metric] == table.largest(metric)


def test_the_costs_do_not_depend_on_the_traced_batch(
    conv_net: torch.nn.Module, conv_graph: fx.GraphModule
) -> None:
    other = trace(conv_net, torch.zeros(1, 3, 16, 16))
    tables = [count(insert_quantizers(g, REFERENCE.rules)) for g in (conv_graph, other)]
    assert tables[0].costs == tables[1].costs
    assert tables[0].float_total == tables[1].float_total


def test_an_unprepared_graph_is_an_error(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        count(conv_graph)
