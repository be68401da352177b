from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxmpq.graph.batches import flat_inputs
from fxmpq.graph.run import run_batch
from fxmpq.targets.inductor.program import dequantized, inductor_program
from fxmpq.targets.inductor.rewrite import QUANTIZE
from fxmpq.targets.qdq import active_quantizers

Made = Callable[..., fx.GraphModule]


def test_it_computes_the_bits_of_the_simulation_on_flat_inputs(
    planned: fx.GraphModule,
    images: list[Tensor],
    calibrated: Made,
    uniform: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    bert = uniform(calibrated(bert_graph, token_batches, "inductor"))
    for graph, batch in ((planned, images[1]), (bert, token_batches[1])):
        found = inductor_program(graph).graph(*flat_inputs(graph, batch))
        assert torch.equal(found[0], run_batch(graph, batch)[0])


def test_marks_find_every_quantized_layer(planned: fx.GraphModule) -> None:
    program = inductor_program(planned)
    found = [name for mark, names in program.marks.items() if mark for name in names]
    assert sorted(found) == ["conv1", "conv2", "downsample.0", "stem.0"]
    tensors = dict(program.graph.named_buffers())
    assert all(mark in tensors for mark in program.marks if mark)


def test_makers_of_codes_are_found_by_the_quantizers_they_are_made_of(
    planned: fx.GraphModule,
) -> None:
    program = inductor_program(planned)
    assert list(program.quantizers) == active_quantizers(planned)
    nodes = {node.name: node for node in planned.graph.nodes}
    for name, maker in program.quantizers.items():
        assert maker.target is QUANTIZE
        assert maker.args[0].name == nodes[name].args[0].name
        scale, zero_point = maker.args[1:3]
        codes = torch.tensor([0, 255], dtype=torch.uint8)
        expected = (torch.tensor([0.0, 255.0]) - zero_point) * scale
        assert torch.equal(dequantized(codes, maker), expected)


def test_convolutions_of_one_element_are_told(
    planned: fx.GraphModule,
    calibrated: Made,
    uniform: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    assert inductor_program(planned).is_pointwise
    bert = uniform(calibrated(bert_graph, token_batches, "inductor"))
    assert not inductor_program(bert).is_pointwise


def test_the_planned_graph_is_left_alone(planned: fx.GraphModule, images: list[Tensor]) -> None:
    before, names = run_batch(planned, images[0])[0], set(planned.state_dict())
    inductor_program(planned)
    assert torch.equal(run_batch(planned, images[0])[0], before)
    assert set(planned.state_dict()) == names
