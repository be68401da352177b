from __future__ import annotations

import logging
import math
import signal
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.state import require
from fxmpq.training.fit import fit
from fxmpq.training.loss import classification_loss
from fxmpq.training.trainable import activate, learned_quantizers, trainable

from .conftest import Pair, lowered, trained


def total_loss(graph: fx.GraphModule, batches: list[Pair]) -> float:
    with torch.no_grad():
        return sum(float(classification_loss(graph, batch)) for batch in batches)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_training_a_quantized_graph_lowers_its_loss(
    graph: fx.GraphModule, batches: list[Pair]
) -> None:
    copied = lowered(graph)
    before = total_loss(copied, batches)
    steps = [float(p.detach()) for q in learned_quantizers(copied).values() for p in q.parameters()]
    fit(copied, batches, loss=classification_loss, epochs=15, learning_rate=0.1)
    assert total_loss(copied, batches) < 0.6 * before
    after = [float(p.detach()) for q in learned_quantizers(copied).values() for p in q.parameters()]
    assert all(one != other for one, other in zip(steps, after, strict=True))


def test_the_steps_are_those_of_a_plain_loop(graph: fx.GraphModule, batches: list[Pair]) -> None:
    def steep(model: nn.Module, batch: Pair) -> Tensor:
        return 30 * classification_loss(model, batch)

    found = trained(graph, batches[:1], loss=steep, epochs=4, learning_rate=0.02)
    copied = lowered(graph)
    optimizer = torch.optim.SGD(
        copied.parameters(), lr=0.02, momentum=0.9, weight_decay=2.5e-5, foreach=False
    )
    clipped = 0
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 + math.cos(math.pi * epoch / 4)) / 2
        optimizer.zero_grad()
        steep(copied, batches[0]).backward()
        for parameter in copied.parameters():
            clipped += int((parameter.grad.abs() > 1).sum())
            parameter.grad.clamp_(-1, 1)
        optimizer.step()
        for quantizer in learned_quantizers(copied).values():
            quantizer.clamp_steps()
    assert clipped > 0
    for one, other in zip(found, copied.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_adam_takes_the_steps_with_a_learning_rate_of_their_own(
    graph: fx.GraphModule, batches: list[Pair]
) -> None:
    options = {"learning_rate": 1e-3, "step_rate": 1e-2, "adaptive": True, "weight_decay": 0.0}
    found = trained(graph, batches[:1], loss=classification_loss, epochs=1, **options)
    copied = lowered(graph)
    classification_loss(copied, batches[0]).backward()
    steps = {id(p) for q in learned_quantizers(copied).values() for p in q.parameters()}
    for one, begun in zip(found, copied.parameters(), strict=True):
        # The first step of Adam is of the learning rate's size, against the gradient's sign.
        rate = 1e-2 if id(begun) in steps else 1e-3
        moved = begun.grad.abs() > 1e-4
        expected = begun.detach() - rate * begun.grad.sign()
        if not (id(begun) in steps and float(expected.detach().min()) <= 1e-5):
            assert torch.allclose(one[moved], expected[moved], rtol=1e-3, atol=1e-6)
        assert torch.equal(one[begun.grad == 0], begun.detach()[begun.grad == 0])


def test_the_gradients_of_all_passes_add_up(graph: fx.GraphModule, batches: list[Pair]) -> None:
    copied = trainable(graph)
    group = require(copied, stage="calibrated").groups[0]
    reached: list[object] = []

    def passes() -> Iterator[None]:
        for precision in (Precision(3, 4), Precision()):
            activate(copied, group, precision)
            yield

    def small(model: nn.Module, batch: Pair) -> Tensor:
        reached.append(next(iter(learned_quantizers(copied).values())).active)
        return 0.01 * classification_loss(model, batch)

    start = [parameter.detach().clone() for parameter in copied.parameters()]
    options = {"loss": small, "learning_rate": 0.5, "weight_decay": 0.0}
    fit(copied, batches[:1], epochs=1, passes=passes, **options)
    assert reached == [Precision(3, 4).activation, None]
    by_hand = trainable(graph)
    for precision in (Precision(3, 4), Precision()):
        activate(by_hand, require(by_hand, stage="calibrated").groups[0], precision)
        (0.01 * classification_loss(by_hand, batches[0])).backward()
    moved = 0
    for first, now, other in zip(start, copied.parameters(), by_hand.parameters(), strict=True):
        expected = first if other.grad is None else first - 0.5 * other.grad
        assert torch.allclose(now, expected, rtol=1e-5, atol=1e-8)
        moved += not torch.equal(now, first)
    assert moved > 4


def test_a_parameter_whose_gradient_is_zero_does_not_decay(
    graph: fx.GraphModule, batches: list[Pair]
) -> None:
    def last_layer(model: nn.Module, batch: Pair) -> Tensor:
        weights = dict(model.named_parameters())
        return model(batch[0]).mean() * 0 + 0.01 * weights["2.weight"].sum()

    copied = trainable(graph)
    before = {name: parameter.detach().clone() for name, parameter in copied.named_parameters()}
    fit(copied, batches, loss=last_layer, epochs=1, learning_rate=0.1, weight_decay=0.5)
    moved = {n for n, p in copied.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {"2.weight"}
    options = {"epochs": 1, "learning_rate": 0.1, "weight_decay": 0.5}
    before = {name: parameter.detach().clone() for name, parameter in copied.named_parameters()}
    fit(copied, batches, loss=lambda model, batch: 0 * last_layer(model, batch), **options)
    assert all(torch.equal(before[name], p) for name, p in copied.named_parameters())


def test_a_seed_gives_the_same_bits(graph: fx.GraphModule, batches: list[Pair]) -> None:
    first = trained(graph, batches, seed=3)
    torch.manual_seed(99)
    assert equal(first, trained(graph, batches, seed=3))
    assert not equal(first, trained(graph, batches, seed=4))


def test_every_epoch_sees_every_batch_in_an_order_of_its_own(
    graph: fx.GraphModule, batches: list[Pair]
) -> None:
    seen: list[int] = []

    def watching(model: nn.Module, batch: Pair) -> Tensor:
        seen.append(next(i for i, b in enumerate(batches) if torch.equal(b[0], batch[0])))
        return classification_loss(model, batch)

    trained(graph, batches, loss=watching, epochs=4)
    epochs = [tuple(seen[i : i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 1


def test_random_numbers_of_the_loss_are_seeded_and_the_global_state_is_put_back(
    graph: fx.GraphModule, batches: list[Pair]
) -> None:
    def noisy(model: nn.Module, batch: Pair) -> Tensor:
        points, labels = batch
        return classification_loss(model, (points + torch.randn(points.shape), labels))

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = trained(graph, batches, loss=noisy)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert equal(first, trained(graph, batches, loss=noisy))


def test_nothing_is_left_behind(
    graph: fx.GraphModule,
    batches: list[Pair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("lightning.pytorch").level
    copied = lowered(graph)
    fit(copied, batches, loss=classification_loss, epochs=1, learning_rate=0.1, shown=True)
    assert all(parameter.grad is None for parameter in copied.parameters())
    assert not any(module.training for module in copied.modules())
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")  # standard error is no terminal
    assert logging.getLogger("lightning.pytorch").level == level


def test_a_progress_bar_is_shown_on_a_terminal(
    graph: fx.GraphModule,
    batches: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    trained(graph, batches, epochs=1, shown=True)
    assert "Epoch 0" in "".join(capsys.readouterr())
    trained(graph, batches, epochs=1)
    assert "Epoch 0" not in "".join(capsys.readouterr())


def test_it_trains_inside_inference_mode(graph: fx.GraphModule, batches: list[Pair]) -> None:
    expected = trained(graph, batches)
    with torch.inference_mode():
        assert equal(expected, trained(graph, batches))


def test_an_interruption_is_one_and_can_be_repeated(
    graph: fx.GraphModule, batches: list[Pair]
) -> None:
    def interrupted(model: nn.Module, batch: Pair) -> Tensor:
        # As Ctrl-C does; a real signal would also reach what runs the tests.
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trained(graph, batches, loss=interrupted)
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_exit_stays_an_exit(graph: fx.GraphModule, batches: list[Pair]) -> None:
    def leaving(model: nn.Module, batch: Pair) -> Tensor:
        raise SystemExit(3)

    with pytest.raises(SystemExit, match="3"):
        trained(graph, batches, loss=leaving)


class Movable(UserDict[str, Tensor]):
    """As tokenizers return: moves itself in place."""

    def to(self, _device: object) -> Movable:
        pytest.fail("the user's batch was moved")


def test_a_users_batch_is_not_moved(graph: fx.GraphModule, batches: list[Pair]) -> None:
    def loss(model: nn.Module, batch: Movable) -> Tensor:
        return classification_loss(model, (batch["x"], batch["y"]))

    mappings = [Movable(x=x, y=y) for x, y in batches]
    assert equal(trained(graph, mappings, loss=loss), trained(graph, batches))
