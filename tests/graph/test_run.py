from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.graph.run import ShapeRecorder, flatten_outputs, float_outputs, record_shapes, run_batch
from fxmpq.graph.trace import trace


def test_float_tensors_are_found_in_nested_outputs() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3).half()
    outputs = (a, [b, None, 3], {"x": c, "y": torch.ones(1, dtype=torch.long)}, "text")
    found = float_outputs(outputs)
    assert [tensor.shape[0] for tensor in found] == [1, 2, 3]
    assert float_outputs(torch.ones(1).long()) == []


def test_outputs_are_concatenated_per_sample() -> None:
    one, other = torch.arange(4.0).reshape(2, 2), torch.arange(12.0).reshape(2, 3, 2)
    flat = flatten_outputs((one, other, torch.tensor(5.0), torch.ones(3)), 2)
    assert flat.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5], [2, 3, 6, 7, 8, 9, 10, 11]]


def test_outputs_without_floats_are_an_error() -> None:
    with pytest.raises(FxmpqError, match="returns no floating-point tensor"):
        flatten_outputs([torch.ones(2).long(), torch.tensor(1.0)], 2)


def test_a_batch_gives_the_models_flat_outputs(
    bert: nn.Module, bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    for batch in token_batches:
        (logits,) = run_batch(bert_graph, batch)
        assert isinstance(logits, Tensor)
        assert not logits.requires_grad
        with torch.no_grad():
            assert torch.allclose(logits, bert(**batch).logits, atol=1e-5)


def test_shapes_are_those_of_the_example() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1)

    graph = trace(Pair(), torch.ones(7, 3, 4))
    shapes = [node.meta.get("example_shape") for node in graph.graph.nodes]
    assert shapes == [(2, 3, 4), (2, 4), None]
    ShapeRecorder(graph).run(torch.ones(5, 3, 4), enable_io_processing=False)
    assert graph.graph.find_nodes(op="placeholder")[0].meta["example_shape"] == (5, 3, 4)
    record_shapes(graph)
    assert graph.graph.find_nodes(op="placeholder")[0].meta["example_shape"] == (2, 3, 4)
