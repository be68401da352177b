from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torchmetrics.functional.text import perplexity

from fxmpq.costs.table import CostTable
from fxmpq.errors import BatchError
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.pipeline import quantize
from fxmpq.quantized import Quantized
from fxmpq.report.compare import Comparison, compare, float_graph, uniform_precisions


@pytest.fixture(scope="module")
def comparison(
    quantized: Quantized,
    images: list[Tensor],
    labels: Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Comparison:
    return compare(quantized, images, labels, output=tmp_path_factory.mktemp("model"))


def test_float_mixed_and_every_uniform_precision_are_measured(
    comparison: Comparison, quantized: Quantized
) -> None:
    entries = comparison.entries
    assert list(entries) == ["float", "mixed", "w8a8", "w4a8", "w2a8"]
    costs = quantized.costs
    assert entries["float"].weight_bytes == costs.float_total["weights"]
    assert entries["mixed"].bops == quantized.plan.costs["bops"]
    for name in ("w8a8", "w4a8", "w2a8"):
        assert entries[name].weight_bytes == costs.total("weights", costs.uniform(name))
    assert all(entry.latency_ms > 0 for entry in entries.values())


def test_float_runs_on_the_runtime_and_agrees_with_the_labels(comparison: Comparison) -> None:
    entry = comparison.entries["float"]
    assert entry.score == pytest.approx(11 / 12)  # the fixture has one label wrong
    assert entry.sqnr_db is None or entry.sqnr_db > 100


def test_more_bits_are_closer_to_float(comparison: Comparison) -> None:
    decibels = {name: entry.sqnr_db for name, entry in comparison.entries.items()}
    assert decibels["w8a8"] > decibels["w4a8"] > decibels["w2a8"]
    assert decibels["mixed"] > decibels["w4a8"]
    assert decibels["w8a8"] > 25


def test_only_the_mixed_model_is_written(comparison: Comparison) -> None:
    (file,) = comparison.converted.files
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    assert comparison.converted.sqnr_db > 25
    assert comparison.latency_samples == 1


def test_a_target_that_a_file_describes_is_converted_for(
    conv_net: nn.Module, images: list[Tensor], labels: Tensor
) -> None:
    npu = Path(__file__).parents[2] / "docs" / "examples" / "npu.toml"
    found = quantize(conv_net, images, target=npu, budget="cycles=50%", progress=False)
    compared = compare(found, images, labels, uniform=["w8a8"])
    assert compared.converted.target == "npu"
    assert compared.converted.runtime == "reference"
    assert list(compared.entries) == ["float", "mixed", "w8a8"]
    cycles = {name: entry.costs["cycles"] for name, entry in compared.entries.items()}
    assert cycles["float"] == found.costs.float_total["cycles"]
    assert cycles["mixed"] == found.plan.costs["cycles"]
    assert cycles["mixed"] <= 0.5 * cycles["float"]
    assert cycles["w8a8"] == found.costs.total("cycles", found.costs.uniform("w8a8"))


def test_labels_that_do_not_fit_are_refused_before_anything_is_converted(
    quantized: Quantized, images: list[Tensor]
) -> None:
    said: list[str] = []
    with pytest.raises(BatchError, match="3 labels for 12 samples"):
        compare(quantized, images, torch.zeros(3, dtype=torch.int64), say=said.append)
    assert said == []


def test_labels_beyond_the_classes_are_refused_before_anything_is_converted(
    quantized: Quantized, images: list[Tensor]
) -> None:
    said: list[str] = []
    labels = torch.full((12,), 5)
    with pytest.raises(BatchError, match="5 to 5, but the model has 5 classes"):
        compare(quantized, images, labels, say=said.append)
    assert said == []


class Bigrams(nn.Module):
    """A language model: the next token depends on the last one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 16), nn.Linear(16, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids))


def test_a_language_model_has_perplexities() -> None:
    torch.manual_seed(0)
    model = Bigrams()
    ids = torch.randint(0, 7, (5, 6))
    # As tokenizers return, and as they are.
    batches = [UserDict(input_ids=ids[:3]), {"input_ids": ids[3:]}]
    found = quantize(
        model,
        batches,
        target="reference",
        budget="avg_weight_bits=5",
        candidates=["w2b16", "w4b16", "w8b16"],
        progress=False,
    )
    entries = compare(found, batches, ids, metric="perplexity", uniform=["w8b16"]).entries
    with torch.no_grad():
        expected = perplexity(model(ids)[:, :-1], ids[:, 1:])
    assert entries["float"].score == pytest.approx(float(expected), rel=1e-5)
    assert entries["w8b16"].score == pytest.approx(float(expected), rel=0.02)
    assert entries["w8b16"].sqnr_db > 30 > entries["mixed"].sqnr_db
    with pytest.raises(BatchError, match=r"labels of shape \[3\] for logits of shape \[3, 6, 7\]"):
        compare(found, batches, ids[:, 0], metric="perplexity")


class FixedBatch(nn.Module):
    """Its export cannot leave the batch size free."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(2, 4))


def test_a_fixed_batch_is_timed_whole_and_uniform_plans_can_be_chosen(tmp_path: Path) -> None:
    batches = [torch.randn(2, 4), torch.randn(2, 4)]
    found = quantize(
        FixedBatch(), batches, target="reference", budget="weights=90%", progress=False
    )
    assert not state_of(found.graph).dynamic
    comparison = compare(found, batches, torch.tensor([0, 1, 2, 0]), uniform=["w3a8"])
    assert comparison.latency_samples == 2
    assert list(comparison.entries) == ["float", "mixed", "w3a8"]
    assert comparison.entries["float"].sqnr_db is None  # the reference target is exact


def test_halves_of_precisions_and_float_are_no_uniform_plans() -> None:
    row = {"w4a8": 1, "w8": 1, "fp32": 4}
    costs = CostTable({"weights": {"a": row, "b": {"w4": 1, "w2a4": 1}}})
    assert uniform_precisions(costs) == ("w8", "w4a8", "w2a4")


def test_the_float_graph_computes_what_the_traced_graph_does(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Callable[..., fx.GraphModule]
) -> None:
    graph = calibrated(conv_graph, images)
    found = float_graph(graph)
    assert set(state_of(found).choices.values()) == {"fp32"}
    assert state_of(graph).choices == {}
    (expected,), (actual,) = run_batch(conv_graph, images[0]), run_batch(found, images[0])
    assert torch.equal(expected, actual)
