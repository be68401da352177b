from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxmpq.formats import NumberFormat
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.quantizers.weight_scale import mse_weight_scales
from fxmpq.targets.onnxruntime.layer_operands import bias_of, stored_weight, weight_codes

INT4 = NumberFormat(4)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def made(bias: bool = True) -> tuple[fx.GraphModule, fx.Node, WeightQuantizer]:
    torch.manual_seed(0)
    graph = trace(nn.Sequential(nn.Linear(6, 4, bias=bias)), draw(3, 6))
    (node,) = [n for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default]
    quantizer = WeightQuantizer("0.weight", [INT4], 0)
    (scale,) = mse_weight_scales(get_tensor(graph, "0.weight"), [INT4], 0)
    quantizer.set_scale(INT4, scale)
    quantizer.activate(INT4)
    return graph, node, quantizer


def test_codes_times_scales_are_the_quantized_weight() -> None:
    graph, _, quantizer = made()
    weight = get_tensor(graph, "0.weight").detach()
    codes, scale = weight_codes(graph, quantizer)
    assert torch.equal(codes * scale[:, None], quantizer(weight))


def test_codes_for_another_scale_are_of_the_quantized_weight() -> None:
    graph, _, quantizer = made()
    weight = get_tensor(graph, "0.weight").detach()
    own, scale = weight_codes(graph, quantizer)
    assert torch.equal(weight_codes(graph, quantizer, scale.clone())[0], own)
    coarse = scale * torch.tensor([1.0, 2.0, 1.0, 8.0])
    codes, found = weight_codes(graph, quantizer, coarse)
    assert found is coarse
    expected = (quantizer(weight) / coarse[:, None]).round().clamp(-8, 7)
    assert torch.equal(codes.float(), expected)
    assert torch.equal(codes[[0, 2]], own[[0, 2]])


def test_stored_codes_say_their_width_and_factor() -> None:
    graph, node, quantizer = made()
    codes, scale = weight_codes(graph, quantizer)
    plain = stored_weight(graph, node, quantizer, codes, scale)
    scaled = stored_weight(graph, node, quantizer, codes, scale / 8, 8)
    names = [[str(entry.target) for entry in found] for found in (plain, scaled)]
    assert names[0] == ["codes_4bit_0_weight", "scale_0_weight"]
    assert names[1] == ["codes_4bit8_0_weight", "scale_0_weight_"]
    assert torch.equal(get_tensor(graph, names[1][0]), codes * 8)
    assert torch.equal(get_tensor(graph, names[1][1]), scale / 8)


def test_only_a_stored_bias_is_one() -> None:
    graph, node, _ = made()
    assert bias_of(graph, node) is get_tensor(graph, "0.bias")
    graph, node, _ = made(bias=False)
    assert bias_of(graph, node) is None
    graph, node, _ = made()
    bias = node.args[2]
    with graph.graph.inserting_before(node):
        node.update_arg(2, graph.graph.call_function(torch.ops.aten.neg.default, (bias,)))
    assert bias_of(graph, node) is None
