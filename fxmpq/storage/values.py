"""Values as JSON that keeps their types: what nodes take as arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import EllipsisType

import torch
from torch import fx

from fxmpq.errors import FileFormatError

DTYPES: Mapping[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_MEMORY_FORMATS: Mapping[str, torch.memory_format] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.memory_format)
}
_LAYOUTS: Mapping[str, torch.layout] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.layout)
}


@dataclass(frozen=True)
class Surroundings:
    """What values refer to.

    Args:
        nodes: By name, those made so far.
        device: Where the graph will run; stored devices become it, `meta` aside.
    """

    nodes: Mapping[str, fx.Node] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def encode_value(value: object) -> object:
    """Write a value as plain data.

    `None`, truth values, integers, finite floats, text and lists stand for themselves; all
    else is an object of one key that tells its type, as `{"dtype": "float32"}`.

    Args:
        value: A node, number, text, dtype, device, memory format, layout, slice, `...`, or
            tuples, lists, dicts and sizes of them.

    Returns:
        What strict JSON can hold.

    Raises:
        FileFormatError: If it is anything else.

    Examples:
        >>> encode_value((1, [2.0, float("inf")], torch.int64))
        {'tuple': [1, [2.0, {'float': 'inf'}], {'dtype': 'int64'}]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if type(value) in (int, float, complex):
        return _number(value)
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    return {"ellipsis": True} if value is ... else _container(value)


def decode_value(found: object, around: Surroundings) -> object:
    """Read a value back.

    Args:
        found: As `encode_value` gives it.
        around: The nodes it may name, and the device for its devices.

    Returns:
        The value, with the types it had.

    Raises:
        FileFormatError: If it is no such value, or names an unknown node.

    Examples:
        >>> decode_value({"tuple": [1, {"dtype": "int64"}]}, Surroundings())
        (1, torch.int64)
    """
    if found is None or isinstance(found, (bool, int, float, str)):
        return found
    if isinstance(found, list):
        return [decode_value(entry, around) for entry in found]
    if isinstance(found, dict) and len(found) == 1:
        kind, content = next(iter(found.items()))
        if kind in _DECODERS:
            return _DECODERS[kind](content, around)
    raise FileFormatError(
        f"{str(found)[:80]!r} is no value of a graph; values other than numbers, text and lists "
        f"have one key of {', '.join(_DECODERS)}"
    )


def _number(value: object) -> object:
    if isinstance(value, complex):
        return {"complex": [_number(value.real), _number(value.imag)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _container(value: object) -> object:
    if isinstance(value, torch.Size):
        return {"size": [encode_value(entry) for entry in value]}
    if isinstance(value, slice):
        return {"slice": [encode_value(entry) for entry in (value.start, value.stop, value.step)]}
    if isinstance(value, Mapping):
        return {"dict": [[encode_value(key), encode_value(value[key])] for key in value]}
    if isinstance(value, list):
        return [encode_value(entry) for entry in value]
    if type(value) is tuple:
        return {"tuple": [encode_value(entry) for entry in value]}
    raise FileFormatError(
        f"a {type(value).__module__}.{type(value).__qualname__} cannot be stored in a graph: "
        f"{str(value)[:80]}"
    )


def _decode_node(found: object, around: Surroundings) -> object:
    if not isinstance(found, str) or found not in around.nodes:
        raise FileFormatError(f"the graph has no earlier node {found!r}")
    return around.nodes[found]


def _decode_float(found: object, around: Surroundings) -> float:
    if found not in ("inf", "-inf", "nan"):
        raise FileFormatError(f"a float apart from numbers is inf, -inf or nan; found {found!r}")
    return float(str(found))


def _decode_complex(found: object, around: Surroundings) -> complex:
    parts = [decode_value(entry, around) for entry in _entries(found, 2)]
    if not all(isinstance(part, (int, float)) for part in parts):
        raise FileFormatError(f"a complex number is two numbers; found {found!r}")
    real, imaginary = parts
    return complex(float(str(real)), float(str(imaginary)))


def _decode_device(found: object, around: Surroundings) -> torch.device:
    return torch.device("meta") if found == "meta" else around.device


def _decode_ellipsis(found: object, around: Surroundings) -> EllipsisType:
    return ...


def _decode_slice(found: object, around: Surroundings) -> slice:
    return slice(*(decode_value(entry, around) for entry in _entries(found, 3)))


def _decode_size(found: object, around: Surroundings) -> torch.Size:
    sizes = [decode_value(entry, around) for entry in _entries(found)]
    if not all(type(size) is int for size in sizes):
        raise FileFormatError(f"a size is integers; found {found!r}")
    return torch.Size([int(str(size)) for size in sizes])


def _decode_tuple(found: object, around: Surroundings) -> tuple[object, ...]:
    return tuple(decode_value(entry, around) for entry in _entries(found))


def _decode_dict(found: object, around: Surroundings) -> dict[object, object]:
    decoded: dict[object, object] = {}
    for pair in _entries(found):
        key, value = (decode_value(entry, around) for entry in _entries(pair, 2))
        if not isinstance(key, (str, int, float, bool, type(None))):
            raise FileFormatError(f"a key is text or a number; found {key!r}")
        decoded[key] = value
    return decoded


def _entries(found: object, count: int | None = None) -> list[object]:
    if not isinstance(found, list) or (count is not None and len(found) != count):
        raise FileFormatError(f"expected a list of {count or 'values'}; found {found!r}")
    return found


def _named(table: Mapping[str, object], what: str) -> Callable[[object, Surroundings], object]:
    """A decoder that looks a name up."""

    def decode(found: object, around: Surroundings) -> object:
        if not isinstance(found, str) or found not in table:
            raise FileFormatError(f"torch has no {what} {found!r}")
        return table[found]

    return decode


_DECODERS: Mapping[str, Callable[[object, Surroundings], object]] = {
    "node": _decode_node,
    "float": _decode_float,
    "complex": _decode_complex,
    "dtype": _named(DTYPES, "dtype"),
    "memory_format": _named(_MEMORY_FORMATS, "memory format"),
    "layout": _named(_LAYOUTS, "layout"),
    "device": _decode_device,
    "ellipsis": _decode_ellipsis,
    "slice": _decode_slice,
    "size": _decode_size,
    "tuple": _decode_tuple,
    "dict": _decode_dict,
}
