from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import flat_inputs
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import switch_group
from fxmpq.graph.trace import trace
from fxmpq.sensitivity.sweep import Changes, Sweep, SweptModel, measuring

Calibrated = Callable[..., fx.GraphModule]


class Counted(Sweep):
    """Notes the name of every node that runs."""

    def __init__(self, *args: object) -> None:
        self.ran: list[str] = []
        super().__init__(*args)

    def run_node(self, n: fx.Node) -> object:
        self.ran.append(n.name)
        return super().run_node(n)


class Paths(nn.Module):
    """Two parallel paths, a layer behind both, and outputs in a nested structure."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        left, right = self.left(x).relu(), self.right(y)
        logits = self.head(left + right)
        return {"logits": logits, "paths": (left, logits.argmax(-1)), "right": right}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Paths().eval()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 8, 6, generator=generator)
    return x, y


@pytest.fixture(scope="module")
def graph(calibrated: Calibrated, model: nn.Module, batch: tuple[Tensor, Tensor]) -> fx.GraphModule:
    return calibrated(trace(model, batch), [batch])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with measuring():
        yield


def whole(graph: fx.GraphModule, choices: Changes, batch: object) -> list[Tensor]:
    """A whole pass with the choices switched on, by definition."""
    switched = copy_graph(graph)
    for group in require(graph, stage="calibrated").groups:
        if group.name in choices:
            switch_group(switched, group, group.candidate(choices[group.name]))
    return list(run_batch(switched, batch))


def assert_same(found: object, expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


CHANGES = [
    {},
    {"left": "w2a8"},
    {"head": "w4a8"},
    {"left": "w4a8", "right": "w2a8"},
    {"left": "w2a8", "right": "w8a8", "head": "w2a8"},
]
BASES = [{}, {"left": "w8a8", "right": "w8a8", "head": "w8a8"}, {"right": "w4a8"}]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("changes", CHANGES)
def test_outputs_equal_a_whole_pass(
    graph: fx.GraphModule, batch: tuple[Tensor, Tensor], base: Changes, changes: Changes
) -> None:
    sweep = Sweep(graph, base)
    assert sweep.is_float == (not base)
    inputs = flat_inputs(graph, batch)
    assert_same(sweep.start(inputs), whole(graph, base, batch))
    assert_same(sweep.outputs(changes), whole(graph, {**base, **changes}, batch))
    assert_same(sweep.whole(inputs, changes), whole(graph, {**base, **changes}, batch))
    assert_same(sweep.outputs({}), whole(graph, base, batch))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("first", CHANGES)
def test_pairs_equal_whole_passes_and_leave_the_base(
    graph: fx.GraphModule, batch: tuple[Tensor, Tensor], base: Changes, first: Changes
) -> None:
    sweep = Sweep(graph, base)
    sweep.start(flat_inputs(graph, batch))
    with sweep.fixed(first):
        for further in CHANGES:
            expected = whole(graph, {**base, **first, **further}, batch)
            assert_same(sweep.outputs(further), expected)
        with sweep.fixed({"right": "w3a8"}):
            expected = whole(graph, {**base, **first, "right": "w3a8", "head": "w4a8"}, batch)
            assert_same(sweep.outputs({"head": "w4a8"}), expected)
    assert_same(sweep.outputs({}), whole(graph, base, batch))
    assert_same(sweep.outputs({"head": "w2a8"}), whole(graph, {**base, "head": "w2a8"}, batch))


def test_a_new_batch_replaces_the_old(graph: fx.GraphModule, batch: tuple[Tensor, Tensor]) -> None:
    sweep = Sweep(graph)
    sweep.start(flat_inputs(graph, batch))
    other = (batch[1][:3], batch[0][:3])
    sweep.start(flat_inputs(graph, other))
    assert_same(sweep.outputs({"left": "w2a8"}), whole(graph, {"left": "w2a8"}, other))


def test_only_what_lies_downstream_runs(
    graph: fx.GraphModule, batch: tuple[Tensor, Tensor]
) -> None:
    sweep = Counted(graph)
    sweep.start(flat_inputs(graph, batch))
    assert len(sweep.ran) == len(graph.graph.nodes)

    def ran(changes: Changes) -> set[str]:
        sweep.ran.clear()
        sweep.outputs(changes)
        assert len(set(sweep.ran)) == len(sweep.ran)
        return {name for name in sweep.ran if name.startswith(("linear", "relu", "add"))}

    assert ran({}) == set()
    assert sweep.ran == []
    assert ran({"head": "w4a8"}) == {"linear_2"}
    assert ran({"left": "w4a8"}) == {"linear", "relu", "add", "linear_2"}
    assert ran({"right": "w4a8"}) == {"linear_1", "add", "linear_2"}
    assert ran({"left": "w4a8", "right": "w4a8"}) == {
        "linear", "linear_1", "relu", "add", "linear_2",
    }  # fmt: skip
    with sweep.fixed({"left": "w4a8"}):
        assert ran({"head": "w2a8"}) == {"linear_2"}
        assert ran({"left": "w4a8"}) == set()


def test_a_quantizer_that_stays_as_it_is_is_not_run_again(
    graph: fx.GraphModule, batch: tuple[Tensor, Tensor]
) -> None:
    group = require(graph, stage="calibrated").group("left")
    sweep = Counted(graph, {"left": "w8a8"})
    sweep.start(flat_inputs(graph, batch))
    sweep.ran.clear()
    sweep.outputs({"left": "w4a8"})
    modules = {node.name: node.target for node in graph.graph.nodes}
    ran = {modules[name] for name in sweep.ran}
    assert not ran & set(group.activation_quantizers)
    assert group.layers[0].weight_quantizer in ran


def test_the_graph_itself_is_not_touched(
    graph: fx.GraphModule, batch: tuple[Tensor, Tensor]
) -> None:
    before = run_batch(graph, batch)
    sweep = Sweep(graph, {"left": "w2a8"})
    sweep.start(flat_inputs(graph, batch))
    sweep.outputs({"head": "w2a8"})
    assert_same(run_batch(graph, batch), list(before))


def test_it_works_inside_inference_mode(
    graph: fx.GraphModule, batch: tuple[Tensor, Tensor]
) -> None:
    expected = whole(graph, {"left": "w2a8"}, batch)
    with torch.inference_mode(), measuring():
        sweep = Sweep(graph)
        sweep.start(flat_inputs(graph, batch))
        found = sweep.outputs({"left": "w2a8"})
    assert_same(found, expected)
    assert not found[0].is_inference()


def test_unknown_changes_are_errors_that_leave_the_base(
    graph: fx.GraphModule, batch: tuple[Tensor, Tensor]
) -> None:
    sweep = Sweep(graph)
    with pytest.raises(FxmpqError, match=r"call start\(inputs\) first"):
        sweep.outputs({"left": "w2a8"})
    sweep.start(flat_inputs(graph, batch))
    with pytest.raises(FxmpqError, match="no group 'lefty'; closest: 'left'"):
        sweep.outputs({"left": "w2a8", "lefty": "w2a8"})
    with pytest.raises(FxmpqError, match="has no candidate w16a16"):
        sweep.outputs({"left": "w2a8", "head": "w16a16"})
    with pytest.raises(FxmpqError, match="no group 'middle'"):
        Sweep(graph, {"middle": "w2a8"})
    assert sweep.is_float
    assert_same(sweep.outputs({}), whole(graph, {}, batch))


def test_a_graph_without_ranges_is_an_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        Sweep(trace(model, batch))


def test_the_stand_in_returns_what_the_model_returns(
    graph: fx.GraphModule, model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    sweep = Counted(graph)
    stand_in = SweptModel(sweep)
    assert not stand_in.is_started
    assert stand_in.graph is sweep.network.graph
    with pytest.raises(AttributeError, match="nothing_like_it"):
        stand_in.nothing_like_it  # noqa: B018 - reading it is the test
    found = stand_in(*batch)
    expected = model(*batch)
    assert stand_in.is_started
    assert list(found) == list(expected)
    assert torch.equal(found["logits"], expected["logits"])
    assert torch.equal(found["paths"][1], expected["paths"][1])

    sweep.ran.clear()
    stand_in.changes = {"head": "w2a8"}
    by_name = stand_in(y=batch[1].clone(), x=batch[0])
    assert len(sweep.ran) < len(graph.graph.nodes) / 2
    assert torch.equal(by_name["logits"], whole(graph, {"head": "w2a8"}, batch)[0])


def test_the_stand_in_runs_whole_passes_on_other_inputs(
    graph: fx.GraphModule, batch: tuple[Tensor, Tensor]
) -> None:
    sweep = Counted(graph)
    stand_in = SweptModel(sweep)
    stand_in(*batch)
    sweep.ran.clear()
    stand_in.changes = {"left": "w2a8"}
    half = (batch[0][:4], batch[1][:4])
    assert torch.equal(stand_in(*half)["logits"], whole(graph, {"left": "w2a8"}, half)[0])
    assert torch.equal(stand_in(*batch)["logits"], whole(graph, {"left": "w2a8"}, batch)[0])
    stand_in.begin()
    assert not stand_in.is_started
    assert torch.equal(stand_in(*half)["logits"], whole(graph, {}, half)[0])


def test_writing_to_the_outputs_does_no_harm(
    graph: fx.GraphModule, batch: tuple[Tensor, Tensor]
) -> None:
    stand_in = SweptModel(Sweep(graph))
    for changes in ({}, {"head": "w2a8"}, {"right": "w4a8"}, {}):
        stand_in.changes = changes
        found = stand_in(*batch)
        for tensor, expected in zip(
            (found["logits"], *found["paths"], found["right"]),
            whole(graph, changes, batch),
            strict=True,
        ):
            assert torch.equal(tensor, expected)
            tensor.zero_()
