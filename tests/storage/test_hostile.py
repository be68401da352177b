from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from fxmpq.errors import FileFormatError
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.storage.load import load
from fxmpq.storage.save import FILE, save

Place = tuple[object, ...]
Change = Callable[[dict], None]


class Small(nn.Module):
    """Few nodes, yet arguments, keywords, slices, devices, constants and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x: Tensor, extra: dict) -> dict[str, Tensor]:
        hidden = self.first(x)[:, :2] + self.offset[:2]
        ones = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
        gelu = nn.functional.gelu(hidden, approximate="tanh")
        return {"a": gelu.clamp(max=float("inf")), "b": ones * extra["e"]}


@pytest.fixture(scope="module")
def content(
    tmp_path_factory: pytest.TempPathFactory, calibrated: Callable[..., fx.GraphModule]
) -> tuple[Path, dict]:
    batch = {"x": torch.randn(3, 4), "extra": {"e": torch.ones(3)}}
    graph = calibrated(trace(Small().eval(), batch), [batch], candidates=None)
    folder = save(graph, tmp_path_factory.mktemp("small"))
    return folder, json.loads((folder / FILE).read_text())


def places(found: object, path: Place = ()) -> Iterator[Place]:
    """Every place in nested data, the containers included."""
    yield path
    if isinstance(found, dict):
        for key, entry in found.items():
            yield from places(entry, (*path, key))
    elif isinstance(found, list):
        for index, entry in enumerate(found):
            yield from places(entry, (*path, index))


def distinct_places(found: dict) -> list[Place]:
    """One place of each kind: lists are told by their first entries of every operation."""
    kinds: dict[object, Place] = {}
    for path in places(found):
        if not path:
            continue
        kind: list[object] = [part for part in path if isinstance(part, str)]
        if path[0] == "nodes" and len(path) > 1:
            kind.append(found["nodes"][path[1]]["target"])
        if path[0] in ("tensors", "quantizers") and len(path) > 2:
            del kind[1]
        kinds.setdefault(str(kind), path)
    return list(kinds.values())


def put(found: dict, path: Place, value: object) -> dict:
    changed = copy.deepcopy(found)
    place = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return changed


def renamed(found: dict, path: Place, name: str) -> dict | None:
    """The same with another key, where the place is in an object."""
    changed = copy.deepcopy(found)
    place = changed
    for part in path[:-1]:
        place = place[part]
    if not isinstance(place, dict):
        return None
    place[name] = place.pop(path[-1])
    return changed


def attempt(folder: Path, changed: dict) -> bool:
    """Load and run; whether it was taken. Any error but a refusal fails the test."""
    (folder / FILE).write_text(json.dumps(changed))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = load(folder)
    except FileFormatError:
        return False
    inputs = state_of(graph).example
    with torch.no_grad():
        fx.Interpreter(graph).run(*inputs, enable_io_processing=False)
        graph(inputs[0], {"e": inputs[1]})
    return True


def test_no_text_in_the_file_becomes_code(content: tuple[Path, dict], tmp_path: Path) -> None:
    folder, found = content
    canary = tmp_path / "canary"
    call = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    refused = 0
    for path in distinct_places(found):
        for text in (f"x={call}", f'x"); {call}; ("', f"x': {call}, '"):
            # An operator may refuse the text as its argument.
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                refused += not attempt(folder, put(found, path, text))
            assert not canary.exists(), (path, text)
            other = renamed(found, path, text)
            if other is not None:
                refused += not attempt(folder, other)
                assert not canary.exists(), (path, text)
    assert refused > 300


@pytest.mark.parametrize("value", [None, 2**70, [], {}])
def test_damage_is_refused_and_nothing_else(content: tuple[Path, dict], value: object) -> None:
    folder, found = content
    refused = 0
    for path in distinct_places(found):
        (folder / FILE).write_text(json.dumps(put(found, path, value)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(folder)
        except FileFormatError:
            refused += 1
    assert refused > 70


def test_what_is_missing_is_told(content: tuple[Path, dict]) -> None:
    folder, found = content
    refused = 0
    for path in distinct_places(found):
        changed = copy.deepcopy(found)
        place = changed
        for part in path[:-1]:
            place = place[part]
        del place[path[-1]]
        (folder / FILE).write_text(json.dumps(changed))
        # What an operator can do without is as good as never stored.
        with contextlib.suppress(RuntimeError, TypeError, IndexError):
            refused += not attempt(folder, changed)
    assert refused > 70


def test_the_file_itself_is_taken(content: tuple[Path, dict]) -> None:
    folder, found = content
    assert attempt(folder, found)
    assert run_batch(load(folder), {"x": torch.ones(7, 4), "extra": {"e": torch.ones(7)}})
    assert len(distinct_places(found)) > 100


def _node(content: dict, operation: str) -> dict:
    return next(node for node in content["nodes"] if node["op"] == operation)


def _set(*path: object, value: object) -> Change:
    def change(content: dict) -> None:
        place = content
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


CHANGES: dict[str, Change] = {
    "no version": lambda content: content.pop("version"),
    "a later version": _set("version", value=2),
    "another schema": _set("schema", value="fxmpq.plan"),
    "an unknown field": _set("code", value="import os"),
    "no nodes": lambda content: content.pop("nodes"),
    "a traversing file": _set("tensor_file", value="../../other/tensors.safetensors"),
    "a shell": lambda c: _node(c, "call_function").update(target="os.system", args=["true"]),
    "eval": lambda c: _node(c, "call_function").update(target="builtins::eval", args=["1"]),
    "a file": lambda c: _node(c, "call_function").update(
        target="aten::from_file.default", args=["/etc/passwd"]
    ),
    "a dunder": lambda c: _node(c, "get_attr").update(target="fc.__class__"),
    "an injection": lambda c: _node(c, "get_attr").update(target='fc"), exit(), ("weight'),
    "a quantizer's code": lambda c: next(iter(c["quantizers"].values())).update(forward="x"),
    "another class": lambda c: next(iter(c["quantizers"].values())).update({"class": "Linear"}),
    "a method's name": lambda c: c["tensors"].update(forward=c["tensors"]["fc.weight"]),
    "a missing tensor": lambda c: c["tensors"].pop("fc.weight"),
    "another tensor": lambda c: c["tensors"]["fc.weight"].update(key="graph/fc.bias"),
    "another shape": _set("tensors", "fc.weight", "shape", value=[16, 5]),
    "an unreadable state": _set("state", value=None),
    "no groups": _set("state", "groups", value=[]),
    "a quantizer less": lambda c: c["quantizers"].pop(next(iter(c["quantizers"]))),
    "a quantizer within a tensor": lambda c: c["quantizers"].update(
        {"fc.weight": next(iter(c["quantizers"].values()))}
    ),
    "a quantizer within a quantizer": lambda c: c["quantizers"].update(
        {f"{name}.name": entry for name, entry in list(c["quantizers"].items())[:1]}
    ),
    "other inputs": _set("call", "inputs", "children", value=["*", "*"]),
    "deep nesting": lambda c: _node(c, "call_function").update(
        args=json.loads("[" * 500 + "]" * 500)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_files_are_refused(saved, name: str) -> None:  # noqa: ANN001
    content = saved.read()
    CHANGES[name](content)
    with pytest.raises(FileFormatError):
        load(saved.write(content))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": "fxmpq.graph"}', "\udcff"])
def test_damaged_json_is_told(saved, text: str) -> None:  # noqa: ANN001
    (saved.folder / "graph.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FileFormatError):
        load(saved.folder)


def test_nesting_without_end_is_told(saved) -> None:  # noqa: ANN001
    text = json.dumps(saved.read()).replace('"nodes": [', '"nodes": ' + "[" * 100_000, 1)
    (saved.folder / "graph.json").write_text(text)
    with pytest.raises(FileFormatError):
        load(saved.folder)


def test_a_tensor_file_of_another_graph_is_told(saved) -> None:  # noqa: ANN001
    (file,) = saved.folder.glob("*.safetensors")
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(FileFormatError, match="is damaged"):
        load(saved.folder)
    file.unlink()
    with pytest.raises(FileFormatError, match="is missing"):
        load(saved.folder)
