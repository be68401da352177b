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
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import switch_group
from fxmpq.graph.trace import trace
from fxmpq.journal import Journal
from fxmpq.sensitivity.sqnr import sqnr
from fxmpq.training.loss import LossFunction
from fxmpq.work import Work

Calibrated = Callable[..., fx.GraphModule]


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
