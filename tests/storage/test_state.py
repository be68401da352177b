from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FileFormatError
from fxmpq.formats import Precision
from fxmpq.graph.state import GraphState, Refinement, copy_graph, state_of
from fxmpq.graph.switch import switch_group
from fxmpq.graph.trace import trace
from fxmpq.storage.state import check_state, decode_state, encode_state
from fxmpq.storage.tensors import TensorReader, TensorWriter

CPU = torch.device("cpu")


def through_file(state: GraphState, folder: Path) -> GraphState:
    writer = TensorWriter()
    stored = json.loads(json.dumps(encode_state(state, writer), allow_nan=False))
    return decode_state(stored, TensorReader(folder, writer.write(folder), CPU))


def test_every_field_comes_back(planned: fx.GraphModule, tmp_path: Path) -> None:
    refinements = (Refinement("round", "conv1", 0.5, 0.25), Refinement("tune", "", 1.0, 0.0))
    state = replace(state_of(planned), refinements=refinements)
    found = through_file(state, tmp_path)
    for field in fields(GraphState):
        if field.name != "example":
            assert getattr(found, field.name) == getattr(state, field.name), field.name
    assert all(
        isinstance(mine, Tensor) and isinstance(theirs, Tensor) and mine.equal(theirs)
        for mine, theirs in zip(found.example, state.example, strict=True)
    )
    assert found.groups
    assert found.choices
    assert found.calibrated


class Flagged(nn.Module):
    def forward(self, x: Tensor, power: float, name: str | None) -> Tensor:
        return x**power


def test_inputs_that_are_no_tensors_come_back(tmp_path: Path) -> None:
    graph = trace(Flagged(), (torch.ones(2, 3), 2.0, None))
    found = through_file(state_of(graph), tmp_path)
    assert found.example[1:] == (2.0, None)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 3},
        {"groups": [{}]},
        {"calibrated": "yes"},
        {"fingerprint": None},
        {"choices": {"conv1": 3}},
        {"call_spec": {}},
        {"example": None},
        {"example": [3]},
        {"example": [{"tensor": {"key": "/etc/passwd"}}]},
        {"example": [{"value": {"eval": "1"}}]},
        {"more": 1},
    ],
)
def test_fields_that_do_not_fit_are_refused(
    planned: fx.GraphModule, change: dict[str, object], tmp_path: Path
) -> None:
    writer = TensorWriter()
    stored = encode_state(state_of(planned), writer)
    reader = TensorReader(tmp_path, writer.write(tmp_path), CPU)
    with pytest.raises(FileFormatError):
        decode_state({**stored, **change}, reader)
    with pytest.raises(FileFormatError, match="a state has call_spec and example"):
        decode_state([stored], reader)


def test_a_graph_fits_its_own_state(planned: fx.GraphModule, conv_graph: fx.GraphModule) -> None:
    check_state(planned, state_of(planned))
    check_state(conv_graph, state_of(conv_graph))


def test_a_graph_does_not_fit_another_state(
    planned: fx.GraphModule, conv_graph: fx.GraphModule, bert_graph: fx.GraphModule
) -> None:
    state = state_of(planned)
    group = state.groups[0]
    (layer, *_), name = group.layers, group.name
    wrong = [
        (planned, state_of(bert_graph)),
        (planned, replace(state, example=(torch.ones(2, 3, 16, 16, dtype=torch.int64),))),
        (planned, replace(state, example=(torch.ones(2),))),
        (planned, replace(state, groups=state.groups[1:])),
        (planned, replace(state, choices={"nothing": "w8a8"})),
        (planned, replace(state, choices={name: "w2a2"})),
        (planned, replace(state, target=None)),
        (conv_graph, replace(state_of(conv_graph), target="reference", groups=state.groups)),
    ]
    for changed in (
        replace(layer, node="nothing"),
        replace(layer, weight="nothing.weight"),
        replace(layer, weight_shape=(1, 2)),
        replace(layer, weight_quantizer="nothing"),
    ):
        groups = (replace(group, layers=(changed, *group.layers[1:])), *state.groups[1:])
        wrong.append((planned, replace(state, groups=groups)))
    for graph, other in wrong:
        with pytest.raises(FileFormatError):
            check_state(graph, other)


def test_calibrated_quantizers_have_their_ranges_and_scales(planned: fx.GraphModule) -> None:
    state = state_of(planned)
    for kind in ("activation_quantizers", "layers"):
        graph = copy_graph(planned)
        group = next(found for found in state.groups if getattr(found, kind))
        if kind == "layers":
            quantizer = graph.get_submodule(str(group.layers[0].weight_quantizer))
            delattr(quantizer, f"scale_{quantizer.formats[0].name}")
        else:
            graph.get_submodule(group.activation_quantizers[0]).ranges = {}
        with pytest.raises(FileFormatError, match="lacks a range|lacks scale_"):
            check_state(graph, state)
        for other in state.groups:
            switch_group(graph, other, Precision())
        check_state(graph, replace(state, calibrated=False, choices={}))
