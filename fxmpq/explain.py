"""Saying what is wrong with a file of settings, in the file's own words."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fxmpq.errors import closest

_KEY = "[key]"


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Turn pydantic's findings into a line each: where, what is wrong, and what would work.

    Args:
        error: From `root.model_validate`.
        root: The model that was to be read.

    Returns:
        Lines with the path of the key as users write it; for an unknown key the closest legal
        ones.

    Examples:
        >>> class Point(BaseModel, extra="forbid"):
        ...     width: int
        >>> try:
        ...     Point.model_validate({"width": 1, "widht": 2})
        ... except ValidationError as error:
        ...     print(explain(error, Point).strip())
        widht: there is no such key; closest: 'width'
    """
    return "\n".join(_explain(dict(problem), root) for problem in error.errors())


def _explain(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    section, names = _walk(problem["loc"], root)
    path = ".".join(names)
    if problem["type"] == "extra_forbidden":
        legal = closest(names[-1], section.model_fields) if section else "nothing"
        return f"  {path}: there is no such key; closest: {legal}"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return (
            f"  {path}.source: no source {context['tag']!r}; there are {context['expected_tags']}"
        )
    if problem["type"] == "union_tag_not_found":
        return f"  {path}.source: missing; say where it comes from, as 'embedded'"
    if problem["type"] == "missing":
        return f"  {path}: missing"
    if problem["type"] == "value_error":
        prefix = f"  {path}: " if path else "  "
        return f"{prefix}{problem['ctx']['error']}"
    return f"  {path}: {problem['msg'][:1].lower()}{problem['msg'][1:]}; found {problem['input']!r}"


def _walk(
    place: Sequence[int | str], root: type[BaseModel]
) -> tuple[type[BaseModel] | None, list[str]]:
    """The section a problem lies in, and its path as users write it.

    pydantic puts the chosen member of a union into the path, and a mark behind a key that is
    wrong itself; no file contains those.
    """
    section: type[BaseModel] | None = root
    kind: object = root
    names: list[str] = []
    for part in place:
        if part == _KEY:
            continue
        members = _members(kind)
        if members:
            kind = next((m for m in members if _is_section(m) and _source(m) == part), None)
        else:
            names.append(str(part))
            kind = _inside(kind, str(part))
        if _is_section(kind):
            section = kind
    return section, names


def _inside(kind: object, name: str) -> object:
    """What a section holds under a name, or a mapping or sequence in general; else `None`."""
    if _is_section(kind):
        field = kind.model_fields.get(name)
        return None if field is None else _plain(field.annotation)
    arguments = [argument for argument in get_args(kind) if argument is not ...]
    return _plain(arguments[-1]) if arguments else None


def _plain(annotation: object) -> object:
    """An annotation without what `Annotated` says of it, and without `None`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    members = _members(annotation)
    return _plain(members[0]) if len(members) == 1 else annotation


def _members(annotation: object) -> tuple[object, ...]:
    """The members of a union but `None`; empty for everything else."""
    if get_origin(annotation) not in (types.UnionType, Union):
        return ()
    return tuple(member for member in get_args(annotation) if member is not types.NoneType)


def _is_section(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _source(section: type[BaseModel]) -> str:
    (source,) = get_args(section.model_fields["source"].annotation)
    return str(source)
