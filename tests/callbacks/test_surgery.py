from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import fx, nn

import fxmpq
from fxmpq.callbacks.surgery import find_submodule, replace_submodule


def nested() -> nn.ModuleDict:
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    return nn.ModuleDict({"net": nn.ModuleDict({"encoder": layers}), "loss": nn.MSELoss()})


@pytest.mark.parametrize("path", ["net", "net.encoder", "net.encoder.1", "loss"])
def test_replacing_changes_that_attribute_and_nothing_else(path: str) -> None:
    root = nested()
    before = dict(root.named_modules())
    replacement = nn.Identity()
    replace_submodule(root, path, replacement)
    after = dict(root.named_modules())
    assert find_submodule(root, path) is replacement
    kept = {name for name in before if name != path and not name.startswith(f"{path}.")}
    assert set(after) == kept | {path}
    assert all(after[name] is before[name] for name in kept)


def test_one_name_of_a_shared_module_is_found_and_replaced() -> None:
    shared = nn.Linear(2, 2)
    root = nn.ModuleDict({"student": shared, "teacher": shared})
    assert find_submodule(root, "teacher") is shared
    replace_submodule(root, "teacher", nn.Identity())
    assert root["student"] is shared


def test_a_missing_submodule_is_refused_with_the_children_and_the_closest_name() -> None:
    with pytest.raises(MisconfigurationException) as error:
        find_submodule(nested(), "net.encodr")
    assert "ModuleDict has no sub-module 'net.encodr'" in str(error.value)
    assert "closest: 'net.encoder'" in str(error.value)
    assert "Its children are: 'net', 'loss'" in str(error.value)


def test_the_whole_module_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="whole LightningModule cannot be replaced"):
        find_submodule(nested(), "")


def test_a_quantized_graph_is_refused_and_other_graphs_are_not() -> None:
    float_graph = fx.symbolic_trace(nn.Linear(4, 4))
    root = nn.ModuleDict({"model": float_graph})
    assert find_submodule(root, "model") is float_graph
    batches = [torch.randn(4, 4)]
    settings = {"target": "reference", "budget": "weights=90%", "progress": False}
    root["model"] = fxmpq.quantize(nn.Linear(4, 4), batches, **settings).graph
    with pytest.raises(MisconfigurationException, match="'model' is a quantized graph already"):
        find_submodule(root, "model")
