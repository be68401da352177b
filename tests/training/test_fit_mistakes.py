from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.training.fit import finite_loss
from fxmpq.training.loss import classification_loss

from .conftest import Pair, lowered, trained


def never(model: nn.Module, batch: object) -> Tensor:
    pytest.fail("the loss was called")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": None}, r"a loss is a callable loss\(model, batch\).*found NoneType"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3'; .* and a number"),
        ({"epochs": 0}, "epochs is 0; it must be a whole number, at least 1"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"epochs": True}, "epochs is True"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be positive"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    graph: fx.GraphModule, batches: list[Pair], options: dict[str, object], message: str
) -> None:
    with pytest.raises(FxmpqError, match=message):
        trained(graph, batches, **{"loss": never, **options})


def test_no_batches_are_refused(graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="nothing to train on"):
        trained(graph, [])


def test_a_loss_that_is_no_finite_scalar_is_an_error(
    graph: fx.GraphModule, batches: list[Pair]
) -> None:
    with pytest.raises(FxmpqError, match=r"scalar tensor.*found a tensor of \[12, 3\]"):
        trained(graph, batches, loss=lambda model, batch: model(batch[0]))
    with pytest.raises(FxmpqError, match="found 0.5"):
        trained(graph, batches, loss=lambda model, batch: 0.5)
    with pytest.raises(FxmpqError, match="became nan; lower learning_rate"):
        trained(graph, batches, loss=lambda model, batch: model(batch[0]).mean() * math.nan)
    copied = lowered(graph)
    assert finite_loss(lambda *_: torch.ones(1, 1), copied, batches[0]).shape == ()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, FxmpqError])
def test_random_numbers_are_put_back_when_a_training_fails(
    graph: fx.GraphModule, batches: list[Pair], failure: type[BaseException]
) -> None:
    def failing(model: nn.Module, batch: Pair) -> Tensor:
        torch.rand(3)
        raise failure("stop")

    torch.manual_seed(7)
    before = torch.get_rng_state()
    with pytest.raises(failure):
        trained(graph, batches, loss=failing)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_without_a_gradient_is_an_error(graph: fx.GraphModule, batches: list[Pair]) -> None:
    def detached(model: nn.Module, batch: Pair) -> Tensor:
        return classification_loss(model, batch).detach()

    with pytest.raises(FxmpqError, match="no gradient .* neither .item"):
        trained(graph, batches, loss=detached)
