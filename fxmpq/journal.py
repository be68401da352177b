"""A journal of finished units of work, one line each, so that an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmpq.artefact import write_atomically
from fxmpq.errors import FileFormatError

SCHEMA = "fxmpq.journal"
VERSION = 1

_LOGGER = logging.getLogger(__name__)


class Journal:
    """Numbers per finished unit, in a text file that grows by one line a unit.

    The first line says what run it belongs to. The file is read at once and touched only when
    the first unit is recorded, so that a run that is refused leaves everything as it was: then
    a file of another run is set aside as `<name>.old`, with a warning that names what differs,
    and a last line that was cut off by the interruption is dropped. Lines hold JSON; nothing in
    them is executed.

    Args:
        path: The file; made, with its folder, if it is not there.
        run: What identifies the run, as plain data: method, options, model, data.

    Raises:
        FileFormatError: If the file is there and is no journal.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "sweep.journal"
        >>> Journal(path, {"method": "sqnr"}).record("batch 0", [0.25])
        >>> Journal(path, {"method": "sqnr"}).done
        {'batch 0': [0.25]}
    """

    def __init__(self, path: str | Path, run: Mapping[str, object]) -> None:
        self.path = Path(path)
        self.done: dict[str, list[float]] = {}
        header = json.dumps({"schema": SCHEMA, "version": VERSION, "run": dict(run)})
        self._differing: list[str] = []
        self._opening: list[str] | None = [header, *self._read(json.loads(header)["run"])]

    def record(self, name: str, numbers: Sequence[float]) -> None:
        """Append a unit and wait until the disk has it.

        Args:
            name: Of the unit.
            numbers: Its result.
        """
        found = [float(number) for number in numbers]
        self._open()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, found]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[name] = found

    def _open(self) -> None:
        """Make the file ready to grow, once."""
        if self._opening is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._differing:
            aside = self.path.with_name(f"{self.path.name}.old")
            self.path.replace(aside)
            _LOGGER.warning(
                "%s belongs to another run (%s differ); it was moved to %s, and the work starts "
                "anew",
                self.path,
                ", ".join(self._differing),
                aside.name,
            )
        # Rewritten whole, so that a line cut off by an interruption is gone.
        write_atomically(self.path, "".join(f"{line}\n" for line in self._opening))
        self._opening = None

    def _read(self, run: Mapping[str, object]) -> list[str]:
        """Read the units of an earlier run of the same kind; returns their lines."""
        if not self.path.exists():
            return []
        # What is no text at all becomes a first line that is no header.
        first, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        found = self._header(first)
        if found != run:
            keys = {*found, *run}
            self._differing = sorted(key for key in keys if found.get(key) != run.get(key))
            return []
        kept = []
        for line in lines[:-1]:
            try:
                name, numbers = json.loads(line)
                self.done[str(name)] = [float(number) for number in numbers]
            except (TypeError, ValueError) as error:
                raise FileFormatError(
                    f"{self.path} holds a line that is no finished unit: {line[:80]!r}. Delete "
                    "that line to measure the unit anew, or the file to start anew"
                ) from error
            kept.append(line)
        return kept

    def _header(self, line: str) -> dict[str, object]:
        try:
            header = json.loads(line)
        except json.JSONDecodeError:
            header = None
        if (
            not isinstance(header, dict)
            or header.get("schema") != SCHEMA
            or not isinstance(header.get("run"), dict)
        ):
            raise FileFormatError(
                f"{self.path} is no journal of interrupted work; name a file that does not exist "
                "yet, or one that an interrupted run left"
            )
        if header.get("version") != VERSION:
            raise FileFormatError(
                f"{self.path} is a journal of version {header.get('version')}; this fxmpq reads "
                f"version {VERSION}. Delete it to start anew"
            )
        run: dict[str, object] = header["run"]
        return run


def data_digest(batches: Iterable[object]) -> str:
    """SHA-256 of all tensors in some batches, with their shapes and types, as hexadecimal.

    Args:
        batches: Any nesting of tensors and plain values, in mappings of any kind too.

    Examples:
        >>> import torch
        >>> data_digest([torch.zeros(2)]) == data_digest([torch.zeros(1, 2)])
        False
    """
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            values = leaf.detach().cpu().contiguous().flatten()
            digest.update(values.view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, Mapping):
            # As tokenizers return: no container to torch, and its `repr` leaves numbers out.
            digest.update(f"{list(leaf)}{data_digest(leaf.values())}".encode())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
