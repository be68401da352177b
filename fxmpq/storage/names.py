"""Names in files: what may become a name in a graph, whose code torch.fx writes and compiles."""

from __future__ import annotations

import keyword
import re

from torch import fx, nn

from fxmpq.errors import FileFormatError

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ :+@#/-]*", re.ASCII)
_TAKEN = frozenset(dir(nn.Module())) | frozenset(dir(fx.GraphModule))


def identifier(found: object, what: str) -> str:
    """Check that a name may stand in generated code as a variable or an argument.

    Args:
        found: As read.
        what: What it names, for the message.

    Returns:
        The name.

    Raises:
        FileFormatError: If it is no ASCII identifier, or a keyword.

    Examples:
        >>> identifier("input_ids", "an argument")
        'input_ids'
    """
    if not isinstance(found, str) or not _IDENTIFIER.fullmatch(found) or keyword.iskeyword(found):
        raise FileFormatError(f"{what} must be named by an identifier; found {found!r}")
    return found


def qualified(found: object, what: str) -> str:
    """Check that a name may be the path of a tensor or module, as `encoder.layer.0.weight`.

    torch.fx writes such names into code between quotes, so that no quote, backslash or line
    break may be in them; and none may hide an attribute that modules have.

    Args:
        found: As read.
        what: What it names, for the message.

    Returns:
        The name.

    Raises:
        FileFormatError: If a part is empty, holds other characters than letters, digits and
            `_ :+@#/-`, starts with two underscores, or is an attribute of every module.

    Examples:
        >>> qualified("encoder.layer.0.weight", "a tensor")
        'encoder.layer.0.weight'
    """
    if not isinstance(found, str):
        raise FileFormatError(f"{what} must have a name; found {found!r}")
    for part in found.split("."):
        if not _PART.fullmatch(part) or part.startswith("__") or part in _TAKEN:
            raise FileFormatError(
                f"{what} cannot be named {found!r}: {part!r} is no part of such a name; parts are "
                "letters, digits and _ :+@#/-, begin with no two underscores, and are no "
                "attributes of every module"
            )
    return found
