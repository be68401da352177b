"""Measured times on disk, so that nothing is measured twice under the same conditions."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fxmpq.artefact import dump_json, load_json
from fxmpq.errors import FileFormatError

SCHEMA = "fxmpq.measured_time"
VERSION = 1
VARIABLE = "FXMPQ_CACHE"
"""Names the folder of what fxmpq keeps from one run to the next."""

Key = Mapping[str, object]


def cache_folder() -> Path:
    """Where fxmpq keeps what it measured.

    Returns:
        The folder that `FXMPQ_CACHE` in the environment names, else `fxmpq` in that of
        `XDG_CACHE_HOME`, else `~/.cache/fxmpq`, and where the user has no home folder one beside
        temporary files. Deleting it loses nothing but time.

    Examples:
        >>> from unittest.mock import patch
        >>> with patch.dict("os.environ", FXMPQ_CACHE="caches"):
        ...     str(cache_folder())
        'caches'
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    if home:
        return Path(home) / "fxmpq"
    try:
        return Path.home() / ".cache" / "fxmpq"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "fxmpq"


class TimeStore:
    """Times by what was measured and under which conditions, a small JSON file each.

    A file that is damaged, or of another key, counts as missing. Where the folder cannot be
    written, nothing is kept.

    Args:
        folder: Made when the first time is kept.

    Examples:
        >>> import tempfile
        >>> store = TimeStore(Path(tempfile.mkdtemp()))
        >>> store.keep({"threads": 1}, 0.25)
        >>> store.find({"threads": 1}), store.find({"threads": 2})
        (0.25, None)
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: Key) -> float | None:
        """The time of a key, in seconds; `None` if there is none.

        Args:
            key: Plain data.
        """
        try:
            found = load_json(SCHEMA, VERSION, self._path(key))
        except FileFormatError:
            return None
        seconds = found.get("seconds")
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if found.get("key") != dict(key) or not is_number:
            return None
        assert isinstance(seconds, (int, float))
        return float(seconds) if math.isfinite(seconds) and seconds >= 0 else None

    def keep(self, key: Key, seconds: float) -> None:
        """Keep a time.

        Args:
            key: Plain data.
            seconds: The time.
        """
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            dump_json(SCHEMA, VERSION, {"key": dict(key), "seconds": seconds}, path)
        except OSError:
            return

    def _path(self, key: Key) -> Path:
        text = json.dumps(dict(key), sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
