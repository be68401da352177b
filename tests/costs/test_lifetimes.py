from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.costs.lifetimes import Lifetimes, Piece, stored_bits
from fxmpq.costs.stored_values import find_stored_values
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.graph.state import Group, state_of
from fxmpq.graph.trace import trace

_RULE = OperatorRule(frozenset({8}), frozenset({4, 8, None}))


def rules(*fusions: tuple[str, ...]) -> TargetRules:
    return TargetRules("chip", {"linear": _RULE}, (Precision(8, 8),), fusions=fusions)


class Shared(nn.Module):
    """What a layer reads is read in float too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.second(hidden) + hidden


def prepared(chip: TargetRules, *candidates: str) -> fx.GraphModule:
    wanted = [Precision.parse(name) for name in candidates]
    return insert_quantizers(trace(Shared(), torch.ones(2, 4)), chip, candidates=wanted)


def told(graph: fx.GraphModule, chip: TargetRules, *, owned: bool = True) -> list[tuple]:
    """Pieces by the names of the nodes where they begin and end."""
    groups = {name: g for g in state_of(graph).groups for name in g.activation_quantizers}
    found = Lifetimes(graph, find_stored_values(graph), groups if owned else {}, chip).pieces()
    names = [node.name for node in graph.graph.nodes]
    return [
        (
            names[piece.begin // 2],
            names[piece.end // 2],
            piece.group and piece.group.name,
            piece.values,
            piece.bytes,
        )
        for piece in found
    ]


@pytest.mark.parametrize(
    ("precision", "bits"),
    [("w4a8", 8), ("w8a2", 2), ("a4", 4), ("we4m3ae4m3", 8), ("w4", None), ("fp32", None)],
)
def test_the_width_of_what_is_stored(precision: str, bits: int | None) -> None:
    assert stored_bits(Precision.parse(precision)) == bits


@pytest.mark.parametrize("precision", ["w8a8d", "w4a8dt"])
def test_codes_of_one_run_are_not_stored(precision: str) -> None:
    assert stored_bits(Precision.parse(precision)) is None


@given(st.integers(0, 10**9), st.sampled_from([2, 3, 4, 8, 16]))
def test_a_piece_takes_whole_bytes(values: int, bits: int) -> None:
    group = Group("g", (), (Precision(8, bits), Precision(8)))
    piece = Piece(0, 1, group, values, 4 * values)
    assert 0 <= 8 * piece.size(group.candidates[0]) - values * bits < 8
    assert piece.size(group.candidates[1]) == 4 * values


def test_codes_are_stored_beside_what_is_read_in_float() -> None:
    chip = rules()
    assert told(prepared(chip, "w8a4", "w8a8"), chip) == [
        # The input comes in codes; the first result is overwritten by the relu's.
        ("x", "linear", "first", 4, 16),
        ("linear", "relu", None, 6, 24),
        ("relu", "add", None, 6, 24),
        ("quantizers_activation_1", "linear_1", "second", 6, 0),
        ("linear_1", "add", None, 6, 24),
        ("add", "output", None, 6, 24),
    ]


def test_without_quantizers_all_is_float() -> None:
    chip = rules()
    found = told(prepared(chip, "w8a4", "w8a8"), chip, owned=False)
    assert [entry[:3] for entry in found] == [
        ("x", "linear", None),
        ("linear", "relu", None),
        ("relu", "add", None),
        ("linear_1", "add", None),
        ("add", "output", None),
    ]


def test_what_lies_within_a_fusion_is_not_stored() -> None:
    chip = rules(("linear", "relu"), ("linear", "add"))
    assert [entry[:2] for entry in told(prepared(chip, "w8a4", "w8a8"), chip)] == [
        ("x", "relu"),
        ("relu", "add"),
        # The second layer runs with the sum, and its input waits for that.
        ("quantizers_activation_1", "add"),
        ("add", "output"),
    ]


def test_floats_wait_for_a_layer_that_may_read_them() -> None:
    class Waiting(Shared):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            total = hidden.sum(1, keepdim=True)
            return self.second(hidden) + total

    chip = rules()
    wanted = [Precision(8), Precision(8, 8)]
    graph = insert_quantizers(trace(Waiting(), torch.ones(2, 4)), chip, candidates=wanted)
    found = [entry for entry in told(graph, chip) if entry[3:] in {(6, 24), (0, 24), (6, 0)}]
    assert ("linear", "sum_1", None, 6, 24) in found
    # In float the second layer reads the same tensor, later than all others do.
    assert any(entry[1:] == ("linear_1", "second", 0, 24) for entry in found)
    assert ("quantizers_activation_1", "linear_1", "second", 6, 0) in found
