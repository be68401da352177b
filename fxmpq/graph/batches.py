"""Batches: from what the user passes to the flat inputs of the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmpq.errors import BatchError, CalibrationError, closest
from fxmpq.graph.state import state_of

Item = TypeVar("Item")
Batch = Tensor | Sequence[object] | Mapping[str, object]


def call_arguments(batch: Batch) -> tuple[tuple[object, ...], dict[str, object]]:
    """Read a batch as a call: a tensor, a tuple of arguments, or keyword arguments.

    Args:
        batch: What the model takes.

    Returns:
        `(args, kwargs)`.

    Raises:
        BatchError: If it is none of the three.

    Examples:
        >>> call_arguments({"input_ids": 1})
        ((), {'input_ids': 1})
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise BatchError(
        f"a batch is a tensor, a tuple of arguments or a mapping of keyword arguments; "
        f"found {type(batch).__name__}"
    )


def flat_inputs(graph: fx.GraphModule, batch: Batch) -> list[object]:
    """Flatten a batch into the graph's placeholders, checking that it fits.

    Tensors come to the graph's device, and outside inference mode as ones that autograd takes.

    Raises:
        BatchError: If arguments, ranks, fixed sizes, dtypes or values other than tensors differ
            from the traced ones, or a size is more than the model takes.
    """
    state = state_of(graph)
    spec = state.call_spec
    args, kwargs = call_arguments(batch)
    kwargs = _in_traced_order(kwargs, spec)
    leaves, found = pytree.tree_flatten((args, kwargs))
    if found != spec:
        raise BatchError(f"the model was traced with the call {spec}; this batch is {found}")
    placeholders = graph.graph.find_nodes(op="placeholder")
    free: dict[str, int] = {}
    for node, traced, leaf in zip(placeholders, state.example, leaves, strict=True):
        if not isinstance(traced, Tensor):
            _check_constant(node, traced, leaf)
        else:
            _check_tensor(node, leaf, free)
    device = graph_device(graph)
    return [_placed(leaf, device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _placed(leaf: Tensor, device: torch.device) -> Tensor:
    if leaf.is_inference() and not torch.is_inference_mode_enabled():
        leaf = leaf.clone()
    return leaf.to(device)


def graph_device(graph: fx.GraphModule) -> torch.device:
    """Device of the graph's first parameter or buffer; the CPU if it has none."""
    for tensor in chain(graph.parameters(), graph.buffers()):
        return tensor.device
    return torch.device("cpu")


def materialize(batches: Iterable[Item], what: str = "calibration") -> list[Item]:
    """Turn an iterable of batches into a list.

    Raises:
        CalibrationError: If there are none.
        BatchError: If it is one tensor or mapping rather than an iterable of batches.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise BatchError(
            f"{what} is an iterable of batches; found one {type(batches).__name__}. "
            "Wrap it in a list: [batch]"
        )
    found = list(batches)
    if not found:
        raise CalibrationError(f"the {what} data is empty; pass at least one batch")
    return found


def batch_size(inputs: Sequence[object]) -> int:
    """Number of samples: the first dimension of the first tensor that has one."""
    for leaf in inputs:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    return 1


def example_batch(graph: fx.GraphModule) -> Batch:
    """The small batch that a graph keeps of what it was traced with, on the CPU.

    Args:
        graph: From `trace` or later.
    """
    state = state_of(graph)
    return _called(pytree.tree_unflatten(list(state.example), state.call_spec))


def first_sample(graph: fx.GraphModule, batch: Batch) -> Batch:
    """The first sample of a batch, or all of it if the graph's batch size is fixed.

    Args:
        graph: From `trace` or later.
        batch: What it takes.
    """
    if not state_of(graph).dynamic:
        return batch
    leaves, spec = pytree.tree_flatten(call_arguments(batch))
    samples = batch_size(leaves)
    first = [
        leaf[:1] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == samples else leaf
        for leaf in leaves
    ]
    return _called(pytree.tree_unflatten(first, spec))


def fixed_size(size: int | torch.SymInt) -> int | None:
    """A traced size as a number; `None` if it is free."""
    if isinstance(size, int):
        return size
    found: int | None = size.node.maybe_as_int()
    return found


def _called(call: tuple[tuple[object, ...], dict[str, object]]) -> Batch:
    """The batch that `call_arguments` reads as a call."""
    args, kwargs = call
    return kwargs or args


def _in_traced_order(kwargs: dict[str, object], spec: pytree.TreeSpec) -> dict[str, object]:
    names = list(spec.child(1).context)
    for name in kwargs:
        if name not in names:
            raise BatchError(
                f"the batch has an argument {name!r}; the model was traced with "
                f"{', '.join(names) or 'positional arguments only'} (closest: "
                f"{closest(name, names)})"
            )
    missing = [name for name in names if name not in kwargs]
    if missing:
        raise BatchError(f"the batch lacks {', '.join(missing)}, with which the model was traced")
    return {name: kwargs[name] for name in names}


def _check_constant(node: fx.Node, traced: object, found: object) -> None:
    """What is no tensor became part of the graph, so it must be what was traced."""
    if isinstance(found, Tensor) or type(found) is not type(traced) or found != traced:
        raise BatchError(
            f"argument {node.name!r} must be {traced!r}, with which the model was traced; found "
            f"{'a tensor' if isinstance(found, Tensor) else repr(found)}. Trace it with that"
        )


def _check_tensor(node: fx.Node, leaf: object, found: dict[str, int]) -> None:
    """Check a tensor's dtype and sizes; `found` collects this batch's free sizes by name."""
    traced = node.meta["val"]
    if not isinstance(leaf, Tensor):
        raise BatchError(f"argument {node.name!r} must be a tensor; found {type(leaf).__name__}")
    # Every argument has the same samples, even where the model would broadcast them.
    names = ["samples" if axis == 0 else str(size) for axis, size in enumerate(traced.shape)]
    before = dict(found)
    fits = len(names) == leaf.dim() and all(
        _fits(size, actual, name, found)
        for name, size, actual in zip(names, traced.shape, leaf.shape, strict=True)
    )
    if not fits or traced.dtype != leaf.dtype:
        expected = [
            str(fixed_size(size) or before.get(name) or _describe(size))
            for name, size in zip(names, traced.shape, strict=True)
        ]
        raise BatchError(
            f"argument {node.name!r} must have shape [{', '.join(expected)}] and dtype "
            f"{traced.dtype}; found {list(leaf.shape)} and {leaf.dtype}"
        )


def _fits(size: int | torch.SymInt, actual: int, name: str, found: dict[str, int]) -> bool:
    """Whether a size may be `actual`: as traced, or where free one in all places."""
    fixed = fixed_size(size)
    if fixed is not None or isinstance(size, int):
        return actual == fixed
    largest = _largest(size)
    is_small_enough = largest is None or actual <= largest
    return is_small_enough and found.setdefault(name, actual) == actual


def _describe(size: torch.SymInt) -> str:
    """A free size for people."""
    largest = _largest(size)
    return "any" if largest is None else f"at most {largest}"


def _largest(size: torch.SymInt) -> int | None:
    """The largest value that the export found the model to take."""
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer else None
