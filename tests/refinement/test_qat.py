from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.errors import BatchError, FxmpqError
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.refinement.qat import qat
from fxmpq.refinement.units import Units
from fxmpq.training.distillation import divergence
from fxmpq.training.loss import classification_loss
from fxmpq.training.planned import float_copy

Planned = Callable[..., fx.GraphModule]
CLASSES = 4


@pytest.fixture(scope="module")
def labelled() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(CLASSES, 12, generator=generator)
    labels = torch.arange(256) % CLASSES
    inputs = pictures[labels] + torch.randn(256, 12, generator=generator)
    return list(zip(inputs.split(32), labels.split(32), strict=True))


@pytest.fixture(scope="module")
def unlabelled(labelled: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [inputs for inputs, _ in labelled]


@pytest.fixture(scope="module")
def planned(labelled: list[tuple[Tensor, Tensor]], unlabelled: list[Tensor]) -> fx.GraphModule:
    """A trained classifier at 2 bits, which costs it much."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, CLASSES)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        for batch in labelled:
            optimizer.zero_grad()
            classification_loss(model, batch).backward()
            optimizer.step()
    graph = fxmpq.prepare(trace(model.eval(), unlabelled[0]), "reference", candidates=["w2a8"])
    graph = fxmpq.calibrate(graph, unlabelled, progress=False)
    groups = require(graph, stage="calibrated").groups
    return with_choices(graph, {group.name: "w2a8" for group in groups})


def run(graph: fx.GraphModule, batches: Any, **options: Any) -> tuple[fx.GraphModule, list[Any]]:
    own = copy_graph(graph)
    units = options.pop("units", None) or Units()
    with torch.no_grad():
        return own, qat(own, batches, units=units, **options)


def mean_loss(graph: fx.GraphModule, labelled: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(classification_loss(graph, batch)) for batch in labelled) / len(labelled)


def mean_divergence(graph: fx.GraphModule, planned: fx.GraphModule, batches: list[Tensor]) -> float:
    """Of its logits from those of the float model."""
    teacher = float_copy(planned)
    with torch.no_grad():
        found = [float(divergence(teacher(batch), graph(batch))) for batch in batches]
    return sum(found) / len(found)


FAST: dict[str, Any] = {"epochs": 6, "learning_rate": 3e-3, "step_rate": 3e-3}


def test_labels_lower_the_loss_of_the_planned_graph(
    planned: fx.GraphModule, labelled: list[tuple[Tensor, Tensor]]
) -> None:
    before = mean_loss(planned, labelled)
    trained, found = run(planned, labelled, loss=classification_loss, distillation=0, **FAST)
    assert mean_loss(trained, labelled) < 0.7 * before
    assert mean_loss(planned, labelled) == before
    assert [(entry.method, entry.layer) for entry in found] == [("qat", "")]


def test_without_labels_the_outputs_come_nearer_to_the_float_ones(
    planned: fx.GraphModule, unlabelled: list[Tensor]
) -> None:
    trained, [found] = run(planned, unlabelled, distillation=1, **FAST)
    assert found.after < found.before
    assert mean_divergence(trained, planned, unlabelled) < 0.5 * mean_divergence(
        planned, planned, unlabelled
    )
    float_graph = float_copy(planned)
    for graph, expected in ((planned, found.before), (trained, found.after)):
        with torch.no_grad():
            pairs = [(graph(x).double(), float_graph(x).double()) for x in unlabelled[:8]]
        error = sum(float((q - y).square().sum()) for q, y in pairs)
        power = sum(float(y.square().sum()) for _, y in pairs)
        assert error / power == pytest.approx(expected, rel=1e-6)


def test_it_goes_on_from_an_earlier_refinement(
    planned: fx.GraphModule, unlabelled: list[Tensor]
) -> None:
    refined = fxmpq.refine(planned, None, unlabelled, method="gptq", progress=False)
    gentle = {"learning_rate": 1e-6, "step_rate": 1e-6}
    _, [plain] = run(planned, unlabelled, distillation=1, **gentle)
    _, [found] = run(refined, unlabelled, distillation=1, **gentle)
    assert found.before < 0.7 * plain.before
    assert found.after == pytest.approx(found.before, rel=0.05)


def test_a_loss_that_is_not_read_drives_the_model_all_the_same(
    planned: fx.GraphModule, labelled: list[tuple[Tensor, Tensor]], unlabelled: list[Tensor]
) -> None:
    """With distillation alone, labelled batches and their inputs train the same."""
    first, _ = run(planned, labelled, loss=classification_loss, distillation=1, **FAST)
    second, _ = run(planned, unlabelled, distillation=1, **FAST)
    assert torch.equal(first(unlabelled[0]), second(unlabelled[0]))


def test_mixing_lies_between(
    planned: fx.GraphModule, labelled: list[tuple[Tensor, Tensor]], unlabelled: list[Tensor]
) -> None:
    """The labels contradict the float model here."""
    contrary = [(inputs, (labels + 1) % CLASSES) for inputs, labels in labelled]
    found = []
    for share in (0, 0.5, 1):
        options = {"loss": classification_loss, "distillation": share}
        trained, _ = run(planned, contrary, **options, **FAST)
        found.append(mean_divergence(trained, planned, unlabelled))
    assert found[0] > found[1] > found[2]


def test_a_seed_gives_the_same_bits_and_another_others(
    planned: fx.GraphModule, unlabelled: list[Tensor]
) -> None:
    graphs = [run(planned, unlabelled, distillation=1, seed=seed)[0] for seed in (0, 0, 1)]
    outputs = [graph(unlabelled[0]) for graph in graphs]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_result_converts_to_what_it_computes(
    planned: fx.GraphModule, unlabelled: list[Tensor]
) -> None:
    trained, _ = run(planned, unlabelled, distillation=1)
    [found] = fxmpq.convert(trained).run(unlabelled[0])
    assert torch.equal(found, trained(unlabelled[0]))


def test_nothing_of_the_training_is_left_in_the_graph(
    planned: fx.GraphModule, unlabelled: list[Tensor]
) -> None:
    trained, _ = run(planned, unlabelled, distillation=1)
    names = [name for name, _ in trained.named_modules()]
    assert names == [name for name, _ in planned.named_modules()]
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert sum(isinstance(module, WeightQuantizer) for module in trained.modules()) == 3


def test_a_finished_training_is_not_done_again(
    planned: fx.GraphModule, unlabelled: list[Tensor], tmp_path: Path
) -> None:
    calls = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        return model(batch).square().mean()

    options = {"loss": loss, "distillation": 0.5}
    first, found = run(planned, unlabelled, units=Units(tmp_path, {"run": 1}), **options)
    assert calls
    calls.clear()
    second, again = run(planned, unlabelled, units=Units(tmp_path, {"run": 1}), **options)
    assert calls == []
    assert again == found
    for batch in unlabelled:
        assert torch.equal(first(batch), second(batch))


def test_an_interrupted_training_leaves_nothing_behind(
    planned: fx.GraphModule, unlabelled: list[Tensor]
) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise KeyboardInterrupt
        return model(batch).square().mean()

    graph = copy_graph(planned)
    before = graph(unlabelled[0])
    with pytest.raises(KeyboardInterrupt):
        qat(graph, unlabelled, units=Units(), loss=loss, distillation=0.0)
    assert torch.equal(graph(unlabelled[0]), before)
    assert [name for name, _ in graph.named_modules()] == [
        name for name, _ in planned.named_modules()
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no loss"),
        ({"distillation": 0.9}, "no loss"),
        ({"loss": classification_loss, "distillation": 2}, "number from 0"),
        ({"loss": "mse"}, "a loss is a callable"),
        ({"loss": classification_loss, "epochs": 0}, "epochs is 0"),
        ({"loss": classification_loss, "learning_rate": 0}, "learning_rate is 0"),
        ({"loss": classification_loss, "step_rate": -1}, "step_rate is -1"),
        ({"loss": classification_loss, "step_rate": True}, "step_rate is True"),
    ],
)
def test_unusable_options_are_refused(
    planned: fx.GraphModule,
    labelled: list[tuple[Tensor, Tensor]],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(FxmpqError, match=message):
        run(planned, labelled, **options)


def test_labelled_batches_without_a_loss_are_refused(
    planned: fx.GraphModule, labelled: list[tuple[Tensor, Tensor]]
) -> None:
    with pytest.raises(BatchError, match="the model was traced with"):
        run(planned, labelled, distillation=1)


def test_a_graph_without_a_plan_is_refused(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(FxmpqError, match="no plan to train"):
        run(calibrated(conv_graph, images), images, distillation=1)
