from __future__ import annotations

import torch
from torch import fx, nn

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.cuda.activations import ActivationCodes
from fxmpq.targets.cuda.arithmetic import to_e4m3, to_int8


def quantized(
    number_format: NumberFormat, grid: ActivationRange
) -> tuple[fx.GraphModule, fx.Node, fx.Node]:
    """A graph that quantizes its input; the nodes of input and quantizer."""
    quantizer = ActivationQuantizer("x", [number_format])
    quantizer.ranges[number_format.name] = grid
    quantizer.activate(number_format)
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_module("quantizer", (x,))
    graph.output(node)
    return fx.GraphModule(nn.ModuleDict({"quantizer": quantizer}), graph), x, node


def test_integers_become_signed_codes_once() -> None:
    grid = ActivationRange(0.1, 130)
    graph, x, node = quantized(NumberFormat(8, Scheme.AFFINE), grid)
    codes = ActivationCodes(graph)
    found = codes.of(node)
    inverse = float(1 / torch.tensor(0.1))
    assert (found.target, found.args) == (to_int8, (x, inverse, 2))
    assert codes.of(node) is found
    assert codes.grid(node) == grid
    graph.graph.lint()


def test_floats_become_bit_patterns() -> None:
    graph, x, node = quantized(NumberFormat(8, Scheme.E4M3), ActivationRange(0.1, 0))
    found = ActivationCodes(graph).of(node)
    assert (found.target, found.args) == (to_e4m3, (x, 0.1))


def test_what_is_not_quantized_is_read_as_it_is() -> None:
    graph, x, node = quantized(NumberFormat(8, Scheme.AFFINE), ActivationRange(0.1, 130))
    codes = ActivationCodes(graph)
    assert (codes.of(x), codes.grid(x)) == (x, None)
    quantizer = graph.get_submodule("quantizer")
    assert isinstance(quantizer, ActivationQuantizer)
    quantizer.ranges.clear()
    assert (codes.of(node), codes.grid(node)) == (node, None)
    quantizer.activate(None)
    assert codes.of(node) is node
