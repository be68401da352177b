from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph
from fxmpq.targets.lowering import lower
from fxmpq.targets.program import free_limits, move_to_cpu, rewritten_program

Made = Callable[..., fx.GraphModule]


@pytest.fixture(scope="module")
def planned(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return uniform(calibrated(conv_graph, images))


def test_sizes_that_were_free_stay_free(
    calibrated: Made, bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    prepared = calibrated(bert_graph, token_batches, exclude=["*"])
    program = rewritten_program(lower(prepared))
    ids = torch.randint(1, 40, (3, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = program.module(check_guards=False)(**batch)
    assert torch.allclose(found.logits, run_batch(prepared, batch)[0], atol=1e-5)


def test_free_sizes_get_limits(bert_graph: fx.GraphModule, conv_graph: fx.GraphModule) -> None:
    # Its embeddings have 12 positions.
    limits = free_limits(bert_graph, {0: 8, 1: 512})
    assert limits == [{0: 8, 1: 12}, {0: 8, 1: 12}]
    assert free_limits(conv_graph, {0: 8, 1: 512}) == [{0: 8}]
    # An example that is larger is taken as it is.
    assert free_limits(conv_graph, {0: 1, 1: 1}) == [{0: 2}]
    program = rewritten_program(lower(bert_graph), limits)
    bounds = {int(found.upper) for found in program.range_constraints.values()}
    assert bounds == {8, 12}


def test_fixed_sizes_stay_fixed(conv_graph: fx.GraphModule) -> None:
    program = rewritten_program(lower(conv_graph))
    (name,) = program.graph_signature.user_inputs
    (shape,) = [node.meta["val"].shape for node in program.graph.nodes if node.name == name]
    assert [isinstance(size, int) for size in shape] == [False, True, True, True]
    assert list(shape[1:]) == [3, 16, 16]


def test_moving_to_the_cpu_moves_no_shared_tensor(planned: fx.GraphModule) -> None:
    shared = copy_graph(planned)
    with shared.graph.inserting_before(shared.graph.output_node()):
        constant = shared.graph.call_function(
            torch.ops.aten.zeros.default, ([2],), {"device": torch.device("meta")}
        )
    mine = dict(planned.named_parameters())
    move_to_cpu(shared)
    assert constant.kwargs["device"] == torch.device("cpu")
    moved = dict(shared.named_parameters())
    assert mine
    for name, parameter in mine.items():
        assert moved[name] is not parameter
        assert torch.equal(moved[name], parameter)
        assert dict(planned.named_parameters())[name] is parameter
