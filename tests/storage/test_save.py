from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.errors import FileFormatError, FxmpqError
from fxmpq.graph.state import copy_graph
from fxmpq.graph.trace import trace
from fxmpq.storage.load import load
from fxmpq.storage.save import FILE, SCHEMA, VERSION, save


def test_a_folder_has_one_file_of_json_and_one_of_tensors(
    planned: fx.GraphModule, tmp_path: Path
) -> None:
    folder = save(planned, tmp_path / "a" / "b")
    names = sorted(file.name for file in folder.iterdir())
    assert names[0] == FILE
    assert len(names) == 2
    content = json.loads((folder / FILE).read_text())
    assert (content["schema"], content["version"]) == (SCHEMA, VERSION)
    assert content["tensor_file"] == names[1]
    (tmp_path / "again").mkdir()
    save(planned, str(tmp_path / "again"))
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_saving_changes_nothing(
    planned: fx.GraphModule, images: list[Tensor], tmp_path: Path
) -> None:
    before = planned(images[0])
    tensors = {name: tensor.clone() for name, tensor in planned.state_dict().items()}
    save(planned, tmp_path)
    assert planned(images[0]).equal(before)
    assert all(tensor.equal(tensors[name]) for name, tensor in planned.state_dict().items())


def test_saving_again_replaces_the_graph_and_nothing_else(
    planned: fx.GraphModule, conv_graph: fx.GraphModule, images: list[Tensor], tmp_path: Path
) -> None:
    save(planned, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save(conv_graph, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert load(tmp_path)(images[0]).equal(conv_graph(images[0]))


def test_a_loaded_graph_is_saved_to_the_same_bytes(planned: fx.GraphModule, tmp_path: Path) -> None:
    first = save(planned, tmp_path / "first")
    second = save(load(first), tmp_path / "second")
    for file in first.iterdir():
        assert (second / file.name).read_bytes() == file.read_bytes()
    save(load(first), first)
    assert {file.name for file in first.iterdir()} == {file.name for file in second.iterdir()}


@pytest.mark.parametrize("interrupted", ["write_text", "replace"])
def test_an_interrupted_save_leaves_the_old_graph(
    planned: fx.GraphModule,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: str,
) -> None:
    save(planned, tmp_path)
    real = getattr(Path, interrupted)

    def interrupt(self: Path, *args: object, **kwargs: object) -> object:
        if self.name.startswith(FILE):
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, interrupted, interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(conv_graph, tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    assert load(tmp_path)(images[0]).equal(planned(images[0]))
    save(conv_graph, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_graph_is_told(conv_net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FxmpqError, match="call fxmpq.trace"):
        save(conv_net, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_converted_graphs_are_saved_by_convert(
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    calibrated: Callable[..., fx.GraphModule],
    uniform: Callable[..., fx.GraphModule],
    tmp_path: Path,
) -> None:
    converted = fxmpq.convert(uniform(calibrated(conv_graph, images)), "reference").module
    assert isinstance(converted, fx.GraphModule)
    with pytest.raises(FileFormatError, match=r"Save it before fxmpq.convert"):
        save(converted, tmp_path / "x")
    assert not (tmp_path / "x").exists()


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


def test_control_flow_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="node 'cond': a stored graph cannot call 'cond'"):
        save(trace(Branches(), torch.ones(2, 3)), tmp_path)


def test_operators_of_others_are_named(conv_graph: fx.GraphModule, tmp_path: Path) -> None:
    graph = copy_graph(conv_graph)
    relu = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.relu.default)
    relu.target = torch.nn.functional.relu
    with pytest.raises(FileFormatError, match="node 'relu_': a stored graph cannot call"):
        save(graph, tmp_path)
