from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import TargetError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import Layer, require
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.targets.qdq import (
    active_quantizers,
    layers_of,
    put_instead,
    rewrite_quantizers,
    stored_codes,
    to_qdq,
)
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]

WIDTHS = [Precision(bits, 8) for bits in (2, 3, 4, 6, 8)]


def agreement(graph: fx.GraphModule, batch: object, **options: frozenset[int]) -> float:
    expected, found = run_batch(graph, batch), run_batch(to_qdq(graph, **options), batch)
    return agreement_db(
        [leaf for leaf in expected if isinstance(leaf, Tensor)],
        [leaf for leaf in found if isinstance(leaf, Tensor)],
    )


def calls(graph: fx.GraphModule, operator: str) -> list[fx.Node]:
    target = getattr(torch.ops.fxmpq, operator).default
    return [node for node in graph.graph.nodes if node.target is target]


@pytest.fixture(scope="module")
def planned(
    calibrated: Made, in_turn: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return in_turn(calibrated(conv_graph, images, candidates=WIDTHS))


def test_it_computes_what_the_simulation_does(
    in_turn: Made,
    planned: fx.GraphModule,
    calibrated: Made,
    images: list[Tensor],
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    assert agreement(planned, images[1]) > 120
    bert = in_turn(calibrated(bert_graph, token_batches, candidates=WIDTHS))
    assert agreement(bert, token_batches[1]) > 120


def test_operators_carry_the_indices_of_quantizers_and_layers(planned: fx.GraphModule) -> None:
    graph = to_qdq(planned)
    assert not any(node.op == "call_module" for node in graph.graph.nodes)
    names = active_quantizers(planned)
    assert len(names) == 4
    rounded = calls(graph, "fake_quantize")
    assert [node.args[4] for node in rounded] == [0, 1, 2, 3]
    # Each comes in its quantizer's place: behind the input, the pooling, two more tensors.
    quantized = [str(next(iter(n.all_input_nodes)).name) for n in rounded]
    nodes = {node.name: node for node in planned.graph.nodes}
    assert quantized == [nodes[name].args[0].name for name in names]
    stored = {node.args[2]: node.args[1] for node in calls(graph, "widened_codes")}
    found = {
        index: precision.weight_bits for index, (_, precision) in enumerate(layers_of(planned))
    }
    assert stored == found
    assert sorted(set(stored.values())) == [2, 3, 4, 6]


def test_codes_are_integers_of_their_width(planned: fx.GraphModule) -> None:
    graph = to_qdq(planned)
    tensors = graph.state_dict()
    for node in calls(graph, "widened_codes"):
        codes = tensors[str(node.args[0].target)]
        found = NumberFormat(node.args[1])
        assert codes.dtype is torch.int8
        assert found.qmin <= int(codes.min()) <= int(codes.max()) <= found.qmax
    floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    assert all(name.startswith("scale_") or "bias" in name for name in floats)


def test_the_planned_graph_is_left_alone(planned: fx.GraphModule, images: list[Tensor]) -> None:
    before, names = run_batch(planned, images[0])[0], set(planned.state_dict())
    to_qdq(planned)
    assert torch.equal(run_batch(planned, images[0])[0], before)
    assert set(planned.state_dict()) == names


def test_only_linear_layers_on_float_input_are_read_narrow(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    candidates = [Precision(4), Precision(6), Precision(4, 8)]
    graph = calibrated(conv_graph, images, candidates=candidates)
    groups = [group.name for group in require(graph, stage="calibrated").groups]
    for choice, expected in (("w4", 1), ("w6", 0), ("w4a8", 0)):
        chosen = with_choices(graph, dict.fromkeys(groups, choice))
        rewritten = to_qdq(chosen, frozenset({2, 4}))
        assert len(calls(rewritten, "stored_numbers")) == expected
        assert len(calls(rewritten, "widened_codes")) == 5 - expected
        assert agreement(chosen, images[0], narrow=frozenset({2, 4})) > 120


class Table(nn.Module):
    """An embedding in front of a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(9, 6), nn.Linear(6, 5)
        self.conv = nn.Conv1d(3, 4, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.conv(self.table(ids)))


@pytest.mark.parametrize("precision", ["w4b3", "w4b4", "w2b16", "w4t", "w8"])
def test_all_granularities_of_scales(calibrated: Made, uniform: Made, precision: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(9, (4, 3))
    candidates = [Precision.parse(precision)]
    graph = uniform(calibrated(trace(Table(), ids), [ids], candidates=candidates))
    assert agreement(graph, ids) > 120
    assert agreement(graph, ids, narrow=frozenset({2, 4, 8})) > 120


@pytest.mark.parametrize("precision", ["w4b4", "w4b5", "w8b3a8", "w4"])
def test_all_layouts_of_weights(calibrated: Made, uniform: Made, precision: str) -> None:
    """Transposed convolutions have their channels second, and blocks run along what is left."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5)
    layers = [
        nn.Conv1d(4, 6, 3),
        nn.ConvTranspose1d(6, 5, 3),
        nn.ConvTranspose1d(5, 4, 2),
        nn.ConvTranspose1d(4, 8, 3, groups=2),
    ]
    candidates = [Precision.parse(precision)]
    traced = trace(nn.Sequential(*layers).eval(), x)
    graph = uniform(calibrated(traced, [x], candidates=candidates))
    assert {layer.kind for layer, _ in layers_of(graph)} == {"conv", "conv_transpose"}
    assert agreement(graph, x) > 120


def test_rows_find_their_ranges_at_every_run(
    calibrated: Made,
    uniform: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    candidates = [Precision.parse("w8a8dt"), Precision.parse("w8a8d")]
    graph = calibrated(bert_graph, token_batches, candidates=candidates)
    plan = uniform(graph, 1)
    assert agreement(plan, token_batches[1]) > 100
    rewritten = to_qdq(plan)
    numbers = [node.args[2] for node in calls(rewritten, "fake_quantize_rows")]
    assert numbers == list(range(len(active_quantizers(plan))))
    with pytest.raises(
        TargetError, match="is of the whole tensor; this target finds those of rows"
    ):
        to_qdq(uniform(graph, 0))
    for module in plan.modules():
        if isinstance(module, ActivationQuantizer):
            module.is_symmetric = True
    with pytest.raises(TargetError, match="is symmetric; this target"):
        to_qdq(plan)


def test_each_kind_of_quantizer_is_rewritten_in_ones_own_way(
    planned: fx.GraphModule, images: list[Tensor]
) -> None:
    """Rounding left out, and weights as the simulation has them: activations are float then."""
    seen: list[str] = []

    def leave_out(
        graph: fx.GraphModule, node: fx.Node, quantizer: ActivationQuantizer, index: int
    ) -> None:
        assert active_quantizers(planned)[index] == node.name
        seen.append(quantizer.name)
        put_instead(graph, node, node.args[0])

    def store(
        graph: fx.GraphModule,
        node: fx.Node,
        place: tuple[Layer, Precision],
        quantizer: WeightQuantizer,
        index: int,
    ) -> None:
        assert layers_of(planned)[index] == place
        codes, scale, number_format = stored_codes(graph, quantizer)
        assert number_format == place[1].weight
        assert codes.shape == place[0].weight_shape
        assert scale.shape == codes.shape[:1]
        seen.append(place[0].name)

    found = rewrite_quantizers(planned, leave_out, store)
    assert len(seen) == len(active_quantizers(planned)) + len(layers_of(planned))
    assert 5 < agreement_db(run_batch(planned, images[1]), run_batch(found, images[1])) < 100
