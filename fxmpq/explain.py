"""Saying what is wrong with a recipe, in the recipe's own words."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fxmpq.errors import closest


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

    pydantic puts the chosen member of a union into the path, which no recipe contains.
    """
    section: type[BaseModel] | None = root
    options: tuple[type[BaseModel], ...] = ()
    names: list[str] = []
    for part in place:
        chosen = [option for option in options if _source(option) == part]
        if chosen:
            section, options = chosen[0], ()
            continue
        names.append(str(part))
        field = section.model_fields.get(str(part)) if section is not None else None
        if field is not None:
            options = _sections_in(field.annotation)
    return section, names


def _source(section: type[BaseModel]) -> str:
    (source,) = get_args(section.model_fields["source"].annotation)
    return str(source)


def _sections_in(annotation: object) -> tuple[type[BaseModel], ...]:
    if get_origin(annotation) not in (types.UnionType, Union):
        return ()
    members = get_args(annotation)
    return tuple(m for m in members if isinstance(m, type) and issubclass(m, BaseModel))
