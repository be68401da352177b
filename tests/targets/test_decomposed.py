from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.decomposed import to_decomposed
from fxmpq.targets.qdq import active_quantizers, layers_of
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]

DECOMPOSED = torch.ops.quantized_decomposed
QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
DEQUANTIZE_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default
WIDTHS = [Precision(bits, 8) for bits in (2, 3, 4, 6, 8)]


def calls(graph: fx.GraphModule, target: object) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target is target]


def outputs(graph: fx.GraphModule, batch: object) -> list[Tensor]:
    return [leaf for leaf in run_batch(graph, batch) if isinstance(leaf, Tensor)]


def assert_equal(graph: fx.GraphModule, planned: fx.GraphModule, batch: object) -> None:
    pairs = zip(outputs(graph, batch), outputs(planned, batch), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.fixture(scope="module")
def planned(
    calibrated: Made, in_turn: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return in_turn(calibrated(conv_graph, images, "openvino", candidates=WIDTHS))


@pytest.fixture(scope="module")
def planned_bert(
    calibrated: Made,
    in_turn: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> fx.GraphModule:
    candidates = [*WIDTHS, Precision(4), Precision()]
    return in_turn(calibrated(bert_graph, token_batches, candidates=candidates))


@pytest.mark.parametrize("signed", [False, True])
def test_it_computes_the_bits_of_the_simulation(
    signed: bool,
    planned: fx.GraphModule,
    images: list[Tensor],
    planned_bert: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    assert_equal(to_decomposed(planned, signed=signed), planned, images[1])
    assert_equal(to_decomposed(planned_bert, signed=signed), planned_bert, token_batches[1])


def test_codes_are_made_once_and_read_through_an_own_dequantization(
    planned: fx.GraphModule, planned_bert: fx.GraphModule
) -> None:
    for source, most in ((planned, 1), (planned_bert, 3)):
        graph = to_decomposed(source, signed=False)
        made = calls(graph, QUANTIZE)
        readers = {node.name: node for node in source.graph.nodes}
        expected = [len(readers[name].users) for name in active_quantizers(source)]
        assert [len(node.users) for node in made] == expected
        assert max(expected) == most
        read = [user for node in made for user in node.users]
        assert set(read) == set(calls(graph, DEQUANTIZE))
        assert all(len(node.users) == 1 for node in read)
        assert all(node.args[1:] == node.args[0].args[1:] for node in read)


def test_codes_are_those_of_the_plan_or_128_less(planned: fx.GraphModule) -> None:
    unsigned, signed = (to_decomposed(planned, signed=value) for value in (False, True))
    pairs = zip(calls(unsigned, QUANTIZE), calls(signed, QUANTIZE), strict=True)
    for one, other in pairs:
        _, scale, zero_point, *limits = one.args
        assert limits == [0, 255, torch.uint8]
        assert list(other.args[1:]) == [scale, zero_point - 128, -128, 127, torch.int8]


def test_weights_are_codes_behind_their_channels_scales(planned: fx.GraphModule) -> None:
    graph = to_decomposed(planned, signed=True)
    assert not any(node.op == "call_module" for node in graph.graph.nodes)
    tensors = graph.state_dict()
    nodes = {node.name: node for node in graph.graph.nodes}
    for layer, precision in layers_of(planned):
        weight = nodes[layer.node].args[1]
        assert weight.target is DEQUANTIZE_WEIGHT
        codes, scales, zero_points, axis, *limits = weight.args
        assert (axis, *limits) == (0, precision.weight.qmin, precision.weight.qmax, torch.int8)
        stored = tensors[str(codes.target)]
        assert stored.dtype is torch.int8
        assert limits[0] <= int(stored.min()) <= int(stored.max()) <= limits[1]
        assert tensors[str(scales.target)].shape == (stored.shape[0],)
        assert not tensors[str(zero_points.target)].any()
    floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    assert all(name.startswith("scales_") or "bias" in name for name in floats)


def test_tables_are_looked_up_in_codes(planned_bert: fx.GraphModule) -> None:
    graph = to_decomposed(planned_bert, signed=False)
    tensors = graph.state_dict()
    tables = [
        tensors[str(node.args[0].target)].dtype
        for node in calls(graph, torch.ops.aten.embedding.default)
        if "codes" in str(node.args[0].target)
    ]
    assert tables == [torch.int8] * 3


class Several(nn.Module):
    """A table, a transposed convolution and a convolution of one channel, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.up, self.conv = nn.ConvTranspose1d(3, 4, 2), nn.Conv1d(4, 1, 1)
        self.fc = nn.Linear(7, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.conv(self.up(self.table(ids))))


class Blocks(nn.Module):
    """Layers whose last blocks are not full."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.fc = nn.Embedding(9, 7), nn.Conv1d(3, 4, 2), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.conv(self.table(ids)))


@pytest.mark.parametrize("precision", ["w4a8dt", "w8b4a8dt", "w2b6"])
def test_rows_and_whole_blocks_have_operators_of_their_own(
    calibrated: Made, uniform: Made, precision: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 12) + 1
    wanted = Precision.parse(precision)
    model = nn.Sequential(nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 3))
    graph = calibrated(trace(model, x), [x], candidates=[wanted, Precision()])
    planned = with_choices(graph, {"0": precision, "2": "fp32"})
    rewritten = to_decomposed(planned, signed=True)
    # Their ranges are found in float64.
    assert agreement_db(outputs(planned, x), outputs(rewritten, x)) > 40
    of_rows = {DECOMPOSED.choose_qparams_per_token_asymmetric.default: 1}
    of_rows |= {
        DECOMPOSED.quantize_per_token.default: 1,
        DECOMPOSED.dequantize_per_token.default: 1,
    }
    is_blocked = "b" in precision
    blocks = {DECOMPOSED.dequantize_per_channel_group.default: int(is_blocked)}
    channels = {DEQUANTIZE_WEIGHT: int(not is_blocked)}
    for target, count in {**of_rows, **blocks, **channels}.items():
        is_of_rows = target in of_rows
        expected = count if wanted.activation is not None or not is_of_rows else 0
        assert len(calls(rewritten, target)) == expected
    (layer, _) = calls(rewritten, torch.ops.aten.linear.default)
    codes = layer.args[1].args[0]
    stored = rewritten.get_buffer(str(codes.target))
    assert (stored.dtype, stored.shape) == (torch.int8, (3, 12))


@pytest.mark.parametrize("precision", ["w4b4a8", "w2b5"])
def test_weights_in_blocks_are_cast_and_scaled(
    calibrated: Made, uniform: Made, precision: str
) -> None:
    torch.manual_seed(0)
    ids = torch.randint(9, (4, 3))
    candidates = [Precision.parse(precision)]
    planned = uniform(calibrated(trace(Blocks(), ids), [ids], candidates=candidates))
    graph = to_decomposed(planned, signed=False)
    assert_equal(graph, planned, ids)
    assert not calls(graph, DEQUANTIZE_WEIGHT)
    stored = [name for name, x in graph.state_dict().items() if x.dtype is torch.int8]
    assert len(stored) == 3


@pytest.mark.parametrize("precision", ["w4a8", "w4ta8", "w8", "w2t"])
def test_scales_of_tensors_and_of_either_axis(
    calibrated: Made, uniform: Made, precision: str
) -> None:
    torch.manual_seed(0)
    ids = torch.randint(9, (4, 3))
    candidates = [Precision.parse(precision)]
    planned = uniform(calibrated(trace(Several(), ids), [ids], candidates=candidates))
    graph = to_decomposed(planned, signed=False)
    assert_equal(graph, planned, ids)
    found = Counter(node.args[3] for node in calls(graph, DEQUANTIZE_WEIGHT))
    # A transposed convolution has its channels second.
    assert found == ({0: 3} if "t" in precision else {0: 2, 1: 1})


def test_the_planned_graph_is_left_alone(planned: fx.GraphModule, images: list[Tensor]) -> None:
    before, names = outputs(planned, images[0]), set(planned.state_dict())
    to_decomposed(planned, signed=True)
    assert torch.equal(outputs(planned, images[0])[0], before[0])
    assert set(planned.state_dict()) == names


@given(
    scale=st.floats(2**-20, 2**10, width=32),
    zero_point=st.integers(0, 255),
    steps=st.lists(st.floats(-600, 600, width=32), min_size=1),
    signed=st.booleans(),
)
def test_halves_and_ends_of_the_range_round_alike(
    scale: float, zero_point: int, steps: list[float], signed: bool
) -> None:
    """The operators' own arithmetic, on a graph of one quantizer."""
    ties = [round(step) + 0.5 for step in steps]
    x = torch.tensor([*steps, *ties]) * scale
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    shift, dtype = (128, torch.int8) if signed else (0, torch.uint8)
    grid = (scale, zero_point - shift, -shift, 255 - shift, dtype)
    assert torch.equal(DEQUANTIZE(QUANTIZE(x, *grid), *grid), expected)
