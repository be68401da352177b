"""What an option is, as plain data: by it a journal knows its own run again."""

from __future__ import annotations

import dis
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fxmpq.journal import data_digest

Describe = Callable[[object], object]

# Their code is told by name: what changes it is another version.
_LIBRARIES = frozenset({"builtins", "fxmpq", "lightning", "numpy", "torch", "torchmetrics"})
_ADDRESS = " at 0x"
_PLAIN = (bool, int, float, str, type(None))


def identity(value: object) -> object:
    """Describe an option, so that equal ones are equal and others differ.

    Plain values stay what they are. Everything else becomes its name and a digest: of a
    function's code, defaults and what it closes over or reads of its module's plain values and
    functions; of an object's public attributes and, unless its class is a library's, its
    methods; of a module's tensors and children. What a function itself counts in, and what a
    torchmetrics metric has gathered, does not matter.

    Args:
        value: Anything.

    Returns:
        What JSON can hold.

    Examples:
        >>> identity({"probes": 2})
        {'probes': 2}
        >>> identity(partial(pow, exp=2)) == identity(partial(pow, exp=2))
        True
        >>> identity(partial(pow, exp=2)) == identity(partial(pow, exp=3))
        False
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(name): identity(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(entry) for entry in value]
    text = json.dumps(_described(value, ()), sort_keys=True)
    return f"{_name(value)}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _described(value: object, within: tuple[int, ...]) -> object:
    """The same in full; `within` are the objects that are being described, for cycles."""
    if isinstance(value, _PLAIN):
        return value
    if id(value) in within or isinstance(value, (type, ModuleType)):
        return _name(value)
    inner = partial(_described, within=(*within, id(value)))
    if isinstance(value, (Tensor, np.ndarray)):
        return _array(value)
    if isinstance(value, (list, tuple, set, frozenset, Mapping)):
        return _container(value, inner)
    return _callable_or_object(value, inner)


def _array(value: Tensor | NDArray[Any]) -> object:
    if isinstance(value, Tensor):
        return data_digest([value])
    return [str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]


def _container(value: Collection[object], inner: Describe) -> object:
    if isinstance(value, Mapping):
        return {str(name): inner(entry) for name, entry in value.items()}
    found = [inner(entry) for entry in value]
    return sorted(map(str, found)) if isinstance(value, (set, frozenset)) else found


def _callable_or_object(value: object, inner: Describe) -> object:
    if isinstance(value, partial):
        return [inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, MethodType):
        return [inner(value.__func__), inner(value.__self__)]
    return _function(value, inner) if isinstance(value, FunctionType) else _object(value, inner)


def _function(function: FunctionType, inner: Describe) -> object:
    """A function by its code and what that reads; a library's by its name."""
    if _is_library(function.__module__):
        return _name(function)
    code = function.__code__
    written = {
        step.argval for step in dis.get_instructions(code) if step.opname.startswith("STORE_")
    }
    held: dict[str, object] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name not in written and cell != type(cell)():
            held[name] = inner(cell.cell_contents)
    for name in _names(code):
        read = function.__globals__.get(name)
        if isinstance(read, (*_PLAIN, Tensor, FunctionType)) and name not in written:
            held[name] = inner(read)
    defaults = [function.__defaults__, function.__kwdefaults__]
    return [_name(function), _code(code), inner(defaults), held]


def _object(value: object, inner: Describe) -> object:
    """An object by its class, its public attributes, and a module's tensors and children."""
    kind = type(value)
    if isinstance(value, Enum) or not hasattr(value, "__dict__"):
        text = repr(value)
        return [_name(kind), None if _ADDRESS in text else text]
    attributes = dict(vars(value))
    gathered = attributes.get("_defaults", ())
    held = {
        name: inner(entry)
        for name, entry in attributes.items()
        if not name.startswith("_") and name != "training" and not hasattr(entry, "__wrapped__")
        if not isinstance(gathered, Mapping) or name not in gathered
    }
    methods = [
        inner(entry)
        for parent in kind.__mro__
        if not _is_library(parent.__module__)
        for _, entry in sorted(vars(parent).items())
        if isinstance(entry, FunctionType)
    ]
    found: list[object] = [_name(kind), held, methods]
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(recurse=False), *value.buffers(recurse=False)]
        children = {name: inner(child) for name, child in value.named_children()}
        found += [data_digest(tensors), children, inner(attributes.get("_hparams"))]
    return found


def _code(code: CodeType) -> str:
    """Digest of a function's instructions, names and constants; not of where it stands."""
    digest = hashlib.sha256(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            text = _code(constant)
        else:
            is_set = isinstance(constant, frozenset)
            text = repr(sorted(map(repr, constant)) if is_set else constant)
        digest.update(f"{text};".encode())
    return digest.hexdigest()


def _names(code: CodeType) -> list[str]:
    """Names that code reads, that of inner functions included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return sorted({*code.co_names, *(name for constant in inner for name in _names(constant))})


def _name(value: object) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{getattr(named, '__qualname__', '')}"


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES
