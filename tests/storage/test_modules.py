from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FileFormatError
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.storage.modules import (
    attach,
    decode_quantizers,
    encode_quantizers,
    encode_tensors,
    make_module,
)
from fxmpq.storage.tensors import TensorReader, TensorWriter

CPU = torch.device("cpu")


class Kinds(nn.Module):
    """A tied parameter, a frozen one, buffers of both kinds, a constant, a name with a dash."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.blocks = nn.ModuleDict({"a-b": nn.Linear(3, 1)})
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("passing", torch.ones(1, dtype=torch.bool), persistent=False)
        self.register_buffer("none", None)
        self.constant = torch.tensor(2.0)


def graph_of(module: nn.Module, *names: str) -> fx.GraphModule:
    """A graph that holds a module's tensors and reads some."""
    graph = fx.GraphModule(nn.Module(), fx.Graph())
    for name, child in module.named_children():
        graph.add_module(name, child)
    for name, parameter in module._parameters.items():
        graph.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        graph.register_buffer(name, buffer, persistent=persistent)
    graph.constant = module.constant
    nodes = fx.Graph()
    nodes.output(tuple(nodes.get_attr(name) for name in names))
    graph.graph = nodes
    return graph


def through_file(graph: fx.GraphModule, folder: Path) -> nn.Module:
    writer = TensorWriter()
    entries = json.loads(json.dumps(encode_tensors(graph, writer)))
    root = nn.Module()
    attach(root, {}, entries, TensorReader(folder, writer.write(folder), CPU))
    return root


def test_tensors_come_back_in_their_roles(tmp_path: Path) -> None:
    module = Kinds()
    found = through_file(graph_of(module, "constant"), tmp_path)
    wanted = dict(module.named_parameters(remove_duplicate=False))
    parameters = dict(found.named_parameters(remove_duplicate=False))
    assert parameters.keys() == wanted.keys()
    for name, parameter in parameters.items():
        assert parameter.equal(wanted[name])
        assert parameter.requires_grad == wanted[name].requires_grad
    assert parameters["tied.weight"] is parameters["first.weight"]
    assert found.kept.equal(module.kept)
    assert found.passing.equal(module.passing)
    assert "passing" not in found.state_dict()
    assert "kept" in found.state_dict()
    assert found.constant.equal(module.constant)
    assert "constant" not in dict(found.named_buffers())


def test_quantizers_come_back(planned: fx.GraphModule) -> None:
    stored = json.loads(json.dumps(encode_quantizers(planned), allow_nan=False))
    found = decode_quantizers(stored)
    assert {type(module) for module in found.values()} >= {ActivationQuantizer, WeightQuantizer}
    for name, module in found.items():
        wanted = planned.get_submodule(name)
        assert type(module) is type(wanted)
        assert repr(module) == repr(wanted)
        held = {key: value for key, value in vars(module).items() if key[0] != "_"}
        assert held == {key: value for key, value in vars(wanted).items() if key[0] != "_"}


def test_other_modules_are_not_stored() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    with pytest.raises(FileFormatError, match="calls '0', a ReLU"):
        encode_quantizers(graph)


def test_a_class_that_passes_for_a_quantizer_is_not_stored() -> None:
    class WeightQuantizer(nn.Module):  # the same name
        def forward(self, x: Tensor) -> Tensor:
            return x

    nodes = fx.Graph()
    nodes.output(nodes.call_module("0", (nodes.placeholder("x"),)))
    graph = fx.GraphModule(nn.Sequential(WeightQuantizer()), nodes)
    with pytest.raises(FileFormatError, match="a WeightQuantizer; a stored graph calls only"):
        encode_quantizers(graph)


def test_attributes_that_are_no_tensors_are_not_stored() -> None:
    module = Kinds()
    graph = graph_of(module, "constant")
    graph.constant = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(FileFormatError, match="Control flow"):
        encode_tensors(graph, TensorWriter())


QUANTIZER = {"class": "BiasCorrection", "name": "fc", "active": None}


@pytest.mark.parametrize(
    "found",
    [
        [],
        {"q": []},
        {"q": {"class": "Sequential", "args": []}},
        {"q": {"class": "os.system"}},
        {"q": {**QUANTIZER, "forward": "x"}},
        {"q": {"class": "BiasCorrection"}},
        {"q": {**QUANTIZER, "active": "int9"}},
        {"q": {**QUANTIZER, "name": 3}},
        {"a.__class__": QUANTIZER},
        {"forward": QUANTIZER},
    ],
)
def test_quantizers_that_do_not_fit_are_refused(found: object) -> None:
    with pytest.raises(FileFormatError):
        decode_quantizers(found)
    assert list(decode_quantizers({"q": QUANTIZER})) == ["q"]


def test_quantizers_of_older_files_are_affine_and_of_inputs() -> None:
    entry = {
        "class": "ActivationQuantizer",
        "name": "x",
        "formats": ["uint8"],
        "ranges": {},
        "active": None,
    }
    for found, expected in ((entry, False), ({**entry, "is_symmetric": True}, True)):
        quantizer = decode_quantizers({"q": found})["q"]
        assert isinstance(quantizer, ActivationQuantizer)
        assert quantizer.is_symmetric is expected
        assert not quantizer.is_output


@pytest.mark.parametrize(
    "change",
    [
        {"role": "code"},
        {"role": None},
        {"requires_grad": 1},
        {"requires_grad": True, "persistent": True},
    ],
)
def test_roles_that_do_not_fit_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    writer = TensorWriter()
    entry = {**writer.add("x", torch.ones(2)), "role": "parameter", "requires_grad": True}
    reader = TensorReader(tmp_path, writer.write(tmp_path), CPU)
    with pytest.raises(FileFormatError):
        attach(nn.Module(), {}, {"x": {**entry, **change}}, reader)
    for names in (["__dict__"], ["forward"], ["a.__class__"], ["a", "a.b"], ["a.b", "a"]):
        with pytest.raises(FileFormatError):
            attach(nn.Module(), {}, dict.fromkeys(names, entry), reader)
    for malformed in ([], {"x": 3}):
        with pytest.raises(FileFormatError):
            attach(nn.Module(), {}, malformed, reader)


def test_integers_have_no_gradients(tmp_path: Path) -> None:
    writer = TensorWriter()
    entry = {**writer.add("x", torch.ones(2, dtype=torch.int8)), "role": "parameter"}
    reader = TensorReader(tmp_path, writer.write(tmp_path), CPU)
    with pytest.raises(FileFormatError, match="torch.int8, which has no gradients"):
        attach(nn.Module(), {}, {"x": {**entry, "requires_grad": True}}, reader)


def test_paths_of_modules_are_made_once() -> None:
    root = nn.Module()
    made = make_module(root, "a.b")
    assert make_module(root, "a.b") is made is root.a.b
    assert make_module(root, "") is root
