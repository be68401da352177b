from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.refinement.blocks import find_blocks
from fxmpq.refinement.fisher import fisher_weights


class Reshaped(nn.Module):
    """Returns one row of values a sample, in three dimensions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[:, None, :]


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def draws(samples: int, batches: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, 5, generator=generator) for _ in range(batches)]


def outputs_of(graph: fx.GraphModule) -> list[fx.Node]:
    return [block.output for block in find_blocks(graph)]


def test_expectation_over_labels_is_the_fisher_diagonal(plan_of: Callable[..., Any]) -> None:
    model, x = two_layers(), draws(1, 1)[0]
    subject = plan_of(model, [x])
    repeated = x.repeat(20_000, 1)
    nodes = outputs_of(subject.planned)
    found = fisher_weights(subject.planned, [repeated], nodes, weighting="labels")
    hidden = model[0](x).relu()
    chances = model[2](hidden).softmax(1)[0]
    spread = chances.diag() - chances[:, None] * chances
    wanted = {nodes[0]: model[2].weight, nodes[1]: torch.eye(3)}
    for node, jacobian in wanted.items():
        exact = (jacobian.T @ spread @ jacobian).diag().detach()
        mean = found[node][0][0]
        assert torch.allclose(mean, exact, rtol=0.06, atol=0.01 * float(exact.max()))


def test_expectation_over_signs_is_the_gauss_newton_diagonal(plan_of: Callable[..., Any]) -> None:
    model, x = two_layers(), draws(1, 1)[0]
    subject = plan_of(Reshaped(model), [x])
    nodes = outputs_of(subject.planned)
    repeated = x.repeat(4000, 1)
    found = fisher_weights(subject.planned, [repeated], nodes)
    exact = model[2].weight.square().sum(0)
    assert torch.allclose(found[nodes[0]][0][0], exact, rtol=0.1)
    assert torch.equal(found[nodes[-1]][0], torch.ones(1, 1, 3))


def test_gradients_are_of_the_float_model_with_one_sample_a_batch(subject: Any) -> None:
    nodes = outputs_of(subject.planned)
    found = fisher_weights(subject.planned, subject.batches, nodes)
    of_float = fisher_weights(subject.calibrated, subject.batches, outputs_of(subject.calibrated))
    for node, reference in zip(nodes, of_float.values(), strict=True):
        assert len(found[node]) == len(subject.batches)
        for ours, theirs in zip(found[node], reference, strict=True):
            assert torch.equal(ours, theirs)
            assert len(ours) == 1
            assert not ours.requires_grad
            assert (ours >= 0).all()
    assert any(weight.any() for weights in found.values() for weight in weights)


def test_seeds_decide(subject_of: Callable[[str], Any]) -> None:
    subject = subject_of("conv")
    nodes = outputs_of(subject.planned)
    first, again, other = (
        fisher_weights(subject.planned, subject.batches, nodes, seed=seed)[nodes[0]][0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Decides(nn.Module):
    """Returns classes, not chances."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).argmax(1)


def test_a_model_without_float_outputs_is_refused(plan_of: Callable[..., Any]) -> None:
    subject = plan_of(Decides(), draws(4, 1))
    with pytest.raises(FxmpqError, match="no floating-point tensor"):
        fisher_weights(subject.planned, subject.batches, outputs_of(subject.planned))


class Passes(nn.Module):
    """Returns, before what its inner model gives, what no layer has a part in."""

    def __init__(self, inner: nn.Module, *, is_last: bool) -> None:
        super().__init__()
        self.inner, self.is_last = inner, is_last

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.inner(x)
        return 2 * x, found.argmax(1) if self.is_last else found


def test_an_output_that_no_layer_has_a_part_in_is_passed_over(plan_of: Callable[..., Any]) -> None:
    inner, batches = two_layers(), draws(6, 2)
    plain, first = (
        plan_of(model, batches).planned for model in (inner, Passes(inner, is_last=False))
    )
    # The block behind the layers holds what is passed on alone.
    expected, found = (
        fisher_weights(graph, batches, outputs_of(graph)[:2]) for graph in (plain, first)
    )
    for wanted, weights in zip(expected.values(), found.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(wanted, weights, strict=True))
    last = plan_of(Passes(inner, is_last=True), batches).planned
    with pytest.raises(FxmpqError, match="depends on its layers.*weighting='none'"):
        fisher_weights(last, batches, outputs_of(last)[:1])


def test_an_unknown_weighting_is_refused(subject_of: Callable[[str], Any]) -> None:
    subject = subject_of("conv")
    with pytest.raises(FxmpqError, match="no weighting 'hessian'; there are"):
        fisher_weights(subject.planned, subject.batches, [], weighting="hessian")


def test_means_are_over_all_samples_of_one_shape(plan_of: Callable[..., Any]) -> None:
    model = two_layers()
    one, two, three = draws(6, 3)
    graph = plan_of(model, [one]).planned
    first = outputs_of(graph)[0]
    batches = [one, two[:2], three[:4]]
    found = fisher_weights(graph, batches, [first])[first]
    assert found[0] is found[1] is found[2]
    signs = torch.Generator().manual_seed(0)
    squares = []
    for batch in batches:
        drawn = torch.randint(2, (len(batch), 3), generator=signs) * 2.0 - 1
        squares.append((drawn @ model[2].weight.detach()).square())
    assert torch.allclose(found[0][0], torch.cat(squares).mean(0), rtol=1e-5)


def test_sequences_of_different_lengths_have_weights_of_their_own(
    subject_of: Callable[[str], Any],
) -> None:
    subject = subject_of("bert")
    graph = subject.planned
    nodes = outputs_of(graph)
    found = fisher_weights(graph, subject.batches, nodes)
    for node in nodes:
        for ours, batch in zip(found[node], subject.batches, strict=True):
            length = batch["input_ids"].shape[1]
            assert ours.dim() < 3 or ours.shape[1] == length
