from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.graph.trace import trace
from fxmpq.sensitivity.scores import (
    AVERAGES,
    SCORES,
    LossScorer,
    OutputScorer,
    StartedOnce,
    divergence,
    find_score,
    logits,
    noise,
    power,
    rows,
    sample_count,
    sample_noise,
    sample_sqnr,
    scorer,
    unit_of,
)
from fxmpq.sensitivity.sweep import Sweep, measuring
from fxmpq.training.loss import StepLoss, classification_loss

seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(shape, generator=generator) * 3
    return reference, reference + torch.randn(shape, generator=generator)


@given(seeds, st.integers(2, 7))
def test_divergence_is_torchs(seed: int, classes: int) -> None:
    reference, found = drawn(seed, 4, 3, classes)
    expected = functional.kl_div(
        found.double().log_softmax(-1),
        reference.double().log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    assert divergence(reference, found) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)
    assert divergence(reference, reference) == 0.0
    assert divergence(reference, found) >= 0
    # A constant added to all logits of a row changes no probability.
    assert divergence(reference, reference + 2.5) == pytest.approx(0, abs=1e-9)
    assert rows(reference) == 12


def test_a_class_at_minus_infinity_has_no_share() -> None:
    reference, found = drawn(0, 4, 3)
    masked = functional.pad(reference, (0, 1), value=-torch.inf)
    expected = divergence(reference, found)
    found = functional.pad(found, (0, 1), value=-torch.inf)
    assert divergence(masked, found) == pytest.approx(expected)


@given(seeds)
def test_noise_and_its_averages(seed: int) -> None:
    reference, found = drawn(seed, 5, 4)
    error = (found - reference).double()
    assert noise(reference, found) == pytest.approx(float((error**2).sum()))
    assert power(reference) == pytest.approx(float((reference.double() ** 2).sum()))
    ratios = (error**2).sum(1) / (reference.double() ** 2).sum(1)
    assert sample_count(reference) == 5
    assert sample_noise(reference, found) == pytest.approx(float(ratios.sum()))
    assert sample_sqnr(reference, found) == pytest.approx(float((1 / ratios).sum()))
    assert sample_sqnr(reference, reference) == pytest.approx(5e12)
    # The harmonic mean is below the arithmetic one.
    mean = AVERAGES["sqnr"].finish(sample_sqnr(reference, found) / 5)
    assert mean <= sample_noise(reference, found) / 5 * (1 + 1e-9)


def test_bad_signals_are_errors() -> None:
    reference = torch.ones(3, 2)
    with pytest.raises(CalibrationError, match="hold NaN or infinite"):
        power(reference * torch.inf)
    assert power(reference * 0) == 0
    reference[1] = 0
    with pytest.raises(CalibrationError, match="sample 1 of a batch"):
        sample_count(reference)


def test_logits_are_the_first_floating_output() -> None:
    first, second = torch.zeros(2, 3), torch.ones(2, 5)
    assert logits([torch.tensor([1, 2]), first, second], 2) is first
    for outputs in ([], [torch.tensor([1, 2])], [torch.zeros(4, 1)], [torch.tensor(1.0)]):
        with pytest.raises(FxmpqError, match="two or more classes"):
            logits(outputs, 4)


def test_scores_by_name_metric_and_callable() -> None:
    for name, score in SCORES.items():
        assert find_score(name) is score
        assert unit_of(score) == {"noise": "noise", "kl": "loss"}[name]
    metric = MulticlassAccuracy(3)
    assert find_score(metric) is metric
    assert find_score(classification_loss) is classification_loss
    assert unit_of(metric) == unit_of(classification_loss) == "loss"


class Undecided(Metric):
    def update(self) -> None: ...

    def compute(self) -> None: ...


def test_what_is_no_score_is_an_error() -> None:
    with pytest.raises(FxmpqError, match="no score 'klx'; there are 'kl'"):
        find_score("klx")
    with pytest.raises(FxmpqError, match="Undecided does not say whether higher is better"):
        find_score(Undecided())
    for wrong in (nn.CrossEntropyLoss(), 3, None):
        with pytest.raises(FxmpqError, match=f"{type(wrong).__name__} is no score; give one of"):
            find_score(wrong)


@pytest.fixture(scope="module")
def graph(calibrated: Callable[..., fx.GraphModule]) -> fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    batch = torch.randn(6, 4)
    return calibrated(trace(model, batch), [batch])


def labelled() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 4, generator=generator)
    return x, torch.randint(0, 3, (5,), generator=generator)


def test_an_output_is_compared_with_float_whatever_the_base(graph: fx.GraphModule) -> None:
    x, _ = labelled()
    with measuring():
        sweep = Sweep(graph, {"0": "w4a8", "2": "w4a8"})
        exact = graph(x)
        found = scorer(SCORES["kl"], sweep)
        assert isinstance(found, OutputScorer)
        base = found.start(x)
        changed = sweep.whole([x], {"0": "w2a8"})[0]
        assert base == [divergence(exact, sweep.whole([x], {})[0]), 5.0]
        assert base[0] > 0
        assert found.part({"0": "w2a8"}) == divergence(exact, changed)


def test_a_loss_is_weighted_by_samples(graph: fx.GraphModule) -> None:
    batch = labelled()
    with measuring():
        sweep = Sweep(graph)
        found = scorer(classification_loss, sweep)
        assert isinstance(found, LossScorer)
        expected = functional.cross_entropy(graph(batch[0]), batch[1])
        assert found.start(batch) == pytest.approx([float(expected) * 5, 5])
        changed = sweep.whole([batch[0]], {"2": "w2a8"})[0]
        expected = functional.cross_entropy(changed, batch[1])
        assert found.part({"2": "w2a8"}) == pytest.approx(float(expected) * 5)


def test_a_loss_is_swept_and_not_run_whole(graph: fx.GraphModule) -> None:
    ran: list[str] = []

    class Counted(Sweep):
        def run_node(self, n: fx.Node) -> object:
            ran.append(n.name)
            return super().run_node(n)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        # Equal inputs, though not the same tensor.
        return functional.cross_entropy(model(batch[0] * 2), batch[1])

    with measuring():
        found = LossScorer(loss, Counted(graph))
        found.start(labelled())
        assert len(ran) == len(graph.graph.nodes)
        ran.clear()
        found.part({"2": "w2a8"})
    assert "linear_1" in ran
    assert "linear" not in ran


def test_the_loss_of_a_lightning_step_is_swept_too(graph: fx.GraphModule) -> None:
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(4, 3)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> dict[str, Tensor]:
            return {"loss": functional.cross_entropy(self.model(batch[0]), batch[1])}

    batch, training = labelled(), Training()
    with measuring():
        step, plain = (
            LossScorer(loss, Sweep(graph)) for loss in (StepLoss(training), classification_loss)
        )
        assert step.start(batch) == plain.start(batch)
        assert step.part({"0": "w2a8"}) == plain.part({"0": "w2a8"})
    assert isinstance(training.model, nn.Linear)


def test_losses_that_do_not_fit_are_errors(graph: fx.GraphModule) -> None:
    batch = labelled()
    with measuring():
        for value, shape in ((torch.zeros(5), r"a tensor of \[5\]"), (0.5, "0.5")):

            def wrong(model: nn.Module, batch: object, value: object = value) -> object:
                model(batch[0])
                return value

            with pytest.raises(FxmpqError, match=f"must return a scalar.*found {shape}"):
                LossScorer(wrong, Sweep(graph)).start(batch)
        with pytest.raises(FxmpqError, match="without running the model"):
            LossScorer(lambda model, batch: torch.tensor(1.0), Sweep(graph)).start(batch)


def test_a_base_runs_once_and_only_if_asked_for() -> None:
    class Stub:
        starts = 0

        def start(self, batch: object) -> list[float]:
            self.starts += 1
            return [0.5, float(batch)]

        def part(self, changes: object) -> float:
            return float(len(changes))

    stub = Stub()
    started = StartedOnce(stub, 4)
    assert stub.starts == 0
    assert started.parts([{}, {"a": "w2a8"}]) == [0.0, 1.0]
    assert started.base() == [0.5, 4.0]
    assert stub.starts == 1
