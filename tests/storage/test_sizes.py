from __future__ import annotations

import json

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from fxmpq.errors import FileFormatError
from fxmpq.graph.batches import fixed_size
from fxmpq.storage.sizes import SizeReader, SizeWriter

S0 = sympy.Symbol("s0", integer=True, positive=True)


class Cuts(nn.Module):
    """Its sizes are sums, products, quotients and remainders of two free ones."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, length = x.shape
        return (
            torch.cat([x, x], dim=1),
            torch.zeros(length // 2),
            torch.zeros(batch % 3 + 2),
            x.reshape(batch * length),
            torch.zeros(torch.sym_max(batch, length)),
        )


def through_text(values: list[object]) -> list[object]:
    writer = SizeWriter()
    stored = [writer.write(value) for value in values]
    text = json.dumps({"stored": stored, "ranges": writer.ranges}, allow_nan=False)
    found = json.loads(text)
    reader = SizeReader(found["ranges"])
    return [reader.read(entry) for entry in found["stored"]]


def symbolic(expression: sympy.Expr) -> torch.SymInt:
    """A size that depends on `s0`, which is 1 or more."""
    environment = ShapeEnv()
    environment.var_to_range[S0] = ValueRanges(1, int_oo)
    return torch.SymInt(SymNode(expression, environment, int, None))


def described(value: object) -> object:
    if isinstance(value, Tensor):
        return [str(value.dtype), *map(str, value.shape)]
    return str(value)


def test_traced_values_come_back_with_names_and_ranges() -> None:
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=4)
    shapes = {"x": {0: batch, 1: length}}
    program = export(Cuts(), (torch.ones(3, 8),), dynamic_shapes=shapes, strict=False)
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    found = through_text(values)
    assert [described(value) for value in found] == [described(value) for value in values]
    names = {str(size) for value in found if isinstance(value, Tensor) for size in value.shape}
    assert any("//" in name for name in names)
    assert any("Max" in name for name in names)
    x = found[0]
    assert isinstance(x, Tensor)
    assert fixed_size(x.shape[0]) is None
    bounds = [size.node.shape_env.bound_sympy(size.node.expr) for size in x.shape]
    assert bounds[0].upper == 64
    assert not bounds[1].upper.is_Integer
    assert bounds[1].lower == 4


def test_real_graphs_come_back(resnet_graph: fx.GraphModule, bert_graph: fx.GraphModule) -> None:
    for graph in (resnet_graph, bert_graph):
        values = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta]
        found = through_text(values)
        assert [described(value) for value in found] == [described(value) for value in values]


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 9), st.integers(1, 99))
def test_expressions_keep_their_value(factor: int, divisor: int, power: int, size: int) -> None:
    expression = (factor * S0 + sympy.Rational(1, divisor)) ** min(power, 8) + S0 / divisor
    writer = SizeWriter()
    stored = writer.write(symbolic(expression))
    found = SizeReader(writer.ranges).read(json.loads(json.dumps(stored)))
    assert isinstance(found, torch.SymInt)
    (symbol,) = found.node.expr.free_symbols
    assert found.node.expr.subs(symbol, size) == expression.subs(S0, size)


def test_fixed_sizes_lists_and_nothing() -> None:
    values: list[object] = [3, torch.empty(2, 0, dtype=torch.int8), [torch.ones(1), 4], None]
    found = through_text(values)
    assert [described(value) for value in found[:2]] == ["3", ["torch.int8", "2", "0"]]
    assert isinstance(found[2], list)
    assert described(found[2][0]) == ["torch.float32", "1"]
    assert found[2][1] == 4
    assert found[3] is None
    assert through_text([True, 1.5]) == [None, None]


def test_a_size_of_another_kind_is_not_stored() -> None:
    with pytest.raises(FileFormatError, match=r"the size sin\(s0\) cannot be stored"):
        SizeWriter().write(symbolic(sympy.sin(S0)))


@pytest.mark.parametrize(
    "ranges",
    [
        None,
        [],
        {"os.system('x')": [1, 2]},
        {"s0": 3},
        {"s0": [1]},
        {"s0": ["1", 2]},
        {"s0": [1.0, 2]},
        {"s0": [5, 2]},
    ],
)
def test_malformed_ranges_are_refused(ranges: object) -> None:
    with pytest.raises(FileFormatError):
        SizeReader(ranges)


@pytest.mark.parametrize(
    "found",
    [
        "s0",
        {"size": "s1"},
        {"size": "__import__('os')"},
        {"size": ["eval", 1]},
        {"size": ["Pow", "s0", 9]},
        {"size": ["Pow", 10, ["Pow", 10, 8]]},
        {"size": ["Pow", ["Pow", ["Pow", 10, 8], 8], 8]},
        {"size": ["Pow", ["Pow", 10, 8], -8]},
        {"size": ["FloorDiv", "s0", 0]},
        {"size": ["Rational", 1, 0]},
        {"size": ["FloorDiv", "s0"]},
        {"size": []},
        {"size": 1.5},
        {"size": True},
        {"size": 2**70},
        {"dtype": "float32"},
        {"dtype": "save", "shape": []},
        {"dtype": "float32", "shape": 3},
        {"dtype": "float32", "shape": [None]},
        7,
    ],
)
def test_malformed_values_are_refused(found: object) -> None:
    with pytest.raises(FileFormatError):
        SizeReader({"s0": [1, None]}).read(found)


@pytest.mark.parametrize("least", [None, -1])
def test_a_tensors_size_is_not_negative(least: int | None) -> None:
    reader = SizeReader({"s0": [least, None]})
    with pytest.raises(FileFormatError, match="is no shape of a tensor"):
        reader.read({"dtype": "float32", "shape": ["s0"]})
