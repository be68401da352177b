from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxmpq.pipeline import quantize
from fxmpq.quantized import Quantized
from fxmpq.report.layers import layer_rows
from fxmpq.report.report import LayerRow
from fxmpq.sensitivity.sensitivity import Sensitivity


class Tied(nn.Module):
    """One linear layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.relu(self.twice(x)))


def rows_of(found: Quantized) -> tuple[LayerRow, ...]:
    return layer_rows(found.graph, found.sensitivity, found.convert())


def check_totals(found: Quantized) -> None:
    rows = rows_of(found)
    assert sum(row.weight_bytes for row in rows) == found.plan.costs["weights"]
    assert sum(row.bops for row in rows) == found.plan.costs["bops"]


def test_sizes_and_operations_add_up_to_the_plans(quantized: Quantized) -> None:
    check_totals(quantized)


def test_rows_name_precision_group_sensitivity_and_kernel(quantized: Quantized) -> None:
    rows = {row.layer: row for row in rows_of(quantized)}
    assert list(rows) == ["stem.0", "conv1", "downsample.0", "conv2", "fc"]
    assert rows["downsample.0"].group == "conv1"
    assert rows["downsample.0"].is_shared
    for row in rows.values():
        assert row.precision == quantized.plan.choices[row.group]
        expected = quantized.sensitivity.sqnr_db(row.group, row.precision)
        assert row.alone_db == pytest.approx(expected)
        assert row.kernel == ("MatMulIntegerToFloat" if row.layer == "fc" else "QLinearConv")
        assert bool(row.reason) == (row.precision != "w8a8")


def test_weights_that_two_calls_share_are_counted_once() -> None:
    torch.manual_seed(0)
    found = quantize(
        Tied(), [torch.randn(4, 6)], target="reference", budget="weights=50%", progress=False
    )
    check_totals(found)
    assert [row.weight_bytes > 0 for row in rows_of(found)] == [True, False]


def test_products_of_activations_are_listed_with_their_reason(
    bert: nn.Module, token_batches: list[dict[str, Tensor]]
) -> None:
    found = quantize(
        bert,
        token_batches[:1],
        target="reference",
        budget="weights=30%",
        exclude=["classifier"],
        progress=False,
    )
    check_totals(found)
    rows = rows_of(found)
    in_float = [row for row in rows if row.precision == "fp32"]
    assert [row.layer for row in in_float if row.group] == ["classifier"]
    products = [row for row in in_float if not row.group]
    assert len(products) == 2  # one attention a layer
    assert all(row.bops > 0 and row.weight_bytes == 0 and row.reason for row in products)


def test_a_score_is_no_sqnr(quantized: Quantized) -> None:
    scores = Sensitivity(quantized.sensitivity.values, "entropy", unit="score")
    rows = layer_rows(quantized.graph, scores, quantized.convert())
    assert all(row.alone_db is None for row in rows)
    assert any(row.alone_db is not None for row in rows_of(quantized))


def test_quantized_products_have_rows_and_their_share_of_the_operations(
    bert: nn.Module, token_batches: list[dict[str, Tensor]]
) -> None:
    found = quantize(
        bert,
        token_batches[:1],
        target="reference",
        budget="weights=30%",
        products=True,
        progress=False,
    )
    check_totals(found)
    rows = [row for row in rows_of(found) if row.precision == "a8"]
    assert [row.layer.rpartition(".")[2] for row in rows] == ["scores", "context"] * 2
    assert all(row.group == row.layer and row.weight_bytes == 0 < row.bops for row in rows)
    assert found.plan.layers[rows[0].layer] == "a8"
