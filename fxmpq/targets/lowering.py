"""Steps that every converter shares: what a plan fixed becomes part of the graph."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.state import copy_graph
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer


def lower(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy a planned graph with bias corrections baked in and idle quantizers gone.

    Args:
        graph: With chosen precisions; not changed.

    Returns:
        A graph whose remaining module calls are active activation and weight quantizers.
    """
    lowered = copy_graph(graph)
    for node in list(lowered.graph.nodes):
        module = quantizer_of(lowered, node)
        if isinstance(module, BiasCorrection):
            _bake_bias(lowered, node, module)
        elif isinstance(module, (ActivationQuantizer, WeightQuantizer)) and module.active is None:
            node.replace_all_uses_with(node.args[0])
            lowered.graph.erase_node(node)
    finish(lowered)
    return lowered


def finish(graph: fx.GraphModule) -> None:
    """Drop dead nodes, unused modules and tensors that no node reads, in place."""
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    _drop_unread_tensors(graph)
    graph.graph.lint()
    graph.recompile()


def quantizer_of(graph: fx.GraphModule, node: object) -> object:
    """The module a node calls, or `None` if it calls none."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return graph.get_submodule(str(node.target))


def store_tensor(graph: fx.GraphModule, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
    """Register a buffer (dots become underscores) and read it in front of a node.

    Args:
        graph: Changed in place.
        name: Stored once: a second call with the same tensor only makes another reading node,
            one with another tensor gets a name of its own.
        tensor: What to store.
        before: Where the reading node goes.

    Returns:
        The node that reads it.
    """
    flat_name = name.replace(".", "_")
    stored = tensor.detach().contiguous()
    while not _holds(graph, flat_name, stored):
        if not hasattr(graph, flat_name):
            graph.register_buffer(flat_name, stored)
        else:
            flat_name += "_"
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(flat_name)


def _holds(graph: fx.GraphModule, name: str, tensor: Tensor) -> bool:
    found = getattr(graph, name, None)
    if found is tensor:
        return True
    if not isinstance(found, Tensor) or found.dtype is not tensor.dtype:
        return False
    if tensor.dtype.itemsize == 1:
        # Small floats are not compared on every device; their bits are.
        found, tensor = found.view(torch.uint8), tensor.view(torch.uint8)
    return torch.equal(found, tensor)


def _bake_bias(graph: fx.GraphModule, node: fx.Node, correction: BiasCorrection) -> None:
    """Replace a bias correction by a stored bias, or by the original one."""
    source = node.args[0]
    if correction.added is None:
        for user in list(node.users):
            user.args = tuple(source if arg is node else arg for arg in user.args)
    else:
        bias = get_tensor(graph, str(source.target)) if isinstance(source, fx.Node) else None
        with torch.no_grad():
            corrected = correction.forward(bias)
        assert corrected is not None
        name = f"corrected_bias.{correction.name}"
        node.replace_all_uses_with(store_tensor(graph, name, corrected, node))
    graph.graph.erase_node(node)


def _drop_unread_tensors(graph: fx.GraphModule) -> None:
    """Delete parameters and buffers that no node reads, so that files stay small."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    for module_name, module in graph.named_modules():
        if module_name in called:
            continue
        for table in (module._parameters, module._buffers):
            for leaf in list(table):
                if f"{module_name}.{leaf}".lstrip(".") not in read:
                    del table[leaf]
