from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer, Member, Product, require
from fxmpq.graph.switch import with_choices
from fxmpq.targets.outcome import (
    computed_elsewhere,
    layer_names,
    layer_precision,
    layer_reports,
)
from fxmpq.targets.target import LayerReport

Made = Callable[..., fx.GraphModule]


def kernel(layer: Member, precision: Precision) -> tuple[str, str]:
    return f"{layer.kind} kernel {precision}", "slow" if layer.name == "fc" else ""


def test_every_layer_has_a_row_in_graph_order(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images, exclude=["conv2"]))
    rows = [tuple(vars(row).values()) for row in layer_reports(planned, kernel)]
    assert rows == [
        ("stem.0", "w2a8", "conv kernel w2a8", ""),
        ("conv1", "w2a8", "conv kernel w2a8", ""),
        ("downsample.0", "w2a8", "conv kernel w2a8", ""),
        ("conv2", "fp32", "float", "kept in float by the user"),
        ("fc", "w2a8", "linear kernel w2a8", "slow"),
    ]


def test_float_chosen_by_the_plan_says_so(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, candidates=[Precision(8, 8), Precision()])
    choices = {group.name: "w8a8" for group in require(graph, stage="calibrated").groups}
    rows = layer_reports(with_choices(graph, {**choices, "fc": "fp32"}), kernel)
    assert (rows[-1].asked, rows[-1].kernel) == ("fp32", "float")
    assert rows[-1].reason == "the plan keeps it in float"


def test_a_target_may_tell_what_it_runs_in_float(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images, exclude=["conv2"]))
    rows = layer_reports(planned, kernel, lambda member: f"float kernel of {member.name}")
    found = [row.kernel for row in rows if row.asked == "fp32"]
    assert found == ["float kernel of conv2"]


def test_products_that_stay_float_come_last(
    calibrated: Made,
    uniform: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    rows = layer_reports(uniform(calibrated(bert_graph, token_batches)), kernel)
    assert [row.kernel for row in rows[-2:]] == ["float", "float"]
    assert all("fused attention" in row.reason for row in rows[-2:])
    assert len(rows) == 17 + 2
    assert len({row.layer for row in rows}) == len(rows)


def test_an_embedding_takes_the_weight_half() -> None:
    table = Layer("table", "embedding", "embedding", "table.weight", 0, (9, 4), 0)
    head = Layer("head", "linear", "linear", "table.weight", 36, (9, 4), 0)
    assert layer_precision(table, Precision(4, 8)) == Precision(4)
    assert layer_precision(head, Precision(4, 8)) == Precision(4, 8)


def test_products_are_listed_with_their_activations(
    calibrated: Made,
    uniform: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    planned = uniform(calibrated(bert_graph, token_batches, products=True))
    rows = [row for row in layer_reports(planned, kernel) if row.kernel.startswith("matmul")]
    assert [(row.asked, row.kernel) for row in rows] == [("a8", "matmul kernel a8")] * 4
    assert layer_precision(Product("s", "s", 1), Precision(4, 8)) == Precision(None, 8)
    assert layer_precision(Product("s", "s", 1), Precision(4)).is_float


def test_only_float_rows_are_said_to_be_computed_elsewhere() -> None:
    rows = [LayerReport(*row) for row in [("a", "fp32", "float", "x"), ("b", "fp32", "float", "")]]
    on_codes = LayerReport("a", "w8a8", "int8", "")
    first, second, third = computed_elsewhere([*rows, on_codes], {"a"}, "bfloat16")
    assert (first.kernel, first.reason) == ("bfloat16", "x")
    assert (second, third) == (rows[1], on_codes)


def test_layers_are_named_by_their_nodes(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    names = layer_names(calibrated(conv_graph, images))
    nodes = {node.name for node in conv_graph.graph.nodes}
    assert set(names) <= nodes
    assert sorted(names.values()) == ["conv1", "conv2", "downsample.0", "fc", "stem.0"]
