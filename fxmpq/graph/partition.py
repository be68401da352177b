"""Partitions: what pairs of things that belong together make of a whole."""

from __future__ import annotations

from collections.abc import Iterable


def partition(size: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The finest partition of `0 ... size - 1` that keeps every pair together.

    Args:
        size: How many things there are.
        pairs: Two things each that belong together.

    Returns:
        Classes in the order of their smallest members, each ascending.

    Examples:
        >>> partition(5, [(3, 1), (4, 3)])
        [[0], [1, 3, 4], [2]]
    """
    parent = list(range(size))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in pairs:
        first, second = sorted((root(one), root(other)))
        parent[second] = first
    classes: dict[int, list[int]] = {}
    for index in range(size):
        classes.setdefault(root(index), []).append(index)
    return list(classes.values())
