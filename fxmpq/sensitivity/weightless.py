"""Groups without weights, which methods that look at weights alone cannot score."""

from __future__ import annotations

from collections.abc import Sequence

from fxmpq.errors import FxmpqError
from fxmpq.graph.state import Group


def check_all_have_weights(groups: Sequence[Group], method: str) -> None:
    """Refuse groups of products of activations that leave something to choose.

    One with a single candidate may have any value, and so is let through.

    Args:
        groups: Of the graph.
        method: That looks at weights alone, for the message.

    Raises:
        FxmpqError: Naming the first such group, and what would work.
    """
    for group in groups:
        if group.layers or len(group.candidates) < 2:
            continue
        names = ", ".join(str(candidate) for candidate in group.candidates)
        raise FxmpqError(
            f"the method {method} looks at weights alone, and group {group.name!r}, a product of "
            f"two activations, has none to choose between {names} by; prepare with one of them, as "
            f"keep={{{group.name!r}: {str(group.candidates[-1])!r}}}, or take a method that looks "
            "at the outputs, as 'projected'"
        )
