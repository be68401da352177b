"""Saving results as JSON that a person can read and edit, and reading it back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from fxmpq.errors import FileFormatError

_T = TypeVar("_T")


def dump_json(
    schema: str, version: int, fields: Mapping[str, object], path: str | Path | None = None
) -> str:
    """Write fields as strict JSON under a schema name and version.

    Args:
        schema: What the file holds, as `fxmpq.plan`.
        version: Of the schema.
        fields: Plain data.
        path: File to write; it is replaced in one move, so a failure loses nothing.

    Returns:
        The JSON text.

    Raises:
        FileFormatError: If a value is not plain data or not finite.
    """
    try:
        text = json.dumps(
            {"schema": schema, "version": version, **fields}, indent=1, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"cannot write {schema} as JSON: {error}") from error
    if path is not None:
        write_atomically(Path(path), text)
    return text


def load_json(schema: str, version: int, source: str | Path) -> dict[str, object]:
    """Read fields back, checking schema and version.

    Args:
        schema: Expected schema name.
        version: Expected version.
        source: A path, or the JSON text itself.

    Returns:
        The fields.

    Raises:
        FileFormatError: If the file is missing, is no JSON, or holds something else.
    """
    text = _read(schema, source)
    try:
        found = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"expected {schema} as JSON: {error}") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"expected {schema} as a JSON object; found {type(found).__name__}")
    found_schema = found.pop("schema", None)
    if found_schema != schema:
        raise FileFormatError(f"expected the schema {schema!r}; found {found_schema!r}")
    found_version = found.pop("version", None)
    if found_version != version:
        raise FileFormatError(
            f"expected version {version} of {schema}; found {found_version!r}. "
            "Make the file again with this version of fxmpq."
        )
    return found


def check_fields(
    schema: str, found: Mapping[str, object], required: set[str], optional: set[str]
) -> None:
    """Refuse missing and unknown fields.

    Raises:
        FileFormatError: Naming them.
    """
    missing = sorted(required - set(found))
    unknown = sorted(set(found) - required - optional)
    if missing or unknown:
        raise FileFormatError(
            f"{schema}: missing fields {missing}, unknown fields {unknown}; it has the fields "
            f"{sorted(required | optional)}"
        )


def build(schema: str, kind: Callable[..., _T], found: Mapping[str, object]) -> _T:
    """Make what a file describes, by keyword.

    Args:
        schema: What the file holds.
        kind: The class to make.
        found: Its arguments, as read.

    Returns:
        The instance.

    Raises:
        FileFormatError: If the class refuses the content.
    """
    try:
        return kind(**found)
    except (AttributeError, TypeError, ValueError) as error:
        raise FileFormatError(f"{schema}: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f"{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(schema: str, source: str | Path) -> str:
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FileFormatError(f"cannot read {schema} from {str(source)!r}: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON has")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a float")
    return number
