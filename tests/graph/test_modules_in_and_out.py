"""At every stage a graph takes and returns what the model did, wherever a module may be used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxmpq
from fxmpq.formats import NumberFormat
from fxmpq.graph.batches import Batch, call_arguments
from fxmpq.graph.state import require

STAGES = ("traced", "prepared", "calibrated", "planned", "converted")
OFF = STAGES[:3]
META = torch.device("meta")


class Answer(NamedTuple):
    scores: Tensor
    features: Tensor


class Nested(nn.Module):
    """Takes a tuple, a dict and a number by keyword; returns a tuple in a dict in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("offset", torch.linspace(-1, 1, 6))

    def forward(
        self, pair: tuple[Tensor, Tensor], *, extra: dict[str, Tensor], scale: float = 1.0
    ) -> tuple[dict[str, object], Answer]:
        left, right = pair
        steps = torch.arange(6, device=left.device)
        hidden = torch.relu(self.first(left) + self.offset * steps)
        scores = self.second(hidden * scale) + extra["bias"]
        return {"sum": left + right, "parts": (hidden, [scores])}, Answer(scores, hidden)


def nested_batch(seed: int, samples: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, samples, 4, generator=generator)
    bias = torch.randn(samples, 3, generator=generator)
    return {"pair": (left, right), "extra": {"bias": bias}, "scale": 0.5}


@dataclass(frozen=True)
class Case:
    """A model, a batch of another size than it was traced with, and its graph at each stage."""

    model: nn.Module
    batch: Batch
    graphs: Mapping[str, fx.GraphModule]

    def call(self, module: nn.Module) -> object:
        args, kwargs = call_arguments(self.batch)
        with torch.no_grad():
            return module(*args, **kwargs)


def make_case(model: nn.Module, batches: list[Batch], other: Batch) -> Case:
    traced = fxmpq.trace(model, batches[0])
    prepared = fxmpq.prepare(traced, "reference", candidates=["w4a8", "w8a8"])
    calibrated = fxmpq.calibrate(prepared, batches, progress=False)
    groups = require(calibrated, stage="calibrated").groups
    plan = {
        group.name: str(group.candidates[place % len(group.candidates)])
        for place, group in enumerate(groups)
    }
    planned = fxmpq.apply(calibrated, plan)
    graphs = (traced, prepared, calibrated, planned, fxmpq.convert(planned).module)
    return Case(model, other, dict(zip(STAGES, graphs, strict=True)))


@pytest.fixture(scope="module")
def cases(
    bert: nn.Module,
    token_batches: list[dict[str, Tensor]],
    resnet: nn.Module,
    resnet_batches: list[dict[str, Tensor]],
    conv_net: nn.Module,
    images: list[Tensor],
) -> dict[str, Case]:
    torch.manual_seed(0)
    nested = [nested_batch(seed, 6) for seed in (0, 1)]
    three = {name: tensor[:3] for name, tensor in token_batches[1].items()}
    return {
        "nested": make_case(Nested().eval(), nested, nested_batch(2, 5)),
        "bert": make_case(bert, token_batches, three),
        "resnet": make_case(
            resnet, resnet_batches, {"pixel_values": resnet_batches[1]["pixel_values"][:3]}
        ),
        "conv": make_case(conv_net, images, (images[1][:3],)),
    }


MODELS = pytest.mark.parametrize("name", ["nested", "bert", "resnet", "conv"])
EACH_STAGE = pytest.mark.parametrize("stage", STAGES)


def same_structure(found: object, wanted: object) -> None:
    """The same classes all the way down, and tensors of the same shape and dtype."""
    assert type(found) is type(wanted)
    leaves, spec = pytree.tree_flatten(found)
    others, expected = pytree.tree_flatten(wanted)
    assert spec == expected
    for leaf, other in zip(leaves, others, strict=True):
        assert type(leaf) is type(other)
        if isinstance(leaf, Tensor):
            assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)


def pairs(found: object, wanted: object) -> Iterator[tuple[Tensor, Tensor]]:
    leaves, others = pytree.tree_leaves(found), pytree.tree_leaves(wanted)
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, Tensor):
            yield leaf, other


def same_bits(found: object, wanted: object) -> bool:
    return all(torch.equal(leaf, other) for leaf, other in pairs(found, wanted))


@MODELS
@EACH_STAGE
def test_it_returns_what_the_model_returns(name: str, stage: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    found, wanted = case.call(case.graphs[stage]), case.call(case.model)
    same_structure(found, wanted)
    if stage in OFF:
        assert same_bits(found, case.call(case.graphs["traced"]))
        for leaf, other in pairs(found, wanted):
            assert torch.allclose(leaf, other, atol=1e-4)
    else:
        assert same_bits(found, case.call(case.graphs["planned"]))
        assert not same_bits(found, case.call(case.graphs["traced"]))


@MODELS
@EACH_STAGE
def test_training_mode_changes_nothing(name: str, stage: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    graph, expected = case.graphs[stage], case.call(case.graphs[stage])
    try:
        assert same_bits(case.call(graph.train()), expected)
    finally:
        graph.eval()
    assert same_bits(case.call(graph), expected)


@MODELS
@pytest.mark.parametrize("stage", [*OFF, "planned"])
def test_gradients_reach_the_weights(name: str, stage: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    graph = case.graphs[stage]
    args, kwargs = call_arguments(case.batch)
    with torch.enable_grad():
        found = [leaf for leaf in pytree.tree_leaves(graph(*args, **kwargs)) if leaf.grad_fn]
        parameters = [parameter for parameter in graph.parameters() if parameter.requires_grad]
        total = sum(leaf.sum() for leaf in found)
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@MODELS
@EACH_STAGE
def test_under_autocast_it_is_as_near_as_the_model(
    name: str, stage: str, cases: dict[str, Case]
) -> None:
    case = cases[name]
    exact = case.call(case.graphs[stage])
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = case.call(case.graphs[stage]), case.call(case.model)
    same_structure(found, wanted)
    for (leaf, other), (own, _) in zip(pairs(found, wanted), pairs(exact, exact), strict=True):
        assert leaf.isfinite().all()
        scale = own.abs().max()
        assert (leaf - own).abs().max() <= 0.1 * scale
        if stage in OFF:
            assert (leaf - other).abs().max() <= 0.05 * scale


@MODELS
@EACH_STAGE
def test_a_deep_copy_is_a_graph_of_its_own(name: str, stage: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    graph, expected = case.graphs[stage], case.call(case.graphs[stage])
    copied = copy.deepcopy(graph)
    found = case.call(copied)
    same_structure(found, expected)
    assert same_bits(found, expected)
    taken = {tensor.data_ptr() for tensor in graph.state_dict().values() if tensor.numel()}
    assert not any(tensor.data_ptr() in taken for tensor in copied.state_dict().values())
    for tensor in copied.state_dict().values():
        tensor.zero_()
    assert same_bits(case.call(graph), expected)
    assert not same_bits(case.call(copied), expected)


def by_the_formula(x: Tensor, scale: float, zero: int, number_format: NumberFormat) -> Tensor:
    codes = torch.clamp(torch.round(x / scale) + zero, number_format.qmin, number_format.qmax)
    return (codes - zero) * scale


@MODELS
@EACH_STAGE
def test_it_runs_where_it_is_moved(
    name: str, stage: str, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases[name]
    # torch's operator has no kernel for tensors without values.
    monkeypatch.setattr("fxmpq.quantizers.modules.fake_quantize_activation", by_the_formula)
    moved = copy.deepcopy(case.graphs[stage]).to(META)
    batch = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(META), case.batch)
    args, kwargs = call_arguments(batch)
    with torch.no_grad():
        found = moved(*args, **kwargs)
    same_structure(found, case.call(case.graphs[stage]))
    assert {leaf.device for leaf, _ in pairs(found, found)} == {META}


@MODELS
@EACH_STAGE
def test_no_tensor_of_it_stays_behind(name: str, stage: str, cases: dict[str, Case]) -> None:
    """Everything that a call computes with is a parameter or a buffer, and so moves along."""
    graph = cases[name].graphs[stage]
    registered = {id(tensor) for tensor in (*graph.parameters(), *graph.buffers())}
    for module in graph.modules():
        for value in vars(module).values():
            held = pytree.tree_leaves(value) if isinstance(value, (dict, list, tuple)) else [value]
            assert all(id(leaf) in registered for leaf in held if isinstance(leaf, Tensor))


@pytest.mark.parametrize("stage", [*OFF, "planned"])
def test_other_calls_are_refused_alike(stage: str, cases: dict[str, Case]) -> None:
    graph: Callable[..., object] = cases["nested"].graphs[stage]
    args, kwargs = call_arguments(nested_batch(0, 2))
    with pytest.raises((TypeError, ValueError)):
        graph(*args)
    with pytest.raises((TypeError, ValueError, KeyError)):
        graph(*args, **{**kwargs, "extra": {}})
