from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import Refinement, copy_graph, require
from fxmpq.graph.trace import trace
from fxmpq.refinement.equalization import equalization, equalize
from fxmpq.refinement.outputs import model_outputs
from fxmpq.refinement.scalable_pairs import Pair, find_pairs
from fxmpq.refinement.units import Units
from fxmpq.targets.registry import get_target

Subject = Any


def run(
    graph: fx.GraphModule, batches: list, units: Units | None = None
) -> tuple[fx.GraphModule, list[Refinement]]:
    changed = copy_graph(graph)
    with torch.no_grad():
        return changed, equalization(changed, batches, units=units or Units())


def tensors_of(graph: fx.GraphModule, pairs: list[Pair]) -> dict[str, Tensor]:
    names = {n for p in pairs for n in (p.first.weight, p.second.weight, p.bias) if n}
    return {name: get_tensor(graph, name).detach() for name in sorted(names)}


def ranges(tensors: dict[str, Tensor], pair: Pair) -> tuple[Tensor, Tensor]:
    """Largest magnitude per channel in both weights, channel by channel."""
    first, second = tensors[pair.first.weight], tensors[pair.second.weight]
    channels = len(first)
    inputs = second.shape[1]
    found = []
    for channel in range(channels):
        if channels <= inputs:
            width = inputs // channels
            found.append(second[:, channel * width : (channel + 1) * width].abs().max())
        else:
            group = channel // inputs
            rows = second.chunk(channels // inputs)[group]
            found.append(rows[:, channel % inputs].abs().max())
    return first.abs().flatten(1).amax(1), torch.stack(found)


class Net(nn.Module):
    """Convolutions of random kinds with random things between, channels of very different size."""

    def __init__(self, kinds: list[str], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(2, 8, 3, padding=1)]
        made = {
            "full": lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False),
            "strided": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
            "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
            "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
            "multiplied": lambda: nn.Sequential(nn.Conv2d(8, 16, 1, groups=8), nn.Conv2d(16, 8, 1)),
        }
        for kind in kinds:
            layers += [nn.LeakyReLU(0.1) if kind == "strided" else nn.ReLU(), made[kind]()]
        self.body = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(32, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                sizes = torch.randn(len(parameter), generator=generator).exp()
                parameter.copy_(0.3 * noise * sizes.reshape(-1, *[1] * (parameter.dim() - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


KINDS = st.lists(
    st.sampled_from(["full", "strided", "grouped", "depthwise", "multiplied"]),
    min_size=1,
    max_size=3,
)


@settings(max_examples=5)
@given(kinds=KINDS, seed=st.integers(0, 1000))
def test_the_model_stays_and_ranges_become_equal(kinds: list[str], seed: int) -> None:
    x = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(seed))
    graph = insert_quantizers(trace(Net(kinds, seed).eval(), x), get_target("reference").rules)
    pairs = find_pairs(graph)
    assert len(pairs) == len(kinds) + kinds.count("multiplied") + 1
    before = tensors_of(graph, pairs)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    after = equalize(before, pairs)
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    for pair in pairs:
        first, second = ranges(after, pair)
        assert torch.allclose(first, second, rtol=1e-3)
    with torch.no_grad():
        wanted = graph(x).double()
        for name, tensor in after.items():
            get_tensor(graph, name).copy_(tensor)
        noise = (graph(x) - wanted).square().sum()
    assert 10 * math.log10(float(wanted.square().sum() / noise.clamp(min=1e-30))) > 100


def test_two_layers_meet_at_the_geometric_mean() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    graph = insert_quantizers(trace(model, torch.zeros(2, 2)), get_target("reference").rules)
    [pair] = find_pairs(graph)
    tensors = {
        pair.first.weight: torch.tensor([[4.0, -1.0], [0.5, 1.0]]),
        pair.second.weight: torch.tensor([[1.0, -9.0]]),
        str(pair.bias): torch.tensor([2.0, 3.0]),
    }
    found = equalize(tensors, [pair])
    # s = sqrt(4 / 1) = 2 and sqrt(1 / 9) = 1 / 3.
    assert torch.allclose(found[pair.first.weight], torch.tensor([[2.0, -0.5], [1.5, 3.0]]))
    assert torch.allclose(found[pair.second.weight], torch.tensor([[2.0, -3.0]]))
    assert torch.allclose(found[str(pair.bias)], torch.tensor([1.0, 9.0]))


def test_dead_channels_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    graph = insert_quantizers(trace(model, torch.zeros(2, 2)), get_target("reference").rules)
    [pair] = find_pairs(graph)
    tensors = {
        pair.first.weight: torch.tensor([[1.0, 2.0], [0.0, 0.0], [1e-12, 0.0]]),
        pair.second.weight: torch.tensor([[8.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
        str(pair.bias): torch.ones(3),
    }
    found = equalize(tensors, [pair])
    for name, tensor in tensors.items():
        kept = found[name].T[1:] if name == pair.second.weight else found[name][1:]
        wanted = tensor.T[1:] if name == pair.second.weight else tensor[1:]
        assert torch.equal(kept, wanted)
    assert float(found[str(pair.bias)][0]) == pytest.approx(2.0)


@pytest.fixture(scope="module")
def badly_scaled(plan_of: Callable) -> Subject:
    """A depthwise net whose channels differ by orders of magnitude, at 8 bits per tensor."""
    torch.manual_seed(0)
    batches = [torch.randn(n, 2, 9, 9) for n in (6, 3)]
    return plan_of(Net(["depthwise", "full"], 3), batches, ("w8ta8",))


def test_a_badly_scaled_net_is_helped(badly_scaled: Subject) -> None:
    changed, [entry] = run(badly_scaled.planned, badly_scaled.batches)
    assert (entry.method, entry.layer) == ("equalization", "")
    assert entry.after < 0.5 * entry.before
    noise = signal = 0.0
    with torch.no_grad():
        for batch in badly_scaled.batches:
            wanted = badly_scaled.calibrated(batch)
            noise += float((changed(batch) - wanted).square().sum())
            signal += float(wanted.square().sum())
            [unchanged] = model_outputs(changed, batch, quantized=False)
            assert torch.allclose(
                unchanged, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
            )
    assert entry.after == pytest.approx(noise / signal, rel=1e-2)
    choices = require(changed, stage="calibrated").choices
    assert choices == require(badly_scaled.planned, stage="calibrated").choices


def test_the_users_graph_keeps_its_weights(badly_scaled: Subject) -> None:
    before = {name: tensor.clone() for name, tensor in badly_scaled.planned.state_dict().items()}
    changed, _ = run(badly_scaled.planned, badly_scaled.batches)
    after = badly_scaled.planned.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    moved = [n for n, p in changed.named_parameters() if not torch.equal(p, before[n])]
    assert "body.0.weight" in moved
    assert all(parameter.requires_grad for parameter in changed.parameters())


def test_what_does_not_help_is_put_back(plan_of: Callable) -> None:
    # Rows of very different size cost nothing per channel; handed to the columns of the next
    # layer they share its scales.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 2, 16)[:, None])
        model[0].bias.zero_()
        model[2].weight.sign_()
    batches = [torch.randn(9, 8)]
    subject = plan_of(model, batches, ("w2",))
    changed, [entry] = run(subject.planned, batches)
    assert entry.after == entry.before
    for name, tensor in subject.planned.state_dict().items():
        assert torch.equal(changed.state_dict()[name], tensor)
    with torch.no_grad():
        assert torch.equal(changed(batches[0]), subject.planned(batches[0]))


def test_an_interrupted_run_goes_on_with_the_same_bits(
    badly_scaled: Subject, tmp_path: Path
) -> None:
    runs = [run(badly_scaled.planned, badly_scaled.batches, Units(tmp_path, {})) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    for batch in badly_scaled.batches:
        with torch.no_grad():
            assert torch.equal(runs[0][0](batch), runs[1][0](batch))


def test_a_graph_without_pairs_is_left_alone(plan_of: Callable) -> None:
    batches = [torch.randn(4, 3)]
    subject = plan_of(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), batches)
    assert run(subject.planned, batches)[1] == []
    assert (
        Precision.parse("w3a8") in require(subject.planned, stage="prepared").groups[0].candidates
    )
