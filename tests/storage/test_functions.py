from __future__ import annotations

import operator
import os

import pytest
import torch
from torch import fx

from fxmpq.errors import FileFormatError
from fxmpq.storage.functions import function_name, function_named

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (aten.conv2d.default, "aten::conv2d.default"),
        (aten.add.Tensor, "aten::add.Tensor"),
        (aten.__and__.Tensor, "aten::__and__.Tensor"),
        (aten.sym_size.int, "aten::sym_size.int"),
        (aten.arange.start_step, "aten::arange.start_step"),
        (aten.full.default, "aten::full.default"),
        (aten._assert_scalar.default, "aten::_assert_scalar.default"),
        (torch.ops.fxmpq.linear.default, "fxmpq::linear.default"),
        (torch.ops.fxmpq.grouped_linear.default, "fxmpq::grouped_linear.default"),
        (torch.ops.fxmpq.batched_linear.default, "fxmpq::batched_linear.default"),
        (operator.getitem, "operator.getitem"),
        (operator.floordiv, "operator.floordiv"),
        (torch.sym_max, "torch.sym_max"),
        (round, "builtins.round"),
    ],
)
def test_functions_have_names(function: object, name: str) -> None:
    assert function_name(function) == name
    assert function_named(name) is function


def test_operators_of_transformers_are_found_where_it_registers_them() -> None:
    found = function_named("transformers::grouped_mm_fallback.default")
    assert found is torch.ops.transformers.grouped_mm_fallback.default
    assert function_name(found) == "transformers::grouped_mm_fallback.default"


def test_every_function_of_real_graphs_is_found_again(
    conv_graph: fx.GraphModule, resnet_graph: fx.GraphModule, bert_graph: fx.GraphModule
) -> None:
    for graph in (conv_graph, resnet_graph, bert_graph):
        called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
        assert called
        assert all(function_named(function_name(function)) is function for function in called)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "fxmpq::integer_linear.default",
        "builtins.eval",
        "builtins::eval",
        "builtins.exec",
        "builtins.getattr",
        "operator.attrgetter",
        "operator.methodcaller",
        "operator.setitem",
        "torch.load",
        "torch.sym_max.__globals__",
        "math.__loader__",
        "aten::from_file.default",  # maps any file into a tensor, and makes files
        "aten::save.default",  # TorchScript's, which writes a file
        "aten::warn.default",
        "aten::manual_seed.default",
        "aten::_print.default",
        "aten::_cufft_clear_plan_cache.default",
        "aten::add_.Tensor",
        "aten::copy_.default",
        "aten::set_.source_Tensor",
        "aten::nothing.default",
        "aten::conv2d.nothing",
        "aten::__class__.__mro__",
        "aten::conv2d",
        "aten::conv2d.default.__class__",
        "prims::add.default",
        "transformers::other.default",
        "quantized::add.default",
        "profiler::_record_function_enter.default",
        "",
        None,
        3,
        ["aten::relu.default"],
    ],
)
def test_what_could_do_more_than_compute_is_refused(name: object) -> None:
    with pytest.raises(FileFormatError, match="a stored graph cannot call"):
        function_named(name)


@pytest.mark.parametrize("function", [os.system, eval, print, aten.relu_.default, torch.relu])
def test_graphs_that_call_them_are_not_saved(function: object) -> None:
    with pytest.raises(FileFormatError, match="a stored graph cannot call"):
        function_name(function)
