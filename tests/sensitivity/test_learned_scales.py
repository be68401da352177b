from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.journal import Journal
from fxmpq.quantizers.learned import weight_step
from fxmpq.sensitivity.indicators import indicator_scores
from fxmpq.sensitivity.learned_scales import _joint_passes, learned_scales
from fxmpq.training.fit import fit
from fxmpq.training.loss import StepLoss, classification_loss
from fxmpq.training.trainable import begin_steps, learned_quantizers, trainable
from fxmpq.work import Work

Planned = Callable[..., fx.GraphModule]
Pair = tuple[Tensor, Tensor]

W, A = NumberFormat, lambda bits: NumberFormat(bits, Scheme.AFFINE)


class Small(nn.Module):
    """A layer that nobody else reads, a GELU, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.first(x)))


@pytest.fixture(scope="module")
def batches() -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(24, 4, generator=generator)
    labels = (points[:, 0] > 0).long() + (points[:, 1] > 0).long()
    return [(points[i : i + 8], labels[i : i + 8]) for i in range(0, 24, 8)]


@pytest.fixture(scope="module")
def graph(calibrated: Planned, batches: list[Pair]) -> fx.GraphModule:
    torch.manual_seed(1)
    inputs = [batch[0] for batch in batches]
    names = ("w2a4", "w2a8", "w4a4", "w4a8", "w8a8")
    candidates = [Precision.parse(name) for name in names]
    return calibrated(trace(Small(), inputs[0]), inputs, candidates=candidates)


def scores(graph: fx.GraphModule, batches: list[Pair], **options: object) -> dict:
    return learned_scales(graph, batches, **{"loss": classification_loss, **options}).values


def never(model: nn.Module, batch: object) -> Tensor:
    pytest.fail("the loss was called")


def test_every_pass_is_uniform_but_the_last(graph: fx.GraphModule) -> None:
    copied = trainable(graph)
    groups = require(graph, stage="calibrated").groups
    generator = torch.Generator().manual_seed(0)
    drawn = set()
    for _ in range(12):
        passes = []
        for _ in _joint_passes(copied, groups, generator):
            active = {name: q.active for name, q in learned_quantizers(copied).items()}
            passes.append({name: entry.bits for name, entry in active.items() if entry})
        weights = {name for name in passes[0] if "weight" in name}
        for bits, found in zip((8, 4, 2), passes, strict=False):
            assert {found[name] for name in weights} == {bits}
            # Activations have no 2 bits: they take their next wider width.
            assert {found[name] for name in set(found) - weights} == {max(bits, 4)}
        assert len(passes) == 4
        drawn.add(tuple(passes[3][name] for name in sorted(weights)))
        assert all(q.active is None for q in learned_quantizers(copied).values())
    assert len(drawn) > 3


def test_tensors_take_their_widest_where_nothing_is_wide_enough(
    calibrated: Planned, batches: list[Pair]
) -> None:
    torch.manual_seed(1)
    inputs = [batch[0] for batch in batches]
    candidates = [Precision(4, 4), Precision(8, 8)]
    keep = {"first": Precision(4, 4)}
    traced = trace(Small(), inputs[0])
    copied = trainable(calibrated(traced, inputs, candidates=candidates, keep=keep))
    groups = require(copied, stage="calibrated").groups
    first = next(q for name, q in learned_quantizers(copied).items() if "first" in name)
    seen = [first.active for _ in _joint_passes(copied, groups, torch.Generator())]
    assert seen == [W(4)] * 3


def test_a_training_that_goes_nowhere_scores_the_first_steps(
    graph: fx.GraphModule, batches: list[Pair]
) -> None:
    options = {"epochs": 1, "learning_rate": 1e-20, "alpha": 3.0}
    found = scores(graph, batches, **options)
    relative = scores(graph, batches, relative=True, **options)
    weight = get_tensor(graph, "first.weight").detach()
    x = batches[0][0]
    for bits, activation_bits in ((2, 4), (4, 8), (8, 8)):
        copied = trainable(graph)
        entry = A(activation_bits)
        quantizer = next(q for q in learned_quantizers(copied).values() if q.name.startswith("x "))
        low, high = quantizer.levels[entry]
        a = 2 * float(x.abs().mean()) / math.sqrt(max(high, -low - 1))
        w = weight_step(weight, W(bits))
        name = f"w{bits}a{activation_bits}"
        assert found["first"][name] == pytest.approx(a + 3 * w, rel=1e-4)
        expected = a**2 / float(x.square().mean()) + 3 * w**2 / float(weight.square().mean())
        assert relative["first"][name] == pytest.approx(expected, rel=1e-4)


def test_scores_are_the_steps_of_a_joint_training(
    graph: fx.GraphModule, batches: list[Pair]
) -> None:
    found = scores(graph, batches, epochs=2, learning_rate=0.02, seed=7)
    copied = trainable(graph)
    groups = require(copied, stage="calibrated").groups
    begin_steps(copied, groups, lambda: copied(batches[0][0]))
    first = {name: p.detach().clone() for name, p in copied.named_parameters()}
    generator = torch.Generator().manual_seed(7)
    fit(
        copied,
        batches,
        loss=classification_loss,
        epochs=2,
        learning_rate=0.02,
        passes=lambda: _joint_passes(copied, groups, generator),
        seed=7,
    )
    assert all(not torch.equal(first[name], p) for name, p in copied.named_parameters())
    steps = {
        name: {entry: float(q.step(entry).detach()) for entry in q.formats}
        for name, q in learned_quantizers(copied).items()
    }
    assert found == indicator_scores(groups, steps, alpha=2.0, guard="monotone")


def test_a_seed_gives_the_same_bits(graph: fx.GraphModule, batches: list[Pair]) -> None:
    first = scores(graph, batches, seed=1)
    torch.manual_seed(9)
    assert scores(graph, batches, seed=1) == first
    assert scores(graph, batches, seed=2) != first


def test_what_it_returns(graph: fx.GraphModule, batches: list[Pair]) -> None:
    found = learned_scales(graph, batches, loss=classification_loss, epochs=1)
    state = require(graph, stage="calibrated")
    assert (found.method, found.unit) == ("learned_scales", "score")
    assert found.fingerprint == state.fingerprint
    assert found.projections is None
    expected = {g.name: [str(c) for c in g.candidates] for g in state.groups}
    assert {name: list(row) for name, row in found.values.items()} == expected


def test_excluded_layers_and_float_activations(calibrated: Planned, batches: list[Pair]) -> None:
    torch.manual_seed(1)
    inputs = [batch[0] for batch in batches]
    candidates = [Precision(2), Precision(4)]
    traced = trace(Small(), inputs[0])
    graph = calibrated(traced, inputs, candidates=candidates, exclude=["last"])
    found = scores(graph, batches, epochs=1)
    assert found["last"] == {"fp32": 0.0}
    assert found["first"]["w2"] > found["first"]["w4"] > 0


def test_a_tensor_of_zeros_counts_nothing_when_steps_are_relative(
    calibrated: Planned, batches: list[Pair]
) -> None:
    model = Small()
    nn.init.zeros_(model.first.weight)
    nn.init.zeros_(model.first.bias)
    inputs = [batch[0] for batch in batches]
    graph = calibrated(trace(model, inputs[0]), inputs, candidates=[Precision(4, 8)])
    found = scores(graph, batches, epochs=1, relative=True, learning_rate=1e-30)
    assert all(math.isfinite(row["w4a8"]) for row in found.values())


def test_an_interrupted_training_starts_again_and_a_finished_one_is_kept(
    graph: fx.GraphModule, batches: list[Pair], tmp_path: Path
) -> None:
    calls = 0

    def interrupted(model: nn.Module, batch: Pair) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return classification_loss(model, batch)

    expected = scores(graph, batches)
    path = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        scores(graph, batches, loss=interrupted, work=Work(journal=Journal(path, {})))
    resumed = scores(graph, batches, work=Work(journal=Journal(path, {})))
    assert resumed == expected
    assert scores(graph, batches, loss=never, work=Work(journal=Journal(path, {}))) == expected


class Lit(nn.Module):
    """Stands in for a LightningModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])


def test_the_users_graph_and_loss_module_stay_as_they_were(
    graph: fx.GraphModule, batches: list[Pair]
) -> None:
    module = Lit(Small()).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    weights = {key: value.clone() for key, value in graph.state_dict().items()}
    names = [type(child).__name__ for child in graph.modules()]
    found = scores(graph, batches, loss=StepLoss(module))
    assert found == scores(graph, batches)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(torch.equal(weights[key], value) for key, value in graph.state_dict().items())
    assert [type(child).__name__ for child in graph.modules()] == names
    assert module.training
    assert module.model.training
    assert all(parameter.grad is None for parameter in [*module.parameters(), *graph.parameters()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha is -1.0; it must be finite and not negative"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"guard": "none"}, "no guard 'none'; there are 'monotone', 'forbid'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": -0.1}, "learning_rate is -0.1"),
        ({"loss": "cross_entropy"}, r"a loss is a callable loss\(model, batch\).*found str"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    graph: fx.GraphModule, batches: list[Pair], options: dict[str, object], message: str
) -> None:
    with pytest.raises(FxmpqError, match=message):
        scores(graph, batches, **{"loss": never, **options})


def test_a_graph_that_is_not_calibrated_is_an_error(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        scores(conv_graph, [(images[0], torch.zeros(6).long())], loss=never)


def test_a_residual_network_scores_fewer_bits_higher(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, candidates=[Precision(2, 8), Precision(8, 8)])
    found = scores(graph, [(images[0], torch.arange(6) % 5)], epochs=1)
    assert all(row["w2a8"] > row["w8a8"] > 0 for row in found.values())
