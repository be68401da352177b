"""Every kind of weight goes the whole way: prepared, calibrated, measured, refined, converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers torch.ops.transformers)
from torch import Tensor, fx, nn
from torch.nn import functional

import fxmpq
from fxmpq.graph.state import copy_graph, state_of
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import BiasCorrection
from fxmpq.refinement.walk import Walk
from fxmpq.targets.convert import convert
from fxmpq.training.freeze import freeze
from fxmpq.training.planned import trainable_plan

Made = Callable[..., fx.GraphModule]


class Transposed(nn.Module):
    """Transposed convolutions: grouped, without a bias, called twice, with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 4, 2, 1, groups=3)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.ConvTranspose2d(6, 4, 3, padding=1, bias=False)
        self.twice = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.norm(self.up(x)).relu())
        return self.twice(self.twice(x).relu()).mean((2, 3))


class Experts(nn.Module):
    """Rows sent to one expert each, and a batched product behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.up = nn.Parameter(torch.randn(3, 6, 8))
        self.down = nn.Parameter(torch.randn(3, 6, 8))
        self.heads = nn.Parameter(torch.randn(5, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        share, expert = self.gate(rows).softmax(1).max(1)
        expert, order = expert.sort()
        ends = functional.one_hot(expert, 3).sum(0).cumsum(0)
        grouped = torch.ops.transformers.grouped_mm_fallback
        moved = grouped(rows[order], self.up.transpose(1, 2), ends).relu()
        moved = grouped(moved, self.down, ends)
        back = torch.zeros_like(moved).index_put((order,), moved) * share.unsqueeze(1)
        return torch.bmm(back.view_as(x).transpose(0, 1), self.heads).transpose(0, 1).flatten(1)


class Products(nn.Module):
    """An einsum, a weight in front and a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(8, 2, 4))
        self.front = nn.Parameter(torch.randn(6, 8))
        self.table = nn.Parameter(torch.randn(6, 9))

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("bth,hnd->bntd", x, self.query).transpose(1, 2).flatten(2)
        return (self.front @ heads.relu().mT).mT @ self.table[:, 2:7]


_KERNELS = {"float ConvTranspose", "float MatMul", "float FusedMatMul", "MatMulIntegerToFloat"}
MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...], int]] = {
    "transposed": (Transposed, (3, 4, 4), 4),
    "experts": (Experts, (5, 8), 4),
    "products": (Products, (5, 8), 3),
}


class Subject:
    """A model of weights of one kind, its trace and batches."""

    def __init__(self, name: str) -> None:
        kind, shape, self.layers = MODELS[name]
        generator = torch.Generator().manual_seed(0)
        self.batches = [torch.randn(samples, *shape, generator=generator) for samples in (4, 6)]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = kind().eval()
        self.traced = trace(self.model, self.batches[0])
        prepared = fxmpq.prepare(self.traced, "reference", candidates=["w3a8", "w8a8"])
        self.graph = fxmpq.calibrate(prepared, self.batches, progress=False)

    def plan(self, index: int) -> dict[str, str]:
        groups = state_of(self.graph).groups
        return {group.name: str(group.candidates[index]) for group in groups}


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


def test_all_weights_are_layers_and_the_bits_stay(subject: Subject) -> None:
    groups = state_of(subject.graph).groups
    names = {layer.weight for group in groups for layer in group.layers}
    assert len(names) >= subject.layers - 1
    assert state_of(subject.graph).left_float == ()
    for batch in subject.batches:
        assert torch.equal(subject.graph(batch), subject.traced(batch))
        assert torch.allclose(subject.traced(batch), subject.model(batch), atol=1e-5)


def test_corrections_take_the_mean_error_of_every_channel(subject: Subject) -> None:
    graph = fxmpq.apply(subject.graph, subject.plan(0))
    checked = 0
    for view in Walk(graph, subject.batches).layers():
        if view.correction is None or view.quantizer is None:
            continue
        change = view.quantized_weight - view.weight
        outputs = [view.output(view.float_input(batch), change, None) for batch in range(len(view))]
        axis = 1 if view.operator.kind == "conv_transpose" else -1
        channels = torch.cat([one.transpose(0, axis).flatten(1) for one in outputs], 1)
        assert isinstance(view.correction, BiasCorrection)
        shift = view.correction.shift(view.number_format)
        assert torch.allclose(shift, -channels.mean(1), atol=1e-5)
        checked += 1
    assert checked >= 1


@pytest.mark.parametrize("method", ["projected", "hessian", "layer_loss", "entropy"])
def test_every_method_measures_it(subject: Subject, method: str) -> None:
    options = {"loss": squared} if method == "hessian" else {}
    found = fxmpq.measure(subject.graph, subject.batches, method=method, progress=False, **options)
    for group in state_of(subject.graph).groups:
        coarse, fine = (found.values[group.name][str(entry)] for entry in group.candidates)
        assert coarse > fine >= 0


def test_projections_agree_with_the_loss_of_each_group_alone(subject: Subject) -> None:
    batches = subject.batches
    probes = 64
    found = fxmpq.measure(subject.graph, batches, method="projected", probes=probes, progress=False)
    alone = fxmpq.measure(subject.graph, batches, method="sqnr", progress=False)
    for group in state_of(subject.graph).groups:
        fine = str(group.candidates[-1])
        ratio = found.values[group.name][fine] / alone.values[group.name][fine]
        assert 0.3 < ratio < 3


@pytest.mark.parametrize(
    "method", ["equalization", "bias_correction", "gptq", "adaquant", "brecq", "norm_reestimation"]
)
def test_every_refinement_takes_it_or_leaves_it(subject: Subject, method: str) -> None:
    options = {"steps": 3} if method in ("adaquant", "brecq") else {}
    refined = fxmpq.refine(
        subject.graph, subject.plan(0), subject.batches, method=method, progress=False, **options
    )
    planned = fxmpq.apply(subject.graph, subject.plan(0))
    assert noise(refined, subject) < 3 * noise(planned, subject)


def test_the_error_of_a_layer_is_that_of_its_output(subject: Subject) -> None:
    graph = fxmpq.apply(subject.graph, subject.plan(0))
    errors = [view.error() for view in Walk(graph, subject.batches).layers() if view.is_quantized]
    assert len(errors) >= subject.layers
    assert all(0 < error < 1 for error in errors)


def test_training_begins_at_the_plan_and_freezes_to_it(subject: Subject) -> None:
    planned = fxmpq.apply(subject.graph, subject.plan(0))
    learning = trainable_plan(planned)
    [batch, _] = subject.batches
    assert torch.equal(learning(batch), planned(batch))
    squared(learning, batch).backward()
    assert all(parameter.grad is not None for parameter in learning.parameters())
    torch.optim.SGD(learning.parameters(), 1e-4).step()
    frozen = copy_graph(planned)
    freeze(learning, frozen)
    assert torch.equal(frozen(batch), learning(batch))
    assert not torch.equal(frozen(batch), planned(batch))


def test_it_is_stored_and_converted_bit_for_bit(subject: Subject, tmp_path: Path) -> None:
    planned = fxmpq.apply(subject.graph, subject.plan(0))
    fxmpq.save(planned, tmp_path / "graph")
    loaded = fxmpq.load(tmp_path / "graph")
    converted = convert(planned, target="reference")
    for batch in subject.batches:
        assert torch.equal(loaded(batch), planned(batch))
        assert torch.equal(converted.run(batch)[0], planned(batch))


@pytest.mark.parametrize("bits", ["w2a8", "w8a8"])
def test_onnxruntime_runs_it_from_few_bits(subject: Subject, bits: str, tmp_path: Path) -> None:
    prepared = fxmpq.prepare(subject.traced, "onnxruntime", candidates=[bits])
    graph = fxmpq.calibrate(prepared, subject.batches, progress=False)
    plan = {group.name: str(group.candidates[0]) for group in state_of(graph).groups}
    planned = fxmpq.apply(graph, plan)
    converted = convert(planned, target="onnxruntime", output=tmp_path, verify=subject.batches)
    assert converted.sqnr_db > 60
    kernels = {row.kernel for row in converted.layers}
    assert kernels <= _KERNELS
    assert all(row.asked != "fp32" for row in converted.layers)


def squared(model: nn.Module, batch: object) -> Tensor:
    found: Tensor = model(batch).square().mean()
    return found


def noise(graph: fx.GraphModule, subject: Subject) -> float:
    with torch.no_grad():
        errors = [graph(batch) - subject.traced(batch) for batch in subject.batches]
    return sum(float(error.square().sum()) for error in errors)
