"""Exporting: calling torch.export, and saying what to do when it refuses."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxmpq.errors import BatchError, TraceError
from fxmpq.graph.aliases import writes_through_views
from fxmpq.graph.batches import batch_size, fixed_size

_OWN_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def export_program(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[ExportedProgram, bool]:
    """Export with free batch and sequence sizes, or with fixed ones if that fails.

    Args:
        model: In eval mode.
        args: Positional arguments of the example call.
        kwargs: Keyword arguments of the example call.

    Returns:
        The program, and whether its batch size is free.

    Raises:
        BatchError: If the model itself cannot run the example.
        TraceError: If the model does not export, with the line that torch.export stopped at.
    """
    try:
        shapes = _free_shapes(model, args, kwargs)
        with _named_arguments(model, list(shapes)):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        return _functional(program), _batch_is_free(program)
    except Exception:  # noqa: BLE001, S110  (fixed sizes decide whether it exports at all)
        pass
    _check_runs(model, args, kwargs)
    try:
        return _functional(torch.export.export(model, args, kwargs, strict=False)), False
    except Exception as error:
        raise TraceError(
            f"torch.export cannot take {type(model).__name__}: {_first_line(error)}\n"
            f"It stopped at {_user_line(error)}\n"
            "What usually helps: replace control flow that depends on tensor values "
            "(`if x.sum() > 0`, `.item()`, `.numpy()`) by torch.where or torch.cond, or trace "
            "the sub-module that does the work."
        ) from error


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
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> dict[str, object]:
    """Leave the batch dimension free, and of integer inputs the sequence dimension too.

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
        if not leaf.is_floating_point() and leaf.dim() > 1 and leaf.shape[1] > 1:
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


def _check_runs(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Tell a batch that does not fit the model from a model that does not export."""
    try:
        model(*args, **kwargs)
    except Exception as error:
        raise BatchError(
            f"{type(model).__name__} cannot run this batch: {_first_line(error)}\n"
            f"It stopped at {_user_line(error)}\n"
            "A batch is what the model takes: a tensor, a tuple of arguments, or a mapping of "
            "keyword arguments."
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _user_line(error: Exception) -> str:
    """The innermost line of the model's own code on the way to an error."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_file() and not frame.filename.startswith(_OWN_FOLDERS)
    ]
    if not frames:
        return "an unknown line"
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
