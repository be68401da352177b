from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fxmpq.graph.state import copy_graph
from fxmpq.refinement.best_seen import BestSeen
from fxmpq.refinement.units import quantizer_tensors


@pytest.fixture
def graph(subject_of: Callable[[str], Any]) -> fx.GraphModule:
    return copy_graph(subject_of("conv").planned)


def state(graph: fx.GraphModule, names: list[str]) -> dict[str, list[float]]:
    return {
        f"{name}/{leaf}": tensor.double().flatten().tolist()
        for name in names
        for leaf, tensor in quantizer_tensors(graph.get_submodule(name)).items()
    }


def names_in(graph: fx.GraphModule) -> list[str]:
    found = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    return [name for name in found if getattr(graph.get_submodule(name), "active", None)]


def change(graph: fx.GraphModule, names: list[str], factor: float) -> None:
    """Give every module something else than it has."""
    for name in names:
        module: Any = graph.get_submodule(name)
        if hasattr(module, "ranges"):
            found = module.ranges[module.active.name]
            module.ranges[module.active.name] = type(found)(found.scale * factor, 1)
        elif hasattr(module, "set_codes"):
            scale = module.scale(module.active) * factor
            module.set_scale(module.active, scale)
            codes = torch.full((2, 2), int(factor))
            module.set_codes(module.active, codes)
        else:
            module.set_shift(module.active, torch.full((3,), factor))


def test_the_state_with_the_least_error_comes_back(graph: fx.GraphModule) -> None:
    names = names_in(graph)
    best = BestSeen(graph, names, 3.0)
    change(graph, names, 2.0)
    best.offer(1.0)
    wanted = state(graph, names)
    change(graph, names, 3.0)
    best.offer(2.0)
    assert state(graph, names) != wanted
    best.restore()
    assert state(graph, names) == wanted
    assert best.error == 1.0


@pytest.mark.parametrize("error", [3.0, 4.0, math.nan, math.inf])
def test_nothing_better_means_the_first_state_without_codes(
    graph: fx.GraphModule, error: float
) -> None:
    names = names_in(graph)
    before = state(graph, names)
    best = BestSeen(graph, names, 3.0)
    change(graph, names, 2.0)
    best.offer(error)
    best.restore()
    assert state(graph, names) == before
    assert best.error == 3.0
    for name in names:
        module: Any = graph.get_submodule(name)
        if hasattr(module, "stored_codes"):
            assert module.stored_codes(module.active) is None
