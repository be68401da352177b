"""Dataclasses as JSON by their annotations, so that a field added to one is stored too."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import TypeVar

from fxmpq.artefact import build
from fxmpq.errors import FileFormatError
from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.granularity import Granularity, PerBlock, PerChannel, PerTensor, read_dynamic
from fxmpq.storage.values import Surroundings, decode_value, encode_value

_T = TypeVar("_T")
_SCALARS = (bool, int, float, str, type(None))
_FORMAT = re.compile(r"(?:(u?int)(\d+)|fp(\d+)_(e\dm\d))(?:(t)|b(\d+)|(dt?))?", re.ASCII)


def encode(value: object) -> object:
    """Write numbers, text, enumerations, dataclasses and containers of them as plain data.

    Args:
        value: Its type must tell how it is read back: no two classes in one place.

    Returns:
        What strict JSON can hold: formats and precisions by name, a dataclass as its fields.

    Raises:
        FileFormatError: If it holds anything else.

    Examples:
        >>> encode((Precision.parse("w4a8"), 0.5))
        ['w4a8', 0.5]
    """
    if isinstance(value, (Precision, NumberFormat)):
        return str(value) if isinstance(value, Precision) else value.name
    if isinstance(value, Enum):
        return encode(value.value)
    if isinstance(value, Mapping):
        return {str(key): encode(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(entry) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return encode_fields(value)
    if isinstance(value, _SCALARS):
        return encode_value(value)
    raise FileFormatError(f"a {type(value).__qualname__} cannot be stored: {str(value)[:80]}")


def encode_fields(value: object, leave: Collection[str] = ()) -> dict[str, object]:
    """Write a dataclass as its fields, without those to leave out."""
    assert dataclasses.is_dataclass(value)
    names = [field.name for field in dataclasses.fields(value) if field.name not in leave]
    return {name: encode(getattr(value, name)) for name in names}


def decode(kind: object, found: object, where: str) -> object:
    """Read what `encode` wrote, as a type.

    Args:
        kind: An annotation: `int`, `float`, `str`, `bool`, an enumeration, a dataclass, a format
            or precision, `tuple[...]`, `list[...]`, `dict[str, ...]`, or a union of such.
        found: As read.
        where: What it is, for the message.

    Returns:
        A value of that type.

    Raises:
        FileFormatError: If it is none.

    Examples:
        >>> decode(tuple[Precision, ...], ["w8a8"], "candidates")[0] == Precision.parse("w8a8")
        True
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, found, where)
    if origin is tuple and isinstance(found, list):
        return _tuple(arguments, found, where)
    if origin is list and isinstance(found, list):
        return [decode(arguments[0], entry, where) for entry in found]
    if origin in (dict, Mapping) and isinstance(found, dict):
        return {key: decode(arguments[1], entry, where) for key, entry in found.items()}
    if isinstance(kind, type):
        return _instance(kind, found, where)
    raise FileFormatError(f"{where} must be {kind}; found {str(found)[:80]!r}")


def decode_fields(
    kind: type[_T], found: object, where: str, others: Mapping[str, object] | None = None
) -> _T:
    """Read a dataclass from its fields; those with defaults may be missing.

    Args:
        kind: The dataclass.
        found: As read.
        where: What it is, for the message.
        others: Fields that are stored elsewhere.

    Returns:
        The instance.

    Raises:
        FileFormatError: If a field is missing, unknown or of another type, or the class refuses.
    """
    others = others or {}
    if not isinstance(found, dict):
        raise FileFormatError(f"{where} must be an object; found {str(found)[:80]!r}")
    hints = typing.get_type_hints(kind)
    assert dataclasses.is_dataclass(kind)
    known = [field.name for field in dataclasses.fields(kind) if field.name not in others]
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise FileFormatError(f"{where} has no {unknown}; it has {known}")
    values = {name: decode(hints[name], entry, f"{where}.{name}") for name, entry in found.items()}
    return build(where, kind, {**values, **others})


def _union(kinds: tuple[object, ...], found: object, where: str) -> object:
    """As the first type that fits; unions here are of types whose stored forms differ."""
    if found is None and type(None) in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not type(None)]
    for kind in others:
        with contextlib.suppress(FileFormatError):
            return decode(kind, found, where)
    return decode(last, found, where)


def _tuple(kinds: tuple[object, ...], found: list[object], where: str) -> tuple[object, ...]:
    if len(kinds) == 2 and kinds[1] is ...:
        kinds = (kinds[0],) * len(found)
    if len(kinds) != len(found):
        raise FileFormatError(f"{where} must be {len(kinds)} values; found {len(found)}")
    pairs = zip(kinds, found, strict=True)
    return tuple(decode(kind, entry, where) for kind, entry in pairs)


def _instance(kind: type, found: object, where: str) -> object:
    if kind in (Precision, NumberFormat):
        read = Precision.parse if kind is Precision else format_named
        return _read(read, found, where)
    if issubclass(kind, Enum):
        return _read(kind, found, where)
    if dataclasses.is_dataclass(kind):
        return decode_fields(kind, found, where)
    if kind is float:
        found = decode_value(found, Surroundings())
        found = float(found) if type(found) is int else found
    if kind not in _SCALARS or type(found) is not kind:
        raise FileFormatError(f"{where} must be {kind.__name__}; found {str(found)[:80]!r}")
    return found


def _read(kind: Callable[[str], object], found: object, where: str) -> object:
    try:
        return kind(str(found))
    except ValueError as error:
        raise FileFormatError(f"{where}: {error}") from error


def format_named(name: str) -> NumberFormat:
    """The format of a name, as `int4`, `uint8`, `int4b32` or `fp8_e4m3t`.

    Raises:
        FileFormatError: If there is none.

    Examples:
        >>> format_named("int4b32") == Precision.parse("w4b32").weight
        True
    """
    match = _FORMAT.fullmatch(name)
    if match is None:
        raise FileFormatError(f"there is no number format {name!r}")
    kind, bits, float_bits, scheme, whole, block, dynamic = match.groups()
    schemes = {"int": Scheme.SYMMETRIC, "uint": Scheme.AFFINE}
    granularity: Granularity = PerBlock(int(block)) if block else PerChannel()
    return NumberFormat(
        int(bits or float_bits),
        schemes[kind] if kind else Scheme(scheme),
        PerTensor() if whole else granularity,
        read_dynamic(dynamic),
    )
