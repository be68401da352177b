"""Trace: from a model and one batch to a canonical graph."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxmpq.errors import LegalityError, TraceError
from fxmpq.graph.batches import Batch, batch_size, call_arguments
from fxmpq.graph.call_structure import CallStructure
from fxmpq.graph.debug import checked, checked_pass
from fxmpq.graph.export import export_program, quiet_torch
from fxmpq.graph.key_value_cache import without_cache
from fxmpq.graph.legality.stages import check_stage
from fxmpq.graph.passes import CANONICAL_PASSES
from fxmpq.graph.quantizable import QuantizableGraph
from fxmpq.graph.remembering import check_keeps_nothing, written_buffers
from fxmpq.graph.run import record_shapes
from fxmpq.graph.state import GraphState, is_traced, with_state

_EXAMPLE_SAMPLES = 2


def trace(model: nn.Module, batch: Batch) -> fx.GraphModule:
    """Export a model and bring its graph into canonical form.

    The graph is what `torch.export` gives (ATen operators, any control flow resolved), with
    in-place operators made pure, dropout and no-op casts gone, and batch norms folded. It is
    called like the model and returns what the model returns; of transformers' decoders what they
    return without a cache of keys and values (`use_cache=False`). The batch size may vary, and
    for integer inputs (token ids, masks) the sequence length too, wherever the export allows
    it; else the size of `batch` is fixed, and `fxmpq inspect` tells which line of the model
    fixes it. The model itself is left as it was, its training flags included; the graph holds
    copies of its weights, and can be moved to another device.

    Args:
        model: Any module that `torch.export` takes.
        batch: A tensor, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        A `GraphModule`.

    Raises:
        TraceError: If the model does not export, with what `torch.export` reports; if it is
            already fxmpq's; or if its results depend on the calls before.
        BatchError: If the batch is not one of the three, or the model cannot run it.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> graph = trace(model, torch.randn(2, 3, 8, 8))
        >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        ['aten.conv2d.default', 'aten.relu.default']
    """
    _check_is_float(model)
    args, kwargs = _example(call_arguments(batch), _device_of(model))
    with torch.inference_mode(False), torch.no_grad(), quiet_torch(), _evaluating(model):
        with without_cache(model):
            program, dynamic, fixed = export_program(model, args, kwargs)
        exported = program.module(check_guards=False)
        graph = _own_copy(exported)
        written = written_buffers(graph)
        for canonical_pass in CANONICAL_PASSES:
            canonical_pass(graph)
            checked_pass(graph, canonical_pass)
        check_keeps_nothing(graph, written, type(model).__name__)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves = [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        state = GraphState(spec, tuple(leaves), dynamic, "", fixed_sizes=fixed)
        with_state(graph, state)
        _check_canonical(model, graph)
        record_shapes(graph)
        with_state(graph, replace(state, fingerprint=fingerprint(graph)))
    return checked(graph, "trace")


def _check_canonical(model: nn.Module, graph: fx.GraphModule) -> None:
    """Refuse a model whose graph later steps could not work with."""
    try:
        check_stage(graph, "canonical", needed_only=True)
    except LegalityError as error:
        raise TraceError(f"{type(model).__name__} has no canonical form: {error}") from error


def _check_is_float(model: nn.Module) -> None:
    if any(isinstance(module, fx.GraphModule) and is_traced(module) for module in model.modules()):
        raise TraceError(
            f"{type(model).__name__} is or holds a graph from fxmpq.trace; pass the float model, "
            "or go on with that graph: fxmpq.prepare(graph, target)"
        )


def fingerprint(graph: fx.GraphModule) -> str:
    """Hash a graph's operators, their arguments (devices aside) and its weights.

    Args:
        graph: A canonical graph without quantizers.

    Returns:
        32 hexadecimal digits (BLAKE2b), equal for equal models on every device.
    """
    digest = hashlib.blake2b(digest_size=16)
    numbers = {node: f"%{index}" for index, node in enumerate(graph.graph.nodes)}

    def described(argument: fx.node.Argument) -> fx.node.Argument:
        if isinstance(argument, fx.Node):
            return numbers[argument]
        return None if isinstance(argument, torch.device) else argument

    for node in graph.graph.nodes:
        arguments = fx.node.map_aggregate((node.args, node.kwargs), described)
        digest.update(f"{node.op} {node.target} {arguments!r};".encode())
    for name, tensor in sorted(graph.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _device_of(model: nn.Module) -> torch.device:
    """Where a model computes: the device of its first tensor, the CPU if it has none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _example(
    call: tuple[tuple[object, ...], dict[str, object]], device: torch.device
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Cut a call to two samples; repeat a single one, since exporting 1 fixes the size to 1."""
    leaves, spec = pytree.tree_flatten(call)
    samples = batch_size(leaves)

    def two(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        with torch.inference_mode(False):
            copied = leaf.detach().clone().to(device)
        if copied.dim() == 0 or copied.shape[0] != samples:
            return copied
        if samples == 1:
            return torch.cat([copied] * _EXAMPLE_SAMPLES)
        return copied[:_EXAMPLE_SAMPLES].clone()

    args, kwargs = pytree.tree_unflatten([two(leaf) for leaf in leaves], spec)
    return args, kwargs


def _own_copy(exported: fx.GraphModule) -> fx.GraphModule:
    """A plain graph module with tensors of its own, which tolerates `.train()` and `.eval()`."""
    nodes = copy.deepcopy(exported.graph)
    codegen = exported.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        nodes.set_codegen(CallStructure(codegen.pytree_info))
    graph = QuantizableGraph(exported, nodes, "QuantizableGraph")
    memo: dict[int, Tensor] = {}
    for module in graph.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = _clone_once(parameter, memo)
                module._parameters[name] = cast("nn.Parameter", own)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _clone_once(buffer, memo)
    return graph.eval()


def _clone_once(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    """Clone a tensor; a second name of the same tensor gets the same clone (tied weights)."""
    if id(tensor) not in memo:
        clone = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if is_parameter else clone
    return memo[id(tensor)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode and restore each module's own flag."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
