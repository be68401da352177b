from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassHingeLoss

from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import switch_group
from fxmpq.graph.trace import trace
from fxmpq.journal import Journal
from fxmpq.sensitivity.sqnr import sqnr
from fxmpq.training.loss import LossFunction
from fxmpq.work import Work

Calibrated = Callable[..., fx.GraphModule]


def naive(graph: fx.GraphModule, batches: list[object]) -> dict[str, dict[str, float]]:
    """The sweep by definition: a whole pass per (group, precision)."""
    graph = copy_graph(graph)

    def outputs() -> Tensor:
        found = [
            leaf.double().flatten()
            for batch in batches
            for leaf in run_batch(graph, batch)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        return torch.cat(found)

    exact = outputs()
    values: dict[str, dict[str, float]] = {}
    for group in require(graph, stage="calibrated").groups:
        for candidate in group.candidates:
            switch_group(graph, group, candidate)
            noise = (outputs() - exact).square().sum() / exact.square().sum()
            values.setdefault(group.name, {})[str(candidate)] = float(noise)
        switch_group(graph, group, Precision())
    return values


def assert_equals_naive(graph: fx.GraphModule, batches: list[object]) -> None:
    expected, found = naive(graph, batches), sqnr(graph, batches)
    assert found.method == "sqnr"
    assert found.projections is None
    assert found.fingerprint == require(graph, stage="calibrated").fingerprint
    assert list(found.values) == list(expected)
    for group, row in expected.items():
        assert found.values[group] == pytest.approx(row, rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_a_residual_network(
    calibrated: Calibrated, conv_graph: fx.GraphModule, images: list[Tensor], target: str
) -> None:
    assert_equals_naive(calibrated(conv_graph, images, target), images)


def test_bert_with_masks_and_two_lengths(
    calibrated: Calibrated, bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    graph = calibrated(
        bert_graph, token_batches, candidates=[Precision(2, 8), Precision(4, 4), Precision(8, 8)]
    )
    assert_equals_naive(graph, token_batches)


class Two(nn.Module):
    """Two outputs, one of which skips most layers, and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.first(self.first(x).relu())
        logits = self.second(hidden.relu())
        return logits, hidden, logits.argmax(-1)


def test_several_outputs_and_a_layer_called_twice(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 6), torch.randn(3, 6)]
    graph = calibrated(trace(Two(), batches[0]), batches)
    assert_equals_naive(graph, batches)


def test_excluded_groups_have_no_noise_and_the_graph_is_left_switched_off(
    calibrated: Calibrated, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, exclude=["conv1"])
    found = sqnr(graph, images)
    assert found.values["conv1"] == {"fp32": 0.0}
    assert all(value > 0 for name in ("fc", "conv2") for value in found.values[name].values())
    assert torch.equal(run_batch(graph, images[0])[0], run_batch(conv_graph, images[0])[0])


def test_an_uncalibrated_graph_is_an_error(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        sqnr(conv_graph, images)


class Classifier(nn.Module):
    """A head behind two hidden layers, whose last is also returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.second(self.first(x).relu()).relu()
        return {"logits": self.head(hidden), "hidden": hidden}


Labelled = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def labelled() -> Labelled:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(21, 6, generator=generator).split([16, 5])
    labels = torch.randint(0, 3, (21,), generator=generator).split([16, 5])
    return list(zip(inputs, labels, strict=True))


@pytest.fixture(scope="module")
def classifier(calibrated: Calibrated, labelled: Labelled) -> fx.GraphModule:
    torch.manual_seed(0)
    inputs = [x for x, _ in labelled]
    return calibrated(trace(Classifier().eval(), inputs[0]), inputs, exclude=["second"])


def measured(
    graph: fx.GraphModule, score: Callable[[fx.GraphModule], float]
) -> dict[str, dict[str, float]]:
    """The increase of a score by definition, with the graph switched as a whole."""
    graph = copy_graph(graph)
    with torch.no_grad():
        base = score(graph)
        rows: dict[str, dict[str, float]] = {}
        for group in require(graph, stage="calibrated").groups:
            for candidate in group.candidates:
                switch_group(graph, group, candidate)
                rows.setdefault(group.name, {})[str(candidate)] = score(graph) - base
            switch_group(graph, group, Precision())
    return rows


def assert_rows(
    found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]], slack: float = 1e-9
) -> None:
    assert list(found) == list(expected)
    for group, row in expected.items():
        assert found[group] == pytest.approx(row, rel=1e-5, abs=slack)


def test_divergence_is_the_mean_over_all_samples(
    classifier: fx.GraphModule, labelled: Labelled
) -> None:
    inputs = torch.cat([x for x, _ in labelled])
    exact = classifier(inputs)["logits"].detach().double().log_softmax(-1)

    def score(graph: fx.GraphModule) -> float:
        found = graph(inputs)["logits"].double().log_softmax(-1)
        return float(functional.kl_div(found, exact, reduction="batchmean", log_target=True))

    found = sqnr(classifier, [x for x, _ in labelled], score="kl")
    assert (found.unit, found.method) == ("loss", "sqnr")
    assert_rows(found.values, measured(classifier, score))


@pytest.mark.parametrize("average", ["samples", "sqnr"])
def test_noise_averaged_over_samples(
    classifier: fx.GraphModule, labelled: Labelled, average: str
) -> None:
    inputs = torch.cat([x for x, _ in labelled])

    def outputs(graph: fx.GraphModule) -> Tensor:
        found = graph(inputs)
        return torch.cat([found["logits"], found["hidden"]], dim=1).detach().double()

    exact = outputs(classifier)

    def score(graph: fx.GraphModule) -> float:
        ratios = (outputs(graph) - exact).square().sum(1) / exact.square().sum(1)
        if average == "samples":
            return float(ratios.mean())
        return 1 / float((1 / ratios.clamp(min=1e-12)).mean())

    found = sqnr(classifier, [x for x, _ in labelled], average=average)
    assert found.unit == ("score" if average == "sqnr" else "noise")
    assert_rows(found.values, measured(classifier, score))


def two_halves(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss that runs the model twice, on other inputs than the whole batch."""
    x, labels = batch
    half = len(x) // 2
    found = torch.cat([model(x[:half] * 2)["logits"], model(x[half:] * 2)["logits"]])
    return functional.cross_entropy(found.double(), labels)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0])["logits"].double(), batch[1])


@pytest.mark.parametrize("loss", [cross_entropy, two_halves])
def test_a_labelled_loss(
    classifier: fx.GraphModule, labelled: Labelled, loss: LossFunction
) -> None:
    whole = tuple(torch.cat(part) for part in zip(*labelled, strict=True))
    parts = labelled if loss is two_halves else [whole]
    samples = sum(len(x) for x, _ in parts)

    def score(graph: fx.GraphModule) -> float:
        return sum(float(loss(graph, batch)) * len(batch[0]) for batch in parts) / samples

    assert_rows(sqnr(classifier, labelled, score=loss).values, measured(classifier, score))


@pytest.mark.parametrize(
    ("metric", "sign"),
    [
        (MulticlassAccuracy(3, average="micro"), -1),
        # It sorts all scores of a class, so it is no mean over batches.
        (MulticlassAUROC(3), -1),
        (MulticlassHingeLoss(3), 1),
    ],
)
def test_metrics_are_computed_over_all_batches_at_once(
    classifier: fx.GraphModule, labelled: Labelled, metric: Metric, sign: int
) -> None:
    (inputs, labels), own = map(torch.cat, zip(*labelled, strict=True)), metric.clone()

    def score(graph: fx.GraphModule) -> float:
        own.reset()
        own.update(graph(inputs)["logits"].detach(), labels)
        return sign * float(own.compute())

    found = sqnr(classifier, labelled, score=metric)
    assert found.unit == "loss"
    # Metrics compute in single precision.
    assert_rows(found.values, measured(classifier, score), slack=1e-6)
    assert any(value != 0 for row in found.values.values() for value in row.values())
    assert metric.update_count == 0


class Decision(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)["logits"].argmax(-1)


def test_what_does_not_fit_is_an_error(
    calibrated: Calibrated, classifier: fx.GraphModule, labelled: Labelled
) -> None:
    inputs = [x for x, _ in labelled]
    decided = calibrated(trace(Decision().eval(), inputs[0]), inputs)
    with pytest.raises(FxmpqError, match="no floating-point output for the metric"):
        sqnr(decided, labelled, score=MulticlassAccuracy(3))
    with pytest.raises(FxmpqError, match="no average 'mean' of noise; there are ratio, samples"):
        sqnr(classifier, inputs, average="mean")
    with pytest.raises(FxmpqError, match="goes with score='noise' only"):
        sqnr(classifier, inputs, score="kl", average="samples")
    with pytest.raises(FxmpqError, match=r"a batch is a pair.*found a Tensor of length 16"):
        sqnr(classifier, inputs, score=MulticlassAccuracy(3))
    with pytest.raises(FxmpqError, match=r"computes \[3\]; a score is one number"):
        sqnr(classifier, labelled, score=MulticlassAccuracy(3, average=None))
    with pytest.raises(CalibrationError, match="unchanged model is nan"):
        sqnr(classifier, [x * torch.nan for x in inputs], score="kl")
    with pytest.raises(CalibrationError, match="is empty"):
        sqnr(classifier, [])


@pytest.mark.parametrize("score", ["noise", "kl", cross_entropy, MulticlassAUROC(3)])
@pytest.mark.parametrize("finished", [0, 1, 3])
def test_an_interrupted_run_goes_on_bit_for_bit(
    classifier: fx.GraphModule, labelled: Labelled, tmp_path: Path, score: Any, finished: int
) -> None:
    batches = [x for x, _ in labelled] if isinstance(score, str) else labelled
    path = tmp_path / "journal"
    sqnr(classifier, batches, score=score, work=Work(journal=Journal(path, {})))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 1 + finished]))
    resumed = sqnr(classifier, batches, score=score, work=Work(journal=Journal(path, {})))
    assert resumed.values == sqnr(classifier, batches, score=score).values
    assert path.read_text().splitlines(keepends=True) == lines


class Base(nn.Module):
    """A group whose name is that of a unit of work might be."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x).relu())


class Weighted(Metric):
    """Takes a mapping as its target."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, target: dict[str, Tensor]) -> None:
        self.total += (outputs * target["weights"]).sum()

    def compute(self) -> Tensor:
        return self.total


def test_a_metric_is_recorded_for_groups_of_any_name(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    """The unchanged model's value is no group's, and nested targets reach the metric."""
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    graph = calibrated(trace(Base(), x), [x], candidates=[Precision(2, 8), Precision(8, 8)])
    batches = [(x, {"weights": torch.randn(6, 3)})]
    expected = sqnr(graph, batches, score=Weighted())
    for _ in range(2):
        work = Work(journal=Journal(tmp_path / "journal", {}))
        assert sqnr(graph, batches, score=Weighted(), work=work).values == expected.values
    assert len(Journal(tmp_path / "journal", {}).done) == 3
