"""A machine whose times are known, in place of a runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import fxmpq
from fxmpq.costs.latency.cut import behind_quantizers
from fxmpq.costs.latency.runtime import Run, Runtime
from fxmpq.graph.state import state_of
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.targets.onnxruntime import ONNXRUNTIME

CALL, OTHER, FLOAT_LAYER, CODES_LAYER, CONVERSION = 16.0, 4.0, 64.0, 8.0, 2.0


@dataclass
class Machine:
    """Takes exact times: for a call, other operators, layers on floats or codes, and conversions.

    A convolution only runs on codes if its result is stored in codes; other layers take no time.
    """

    now: float = 0.0
    loaded: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def runtime(self) -> Runtime:
        """What loads planned graphs on it."""
        return Runtime("onnxruntime", self.load, ("torch",))

    def clock(self) -> float:
        """Its time, in seconds."""
        return self.now

    def load(self, graph: fx.GraphModule) -> Run:
        """Make a planned graph run."""
        self.loaded.append(tuple(state_of(graph).choices.values()))
        spent = time_of(graph)

        def run(batch: object) -> None:
            self.now += spent

        return run


def time_of(graph: fx.GraphModule) -> float:
    """What a planned graph takes on the machine."""
    state = state_of(graph)
    asked = {
        member.node: group.candidate(state.choices[group.name])
        for group in state.groups
        for member in group.members
        if member.kind == "conv"
    }
    stored = {node for node in graph.graph.nodes if _stores(graph, node)}
    behind = {behind_quantizers(graph, node) for node in stored}

    def on_codes(node: fx.Node) -> bool:
        result = _fused_end(node)
        return asked[node.name].activation is not None and result in behind

    total = CALL
    for node in graph.graph.nodes:
        if node in stored:
            source = _layer_of(behind_quantizers(graph, node))
            made = source is not None and source.name in asked and on_codes(source)
            total += 0 if made else CONVERSION
            read = all(user.name in asked and asked[user.name].activation for user in node.users)
            total += 0 if read else CONVERSION
        elif node.name in asked:
            total += CODES_LAYER if on_codes(node) else FLOAT_LAYER
        elif node.name.startswith(("max_pool", "add")):
            total += OTHER
    return total


def _stores(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = graph.get_submodule(str(node.target))
    return isinstance(module, ActivationQuantizer) and module.active is not None


def _fused_end(node: fx.Node) -> fx.Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and "relu" in users[0].name else node


def _layer_of(value: object) -> fx.Node | None:
    if isinstance(value, fx.Node) and "relu" in value.name:
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None


@pytest.fixture
def machine() -> Machine:
    """A machine at time zero."""
    return Machine()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("FXMPQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def chain() -> nn.Module:
    """Three convolutions, the middle one alike to the last, and something between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU()
    ).eval()


@pytest.fixture(scope="session")
def prepared() -> fx.GraphModule:
    """The chain, prepared for the rules of ONNX Runtime with a choice between codes and float."""
    graph = fxmpq.trace(chain(), torch.randn(2, 2, 4, 4, generator=torch.Generator()))
    return fxmpq.prepare(graph, ONNXRUNTIME, candidates=["w8a8", "fp32"])
