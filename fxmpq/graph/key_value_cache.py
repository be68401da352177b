"""Decoders' caches of keys and values: switched off while a model is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Have transformers' decoders return no cache of keys and values, for the time of an export.

    By their configuration (`use_cache`) they return one with every call that names none, in a
    class of its own that no graph can return. The settings are restored on leaving.

    Args:
        model: Any module; a configuration is looked for at every module in it, since a model of
            several parts has several.

    Examples:
        >>> from types import SimpleNamespace
        >>> model = nn.Linear(2, 2)
        >>> model.config = SimpleNamespace(use_cache=True)
        >>> with without_cache(model):
        ...     print(model.config.use_cache)
        False
        >>> model.config.use_cache
        True
    """
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    # Many modules hold the same configuration.
    caching = {id(entry): entry for entry in found if getattr(entry, "use_cache", None) is True}
    try:
        for entry in caching.values():
            entry.use_cache = False
        yield
    finally:
        for entry in caching.values():
            entry.use_cache = True
