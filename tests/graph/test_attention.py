from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.graph.attention import settle_attention, take_attention_apart
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph, node_shape
from fxmpq.graph.trace import trace
from fxmpq.targets.target import agreement_db

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


def fused(tensors: list[Tensor], **options: object) -> fx.GraphModule:
    """A graph of one call of fused attention, with the notes that a trace has."""
    graph = fx.Graph()
    nodes = []
    for index, tensor in enumerate(tensors):
        node = graph.placeholder(f"input_{index}")
        node.meta = {"val": tensor.to("meta"), "example_shape": tensor.shape}
        nodes.append(node)
    call = graph.call_function(ATTENTION, tuple(nodes), options)
    call.meta = {
        "val": ATTENTION(*tensors, **options).to("meta"),
        "nn_module_stack": {"a": ("block.attention", nn.Module)},
    }
    call.meta["example_shape"] = call.meta["val"].shape
    graph.output(call)
    return fx.GraphModule(nn.Module(), graph)


def taken_apart(graph: fx.GraphModule) -> fx.GraphModule:
    taken = take_attention_apart(graph)
    assert len(taken) == 1
    settle_attention(graph, taken, lambda entry: True)
    graph.graph.lint()
    assert not graph.graph.find_nodes(op="call_function", target=ATTENTION)
    return graph


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(kind: str, rows: int, columns: int, seed: int) -> Tensor | None:
    values = draw(2, 1, rows, columns, seed=seed)
    if kind == "boolean":
        allowed = values > 0
        allowed[0, 0, 0] = False  # nothing is left of this row
        return allowed
    if kind == "additive":
        return values
    if kind == "infinite":
        return torch.zeros_like(values).masked_fill(values > 0.5, -math.inf)
    if kind == "smallest":
        return torch.zeros_like(values).masked_fill(values > 0.5, torch.finfo(torch.float32).min)
    return None


@given(
    *(st.integers(1, 6) for _ in range(4)),
    st.sampled_from(["none", "causal", "boolean", "additive", "infinite", "smallest"]),
    st.sampled_from([None, 0.25, 2.0]),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 10),
)
def test_the_parts_compute_what_the_fused_operator_does(
    rows: int,
    columns: int,
    width: int,
    out: int,
    mask: str,
    scale: float | None,
    shared: int,
    seed: int,
) -> None:
    query = draw(2, 2 * shared, rows, width, seed=seed)
    key = draw(2, 2, columns, width, seed=seed + 1)
    value = draw(2, 2, columns, out, seed=seed + 2)
    tensors = [query, key, value]
    found = mask_of(mask, rows, columns, seed)
    tensors += [] if found is None else [found]
    options = {"is_causal": mask == "causal", "scale": scale, "enable_gqa": shared > 1}
    graph = fused(tensors, **options)
    expected = graph(*tensors)
    for entry in (result := taken_apart(graph)).graph.nodes:
        if entry.op == "call_function":
            assert entry.meta["val"].shape == node_shape(entry)
    assert agreement_db([expected], [result(*tensors)]) >= 100


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 2, 5, 4)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_rank_is_taken_apart(shape: tuple[int, ...], is_causal: bool) -> None:
    tensors = [draw(*shape, seed=seed) for seed in range(3)]
    graph = fused(tensors, is_causal=is_causal)
    expected = graph(*tensors)
    assert agreement_db([expected], [taken_apart(graph)(*tensors)]) >= 100


def test_recorded_shapes_are_those_of_the_results() -> None:
    tensors = [draw(2, 4, 5, 3, seed=0), draw(2, 2, 6, 3, seed=1), draw(2, 2, 6, 7, seed=2)]
    graph = taken_apart(fused(tensors, is_causal=True, enable_gqa=True))
    shapes = {}

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.op == "call_function":
                shapes[n] = (result.shape, result.dtype)
            return result

    Look(graph).run(*tensors)
    assert shapes == {node: (node_shape(node), node.meta["val"].dtype) for node in shapes}
    assert len(shapes) > 8


def test_parts_keep_the_place_in_the_model() -> None:
    tensors = [draw(2, 3, 4, seed=seed) for seed in range(3)]
    graph = fused(tensors)
    (found,) = take_attention_apart(graph)
    assert (found.scores.name, found.context.name) == ("scores", "context")
    for node in (found.scores, found.context, found.result):
        assert node.meta["nn_module_stack"] == {"a": ("block.attention", nn.Module)}


def test_what_does_not_stay_apart_is_as_it_was(bert_graph: fx.GraphModule) -> None:
    graph = copy_graph(bert_graph)
    before = [(node.name, node.target, str(node.args)) for node in graph.graph.nodes]
    taken = take_attention_apart(graph)
    assert len(taken) == 2
    settle_attention(graph, taken, lambda entry: False)
    assert [(node.name, node.target, str(node.args)) for node in graph.graph.nodes] == before


def test_each_attention_is_settled_by_itself(
    bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    graph = copy_graph(bert_graph)
    taken = take_attention_apart(graph)
    settle_attention(graph, taken, lambda entry: entry is taken[1])
    assert len(graph.graph.find_nodes(op="call_function", target=ATTENTION)) == 1
    for batch in token_batches:  # of different lengths, with padding
        found, expected = run_batch(graph, batch), run_batch(bert_graph, batch)
        assert agreement_db(expected, found) >= 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_stay_fused(dtype: torch.dtype) -> None:
    graph = fused([draw(2, 3, 4, seed=seed).to(dtype) for seed in range(3)])
    assert take_attention_apart(graph) == []


def test_dropout_stays_fused() -> None:
    graph = fused([draw(2, 3, 4, seed=seed) for seed in range(3)], dropout_p=0.1)
    assert take_attention_apart(graph) == []


class Viewed(nn.Module):
    """Takes for granted that the fused operator returns heads behind positions in memory."""

    def __init__(self, *, permutes: bool) -> None:
        super().__init__()
        self.permutes = permutes

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        found = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        rows = found.permute(0, 2, 1, 3) if self.permutes else found.transpose(1, 2)
        return rows.view(x.shape)


@pytest.mark.parametrize("permutes", [False, True])
def test_readers_that_view_the_result_find_the_layout_they_ask_for(permutes: bool) -> None:
    x = draw(3, 5, 8, seed=0)
    graph = trace(Viewed(permutes=permutes), x)
    expected = graph(x)
    assert agreement_db([expected], [taken_apart(graph)(x)]) >= 100
