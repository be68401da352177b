"""Traced values: dtypes and sizes, fixed or free, as JSON and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import sympy
import torch
from sympy.core.expr import Expr
from torch import Tensor
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from fxmpq.errors import FileFormatError
from fxmpq.graph.batches import fixed_size
from fxmpq.storage.values import DTYPES

_SYMBOL = re.compile(r"[a-z]+[0-9]+", re.ASCII)
_MOST = 2**63
_LARGEST_POWER = 8
_TORCH = (
    "FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv Max Min "
    "PowByNatural IntTrueDiv TruncToInt RoundToInt ToFloat Identity"
)
_OPERATIONS: Mapping[str, type] = {
    **{name: getattr(functions, name) for name in _TORCH.split() if hasattr(functions, name)},
    **{kind.__name__: kind for kind in (sympy.Add, sympy.Mul, sympy.Pow)},
}


class SizeWriter:
    """Writes traced values, and collects the free sizes that they name.

    Args:
        ranges: Free sizes that were met: name to the least and the largest they may be.
    """

    def __init__(self) -> None:
        self.ranges: dict[str, list[int | None]] = {}

    def write(self, value: object) -> object:
        """Write a node's traced value: a tensor, a size, or a list of them; else `None`.

        Raises:
            FileFormatError: If a size is computed in a way that cannot be stored.
        """
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            return {"dtype": dtype, "shape": [self._size(size) for size in value.shape]}
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return {"size": self._size(value)}
        if isinstance(value, (list, tuple)):
            return [self.write(entry) for entry in value]
        return None

    def _size(self, size: int | torch.SymInt) -> object:
        fixed = fixed_size(size)
        if isinstance(size, int) or fixed is not None:
            return fixed
        return self._expression(size.node.expr, size.node.shape_env)

    def _expression(self, expression: Expr, environment: ShapeEnv) -> object:
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Rational):
            return ["Rational", int(expression.p), int(expression.q)]
        if isinstance(expression, sympy.Symbol):
            bounds = environment.bound_sympy(expression)
            ends = (bounds.lower, bounds.upper)
            self.ranges[expression.name] = [int(end) if end.is_Integer else None for end in ends]
            return expression.name
        name = next((n for n, kind in _OPERATIONS.items() if type(expression) is kind), None)
        if name is None:
            raise FileFormatError(f"the size {expression} cannot be stored")
        return [name, *(self._expression(part, environment) for part in expression.args)]


class SizeReader:
    """Reads traced values back; free sizes of one name are one size.

    Args:
        ranges: Free sizes: name to the least and the largest they may be, `None` for any.

    Raises:
        FileFormatError: If the ranges are no such mapping.
    """

    def __init__(self, ranges: object) -> None:
        self._environment = ShapeEnv()
        self._symbols: dict[str, sympy.Symbol] = {}
        if not isinstance(ranges, dict):
            raise FileFormatError(f"free sizes are names with their ranges; found {ranges!r}")
        for name, ends in ranges.items():
            if not _SYMBOL.fullmatch(name) or not isinstance(ends, list) or len(ends) != 2:
                raise FileFormatError(f"a free size is as s1: [1, 512]; found {name!r}: {ends!r}")
            lower, upper = (None if end is None else _integer(end) for end in ends)
            is_positive = True if lower is not None and lower > 0 else None
            symbol = sympy.Symbol(name, integer=True, positive=is_positive)
            if lower is not None and upper is not None and lower > upper:
                raise FileFormatError(f"the free size {name} lies in no range: {ends}")
            self._environment.var_to_range[symbol] = ValueRanges(
                -int_oo if lower is None else lower, int_oo if upper is None else upper
            )
            self._symbols[name] = symbol

    def read(self, found: object) -> object:
        """Read a value: tensors come back on the `meta` device, without memory.

        Raises:
            FileFormatError: If it is no such value.
        """
        if found is None:
            return None
        if isinstance(found, list):
            return [self.read(entry) for entry in found]
        if isinstance(found, dict) and set(found) == {"size"}:
            return self._size(found["size"])
        if isinstance(found, dict) and set(found) == {"dtype", "shape"}:
            dtype, shape = DTYPES.get(str(found["dtype"])), found["shape"]
            if dtype is not None and isinstance(shape, list):
                return self._tensor([self._size(size) for size in shape], dtype)
        raise FileFormatError(f"{str(found)[:80]!r} is no traced value")

    def _tensor(self, shape: list[int | torch.SymInt], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(shape, dtype=dtype, device="meta")
        except Exception as error:
            raise FileFormatError(f"{shape} is no shape of a tensor: {error}") from error

    def _size(self, found: object) -> int | torch.SymInt:
        if isinstance(found, int):
            return _integer(found)
        expression = self._expression(found)
        node = SymNode(expression, self._environment, int, None)
        return torch.SymInt(node)  # type: ignore[no-untyped-call]  # torch gives it no types

    def _expression(self, found: object) -> Expr:
        if isinstance(found, str) and found in self._symbols:
            return self._symbols[found]
        if isinstance(found, list) and found and isinstance(found[0], str):
            return self._operation(found[0], found[1:])
        return sympy.Integer(_integer(found))

    def _operation(self, name: str, parts: list[object]) -> Expr:
        if name == "Rational" and len(parts) == 2 and _integer(parts[1]) != 0:
            return sympy.Rational(*(_integer(part) for part in parts))
        if name not in _OPERATIONS:
            raise FileFormatError(f"{name!r} is no operation on sizes")
        if name == "Pow" and not (len(parts) == 2 and abs(_integer(parts[1])) <= _LARGEST_POWER):
            raise FileFormatError(f"a size is raised to a power of {parts[1:]}")
        operands = [self._expression(part) for part in parts]
        try:
            made = _OPERATIONS[name](*operands)
        except Exception as error:
            raise FileFormatError(f"{name} of {operands} is no size: {error}") from error
        # Powers of powers would grow without end.
        if isinstance(made, sympy.Rational) and max(abs(made.p), made.q) >= _MOST:
            raise FileFormatError(f"{name} of {operands} is too large for a size")
        return made


def _integer(found: object) -> int:
    if type(found) is not int or not -_MOST < found < _MOST:
        raise FileFormatError(f"a size is an integer; found {str(found)[:80]!r}")
    return found
