from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.calibration.calibrate import calibrate
from fxmpq.errors import FxmpqError, PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import Group, copy_graph, node_shape, require, require_groups, state_of
from fxmpq.graph.trace import trace
from fxmpq.sensitivity.measure import measure
from fxmpq.steps import cost
from fxmpq.targets.reference import REFERENCE


def test_a_plain_module_has_no_state(conv_net: nn.Module) -> None:
    with pytest.raises(FxmpqError, match="found ConvNet; call fxmpq.trace"):
        state_of(conv_net)
    with pytest.raises(FxmpqError, match="found ReLU; call fxmpq.trace"):
        state_of(fx.symbolic_trace(nn.ReLU()))


def test_a_missing_step_is_named(conv_graph: fx.GraphModule) -> None:
    assert require(conv_graph, stage="traced").target is None
    with pytest.raises(FxmpqError, match=r"call fxmpq.prepare\(graph, target\) first"):
        require(conv_graph, stage="prepared")
    with pytest.raises(FxmpqError, match=r"call fxmpq.prepare\(graph, target\) first"):
        require(conv_graph, stage="calibrated")
    prepared = insert_quantizers(conv_graph, REFERENCE.rules)
    assert require(prepared, stage="prepared").target == "reference"
    with pytest.raises(FxmpqError, match=r"call fxmpq.calibrate\(graph, batches\) first"):
        require(prepared, stage="calibrated")


def test_nothing_to_quantize_is_told_before_measuring_and_solving() -> None:
    graph = insert_quantizers(trace(nn.Hardswish(), torch.randn(2, 3)), REFERENCE.rules)
    for stage in ("prepared", "traced"):
        with pytest.raises(FxmpqError, match="the graph has nothing to quantize"):
            require_groups(graph, stage=stage)
    with pytest.raises(FxmpqError, match="the graph has nothing to quantize"):
        cost(graph)
    with pytest.raises(FxmpqError, match="the graph has nothing to quantize"):
        measure(calibrate(graph, [torch.randn(2, 3)], progress=False), [])


def test_a_copy_shares_tensors_and_nothing_else(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    duplicate = copy_graph(conv_graph)
    assert state_of(duplicate) is state_of(conv_graph)
    own, others = dict(conv_graph.named_parameters()), dict(duplicate.named_parameters())
    assert own.keys() == others.keys()
    assert all(own[name].data_ptr() == others[name].data_ptr() for name in own)
    assert all(own[name].stride() == others[name].stride() for name in own)
    assert not set(conv_graph.graph.nodes) & set(duplicate.graph.nodes)
    before = len(conv_graph.graph.nodes)
    for node in reversed(list(duplicate.graph.nodes)):
        if node.target is torch.ops.aten.relu.default:
            node.replace_all_uses_with(node.args[0])
            duplicate.graph.erase_node(node)
    duplicate.recompile()
    assert len(conv_graph.graph.nodes) == before > len(duplicate.graph.nodes)
    with torch.no_grad():
        assert not duplicate(images[0]).equal(conv_graph(images[0]))


def test_a_copy_of_a_copy_is_called_like_the_model(
    bert: nn.Module, bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    duplicate = copy_graph(copy_graph(bert_graph))
    with torch.no_grad():
        found = duplicate(**token_batches[0])
        assert type(found) is type(bert(**token_batches[0]))
        assert found.logits.equal(bert_graph(**token_batches[0]).logits)


def test_a_group_knows_its_candidates() -> None:
    group = Group("conv1", (), (Precision(4, 8), Precision(8, 8)))
    assert group.candidate("w8a8") == group.candidate(Precision(8, 8)) == Precision(8, 8)
    with pytest.raises(FxmpqError, match="'conv1' has no candidate w2a8; it has w4a8, w8a8"):
        group.candidate("w2a8")
    with pytest.raises(PrecisionError, match="cannot read"):
        group.candidate("eight bits")


def test_groups_are_found_by_name(conv_graph: fx.GraphModule) -> None:
    state = require(insert_quantizers(conv_graph, REFERENCE.rules), stage="prepared")
    assert state.group("fc").layers[0].name == "fc"


def test_the_example_is_two_samples(conv_graph: fx.GraphModule) -> None:
    state = state_of(conv_graph)
    (example,) = state.example
    assert isinstance(example, Tensor)
    assert example.shape == (2, 3, 16, 16)
    assert state.dynamic


def test_nodes_without_a_tensor_have_no_shape(conv_graph: fx.GraphModule) -> None:
    shapes = {node.op: node_shape(node) for node in conv_graph.graph.nodes}
    assert shapes["placeholder"] == (2, 3, 16, 16)
    assert shapes["output"] is None
