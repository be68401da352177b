"""The journal of finished units."""

from __future__ import annotations

import json
import logging
from collections import UserDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import FileFormatError
from fxmpq.journal import Journal, data_digest

RUN = {"method": "sqnr", "options": {"seed": 0}}


@given(
    st.dictionaries(
        st.text(), st.lists(st.floats(allow_nan=False, width=64), max_size=4), max_size=5
    )
)
def test_what_is_recorded_is_read_back_to_the_last_bit(units: dict[str, list[float]]) -> None:
    """Names of any characters, numbers of any size."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.journal"
        journal = Journal(path, RUN)
        for name, numbers in units.items():
            journal.record(name, numbers)
        assert Journal(path, RUN).done == units


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_line_that_was_cut_off_is_dropped_and_the_rest_kept(tmp_path: Path, cut: int) -> None:
    """As after a power failure in the middle of a write."""
    path = tmp_path / "run.journal"
    journal = Journal(path, RUN)
    journal.record("a", [1.0])
    journal.record("b", [2.0])
    path.write_text(path.read_text()[:-cut])
    again = Journal(path, RUN)
    assert again.done == {"a": [1.0]}
    again.record("b", [3.0])
    assert Journal(path, RUN).done == {"a": [1.0], "b": [3.0]}


def test_another_run_starts_anew_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The old file is set aside, and the warning names what differs."""
    path = tmp_path / "run.journal"
    Journal(path, RUN).record("a", [1.0])
    before = path.read_text()
    journal = Journal(path, {**RUN, "data": "abc", "options": {"seed": 1}})
    assert journal.done == {}
    # Nothing is touched before there is something to keep: the request may yet be refused.
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    with caplog.at_level(logging.WARNING):
        journal.record("a", [2.0])
    assert "data, options" in caplog.text
    assert (tmp_path / "run.journal.old").read_text() == before


@pytest.mark.parametrize("content", ["", "hello\n", "[1]\n", '{"schema": "fxmpq.plan"}\n'])
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    """A mistyped path must not overwrite a file."""
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(FileFormatError, match="no journal"):
        Journal(path, RUN)
    assert path.read_text() == content


def test_another_version_is_refused(tmp_path: Path) -> None:
    """Units of another version may mean something else."""
    path = tmp_path / "run.journal"
    path.write_text(json.dumps({"schema": "fxmpq.journal", "version": 99, "run": RUN}) + "\n")
    with pytest.raises(FileFormatError, match="version 99"):
        Journal(path, RUN)


def test_digests_see_values_types_shapes_and_nesting() -> None:
    """Equal data has an equal digest, and nothing else has."""
    base = [{"x": torch.tensor([1.0, 2.0]), "n": 3}]
    same = [{"x": torch.tensor([1.0, 2.0]), "n": 3}]
    others = [
        [{"x": torch.tensor([1.0, 2.5]), "n": 3}],
        [{"x": torch.tensor([1.0, 2.0]).double(), "n": 3}],
        [{"x": torch.tensor([[1.0, 2.0]]), "n": 3}],
        [{"x": torch.tensor([1.0, 2.0]), "n": 4}],
        [{"x": torch.tensor([1.0, 2.0]).bfloat16(), "n": 3}],
    ]
    assert data_digest(base) == data_digest(same)
    assert len({data_digest(batches) for batches in [base, *others]}) == 6


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b'{"schema": "fxmpq.journal", "version": 1}\n']
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    """Pictures and the like, and a journal that does not say of what."""
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="no journal"):
        Journal(path, RUN)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", ["hello", "[1]", '["a", 3]', '["a", ["b"]]', "null"])
def test_a_line_in_the_middle_that_is_no_unit_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "run.journal"
    Journal(path, RUN).record("a", [1.0])
    path.write_text(path.read_text() + line + '\n["b", [1.0]]\n')
    with pytest.raises(FileFormatError, match="a line that is no finished unit: .*Delete"):
        Journal(path, RUN)


def test_digests_see_into_mappings_that_torch_does_not_know() -> None:
    """Whose `repr` shows the corners of a large tensor only."""
    one, other = torch.zeros(2000), torch.zeros(2000)
    other[1000] = 1
    found = {data_digest([UserDict(x=x)]) for x in (one, one.clone(), other)}
    assert len(found) == 2
    assert data_digest([UserDict(x=one)]) != data_digest([UserDict(y=one)])
