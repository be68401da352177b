"""Exporting: calling torch.export, and saying what to do when it refuses."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxmpq.errors import BatchError, TraceError
from fxmpq.graph.aliases import writes_through_views
from fxmpq.graph.batches import batch_size, fixed_size
from fxmpq.graph.reasons import failure, first_line, noted_sizes, user_line
from fxmpq.graph.state import FixedSize


def export_program(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[ExportedProgram, bool, tuple[FixedSize, ...]]:
    """Export with free batch and sequence sizes, or with fixed ones where that fails.

    If no export takes free sequence sizes, one with a free batch alone is tried, and at last one
    with all sizes fixed.

    Args:
        model: In eval mode.
        args: Positional arguments of the example call.
        kwargs: Keyword arguments of the example call.

    Returns:
        The program, whether its batch size is free, and the sizes of samples and sequences that
        are fixed in it, with reasons.

    Raises:
        BatchError: If the model itself cannot run the example.
        TraceError: If the model does not export, with the line that torch.export stopped at.
    """
    samples = batch_size(pytree.tree_leaves((args, kwargs)))
    reasons: dict[int, str] = {}
    for sequences in (True, False):
        try:
            shapes = _free_shapes(model, args, kwargs, sequences=sequences)
            if not sequences and shapes == _free_shapes(model, args, kwargs, sequences=True):
                break
            with _named_arguments(model, list(shapes)), noted_sizes() as noted:
                program = _export(model, args, kwargs, shapes)
            fixed = _fixed_sizes(program, samples, reasons, noted)
            return _functional(program), _batch_is_free(program), fixed
        except Exception as error:  # noqa: BLE001  (fixed sizes decide whether it exports at all)
            reasons[1 if sequences else 0] = failure(error)
    _check_runs(model, args, kwargs)
    try:
        program = _export(model, args, kwargs, None)
        return _functional(program), False, _fixed_sizes(program, samples, reasons, {})
    except Exception as error:
        raise TraceError(
            f"torch.export cannot take {type(model).__name__}: {first_line(error)}\n"
            f"It stopped at {user_line(error)}\n"
            "What usually helps: replace control flow that depends on tensor values "
            "(`if x.sum() > 0`, `.item()`, `.numpy()`) by torch.where or torch.cond, or trace "
            "the sub-module that does the work."
        ) from error


def _export(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    shapes: dict[str, object] | None,
) -> ExportedProgram:
    """Export with copies of the example.

    torch.export marks free sizes on the tensors themselves, and an export that fails leaves the
    marks there, so that the next one would have those sizes free too.
    """
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keep torch's own notices, graph prints and deprecations from the user's terminal.

    What matters of them is in the errors that fxmpq raises.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Make a program functional where renaming the results of in-place operators is not enough."""
    return program.run_decompositions({}) if writes_through_views(program) else program


def _free_shapes(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], *, sequences: bool
) -> dict[str, object]:
    """Leave the batch dimension free, and of integer inputs the sequence dimension if asked.

    Per argument, under the model's own names, since keyword arguments may come in any order.
    """
    signature = inspect.signature(model.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    samples = batch_size(pytree.tree_leaves((args, kwargs)))

    def free_dimensions(leaf: object) -> dict[int, object] | None:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != samples:
            return None
        free: dict[int, object] = {0: Dim.AUTO}
        if sequences and not leaf.is_floating_point() and leaf.dim() > 1 and leaf.shape[1] > 1:
            free[1] = Dim.AUTO
        return free

    return {name: pytree.tree_map(free_dimensions, value) for name, value in named.items()}


@contextmanager
def _named_arguments(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """For the time of an export, name the arguments that a model takes as `**kwargs`.

    torch.export (2.13) finds no dynamic shapes for arguments that the signature does not name.
    """
    forward, own = model.forward, vars(model).get("forward")
    signature = inspect.signature(forward)
    unnamed = [name for name in names if name not in signature.parameters]
    if not unnamed:
        yield
        return

    @functools.wraps(forward)
    def named(*args: object, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    kept += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in unnamed]
    vars(named)["__signature__"] = signature.replace(parameters=kept)
    vars(model)["forward"] = named
    try:
        yield
    finally:
        if own is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = own


def _batch_is_free(program: ExportedProgram) -> bool:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [nodes[name] for name in program.graph_signature.user_inputs if name in nodes]
    values = [node.meta["val"] for node in inputs]
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim() > 0]
    return bool(sizes) and fixed_size(sizes[0]) is None


def _fixed_sizes(
    program: ExportedProgram, samples: int, reasons: Mapping[int, str], noted: Mapping[str, str]
) -> tuple[FixedSize, ...]:
    """The sizes that were to be free and are numbers in a program.

    Args:
        program: As exported.
        samples: Of the example.
        reasons: Of exports with free sizes that failed: of samples, 0, and of sequences, 1.
        noted: Line of the model per size, from `noted_sizes`.
    """
    inputs = set(program.graph_signature.user_inputs)
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in inputs or not isinstance(value, Tensor):
            continue
        sizes = [fixed_size(size) for size in value.shape]
        if not sizes or sizes[0] not in (None, samples):
            continue
        # A sequence of one value is not to be free.
        is_sequence = not value.is_floating_point() and len(sizes) > 1 and sizes[1] != 1
        for dimension, size in enumerate(sizes[: 1 + is_sequence]):
            if size is not None:
                reason = reasons.get(dimension) or reasons.get(1) or _line(node, dimension, noted)
                found.append(FixedSize(node.name, dimension, size, reason))
    return tuple(found)


def _line(node: fx.Node, dimension: int, noted: Mapping[str, str]) -> str:
    """Where the model fixed a size, as far as that was noted."""
    ending = f".size()[{dimension}]"
    lines = {name: line for name, line in noted.items() if name.endswith(ending) and line}
    own = [line for name, line in lines.items() if repr(str(node.target)) in name]
    line = next(iter([*own, *lines.values()]), "")
    return f"the model fixes it at {line}" if line else "torch.export fixes it, without a reason"


def _check_runs(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Tell a batch that does not fit the model from a model that does not export."""
    try:
        model(*args, **kwargs)
    except Exception as error:
        raise BatchError(
            f"{type(model).__name__} cannot run this batch: {first_line(error)}\n"
            f"It stopped at {user_line(error)}\n"
            "A batch is what the model takes: a tensor, a tuple of arguments, or a mapping of "
            "keyword arguments."
        ) from error
