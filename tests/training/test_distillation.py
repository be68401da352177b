from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.graph.trace import trace
from fxmpq.training.distillation import Distillation, check_distillation, divergence

Planned = Callable[..., fx.GraphModule]


@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), rows=st.integers(1, 5))
def test_the_divergence_is_torchs_own(seed: int, classes: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    distributions = [torch.distributions.Categorical(logits=each) for each in (teacher, student)]
    expected = torch.distributions.kl_divergence(*distributions).mean()
    torch.testing.assert_close(divergence(teacher, student), expected, rtol=1e-4, atol=1e-5)
    assert float(divergence(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_its_gradient_is_the_difference_of_the_distributions() -> None:
    teacher, student = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    divergence(teacher, student).backward()
    expected = (student.softmax(-1) - teacher.softmax(-1)) / 4
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected.detach())


def test_all_positions_of_a_sequence_count_alike() -> None:
    teacher, student = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    expected = divergence(teacher.reshape(10, 3), student.reshape(10, 3))
    torch.testing.assert_close(divergence(teacher, student), expected)


def test_a_class_that_cannot_be_has_no_share() -> None:
    teacher = torch.tensor([[0.0, 1.0, -torch.inf]])
    student = torch.tensor([[0.5, 0.0, -torch.inf]], requires_grad=True)
    found = divergence(teacher, student)
    expected = divergence(teacher[:, :2], student.detach()[:, :2])
    assert float(found.detach()) == pytest.approx(float(expected))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_loss_is_mixed(share: float) -> None:
    x = torch.randn(6, 4)
    teacher, network = nn.Linear(4, 3), nn.Linear(4, 3)
    student = trace(network, x)
    distillation = Distillation(student, teacher, share)
    assert distillation.needs_task is (share < 1)
    with distillation.listening():
        outputs = student(x)
        task = nn.functional.cross_entropy(outputs, torch.arange(6) % 3)
        found = distillation.mixed(task if share < 1 else None)
    expected = (1 - share) * task + share * divergence(teacher(x), network(x))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_several_calls_in_a_step_count_alike() -> None:
    first, second = torch.randn(6, 4), torch.randn(2, 4)
    teacher, network = nn.Linear(4, 3), nn.Linear(4, 3)
    student = trace(network, first)
    distillation = Distillation(student, teacher, 1.0)
    with distillation.listening():
        student(first), student(second)
        found = distillation.mixed(None)
    parts = [divergence(teacher(x), network(x)) for x in (first, second)]
    torch.testing.assert_close(found, sum(parts) / 2)


def test_the_teacher_is_called_with_the_same_keywords(
    bert: nn.Module, bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    distillation = Distillation(bert_graph, bert, 1.0)
    with distillation.listening():
        bert_graph(**token_batches[1])
        assert float(distillation.mixed(None).detach()) == pytest.approx(0, abs=1e-5)


def test_its_hook_is_gone_whatever_happens() -> None:
    x = torch.randn(6, 4)
    student = trace(nn.Linear(4, 3), x)
    distillation = Distillation(student, nn.Linear(4, 3), 0.5)

    def fail() -> None:
        with distillation.listening():
            student(x)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not student._forward_hooks
    with (
        distillation.listening(),
        pytest.raises(FxmpqError, match="without running the model"),
    ):
        distillation.mixed(torch.tensor(0.0))


@pytest.mark.parametrize(
    "network", [nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 3), nn.Flatten(0))]
)
def test_what_has_no_classes_is_refused(network: nn.Module) -> None:
    x = torch.randn(6, 4)
    student = trace(network, x)
    with (
        Distillation(student, network, 0.5).listening(),
        pytest.raises(FxmpqError, match="two or more classes"),
    ):
        student(x)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(FxmpqError, match="number from 0"):
        check_distillation(share)
