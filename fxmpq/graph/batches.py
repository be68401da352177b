"""Batches: from what the user passes to the flat inputs of the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmpq.errors import BatchError, CalibrationError, closest
from fxmpq.graph.state import state_of

Batch = Tensor | Sequence[object] | Mapping[str, object]


def call_arguments(batch: Batch) -> tuple[tuple[object, ...], dict[str, object]]:
    """Read a batch as a call: a tensor, a tuple of arguments, or keyword arguments.

    Args:
        batch: What the model takes.

    Returns:
        `(args, kwargs)`.

    Raises:
        BatchError: If it is none of the three.

    Example:
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

    Raises:
        BatchError: If arguments, ranks, fixed sizes or dtypes differ from the traced ones.
    """
    spec = state_of(graph).call_spec
    args, kwargs = call_arguments(batch)
    kwargs = _in_traced_order(kwargs, spec)
    leaves, found = pytree.tree_flatten((args, kwargs))
    if found != spec:
        raise BatchError(f"the model was traced with the call {spec}; this batch is {found}")
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, leaf in zip(placeholders, leaves, strict=True):
        _check_leaf(node, leaf)
    device = graph_device(graph)
    return [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def graph_device(graph: fx.GraphModule) -> torch.device:
    """Device of the graph's first parameter or buffer; the CPU if it has none."""
    for tensor in (*graph.parameters(), *graph.buffers()):
        return tensor.device
    return torch.device("cpu")


def materialize(batches: Iterable[Batch], what: str = "calibration") -> list[Batch]:
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
        raise CalibrationError(
            f"the {what} data is empty; pass at least one batch of what the model takes"
        )
    return found


def batch_size(inputs: Sequence[object]) -> int:
    """Number of samples: the first dimension of the first tensor that has one."""
    for leaf in inputs:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    return 1


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


def _check_leaf(node: fx.Node, leaf: object) -> None:
    traced = node.meta.get("val")
    if not isinstance(traced, Tensor):
        return
    if not isinstance(leaf, Tensor):
        raise BatchError(f"argument {node.name!r} must be a tensor; found {type(leaf).__name__}")
    expected = [size if isinstance(size, int) else "any" for size in traced.shape]
    fits = len(expected) == leaf.dim() and all(
        size in ("any", actual) for size, actual in zip(expected, leaf.shape, strict=True)
    )
    if not fits or traced.dtype != leaf.dtype:
        raise BatchError(
            f"argument {node.name!r} must have shape {expected} and dtype {traced.dtype}; "
            f"found {list(leaf.shape)} and {leaf.dtype}"
        )
