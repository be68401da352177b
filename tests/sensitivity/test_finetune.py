from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.journal import Journal
from fxmpq.sensitivity.finetune import finetune, merge
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.training.fit import fit
from fxmpq.training.loss import StepLoss, classification_loss
from fxmpq.training.trainable import activate, begin_steps, trainable
from fxmpq.work import Work

Planned = Callable[..., fx.GraphModule]
Pair = tuple[Tensor, Tensor]
W2, W4, W8 = Precision(2, 8), Precision(4, 8), Precision(8, 8)


class Branches(nn.Module):
    """A classifier on one layer that matters and one whose output hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.faint, self.last = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.main(x)) + 1e-6 * self.faint(x.relu()))


@pytest.fixture(scope="module")
def batches() -> list[Pair]:
    """Two batches of different size."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(30, 6, generator=generator)
    labels = (points[:, 0] > 0).long() + (points[:, 1] + points[:, 2] > 0).long()
    return [(points[:20], labels[:20]), (points[20:], labels[20:])]


@pytest.fixture(scope="module")
def graph(calibrated: Planned, batches: list[Pair]) -> fx.GraphModule:
    torch.manual_seed(1)
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        torch.stack([classification_loss(model, batch) for batch in batches]).mean().backward()
        optimizer.step()
    inputs = [batch[0] for batch in batches]
    return calibrated(trace(model, inputs[0]), inputs, candidates=[W2, W4, W8])


def measured(graph: fx.GraphModule, batches: list[Pair], **options: object) -> Sensitivity:
    settings = {"loss": classification_loss, "learning_rate": 0.05, **options}
    return finetune(graph, batches, **settings)


@pytest.fixture(scope="module")
def whole(graph: fx.GraphModule, batches: list[Pair]) -> Sensitivity:
    return measured(graph, batches)


def never(model: nn.Module, batch: object) -> Tensor:
    pytest.fail("the loss was called")


def by_definition(graph: fx.GraphModule, batches: list[Pair], name: str, lower: Precision) -> float:
    """Train the baseline, the reference and one lowered network, each on a graph of its own."""
    losses = []
    for precision in (None, lower):
        copied = trainable(graph)
        state = require(copied, stage="calibrated")
        begin_steps(copied, state.groups, lambda c=copied: c(batches[0][0]))
        for group in state.groups:
            activate(copied, group, W8)
        options = {"loss": classification_loss, "epochs": 1, "learning_rate": 0.05}
        fit(copied, batches, seed=0, **options)
        if precision is not None:
            activate(copied, state.group(name), precision)
            begin_steps(copied, [state.group(name)], lambda c=copied: c(batches[0][0]))
        fit(copied, batches, seed=1, **options)
        with torch.no_grad():
            total = sum(len(b[1]) * float(classification_loss(copied, b)) for b in batches)
        losses.append(total / 30)
    return max(0.0, losses[1] - losses[0])


@pytest.mark.parametrize(("name", "lower"), [("main", W2), ("main", W4), ("last", W2)])
def test_a_value_is_the_loss_that_training_does_not_make_up_for(
    graph: fx.GraphModule, batches: list[Pair], whole: Sensitivity, name: str, lower: Precision
) -> None:
    assert whole.value(name, lower) == by_definition(graph, batches, name, lower)


def test_what_matters_has_values_and_the_rest_has_not(
    graph: fx.GraphModule, whole: Sensitivity
) -> None:
    state = require(graph, stage="calibrated")
    assert (whole.method, whole.unit) == ("finetune", "loss")
    assert whole.fingerprint == state.fingerprint
    assert list(whole.values) == ["main", "faint", "last"]
    assert all(row["w8a8"] == 0 for row in whole.values.values())
    assert whole.value("main", "w2a8") > 0.01
    assert whole.value("faint", "w2a8") < 1e-4


def test_groups_measured_apart_are_those_measured_together(
    graph: fx.GraphModule, batches: list[Pair], whole: Sensitivity
) -> None:
    parts = [measured(graph, batches, groups=names) for names in (["main", "faint"], ["last"])]
    assert list(parts[1].values) == ["last"]
    joined = merge(parts)
    assert joined.values == whole.values
    assert joined.entries == whole.entries
    assert (joined.method, joined.unit) == (whole.method, whole.unit)
    assert joined.fingerprint == whole.fingerprint


def test_a_seed_gives_the_same_bits(
    graph: fx.GraphModule, batches: list[Pair], whole: Sensitivity
) -> None:
    torch.manual_seed(9)
    assert measured(graph, batches).values == whole.values
    assert measured(graph, batches, seed=1).values != whole.values


def test_more_epochs_are_longer_trainings(graph: fx.GraphModule, batches: list[Pair]) -> None:
    calls = 0

    def counted(model: nn.Module, batch: Pair) -> Tensor:
        nonlocal calls
        calls += 1
        return classification_loss(model, batch)

    measured(graph, batches, loss=counted, epochs=3, groups=["last"])
    trainings, lowerings, evaluations = 4, 2, 3
    assert calls == len(batches) * (3 * trainings + evaluations) + 1 + lowerings


def test_an_interruption_loses_one_unit(
    graph: fx.GraphModule, batches: list[Pair], whole: Sensitivity, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    calls = 0

    def interrupted(model: nn.Module, batch: Pair) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 16:
            raise KeyboardInterrupt
        return classification_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        measured(graph, batches, loss=interrupted, work=Work(journal=Journal(path, {})))
    assert list(Journal(path, {}).done) == ["reference", "main w2a8"]
    resumed = measured(graph, batches, work=Work(journal=Journal(path, {})))
    assert resumed.values == whole.values
    finished = measured(graph, batches, loss=never, work=Work(journal=Journal(path, {})))
    assert finished.values == whole.values


def test_groups_without_a_choice_cost_nothing(calibrated: Planned, batches: list[Pair]) -> None:
    torch.manual_seed(1)
    inputs = [batch[0] for batch in batches]
    traced = trace(Branches(), inputs[0])
    graph = calibrated(traced, inputs, candidates=[W8], exclude=["last"])
    found = measured(graph, batches, loss=never)
    assert found.values == {"main": {"w8a8": 0}, "faint": {"w8a8": 0}, "last": {"fp32": 0}}


class Lit(nn.Module):
    """Stands in for a LightningModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])


def test_the_users_graph_and_loss_module_stay_as_they_were(
    graph: fx.GraphModule, batches: list[Pair], whole: Sensitivity
) -> None:
    module = Lit(Branches()).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    weights = {key: value.clone() for key, value in graph.state_dict().items()}
    versions = [value._version for value in graph.state_dict().values()]
    found = measured(graph, batches, loss=StepLoss(module), groups=["last"])
    assert found.values["last"] == whole.values["last"]
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(torch.equal(weights[key], value) for key, value in graph.state_dict().items())
    assert [value._version for value in graph.state_dict().values()] == versions
    assert module.model.training
    assert all(parameter.grad is None for parameter in [*module.parameters(), *graph.parameters()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ["mian"]}, "no group 'mian'; closest: 'main'"),
        ({"groups": []}, "groups is empty"),
        ({"groups": "main"}, "groups is 'main'; give a sequence of names: \\['main'\\]"),
        ({"groups": ["main", "last", "main"]}, "groups names 'main' twice"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"loss": None}, r"a loss is a callable loss\(model, batch\).*found NoneType"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    graph: fx.GraphModule, batches: list[Pair], options: dict[str, object], message: str
) -> None:
    with pytest.raises(FxmpqError, match=message):
        measured(graph, batches, **{"loss": never, **options})


def test_a_graph_that_is_not_calibrated_is_an_error(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        measured(conv_graph, [(images[0], torch.zeros(6).long())], loss=never)


A, B = {"a": {"w8a8": 0.5}}, {"b": {"w8a8": 0.25}}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "nothing to merge"),
        ([Sensitivity(A), Sensitivity(A)], "group 'a' is in two of the parts"),
        ([Sensitivity(A), Sensitivity(B, method="sqnr")], "differ in method: 'given' and 'sqnr'"),
        ([Sensitivity(A), Sensitivity(B, unit="loss")], "differ in unit: 'noise' and 'loss'"),
        (
            [Sensitivity(A, fingerprint="1"), Sensitivity(B, fingerprint="2")],
            "differ in fingerprint: '1' and '2'",
        ),
        (
            [Sensitivity(A), Sensitivity(B, projections=np.ones((1, 1)))],
            "interactions cannot be merged",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    parts: list[Sensitivity], message: str
) -> None:
    with pytest.raises(FxmpqError, match=message):
        merge(parts)


def test_every_training_moves_the_progress_bar(graph: fx.GraphModule, batches: list[Pair]) -> None:
    """The reference's too, which takes as long as any two others."""
    work, seen = Work(), []
    original = work.track

    def track(items: Sequence[object], description: str, *, total: int | None = None) -> object:
        seen.append(len(items))
        return original(items, description, total=total)

    work.track = track  # type: ignore[method-assign, assignment]
    measured(graph, batches, groups=["last"], work=work)
    assert seen == [3]
