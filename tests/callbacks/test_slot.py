from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import fx, nn

from fxmpq.callbacks.slot import NetworkSlot


class Holder(LightningModule):
    """Holds a network two levels deep, with a part in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
        network[2].eval()
        self.parts = nn.ModuleDict({"net": network})
        self.head = nn.Linear(4, 2)


def graph_of(module: Holder) -> fx.GraphModule:
    return fx.symbolic_trace(copy.deepcopy(module.parts["net"]))


def test_the_graph_takes_the_place_and_gives_it_back() -> None:
    module, slot = Holder(), NetworkSlot("parts.net")
    network, head, graph = module.parts["net"], module.head, graph_of(module)
    assert not slot.holds_graph(module)
    assert not slot.put_float_back(module)
    slot.put_graph(module, graph)
    assert module.parts["net"] is graph is slot.graph
    assert module.head is head
    assert slot.float_network is network
    assert slot.holds_graph(module)
    assert not slot.holds_graph(Holder())
    assert slot.put_float_back(module)
    assert module.parts["net"] is network
    assert not slot.holds_graph(module)


def test_a_graph_can_follow_another() -> None:
    module, slot = Holder(), NetworkSlot("parts.net")
    network = module.parts["net"]
    for graph in (graph_of(module), graph_of(module)):
        slot.put_graph(module, graph)
        assert slot.graph is graph
        slot.put_float_back(module)
        assert module.parts["net"] is slot.float_network is network


def test_the_float_network_gets_its_training_flags_back() -> None:
    module, slot = Holder(), NetworkSlot("parts.net")
    network = module.parts["net"]
    flags = [child.training for child in network.modules()]
    assert flags == [True, True, True, False]
    slot.remember_flags(module)
    module.eval()
    slot.put_graph(module, graph_of(module))
    assert [child.training for child in network.modules()] == flags


def test_a_network_made_after_the_flags_were_noted_is_in_training() -> None:
    module, slot = Holder(), NetworkSlot("parts.net")
    slot.remember_flags(module)
    module.parts["net"] = nn.Sequential(nn.Linear(4, 4))
    module.eval()
    slot.put_graph(module, graph_of(module))
    assert slot.float_network is not None
    assert all(child.training for child in slot.float_network.modules())


def test_saved_weights_are_the_float_networks() -> None:
    module, slot = Holder(), NetworkSlot("parts.net")
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    graph = graph_of(module)
    graph.register_buffer("scale", torch.ones(1))
    graph.get_submodule("0").weight = nn.Parameter(torch.zeros(4, 4))
    slot.put_graph(module, graph)
    weights = dict(module.state_dict())
    assert "parts.net.scale" in weights
    slot.restore_float_weights(weights)
    assert weights.keys() == expected.keys()
    assert not torch.equal(weights["parts.net.0.weight"], torch.zeros(4, 4))
    Holder().load_state_dict(weights)


def test_what_was_taken_out_follows_the_graph_to_its_device() -> None:
    module, slot = Holder(), NetworkSlot("parts.net")
    slot.put_graph(module, graph_of(module))
    other = nn.BatchNorm1d(3)
    module.to("meta")  # stands for the CPU on which a run on a GPU ends
    slot.follow_device(other)
    assert slot.float_network is not None
    left = [*slot.float_network.state_dict().values(), *other.state_dict().values()]
    assert {tensor.device.type for tensor in left} == {"meta"}


def test_a_missing_network_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="children are: 'parts', 'head'"):
        NetworkSlot("model").put_graph(Holder(), graph_of(Holder()))
