from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fxmpq.graph.attributes import get_tensor, replace_stored, set_tensor
from fxmpq.graph.trace import trace


@pytest.fixture
def graph() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))


def test_a_tensor_is_found_by_its_qualified_name(graph: fx.GraphModule) -> None:
    assert get_tensor(graph, "0.weight") is dict(graph.named_parameters())["0.weight"]


@pytest.mark.parametrize("name", ["0.missing", "missing.weight"])
def test_a_missing_tensor_is_an_error(graph: fx.GraphModule, name: str) -> None:
    with pytest.raises(AttributeError, match="missing"):
        get_tensor(graph, name)


def test_what_is_no_tensor_is_an_error(graph: fx.GraphModule) -> None:
    with pytest.raises(AttributeError, match=r"'0.in_features' is a int, not a tensor"):
        get_tensor(graph, "0.in_features")


def test_parameters_and_buffers_are_registered_as_such(graph: fx.GraphModule) -> None:
    set_tensor(graph, "a.b.weight", nn.Parameter(torch.ones(2)))
    set_tensor(graph, "a.b.scale", torch.zeros(3))
    set_tensor(graph, "root", torch.ones(1))
    assert set(dict(graph.named_parameters())) == {"0.weight", "0.bias", "a.b.weight"}
    assert set(dict(graph.named_buffers())) == {"a.b.scale", "root"}
    assert get_tensor(graph, "a.b.scale").tolist() == [0.0, 0.0, 0.0]


def test_a_tensor_can_be_replaced_by_another_kind(graph: fx.GraphModule) -> None:
    set_tensor(graph, "0.bias", torch.ones(3))
    assert "0.bias" not in dict(graph.named_parameters())
    assert get_tensor(graph, "0.bias").tolist() == [1.0, 1.0, 1.0]
    assert "0.weight" in dict(graph.named_parameters())


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_stored_tensor_is_replaced_as_what_it_is(requires_grad: bool) -> None:
    traced = trace(nn.Sequential(nn.Linear(2, 3)), torch.ones(2, 2))
    (node,) = (n for n in traced.graph.nodes if n.target == "0.weight")
    get_tensor(traced, "0.weight").requires_grad_(requires_grad)
    recorded, before = node.meta["val"], get_tensor(traced, "0.weight").detach()
    replace_stored(traced, node, before.t())
    after = get_tensor(traced, "0.weight")
    assert isinstance(after, nn.Parameter)
    assert after.requires_grad is requires_grad
    assert torch.equal(after, before.t())
    assert type(node.meta["val"]) is type(recorded)
    assert (node.meta["val"].shape, node.meta["val"].stride()) == ((2, 3), (1, 2))


def test_a_stored_buffer_stays_one(graph: fx.GraphModule) -> None:
    set_tensor(graph, "table", torch.ones(2, 3))
    node = graph.graph.get_attr("table")
    replace_stored(graph, node, torch.zeros(6))
    assert dict(graph.named_buffers())["table"].shape == (6,)
    assert "val" not in node.meta
