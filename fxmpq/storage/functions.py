"""Functions that a stored graph may call, by name: pure ATen operators and a table of Python's."""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import math
import operator
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch._ops import OpOverload, OpOverloadPacket

from fxmpq.errors import FileFormatError

Function = Callable[..., Any]

_OPERATOR = re.compile(r"(aten|fxmpq|transformers)::([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)", re.ASCII)

# What canonical passes write products of stored weights as.
_OWN = frozenset({"linear", "grouped_linear", "batched_linear"})

# Where transformers registers the operators that its mixtures of experts export to.
_TRANSFORMERS: Mapping[str, str] = {"grouped_mm_fallback": "transformers.integrations.moe"}

# What torch.export computes sizes with.
_PYTHON: tuple[tuple[ModuleType, tuple[str, ...]], ...] = (
    (operator, ("getitem", "add", "mul", "sub", "truediv", "floordiv", "mod", "pow", "neg", "abs")),
    (operator, ("ge", "le", "gt", "lt", "eq", "ne", "and_", "or_", "not_", "lshift", "rshift")),
    (math, ("ceil", "floor", "trunc")),
    (builtins, ("round",)),
    (torch, ("sym_int", "sym_float", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt")),
    (torch, ("sym_sum",)),
)
_FUNCTIONS: Mapping[str, Function] = {
    f"{module.__name__.removeprefix('_')}.{name}": getattr(module, name)
    for module, names in _PYTHON
    for name in names
    if hasattr(module, name)
}

# ATen operators without a tensor argument that only make a tensor, or check a size.
_FACTORIES = re.compile(
    "arange|empty|empty_permuted|empty_strided|eye|fft_r?fftfreq|full|linspace|logspace|normal|"
    "ones|rand|randint|randn|randperm|range|scalar_tensor|tri[lu]_indices|zeros|[a-z]+_window"
)
_CHECKS = re.compile("_assert_(async|scalar|tensor_metadata)|sym_constrain_range(_for_size)?")


def function_name(function: object) -> str:
    """The name under which a function is stored.

    Args:
        function: What a node calls.

    Returns:
        As `aten::conv2d.default` or `operator.getitem`.

    Raises:
        FileFormatError: If a stored graph may not call it.

    Examples:
        >>> function_name(torch.ops.aten.add.Tensor)
        'aten::add.Tensor'
    """
    if isinstance(function, OpOverload):
        name = f"{function._schema.name}.{function._overloadname}"
        return name if function_named(name) is function else _refused(name)
    for name, known in _FUNCTIONS.items():
        if known is function:
            return name
    return _refused(str(function))


def function_named(name: object) -> Function:
    """The function of a stored name; nothing is imported or evaluated to find it.

    Args:
        name: As `function_name` gives it.

    Returns:
        An ATen operator that writes to nothing, takes a tensor or makes one, and returns
        something; or a function of the table.

    Raises:
        FileFormatError: If it is anything else, as `os.system` or `aten::from_file.default`.

    Examples:
        >>> function_named("operator.getitem")([1, 2], 0)
        1
    """
    if not isinstance(name, str):
        return _refused(repr(name))
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    match = _OPERATOR.fullmatch(name)
    packet = _packet(match[1], match[2]) if match else None
    overload = getattr(packet, match[3], None) if match and packet else None
    if not isinstance(overload, OpOverload) or not _is_pure(overload):
        return _refused(name)
    return overload


def _packet(namespace: str, name: str) -> OpOverloadPacket | None:
    if namespace == "transformers":
        if name not in _TRANSFORMERS:
            return None
        with contextlib.suppress(ImportError):
            importlib.import_module(_TRANSFORMERS[name])
    if namespace == "fxmpq" and name not in _OWN:
        return None
    found = getattr(getattr(torch.ops, namespace), name, None)
    return found if isinstance(found, OpOverloadPacket) else None


@functools.cache
def _is_pure(overload: OpOverload) -> bool:
    """Whether an operator only computes: `aten::save` and `aten::from_file` touch files."""
    schema = overload._schema
    base = schema.name.rpartition("::")[2]
    if schema.is_mutable:
        return False
    takes_tensor = any("Tensor" in str(argument.type) for argument in schema.arguments)
    makes_value = bool(schema.returns) and (takes_tensor or bool(_FACTORIES.fullmatch(base)))
    return makes_value or bool(_CHECKS.fullmatch(base))


def _refused(name: str) -> NoReturn:
    raise FileFormatError(
        f"a stored graph cannot call {name!r}; it may call ATen operators that write to nothing, "
        f"transformers' {', '.join(_TRANSFORMERS)}, fxmpq's {', '.join(sorted(_OWN))}, and "
        "Python's arithmetic on numbers"
    )
