from __future__ import annotations

import inspect

import pytest
from torch import fx

from fxmpq.errors import FxmpqError
from fxmpq.graph.state import Refinement
from fxmpq.refinement.methods import (
    METHODS,
    RECIPES,
    Method,
    methods_of,
    needed_options,
    options_of,
)
from fxmpq.refinement.units import Units


def nudge(
    graph: fx.GraphModule, batches: list, *, units: Units, share: float = 0.5, seed: int = 0
) -> list[Refinement]:
    return []


def needs(graph: fx.GraphModule, batches: list, *, units: Units, loss: object) -> list[Refinement]:
    return []


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "nudge", Method(nudge, rounds=True))
    monkeypatch.setitem(METHODS, "needs", Method(needs, trains=True))
    monkeypatch.setitem(RECIPES, "twice nudged", ("nudge", "nudge"))


def test_a_name_stands_for_a_method_or_a_recipes() -> None:
    assert methods_of("nudge") == ("nudge",)
    assert methods_of("twice nudged") == ("nudge", "nudge")


def test_options_come_with_their_defaults() -> None:
    assert options_of("nudge") == {"share": 0.5, "seed": 0}
    assert options_of("needs") == {"loss": None}
    assert (needed_options("nudge"), needed_options("needs")) == ((), ("loss",))


def test_an_unknown_name_is_refused_with_the_closest() -> None:
    with pytest.raises(FxmpqError, match=r"no refinement 'nugde'; closest: .*'nudge'.*Recipes: "):
        methods_of("nugde")
    with pytest.raises(FxmpqError, match="'twice nudged'"):
        methods_of("twice nugded")


def test_every_method_has_the_engines_signature() -> None:
    for name, method in METHODS.items():
        parameters = list(inspect.signature(method.refine).parameters.values())
        assert len(parameters) >= 3, name
        first, second, *options = parameters
        assert (first.name, second.name) == ("graph", "batches"), name
        assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options), name
        assert "units" in {option.name for option in options}, name


def test_recipes_are_made_of_methods_that_need_nothing_more() -> None:
    for name, methods in RECIPES.items():
        assert name not in METHODS
        for method in methods:
            assert not METHODS[method].trains
            assert needed_options(method) == ()
